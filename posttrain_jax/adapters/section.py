"""From the section of a run's config that describes its adapter, a plain dict, to the config of the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.adapters.combination import AnyConfig, together
from posttrain_jax.adapters.config import WHOLE, AdapterConfig


def from_section(
  section: Mapping[str, Any], *, whole: Sequence[str] = (), steps: int | None = None
) -> AnyConfig | None:
  """The config that a run's section describes; None for method "none", full fine-tuning.

  {"method": "lora", "r": 8} holds a method's options.  {"method": "prompt+lora", "prompt": {...}, "lora": {...}} holds
  those of each part under its name.  What such files write differently from AdapterConfig: "uniform" for the default
  start of LoRA, "" and () for what is not set.

  >>> from_section({"method": "prompt+lora", "prompt": {}, "lora": {"r": 4}}).parts[1].r
  4

  Args:
    whole: names that train whole beside what the section says, such as a new head; the first part has them.
    steps: updates of the run, with which AdaLoRA's schedule ends where it does not say.
  """
  methods = str(section["method"]).split("+")
  if methods == ["none"]:
    return None
  options = dict(section)
  del options["method"]
  if len(methods) == 1:
    return _from_options(methods[0], options, whole, steps)
  if unknown := sorted(set(options) ^ set(methods)):
    raise ValueError(
      f"method={section['method']!r} goes with one section for each of {', '.join(methods)}; found "
      f"{', '.join(options) or 'none'}, which differs in {', '.join(unknown)}"
    )
  first = lambda i: whole if i == 0 else ()
  return together(
    [_from_options(name, options[name], first(i), steps) for i, name in enumerate(methods)]
  )


def _from_options(
  method: str, options: Mapping[str, Any], whole: Sequence[str], steps: int | None
) -> AdapterConfig:
  fields = {name: _option(name, value) for name, value in options.items()}
  if whole:
    fields[WHOLE] = tuple(dict.fromkeys([*fields.get(WHOLE, ()), *whole]))
  if method == "adalora":  # its file says when its schedule ends
    fields.setdefault("total_step", steps)
  return AdapterConfig(method=method, **fields)


def _option(name: str, value: Any) -> Any:
  if name == "init_lora_weights" and value == "uniform":
    return True
  return None if name in ("layers_to_transform", "prompt_tuning_init_text") and not value else value
