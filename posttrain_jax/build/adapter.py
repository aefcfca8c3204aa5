"""config.adapter: which method adapts the base, and the trees that a run starts with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import layout
from posttrain_jax.adapters.adalora import AdaLoRA
from posttrain_jax.adapters.node import Change
from posttrain_jax.build import critic, decisions
from posttrain_jax.core import memory, tree
from posttrain_jax.data import templates
from posttrain_jax.models import hf
from posttrain_jax.objectives import Context, of_policy

if TYPE_CHECKING:
  from posttrain_jax.build.model import Model


def described(config: ml_collections.ConfigDict) -> adapters.AnyConfig | None:
  """The config of config.adapter; None for full fine-tuning."""
  whole = ("score",) if decisions.has_score(config) else ()
  with settings.section("adapter"):
    return adapters.from_section(config.adapter.to_dict(), whole=whole, steps=config.steps)


def slots(adapter_config: adapters.AnyConfig) -> int:
  """How many positions of the model stand before every text: a soft prompt, a prefix."""
  parts = adapters.parts_of(adapter_config)
  return sum(part.num_virtual_tokens for part in parts if not part.in_weights)


@dataclasses.dataclass(frozen=True)
class Trees:
  """What a run starts with: what the optimizer updates, what the state carries beside it, and what never changes."""

  trainable: Any
  carried: Any  # the fixed part of the adapter; None without one
  context: Context
  adapter_config: adapters.AnyConfig | None

  @property
  def adapter(self) -> Any:
    """The policy's whole adapter, trained and fixed fields together."""
    return tree.combine(of_policy(self.trainable), of_policy(self.carried))


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
    trained = critic.beside(config, model.params, model.config, mesh)
    return Trees(trained, None, Context(reference=reference), None)
  text = adapter_config.prompt_tuning_init_text
  ids = None if text is None else templates.opening(model.tokenizer, text)
  if ids is not None and max(ids, default=0) >= model.config.vocab_size:
    raise settings.ConfigError(
      f"adapter.prompt_tuning_init_text: token {max(ids)} is beyond the model's embedding of {model.config.vocab_size}"
    )
  params, adapter = adapters.init(
    jax.random.key(config.seed),
    model.params,
    adapter_config,
    started=None if model.started is None else model.started.nodes,
    text_tokens=ids,
    model=model.config,
  )
  compared_with = None
  if model.earlier is not None and model.earlier.goes_on is not None:
    earlier, _ = model.earlier.goes_on
    adapter = _goes_on(adapter, earlier)
    if decisions.compares_with_start(config):
      compared_with = jax.tree.map(jnp.copy, earlier)  # what trains is donated from step to step
  laid_out = critic.beside(config, layout.laid_out(adapter, mesh), model.config, mesh)
  trainable, carried = tree.partition(laid_out)
  if decisions.trained_on_host(config):
    trainable = layout.hosted(trainable)
  return Trees(
    trainable,
    carried,
    Context(params, reference=reference, reference_adapter=compared_with),
    adapter_config.for_layers(model.config.num_layers),
  )


def _goes_on(fresh: Any, earlier: Any) -> Any:
  """The adapter that was trained before in the place of a fresh one; what that has beside it stays fresh.

  Dropout is that of the fresh one: it is of the training.
  """
  new, old = tree.flatten(fresh), tree.flatten(earlier)
  if unknown := sorted(old.keys() - new.keys()):
    raise settings.ConfigError(
      f"model.adapter: it adapts {unknown[0]}, which config.adapter does not"
    )
  nodes = dict(new)
  for path, node in old.items():
    if isinstance(node, Change) and node.dropout != new[path].dropout:
      node = dataclasses.replace(node, dropout=new[path].dropout)
    if isinstance(
      node, AdaLoRA
    ):  # what it remembers of its gradients is in no file: its schedule begins anew
      begun = new[path]
      node = dataclasses.replace(node, importance=begun.importance, uncertainty=begun.uncertainty)
    nodes[path] = node
  return tree.unflatten(nodes)


def resumed(
  model: Model,
  context: Context,
  nodes: Mapping[str, Any],
  mesh: jax.sharding.Mesh | None,
) -> Context:
  """The context with the base that a checkpoint's nodes, {path: node}, were made beside."""
  if model.started is None or model.started.agrees(nodes):
    return context
  on_host = memory.any_on_host(context.base)
  place = functools.partial(layout.place, mesh=mesh, on_host=on_host)
  params, _ = hf.load(
    model.folder, dtype=model.products, storage="dense", place=model.started.resume(nodes, place)
  )
  return dataclasses.replace(context, base=params)
