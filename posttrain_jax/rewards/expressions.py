"""Mathematical expressions compared by value, by math-verify, which reads LaTeX and compares with SymPy.

It has alarms of its own, which work in the main thread alone and turn every failure into "wrong"; here they are off,
and the worker's deadline counts.  A comparison that fails is missing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import re
from collections.abc import Callable

from posttrain_jax.rewards.compared import Compared
from posttrain_jax.rewards.matching import RIGHT

# (answer, expected): those that are equal, and those that are not
EXAMPLES = (
  ((r"So it is $\frac{1}{2} + x$.", r"x + 0.5"), (r"\boxed{(x+1)^2}", "x^2 + 2x + 1")),
  ((r"\boxed{x^2 + 1}", "x^2 + 2x + 1"), ("1/3", "0.5")),
)
MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")  # prose: as LaTeX, Paris is the product p a r i s


def check() -> None:
  """Raises ValueError where math-verify is not installed."""
  if importlib.util.find_spec("math_verify") is None:
    raise ValueError("expression needs math-verify: pip install 'posttrain-jax[math]'")


@dataclasses.dataclass(frozen=True)
class Expression(Compared):
  """`expression` on a row's column; a worker imports math-verify as it reads this, in no call's time."""

  def __reduce__(self) -> tuple[Callable[..., Expression], tuple[str, str]]:
    return _loaded, (self.column, self.within)


def verifier(column: str, within: str = "") -> Expression:
  """Raises ValueError where math-verify is not installed."""
  check()
  return Expression(expression, column, within, *EXAMPLES)


def _loaded(column: str, within: str) -> Expression:
  import math_verify

  logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # it warns that alarms are off
  return verifier(column, within)


def expression(answer: str, gold: str) -> tuple[bool, str]:
  r"""The answer's last expression (in a box, in LaTeX, or a plain number) equals the expected one.

  Equal are 1/2, 0.5 and `\frac12`, x + 1 and 1 + x, and sets in any order.  Of an expected text with `####` it is what
  follows.

  Raises:
    ValueError: the expected text holds no expression.
  """
  import math_verify

  wanted = _parsed(_latex(gold.rpartition("####")[2].strip()))
  if not wanted:
    raise ValueError("no expression")
  given = _parsed(answer)
  if not given:
    return False, "no expression"
  is_same = math_verify.verify(wanted, given, timeout_seconds=None, raise_on_error=True)
  return is_same, RIGHT if is_same else "another value"


def _parsed(text: str) -> list:
  import math_verify

  return math_verify.parse(text, parsing_timeout=0, raise_on_error=True)


def _latex(gold: str) -> str:
  """The expected text as math-verify finds an expression in it."""
  return gold if MARKED.search(gold) or WORD.search(gold) else f"${gold}$"
