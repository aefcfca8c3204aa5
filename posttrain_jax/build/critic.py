"""config.critic: what says how good a text is so far, beside a policy that it teaches (PPO)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from posttrain_jax import objectives
from posttrain_jax.adapters import layout
from posttrain_jax.core import tree
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.objectives import ActorCritic, Scorer
from posttrain_jax.objectives.critic import HEAD

Config = ml_collections.ConfigDict


def has(config: Config) -> bool:
  """Whether the run trains a critic beside its policy."""
  return "critic" in config


def beside(config: Config, trained: Any, model: ModelConfig, mesh: jax.sharding.Mesh | None) -> Any:
  """What trains, laid out, with the critic's branch: a head of zeros, over a copy of the rest or over its own.

  Every value is 0 at the start, and the critic's trunk is the policy's as it begins.
  """
  if not has(config):
    return trained
  head = layout.place(f"{HEAD}/weight", jnp.zeros((model.hidden_size, 1)), mesh=mesh)
  trunk: dict[str, Any] = {}
  if config.critic.trunk == "own":
    trunk = jax.tree.map(jnp.copy, _trunk(trained))
  return {**trained, objectives.CRITIC: {**trunk, HEAD: {"weight": head}}}


def abstract(config: Config, trained: Any, model: ModelConfig, placed: Any) -> Any:
  """`beside` of shapes.

  Args:
    placed: shapes -> shapes on their devices.
  """
  if not has(config):
    return trained
  shape = jax.ShapeDtypeStruct((model.hidden_size, 1), jnp.float32)
  head = placed({HEAD: {"weight": shape}})
  trunk = _trunk(trained) if config.critic.trunk == "own" else {}
  return {**trained, objectives.CRITIC: {**trunk, **head}}


def _trunk(trained: Any) -> Any:
  """Without the head that writes: nothing of a critic reads it."""
  return tree.without(trained, "lm_head")


def beside_actor(
  config: Config, actor: Scorer, how: Mapping[str, Any], *, as_it_scores: bool
) -> ActorCritic:
  """The objective of both; as_it_scores: whether a training step computes what a measurement does."""
  c = config.critic
  return ActorCritic(
    actor.model,
    part=actor,
    trunk=c.trunk,
    weight=float(c.weight),
    epsilon=c.epsilon,
    values_as_it_scores=as_it_scores,
    **how,
  )


def told(config: Config, trainable: Any) -> str:
  """A sentence on the critic that a run trains."""
  c, count = config.critic, sum(x.size for x in jax.tree.leaves(trainable[objectives.CRITIC]))
  of = "a trunk of its own" if c.trunk == "own" else "the policy's trunk"
  waits = f"; it learns alone for the first {c.warmup} updates" if c.warmup else ""
  if c.warmup >= config.steps:
    waits += f", and the run has {config.steps}: the policy stays as it is; lower critic.warmup or raise steps"
  return f"critic: a score head on {of}, {count:,} parameters, learning rate {c.lr:g}{waits}"
