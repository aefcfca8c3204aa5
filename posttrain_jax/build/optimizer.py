"""config.optimizer: the chain of transformations, its schedule, and what lives in host memory."""

from __future__ import annotations

from typing import Any

import ml_collections
import optax

from posttrain_jax.build import critic
from posttrain_jax.core import tree
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.objectives import CRITIC
from posttrain_jax.optim import branch, chain, schedules

ELSEWHERE = (
  "name",
  "clip",
  "loraplus_lr_ratio",
  "offload",
)  # which reach the chain in another form


def rate(config: ml_collections.ConfigDict, steps: int, done: int) -> float:
  """The learning rate of the step that follows `done` others, in a run of so many."""
  o = config.optimizer
  schedule: Any = schedules.learning_rate(o.lr, steps=steps, warmup=o.warmup, schedule=o.schedule)
  return float(schedule(done))


def make(
  config: ml_collections.ConfigDict, model: ModelConfig
) -> tuple[optax.GradientTransformation, schedules.Rate]:
  """The optimizer of what trains; a critic has one of its own, at its own rate."""
  own = {field: value for field, value in config.optimizer.items() if field not in ELSEWHERE}

  def at(**fields: Any) -> tuple[optax.GradientTransformation, schedules.Rate]:
    return chain.chain(
      config.optimizer.name,
      steps=config.steps,
      clip=config.optimizer.clip or None,
      offloaded=config.optimizer.offload != "none",
      axes={path: spec.axes for path, spec in tree.items(decoder.specs(model))},
      head_dim=model.head_dim,
      **{**own, **fields},
    )

  updates, rate = at(loraplus_lr_ratio=config.optimizer.loraplus_lr_ratio or None)
  if not critic.has(config):
    return updates, rate
  others, _ = at(lr=config.critic.lr)
  return branch.apart(updates, others, name=CRITIC, wait=config.critic.warmup), rate
