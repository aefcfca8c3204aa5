"""Learning rates by update: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from typing import Any

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


class Rate:
  """A schedule whose value may be given to a program, so that its numbers are none of the program's constants.

  >>> rate = Rate(lambda count: 0.5 * count)
  >>> with rate.given(3.0):
  ...   rate(1)
  3.0
  >>> rate(1)
  0.5
  """

  def __init__(self, schedule: optax.Schedule):
    self._schedule, self._given = schedule, None

  def __call__(self, count: Any) -> Any:
    return self._schedule(count) if self._given is None else self._given

  @contextlib.contextmanager
  def given(self, value: Any) -> Generator[None]:
    """Inside, whatever asks for the rate is told this, as where an update is traced."""
    self._given = value
    try:
      yield
    finally:
      self._given = None
