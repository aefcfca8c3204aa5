"""Optimizers as optax chains, by name: clip, adapt, decay, step."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "linear", "cosine")


def build(
  name: str,
  *,
  lr: float,
  steps: int,
  warmup: float = 0.0,
  schedule: str = "cosine",
  weight_decay: float = 0.0,
  clip: float | None = 1.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """(transformation, schedule).

  Args:
    name: adamw, adafactor, lion or sgd: optax's own.
    lr: peak learning rate.
    steps: optimizer updates in the run.
    warmup: share of steps over which the rate rises linearly from 0.
    schedule: what follows: constant, or linear or cosine to 0.
    weight_decay: decoupled, on matrices only (adapters' factors are matrices; norms and biases are not).
    clip: largest global norm of the gradient; None for no clipping.
  """
  rate = learning_rate(lr, steps=steps, warmup=warmup, schedule=schedule)
  mask = matrices if weight_decay else None
  optimizers = {
    "adamw": lambda: optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask),
    "adafactor": lambda: optax.adafactor(
      rate, weight_decay_rate=weight_decay or None, weight_decay_mask=matrices
    ),
    "lion": lambda: optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask),
    "sgd": lambda: optax.chain(
      optax.add_decayed_weights(weight_decay, matrices), optax.sgd(rate, momentum=b1)
    ),
  }
  if name not in optimizers:
    raise ValueError(f"optimizer.name={name!r}: known are {', '.join(optimizers)}")
  chain = [optax.clip_by_global_norm(clip)] if clip else []
  return optax.chain(*chain, optimizers[name]()), rate


def learning_rate(lr: float, *, steps: int, warmup: float, schedule: str) -> optax.Schedule:
  """update -> learning rate: linear over the first `warmup` share of steps, then as `schedule` says."""
  if schedule not in SCHEDULES:
    raise ValueError(f"optimizer.schedule={schedule!r}: known are {', '.join(SCHEDULES)}")
  if not 0 <= lr < math.inf:
    raise ValueError(f"optimizer.lr={lr}: write a finite number of at least 0")
  if not 0 <= warmup <= 1:
    raise ValueError(f"optimizer.warmup={warmup}: a share of the steps, from 0 to 1")
  rising = round(warmup * steps)
  falling = max(steps - rising, 1)
  after = {
    "constant": lambda: optax.constant_schedule(lr),
    "linear": lambda: optax.linear_schedule(lr, 0.0, falling),
    "cosine": lambda: optax.cosine_decay_schedule(lr, falling),
  }[schedule]()
  if not rising:
    return after
  # the first update is not wasted on a rate of 0
  return optax.join_schedules(
    [optax.linear_schedule(lr / rising, lr, rising - 1 or 1), after], [rising]
  )


def matrices(params: Any) -> Any:
  """True for leaves that weight decay applies to: those with two axes or more besides the stacked layers'."""

  def decays(path, leaf):
    stacked = getattr(path[0], "key", None) == "layers"
    return jnp.ndim(leaf) - stacked >= 2

  return jax.tree_util.tree_map_with_path(decays, params)
