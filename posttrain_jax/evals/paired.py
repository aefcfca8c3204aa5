"""Two models on the same items: how far apart they are, how sure that is, and what could have been seen.

Differences are after - before, and higher is better.  Items of one group (a passage, a template) are not independent:
errors add up what a group has in common (Miller 2024, "Adding error bars to evals", eq. 4).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy import special

LEVEL = 0.95  # of intervals
POWER = 0.8  # with which a drop is called one that could have been seen


@dataclasses.dataclass(frozen=True)
class Difference:
  """mean = sum(after - before) / sum(size), with its 95 % interval; None where there is but one group.

  error: the standard error, of the groups; 0 where there is but one, which says nothing of it.
  count, groups: items, and groups of them.
  lost, gained: of items that are right or wrong, how many became wrong and right; None of others.
  shrink: of right and wrong, what the groups leave of the number of items, 1 where items are independent.
  """

  mean: float
  low: float | None
  high: float | None
  error: float
  count: int
  groups: int
  lost: int | None = None
  gained: int | None = None
  shrink: float = 1.0

  @property
  def is_binary(self) -> bool:
    return self.lost is not None

  def p_of_drop(self, tolerance: float = 0.0) -> float:
    """One-sided p of "it fell by no more than the tolerance"; small: it fell by more.

    Right and wrong without a tolerance and without groups: McNemar's exact test.  With one: Tango's score test.  Other
    values: Student's t over groups.  1 where there is but one group, which says nothing.
    """
    if self.groups < 2:
      return 1.0
    if self.lost is not None and self.gained is not None:
      if tolerance == 0 and self.shrink == 1:
        changed = self.lost + self.gained
        return 1.0 if not changed else float(special.bdtr(self.gained, changed, 0.5))
      z = score_statistic(
        self.gained * self.shrink, self.lost * self.shrink, self.count * self.shrink, -tolerance
      )
      return self.below(float(z))
    if self.error == 0:
      return float(self.mean >= -tolerance)
    return self.below((self.mean + tolerance) / self.error)

  @property
  def p_value(self) -> float:
    """Two-sided p of "nothing changed"; of right and wrong without groups McNemar's exact one."""
    down = self.p_of_drop()
    if self.lost is not None and self.gained is not None and self.shrink == 1:
      return mcnemar(self.lost, self.gained)
    return 1.0 if self.error == 0 and self.mean == 0 else min(1.0, 2 * min(down, 1 - down))

  def visible(self, tolerance: float = 0.0, alpha: float = 0.05) -> float | None:
    """The drop that would have been told from one within the tolerance in 80 of 100 cases; None for one group, and
    where not even that of every item from right to wrong would have been.

    tolerance + (z_alpha + z_power) error, one-sided.  Where no item changed the error is that of the interval.
    """
    if self.low is None or self.high is None:
      return None
    error = max(self.error, (self.high - self.low) / (2 * self.quantile((1 + LEVEL) / 2)))
    drop = tolerance + (self.quantile(1 - alpha) + self.quantile(POWER)) * error
    return None if self.is_binary and drop > 1 else drop

  @property
  def _freedom(self) -> float:
    """Degrees of freedom of what statistics are compared with; infinite, the normal, where no groups are counted."""
    is_plain = self.is_binary and self.groups == self.count
    return math.inf if is_plain else max(self.groups - 1, 1)

  def quantile(self, level: float) -> float:
    """Student's t, or the normal, below which it is with this probability."""
    free = self._freedom
    return float(special.ndtri(level) if math.isinf(free) else special.stdtrit(free, level))

  def below(self, statistic: float) -> float:
    """The probability of a lower statistic."""
    free = self._freedom
    return float(special.ndtr(statistic) if math.isinf(free) else special.stdtr(free, statistic))


def difference(
  before: Sequence[float],
  after: Sequence[float],
  *,
  sizes: Sequence[float] | None = None,
  groups: Sequence[Hashable] | None = None,
) -> Difference:
  """The mean difference of the same items, sum(after - before) / sum(size), with its interval.

  Of zeros and ones the interval is Tango's score interval, with as many items as the groups leave of them; of other
  values Student's t over groups, whose residuals are (after - before) - mean * size.

  >>> d = difference([1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 1, 1])
  >>> d.lost, d.gained, round(d.mean, 4)
  (2, 1, -0.1667)

  Args:
    sizes: of each item, as its bytes where values are its bits; None: 1 each.
    groups: what each item belongs to; None: each to itself.
  """
  was, now = np.asarray(before, np.float64), np.asarray(after, np.float64)
  if was.shape != now.shape or was.ndim != 1 or not was.size:
    raise ValueError(f"{was.shape} values before and {now.shape} after: both are of the same items")
  size = np.ones_like(was) if sizes is None else np.asarray(sizes, np.float64)
  labels = np.arange(was.size) if groups is None else _numbered(groups)
  mean = float(np.sum(now - was) / np.sum(size))
  error, count = cluster_error((now - was) - mean * size, size, labels)
  is_binary = sizes is None and bool(np.isin(was, (0, 1)).all() and np.isin(now, (0, 1)).all())
  known: dict[str, Any] = dict(mean=mean, error=error, count=was.size, groups=count)
  if is_binary:
    known |= dict(lost=int(np.sum(was > now)), gained=int(np.sum(now > was)))
    known |= dict(shrink=_shrink(now - was, mean, error, count))
  if count < 2:
    return Difference(low=None, high=None, **known)
  made = Difference(low=None, high=None, **known)
  z = made.quantile((1 + LEVEL) / 2)
  if is_binary:
    scaled = [x * made.shrink for x in (known["gained"], known["lost"], was.size)]
    low, high = score_interval(*scaled, z=z)
  else:
    low, high = mean - z * error, mean + z * error
  return dataclasses.replace(made, low=low, high=high)


def _numbered(groups: Sequence[Hashable]) -> np.ndarray:
  place = {group: i for i, group in enumerate(dict.fromkeys(groups))}
  return np.asarray([place[group] for group in groups])


def cluster_error(residuals: np.ndarray, size: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
  """(sqrt(G / (G - 1) sum over groups of (sum of residuals)^2) / sum(size), G groups); 0 where there is but one."""
  sums = np.bincount(labels, residuals)
  groups = sums.size
  if groups < 2:
    return 0.0, groups
  return float(np.sqrt(groups / (groups - 1) * np.sum(sums**2)) / np.sum(size)), groups


def _shrink(differences: np.ndarray, mean: float, error: float, groups: int) -> float:
  """Of n items as many count as would have this error if they were independent; a group alone, where none changed."""
  n = differences.size
  if groups == n:
    return 1.0
  alone = float(np.sum((differences - mean) ** 2)) / (n * (n - 1))
  if error == 0 or alone == 0:
    return groups / n
  return min(1.0, alone / error**2)


# Right and wrong


def score_statistic(gained: Any, lost: Any, count: Any, difference: Any) -> Any:
  """(gained - lost - n d) / sqrt(n (2 q + d (1 - d))), standard normal where the difference is d.

  q is the likeliest share of losses given d, the larger root of 2n q^2 + B q + C = 0 with B = -(gained + lost) +
  (2n - gained + lost) d and C = -lost d (1 - d).  At d = 0 it is McNemar's.  Tango 1998, eq. 10.  Arrays broadcast.
  """
  g, l, n, d = (np.asarray(x, np.float64) for x in (gained, lost, count, difference))
  b = -g - l + (2 * n - g + l) * d
  c = -l * d * (1 - d)
  q = (np.sqrt(np.maximum(b * b - 8 * n * c, 0)) - b) / (4 * n)
  variance = np.maximum(n * (2 * q + d * (1 - d)), 0)
  top = g - l - n * d
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(
      variance > 0, top / np.sqrt(variance), np.where(top == 0, 0.0, np.copysign(np.inf, top))
    )


def score_interval(gained: float, lost: float, count: float, *, z: float) -> tuple[float, float]:
  """(low, high): the differences whose `score_statistic` is within -z and z.

  >>> [round(x, 4) for x in score_interval(0, 0, 96.159, z=1.96)]
  [-0.0384, 0.0384]
  """
  from scipy import optimize  # half a second of a start that needs no interval

  centre = (gained - lost) / count
  over = lambda sign: lambda d: float(score_statistic(gained, lost, count, d)) - sign * z
  ends = [
    far if centre == far else optimize.brentq(over(-far), centre, far * (1 - 1e-12), xtol=1e-12)
    for far in (-1.0, 1.0)
  ]
  return ends[0], ends[1]


def mcnemar(lost: int, gained: int) -> float:
  """The exact two-sided p of as many losses and gains, were both as likely: binomial over what changed.

  >>> round(mcnemar(9, 1), 4), mcnemar(0, 0)
  (0.0215, 1.0)
  """
  return min(1.0, 2 * float(special.bdtr(min(lost, gained), lost + gained, 0.5)))


def holm(ps: Sequence[float]) -> list[float]:
  """p of each of several tests such that any is wrongly below alpha in alpha of all cases at most.  Holm 1979.

  >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
  [0.03, 0.06, 0.06]
  """
  adjusted, largest = [0.0] * len(ps), 0.0
  for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
    largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
    adjusted[i] = largest
  return adjusted


# Several answers to an item


def pass_at(count: int, right: int, k: int) -> float:
  """1 - C(n - c, k) / C(n, k): whether one of k answers is right, of n drawn and c right, unbiased.  Chen et al. 2021.

  >>> round(pass_at(5, 2, 1), 4), pass_at(5, 2, 4)
  (0.4, 1.0)
  """
  _check_counts(count, right, k)
  if count - right < k:
    return 1.0
  return 1.0 - math.prod(1.0 - k / i for i in range(count - right + 1, count + 1))


def pass_every(count: int, right: int, k: int) -> float:
  """C(c, k) / C(n, k): whether all of k answers are right, of n drawn and c right, unbiased.

  >>> pass_every(4, 2, 2) == 1 / 6
  True
  """
  _check_counts(count, right, k)
  return math.comb(right, k) / math.comb(count, k)


def _check_counts(count: int, right: int, k: int) -> None:
  if not 0 <= right <= count or not 1 <= k <= count:
    raise ValueError(f"pass@{k} of {right} right of {count}: write k from 1 to the answers drawn")
