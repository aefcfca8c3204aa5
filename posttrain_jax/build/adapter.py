"""config.adapter: which method adapts the base, and the trees that a run starts with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import ml_collections

from posttrain_jax import adapters
from posttrain_jax.build import decisions, layout
from posttrain_jax.core import tree
from posttrain_jax.models import hf
from posttrain_jax.objectives import Context
from posttrain_jax.settings import ConfigError

if TYPE_CHECKING:
  from posttrain_jax.build.model import Model


def described(config: ml_collections.ConfigDict) -> adapters.AdapterConfig | None:
  """The AdapterConfig of config.adapter; None for full fine-tuning."""
  fields = {name: _option(name, value) for name, value in config.adapter.items()}
  if decisions.is_full(config):
    return None
  if decisions.has_score(config):
    if "modules_to_save" not in fields:
      raise ConfigError(
        f"adapter={fields['method']}: a reward model trains its score head whole, for which this method has no place;"
        " write adapter=lora or another of its kind"
      )
    fields["modules_to_save"] = (*fields["modules_to_save"], "score")
  if fields["method"] == "adalora":  # its schedule ends with the run, and its file says when
    fields.setdefault("total_step", config.steps)
  return adapters.AdapterConfig(**fields)


def _option(name: str, value: Any) -> Any:
  """A config field as AdapterConfig takes it."""
  if isinstance(value, ml_collections.ConfigDict):
    return value.to_dict()
  if name == "init_lora_weights":
    return True if value == "uniform" else value
  return None if name in ("layers_to_transform", "prompt_tuning_init_text") and not value else value


@dataclasses.dataclass(frozen=True)
class Trees:
  """What a run starts with: what the optimizer updates, what the state carries beside it, and what never changes."""

  trainable: Any
  carried: Any  # the fixed part of the adapter; None without one
  context: Context
  adapter_config: adapters.AdapterConfig | None

  @property
  def adapter(self) -> Any:
    """The whole adapter, trained and fixed fields together."""
    return tree.combine(self.trainable, self.carried)


def make(
  config: ml_collections.ConfigDict,
  model: Model,
  reference: Any,
  mesh: jax.sharding.Mesh | None,
) -> Trees:
  """The trees of a run's first step.

  Args:
    reference: parameters of the reference policy, where they are not the base's.
  """
  adapter_config = described(config)
  if adapter_config is None:
    return Trees(model.params, None, Context(reference=reference), None)
  text = adapter_config.prompt_tuning_init_text
  params, adapter = adapters.init(
    jax.random.key(config.seed),
    model.params,
    adapter_config,
    started=None if model.started is None else model.started.nodes,
    text_tokens=None if text is None else model.tokenizer(text)["input_ids"],
    model=model.config,
  )
  trainable, carried = tree.partition(layout.placed_adapter(adapter, mesh))
  return Trees(
    trainable,
    carried,
    Context(params, reference=reference),
    adapter_config.for_layers(model.config.num_layers),
  )


def resumed(
  model: Model,
  context: Context,
  nodes: Mapping[str, Any],
  mesh: jax.sharding.Mesh | None,
) -> Context:
  """The context with the base that a checkpoint's nodes, {path: node}, were made beside."""
  if model.started is None or model.started.agrees(nodes):
    return context
  place = functools.partial(layout.place, mesh=mesh)
  params, _ = hf.load(
    model.folder, dtype=model.dtype, storage="dense", place=model.started.resume(nodes, place)
  )
  return dataclasses.replace(context, base=params)


def starts_as_its_base(adapter_config: adapters.AdapterConfig | None) -> bool:
  """Whether a fresh adapter leaves what training computes as it was; full fine-tuning starts there, too."""
  return adapter_config is None or not (
    adapter_config.lora_dropout
    or adapter_config.attention_group
    or adapter_config.method in ("prompt", "prefix")
  )
