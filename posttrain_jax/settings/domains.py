"""What a field may hold: a domain says what is wrong with a value and what to write instead, or "" where it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from posttrain_jax.core import patterns

LARGEST = 3.4028234663852886e38  # of float32, in which a run computes
SMALLEST = 1.1754943508222875e-38  # what is nearer to 0 counts as 0 there
LARGEST_WHOLE = 2**31 - 1


class Domain(Protocol):
  """`wrong(value)`: a sentence that follows the field and its value, or ""; `says`: what the domain holds, for help."""

  @property
  def says(self) -> str: ...

  def wrong(self, value: Any) -> str: ...


@dataclasses.dataclass(frozen=True)
class Number:
  """A finite number from low to high; the bounds themselves are left out with `above` and `below`.

  >>> Number(0, 1, below=True).wrong(1.5)
  'write a number of at least 0 and below 1'
  """

  low: float = -LARGEST
  high: float = LARGEST
  above: bool = False
  below: bool = False
  whole: bool = False
  also: tuple[Any, ...] = ()  # single values beside

  @property
  def says(self) -> str:
    low = f"{'above' if self.above else 'of at least'} {self.low:g}"
    high = f"{'below' if self.below else 'at most'} {self.high:{',' if self.whole else 'g'}}"
    bounds = [low] if self.low > -LARGEST else []
    bounds += [high] if self.high not in (LARGEST, LARGEST_WHOLE) else []
    kind = "a whole number" if self.whole else "a number"
    beside = "".join(f", or {value}" for value in dict.fromkeys(self.also))
    return " ".join([kind, " and ".join(bounds)]).strip() + beside

  def wrong(self, value: Any) -> str:
    if _is_among(value, self.also):
      return ""
    if not _is_number(value, whole=self.whole):
      return f"write {self.says}"
    if abs(value) > LARGEST:
      return f"it is beyond {LARGEST:.2g}, float32's largest; write {self.says}"
    if 0 < abs(value) < SMALLEST:
      return f"it is nearer to 0 than {SMALLEST:.2g}, float32's smallest; write {self.says}"
    if self.whole and abs(value) > LARGEST_WHOLE:
      return f"it is beyond {LARGEST_WHOLE:,}; write {self.says}"
    low = self.low < value if self.above else self.low <= value
    high = value < self.high if self.below else value <= self.high
    return "" if low and high else f"write {self.says}"


def _is_number(value: Any, *, whole: bool) -> bool:
  """Whether value is an int, or a float that is not NaN; True and False are no numbers."""
  if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
    return False
  return value == value


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
  """Whether value is one of values, where 1 and True differ."""
  return any(type(value) is type(other) and value == other for other in values)


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of some words.  refused: others that one may expect, and why they are none of these.

  >>> Choice(("raise", "skip"), {"stop": "it has no end"}).wrong("stop")
  'it has no end; known are raise, skip'
  """

  names: tuple[str, ...]
  refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def says(self) -> str:
    return ", ".join(name or "'' (none)" for name in self.names)

  def wrong(self, value: Any) -> str:
    if isinstance(value, str) and value in self.names:
      return ""
    why = self.refused.get(value) if isinstance(value, str) else None
    return f"{why}; known are {self.says}" if why else f"known are {self.says}"


@dataclasses.dataclass(frozen=True)
class Text:
  """A text; with `empty` also none of it, with `optional` None."""

  what: str = "a text"
  empty: bool = False
  optional: bool = False

  @property
  def says(self) -> str:
    beside = " or ''" if self.empty else ""
    return self.what + beside + (" or None" if self.optional else "")

  def wrong(self, value: Any) -> str:
    if value is None and self.optional:
      return ""
    is_text = isinstance(value, str) and "\0" not in value
    return "" if is_text and (value.strip() or self.empty) else f"write {self.says}"


@dataclasses.dataclass(frozen=True)
class Flag:
  """True or False."""

  says: str = "true or false"

  def wrong(self, value: Any) -> str:
    return "" if isinstance(value, bool) else "write true or false"


@dataclasses.dataclass(frozen=True)
class Expression:
  """A regular expression that can be matched; one that takes too long is refused where it is.

  >>> Expression().wrong("layers/[")
  'it is no regular expression: unterminated character set at position 7'
  """

  empty: bool = False

  @property
  def says(self) -> str:
    return "a regular expression" + (" or ''" if self.empty else "")

  def wrong(self, value: Any) -> str:
    if not isinstance(value, str) or not (value or self.empty):
      return f"write {self.says}"
    reason = patterns.wrong(value)
    return f"it {reason}" if reason else ""


@dataclasses.dataclass(frozen=True)
class Several:
  """A tuple of what another domain holds, perhaps empty; also one such value by itself."""

  each: Domain

  @property
  def says(self) -> str:
    return f"a tuple, each of it {self.each.says}"

  def wrong(self, value: Any) -> str:
    values = value if isinstance(value, tuple | list) else (value,)
    wrong = next((sentence for sentence in map(self.each.wrong, values) if sentence), "")
    return f"of each value: {wrong}" if wrong else ""


@dataclasses.dataclass(frozen=True)
class Table:
  """{key: value}, each in its domain."""

  key: Domain
  value: Domain

  @property
  def says(self) -> str:
    return f"a dict of {self.key.says} to {self.value.says}"

  def wrong(self, value: Any) -> str:
    if not isinstance(value, Mapping):
      return f"write {self.says}"
    for name, item in value.items():
      if sentence := self.key.wrong(name):
        return f"{name!r}: {sentence}"
      if sentence := self.value.wrong(item):
        return f"{name}={item!r}: {sentence}"
    return ""


@dataclasses.dataclass(frozen=True)
class Anything:
  """What only its reader knows the domain of, as an option of a verifier."""

  says: str = "a value"

  def wrong(self, value: Any) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Either:
  """What one of two domains holds; a text is judged by the first."""

  text: Domain
  other: Domain

  @property
  def says(self) -> str:
    return f"{self.text.says}, or {self.other.says}"

  def wrong(self, value: Any) -> str:
    domain = self.text if isinstance(value, str) else self.other
    return domain.wrong(value)
