"""config.optimizer: the chain of transformations, its schedule, and what lives in host memory."""

from __future__ import annotations

import ml_collections
import optax

from posttrain_jax.core import tree
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.optim import chain

ELSEWHERE = (
  "name",
  "clip",
  "loraplus_lr_ratio",
  "offload",
)  # which reach the chain in another form


def rate(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
  """update -> learning rate, in a run of so many steps."""
  o = config.optimizer
  return chain.learning_rate(o.lr, steps=steps, warmup=o.warmup, schedule=o.schedule)


def make(
  config: ml_collections.ConfigDict, model: ModelConfig
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  own = {field: value for field, value in config.optimizer.items() if field not in ELSEWHERE}
  return chain.chain(
    config.optimizer.name,
    steps=config.steps,
    clip=config.optimizer.clip or None,
    loraplus_lr_ratio=config.optimizer.loraplus_lr_ratio or None,
    offloaded=config.optimizer.offload != "none",
    axes={path: spec.axes for path, spec in tree.items(decoder.specs(model))},
    head_dim=model.head_dim,
    **own,
  )
