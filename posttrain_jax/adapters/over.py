"""An adapter over others that are frozen: W changed by the lowest first, then by the one over it.

In files it is one adapter of the original base where that is exact: low-rank updates add up, ranks side by side.  Where
it is not (DoRA, (IA)3, VeRA, a soft prompt), its folder has what it stands on in a folder `under`, and no name of a
base: nothing but the base with that adapter is what it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from posttrain_jax.adapters import combine, peft_format
from posttrain_jax.adapters.bind import bind
from posttrain_jax.adapters.combination import AnyConfig, parts_of
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.lora import LoRA
from posttrain_jax.adapters.replaced import Replaced
from posttrain_jax.core import tree
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig

Level = tuple[Any, AnyConfig]  # an adapter and its config


def load(folder: str | Path, params: Any, model_config: ModelConfig) -> tuple[Level, ...]:
  """The adapters of a folder, lowest first: those that it stands on, and its own last.

  Raises:
    FileNotFoundError, ValueError: as `peft_format.load`.
  """
  home = peft_format.locate(Path(folder))
  below = home / peft_format.UNDER
  levels = load(below, params, model_config) if below.is_dir() else ()
  return (*levels, peft_format.load(home, bound(params, levels), model_config))


def shapes(folder: str | Path, model_config: ModelConfig) -> tuple[Level, ...]:
  """`load` without a base: the arrays of the adapters are shapes."""
  configs: list[AnyConfig] = []

  def read(params: Any) -> list[Any]:
    levels = load(folder, params, model_config)
    configs.extend(config for _, config in levels)
    return [adapter for adapter, _ in levels]

  return tuple(zip(jax.eval_shape(read, decoder.abstract(model_config)), configs))


def bound(params: Any, levels: Sequence[Level]) -> Any:
  """The base with every one of them bound, one over the other."""
  for adapter, _ in levels:
    params = bind(params, adapter)
  return params


def save(
  folder: str | Path,
  levels: Sequence[Level],
  model_config: ModelConfig,
  *,
  base_name: str | None = None,
  finish: Callable[[Path], None] = lambda folder: None,
) -> None:
  """The folder of the last adapter over the others: one adapter of the base where it can be, else `under` beside it."""
  *below, (adapter, config) = levels
  alone = (adapter, config) if not below else combined(levels)
  if alone is not None:
    peft_format.save(folder, *alone, model_config, base_name=base_name, finish=finish)
    return

  def with_its_base(new: Path) -> None:
    save(new / peft_format.UNDER, below, model_config, base_name=base_name)
    finish(new)

  peft_format.save(folder, adapter, config, model_config, finish=with_its_base)


def adds_up(levels: Sequence[Level]) -> bool:
  """Whether all of them together are one adapter of the base: low-rank updates, and what was trained whole on top."""
  configs = [part for _, config in levels for part in parts_of(config)]
  if any(config.context_length or config.attention_group for config in configs):
    return False
  whole: set[str] = set()
  low_rank: set[str] = set()
  for adapter, _ in levels:
    for path, node in tree.items(adapter):
      if isinstance(node, Replaced) and node.mask is None:
        whole.add(path)
      elif type(node) is LoRA and path not in whole:
        low_rank.add(path)
      else:
        return False
  return bool(low_rank - whole)


def combined(levels: Sequence[Level]) -> tuple[Any, AdapterConfig] | None:
  """(adapter, config) of the original base that computes what all of them do; None where no LoRA does exactly that.

  x @ W + s1 (x @ a1) @ b1 + s2 (x @ a2) @ b2 has the factors [s1 a1, s2 a2] and [b1; b2] at a scale of 1.
  What was trained whole stands over what was below it.
  """
  if not adds_up(levels):
    return None
  configs = [part for _, config in levels for part in parts_of(config)]
  kept = {p: n for nodes, _ in levels for p, n in tree.items(nodes) if isinstance(n, Replaced)}
  low_rank = [
    tree.unflatten((path, node) for path, node in tree.items(nodes) if path not in kept)
    for nodes, _ in levels
  ]
  adapter, config = combine.concatenate([nodes for nodes in low_rank if nodes])
  saved = dict.fromkeys(name for part in configs for name in part.modules_to_save)
  config = config.replace(
    modules_to_save=tuple(saved), lora_dropout=parts_of(levels[-1][1])[-1].lora_dropout
  )
  return tree.unflatten({**tree.flatten(adapter), **kept}), config
