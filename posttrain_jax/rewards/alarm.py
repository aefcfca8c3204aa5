"""Whether a reward is being gamed: it rises, and what else says how good answers are falls."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

WINDOW = 10  # batches
ERRORS = 3.0  # standard errors; it is asked after each batch, and two would be a false alarm in most long runs


@dataclasses.dataclass
class Watch:
  """Compares the last WINDOW batches with the WINDOW before them.

  It speaks where the reward has risen and the held-out score has fallen, each by more than three standard errors of the
  difference of the two means, so that batches that merely vary are no alarm, and then begins anew.

  >>> watch = Watch()
  >>> said = [watch.add(batch, -batch) for batch in range(25)]
  >>> [batch for batch, sentence in enumerate(said) if sentence]
  [19]
  """

  history: list[tuple[float, float]] = dataclasses.field(default_factory=list)

  def add(self, reward: float, other: float) -> str:
    """What is to be said after a batch with these means; "" for nothing."""
    self.history = [*self.history, (reward, other)][-2 * WINDOW :]
    rewards, others = zip(*self.history)
    if len(rewards) < 2 * WINDOW or not _rises(rewards) or not _rises([-x for x in others]):
      return ""
    self.history = []
    return (
      f"over the last {2 * WINDOW} batches the reward rose from {_ends(rewards)} while the held-out score fell from"
      f" {_ends(others)}: the reward may be gamed; read what is written (completions/) before going on"
    )


def _rises(values: Sequence[float]) -> bool:
  before, now = values[:WINDOW], values[WINDOW:]
  spread = statistics.variance(before) + statistics.variance(now)
  return statistics.fmean(now) - statistics.fmean(before) > ERRORS * math.sqrt(spread / WINDOW)


def _ends(values: Sequence[float]) -> str:
  return f"{statistics.fmean(values[:WINDOW]):.3g} to {statistics.fmean(values[WINDOW:]):.3g}"
