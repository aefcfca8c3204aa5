"""A score is a number, or it is missing for a reason; a missing score is never 0."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, SupportsFloat

from posttrain_jax.core import words

ANY = (-math.inf, math.inf)  # a range that every finite number is in
LARGEST = float.fromhex("0x1.fffffep+127")  # of float32, which rewards are trained on in


@dataclasses.dataclass(frozen=True)
class Score:
  """value: higher is better; None where it is missing.  reason: why it is missing, or what is to be said of the value.

  applies: False where the verifier has nothing to say of such a row, so that asking again would be of no use.
  """

  value: float | None
  reason: str = ""
  applies: bool = dataclasses.field(default=True, repr=False)

  @property
  def is_missing(self) -> bool:
    return self.value is None


def missing(reason: str) -> Score:
  """The verifier should have said a number and did not: a fault, a time-out, a row that it cannot read."""
  return Score(None, reason)


def not_applicable(reason: str = "it does not apply to this row") -> Score:
  """The verifier is not meant for such a row: a reward leaves the part out of the sum."""
  return Score(None, reason, applies=False)


def of(returned: Any, within: tuple[float, float] = ANY) -> Score:
  """What a verifier returned as a score: a Score, or anything that `float` takes, NumPy's and JAX's scalars included.

  >>> of(True), of(0.5, (0, 1)).value
  (Score(value=1.0, reason=''), 0.5)
  >>> of(float("nan")).reason, of(7, (0, 1)).reason
  ('returned nan', 'returned 7.0, which is not within 0 and 1')
  >>> of("1").reason
  "returned '1', a str"
  """
  if isinstance(returned, Score):
    return returned if returned.value is None else _number(returned.value, returned.reason, within)
  return _number(returned, "", within)


def _number(value: Any, reason: str, within: tuple[float, float]) -> Score:
  if value is None:
    return missing("returned None")
  if inspect.iscoroutine(value):
    value.close()  # Python would warn that nobody waited for it
    return missing(
      "returned a coroutine: it is `async def`, which only a function of TRL's form may be; write `def`"
    )
  if not isinstance(value, SupportsFloat):
    return missing(f"returned {words.shown(value, 60)}, a {type(value).__name__}")
  try:
    number = float(value)
  except (TypeError, ValueError, OverflowError, RuntimeError) as error:
    return missing(f"returned {words.shown(value, 60)}, which is no float: {error}")
  if not math.isfinite(number):
    return missing(f"returned {number}")
  if abs(number) > LARGEST:
    return missing(
      f"returned {number:g}, which float32 does not hold: its largest number is 3.4e38"
    )
  low, high = within
  if not low <= number <= high:
    return missing(f"returned {number}, which is not within {low:g} and {high:g}")
  return Score(number, reason)
