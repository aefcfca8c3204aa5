"""config.optimizer: the chain of transformations, its schedule, and what lives in host memory."""

from __future__ import annotations

import ml_collections
import optax

from posttrain_jax.core import tree
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.optim import chain


def make(
  config: ml_collections.ConfigDict, model: ModelConfig
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  o = config.optimizer
  return chain.chain(
    o.name,
    lr=o.lr,
    steps=config.steps,
    warmup=o.warmup,
    schedule=o.schedule,
    weight_decay=o.weight_decay,
    clip=o.clip or None,
    b1=o.b1,
    b2=o.b2,
    eps=o.eps,
    rank=o.rank,
    update_gap=o.update_gap,
    scale=o.scale,
    projection=o.projection,
    target=o.target,
    embeddings_in_float32=o.embeddings_in_float32,
    loraplus_lr_ratio=o.loraplus_lr_ratio or None,
    loraplus_lr_embedding=o.loraplus_lr_embedding,
    offloaded=o.offload != "none",
    axes={path: spec.axes for path, spec in tree.items(decoder.specs(model))},
    head_dim=model.head_dim,
  )
