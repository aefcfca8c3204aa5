"""config.objective.reference: the reference policy's parameters, or its log-probabilities computed once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from posttrain_jax import adapters
from posttrain_jax.adapters import layout, over, peft_format
from posttrain_jax.build import decisions, earlier_adapter
from posttrain_jax.build.data import Data
from posttrain_jax.build.model import Model
from posttrain_jax.core import tree
from posttrain_jax.models import fetch, hf
from posttrain_jax.objectives import Scorer, reference_cache
from posttrain_jax.settings import ConfigError

# fields of a model's config that change no log-probability
SAYS_NOTHING = (
  "family",
  "max_length",
  "bos_token_id",
  "eos_token_ids",
  "pad_token_id",
  "part_of",
  "source",
)


def is_in_step(config: ml_collections.ConfigDict) -> bool:
  """Whether each step computes the reference's log-probabilities, of parameters that stay."""
  beforehand = decisions.caches_reference(config) or decisions.follows(config)
  return decisions.has_reference(config) and not beforehand


def is_adapter(name: str) -> bool:
  """Whether config.objective.reference is the folder of an adapter on the base."""
  return (Path(name).expanduser() / peft_format.CONFIG).exists()


def in_step(config: ml_collections.ConfigDict, model: Model, mesh: jax.sharding.Mesh | None) -> Any:
  """The parameters that a step compares with, where they are not the base under the adapter; else None."""
  if not is_in_step(config):
    return None
  is_base = decisions.compares_with_base(config)
  if decisions.is_full(config) and (is_base or is_adapter(config.objective.reference)):
    # what trains is donated from step to step
    copied = jax.tree.map(jnp.copy, model.params)
    model = dataclasses.replace(model, params=copied, bare=copied)
  elif is_base:
    return None
  return params(config, model, mesh)


def params(config: ml_collections.ConfigDict, model: Model, mesh: jax.sharding.Mesh | None) -> Any:
  """The parameters of config.objective.reference: the base, the base with an adapter folder, or another model.

  The base is the policy that the run starts as: with the adapter of config.model.adapter, if there is one.
  """
  name, base = config.objective.reference, model.plain
  if model.started is not None:  # what a start took out of the base is the reference's again
    # copies: what the adapter carries of its start is donated from step to step
    started = jax.tree.map(jnp.copy, tree.unflatten(model.started.nodes.items()))
    base = adapters.original(base, layout.laid_out(started, mesh))
  if name == "base":
    return earlier_adapter.policy(config, base, model.config, mesh)
  if is_adapter(name):
    levels = over.load(Path(name).expanduser(), model.plain, model.config)
    placed = [(layout.laid_out(nodes, mesh), described) for nodes, described in levels]
    return over.bound(base, placed)
  place = functools.partial(layout.place, mesh=mesh)
  storage = config.objective.reference_base
  other, _ = hf.load(fetch.resolve(name), dtype=model.products, storage=storage, place=place)
  return other


def check(config: ml_collections.ConfigDict, model: Model) -> None:
  """Raises where config.objective.reference is no policy to compare with, before anything is written.

  Raises:
    ConfigError: nothing is there, or a model of another vocabulary or shape, or one that computes otherwise.
  """
  name = config.objective.reference
  if name == "base" or is_adapter(name):
    return
  try:
    other_config = hf.read_config(fetch.resolve(name))
  except (OSError, ValueError) as error:
    raise ConfigError(f"objective.reference={name}: {error}") from error
  if other_config.vocab_size != model.config.vocab_size:
    raise ConfigError(
      f"objective.reference={name}: its vocabulary has {other_config.vocab_size} tokens, the model's"
      f" {model.config.vocab_size}; a reference scores the same tokens"
    )
  shape = lambda c: (c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim)
  if shape(other_config) != shape(model.config):
    raise ConfigError(
      f"objective.reference={name}: it is of another shape than the model; the reference is a policy of the same family"
    )
  other, own = (dataclasses.asdict(c) for c in (other_config, model.config))
  if unlike := [field for field in own if field not in SAYS_NOTHING and other[field] != own[field]]:
    shown = ", ".join(f"{field} {other[field]} for {own[field]}" for field in unlike)
    raise ConfigError(
      f"objective.reference={name}: it computes otherwise than the model ({shown}), and a step computes both alike; the"
      " reference is a policy of the same family"
    )


def scored(
  config: ml_collections.ConfigDict,
  model: Model,
  data: Data,
  objective: Scorer,
  mesh: jax.sharding.Mesh | None,
  say: Callable[[str], None],
) -> Data:
  """data with the reference's log-probabilities, where they are to be computed once."""
  if not objective.needs_reference or not decisions.caches_reference(config):
    return data
  score = functools.partial(
    reference_cache.scored,
    scorer=objective,
    params=params(config, model, mesh),
    cache=fetch.cache() / "reference",
    length=config.data.length if config.data.packing else None,
    mesh=mesh,
    say=say,
  )
  return data.map(score)


def blank(
  config: ml_collections.ConfigDict, batch: Mapping[str, Any], objective: Scorer
) -> Mapping[str, Any]:
  """A batch of the shapes that `scored` gives, for a program that is compiled and not run."""
  if not (objective.needs_reference and decisions.caches_reference(config)):
    return batch
  filled = {**batch, "ref_logps": np.zeros(batch["tokens"].shape, np.float32)}
  if "companion" in batch:
    filled["companion"] = blank(config, batch["companion"], objective)
  return filled
