"""Regular expressions of others, which come with files and configs: matched within a time, or refused in a sentence.

Python's own engine may take hours over a name of forty letters, as over `(a|a)*b`, and cannot be stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from typing import Any

import regex

from posttrain_jax.core import words

LONGEST = 20_000  # characters of an expression
REPEATS = 10_000  # the product of its counts, {m,n}: the engine writes such repetitions out
SECONDS = (
  1.0  # for one expression over everything that it is matched with; a common one takes milliseconds
)


def fullmatch(expression: str, text: str) -> bool:
  """Whether the expression matches the whole text.

  >>> fullmatch("layers.*", "layers.3.mlp"), fullmatch("mlp", "layers.3.mlp")
  (True, False)

  Raises:
    ValueError: it is no regular expression, or takes too long.
  """
  return _matcher(expression).matches(text)


def stands_in(expression: str, text: str, *, whole: bool = False, seconds: float = SECONDS) -> bool:
  """Whether the expression matches somewhere in the text, which is a new one each time; with `whole`, all of it.

  A point matches line ends, too.

  >>> stands_in("<b>.*</b>", "a <b>c</b>"), stands_in("<b>.*</b>", "a <b>c</b>", whole=True)
  (True, False)

  Raises:
    ValueError: it is no regular expression, or takes longer.
  """
  compiled = _across_lines(expression)
  matched = compiled.fullmatch if whole else compiled.search
  try:
    return matched(text, timeout=seconds) is not None
  except (TimeoutError, MemoryError):
    raise ValueError(
      f"the regular expression {words.shown(expression)} takes more than {seconds:g} s to match"
    ) from None


def check(expression: str) -> None:
  """Raises ValueError where this is no regular expression that `fullmatch` takes."""
  _matcher(expression)


def wrong(expression: str) -> str:
  """What `check` says of an expression, without it; "" where it is one.

  >>> wrong("layers/[")
  'is no regular expression: unterminated character set at position 7'
  """
  if len(expression) > LONGEST:
    return f"has {len(expression):,} characters; an expression has {LONGEST:,}"
  counts = [
    max(map(int, re.findall(r"\d{1,9}", c)))
    for c in re.findall(r"\{[\d, ]*\d[\d, ]*\}", expression)
  ]
  if math.prod(max(count, 1) for count in counts) > REPEATS:
    return f"repeats up to {math.prod(counts):.3g} times: write + or *"
  try:
    re.compile(expression)
    regex.compile(expression)
  except (re.error, regex.error, RecursionError, OverflowError) as error:
    return f"is no regular expression: {error}"
  return ""


@dataclasses.dataclass
class _Matcher:
  """A compiled expression, what it has matched so far, and the seconds that are left to it."""

  compiled: Any  # of `regex`
  results: dict[str, bool] = dataclasses.field(default_factory=dict)
  left: float = SECONDS

  def matches(self, text: str) -> bool:
    if text not in self.results:
      began = time.monotonic()
      try:
        found = self.compiled.fullmatch(text, timeout=max(self.left, 1e-3))
      except (TimeoutError, MemoryError):
        self.left = 0.0
        raise ValueError(
          f"the regular expression {words.shown(self.compiled.pattern)} takes more than {SECONDS:g} s to match: it "
          "repeats what is repeated already, as in (a+)+; write it without, or list names"
        ) from None
      self.left -= time.monotonic() - began
      self.results[text] = found is not None
    return self.results[text]


@functools.lru_cache(maxsize=1024)
def _matcher(expression: str) -> _Matcher:
  reason = wrong(expression)
  if reason:
    raise ValueError(f"{words.shown(expression)} {reason}")
  return _Matcher(regex.compile(expression))


@functools.lru_cache(maxsize=1024)
def _across_lines(expression: str) -> Any:
  reason = wrong(expression)
  if reason:
    raise ValueError(f"{words.shown(expression)} {reason}")
  return regex.compile(expression, regex.DOTALL)
