"""Learning rates by update: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math

import optax

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(lr: float, *, steps: int, warmup: float, schedule: str) -> optax.Schedule:
  """update -> learning rate: linear over the first `warmup` share of steps, then as `schedule` says."""
  if schedule not in SCHEDULES:
    raise ValueError(f"schedule={schedule!r}: known are {', '.join(SCHEDULES)}")
  if not 0 <= lr < math.inf:
    raise ValueError(f"lr={lr}: write a finite number of at least 0")
  if not 0 <= warmup <= 1:
    raise ValueError(f"warmup={warmup}: a share of the steps, from 0 to 1")
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
