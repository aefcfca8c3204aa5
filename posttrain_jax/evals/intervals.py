"""How sure a share or a mean is that was taken over so many questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959964  # of 95 %


def wilson(correct: int, total: int, z: float = Z) -> tuple[float, float]:
  """Wilson's interval of a share, 95 % for the default z.  Wilson 1927.

  >>> [round(x, 4) for x in wilson(8, 10)]
  [0.4902, 0.9433]
  """
  if total == 0:
    return 0.0, 1.0
  share = correct / total
  centre = share + z * z / (2 * total)
  half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
  scale = 1 + z * z / total
  return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mean(values: Sequence[float], z: float = Z) -> dict[str, Any]:
  """The mean of some values with its interval, 95 % for the default z: {"mean", "low", "high", "count", "right"}.

  Of zeros and ones it is Wilson's, and `right` counts the ones; of others it is the normal one, mean +- z s / sqrt(n),
  which one value alone does not have (None), nor equal ones.

  >>> mean([1.0, 0.0, 1.0, 1.0])["right"], mean([0.5])["low"]
  (3, None)
  >>> round(mean([0, 0.5])["high"], 4)
  0.74
  """
  total = len(values)
  centre = math.fsum(values) / total
  if all(value in (0, 1) for value in values):
    low, high = wilson(right := round(math.fsum(values)), total, z)
    return dict(mean=centre, low=low, high=high, count=total, right=right)
  known = dict(mean=centre, low=None, high=None, count=total, right=None)
  if len({*values}) < 2:
    return known
  half = z * math.sqrt(_variance(values, centre) / total)
  return {**known, "low": centre - half, "high": centre + half}


def change(before: Sequence[float], after: Sequence[float], z: float = Z) -> dict[str, Any]:
  """`mean` of the differences, value by value: two runs over the same questions are compared on each of them.

  Always the normal interval, since a difference is no share; None where all are equal, which says nothing of how far
  others would differ.
  """
  differences = [b - a for a, b in zip(before, after, strict=True)]
  total, centre = len(differences), math.fsum(differences) / len(differences)
  if len({*differences}) < 2:
    return dict(mean=centre, low=None, high=None, count=total)
  half = z * math.sqrt(_variance(differences, centre) / total)
  return dict(mean=centre, low=centre - half, high=centre + half, count=total)


def _variance(values: Sequence[float], centre: float) -> float:
  return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
