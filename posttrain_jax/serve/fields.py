"""The fields of a request's body, each read once, with its kind and its bounds; what nobody read is refused.

A field that is null counts as absent, as OpenAI's clients mean it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from posttrain_jax.core import words
from posttrain_jax.serve.errors import Refused, wrong

DEEPEST = 64  # objects within objects


def parsed(body: bytes) -> dict[str, Any]:
  """The object that a body holds.

  Raises:
    Refused: it is no JSON, no UTF-8, holds NaN, names a field twice, is nested too deeply, or is no object.
  """
  try:
    text = body.decode("utf-8")
  except UnicodeDecodeError as error:
    raise wrong(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
  try:
    value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
  except RecursionError:
    raise wrong("the body is nested too deeply") from None
  except ValueError as error:
    raise wrong(f"the body is not JSON: {words.cut(str(error), 200)}") from None
  if not isinstance(value, dict):
    raise wrong('the body is no JSON object: write {"model": ...}')
  _check_depth(value)
  return value


def _no_number(constant: str) -> None:
  raise ValueError(f"{constant} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [key for key, _ in pairs]
    again = next(key for at, key in enumerate(names) if key in names[:at])
    raise ValueError(f"{words.shown(again, 60)} stands there twice")
  return found


def _check_depth(value: Any) -> None:
  level = [value]
  for _ in range(DEEPEST):
    level = [
      part
      for one in level
      if isinstance(one, dict | list)
      for part in (one.values() if isinstance(one, dict) else one)
    ]
    if not level:
      return
  raise wrong(f"the body is nested more than {DEEPEST} deep")


class Fields:
  """What a body says, field by field.

  >>> body = Fields({"n": 2, "temperatur": 1})
  >>> body.whole("n", 1, 1, 8)
  2
  >>> body.close({"temperature"})
  Traceback (most recent call last):
  posttrain_jax.serve.errors.Refused: unknown field 'temperatur'; did you mean 'temperature'?
  """

  def __init__(self, values: Mapping[str, Any], within: str = "") -> None:
    self._values, self._within = values, within
    self._read: set[str] = set()

  def name(self, field: str) -> str:
    return f"{self._within}.{field}" if self._within else field

  def take(self, field: str) -> Any:
    """The value as it came; None where it is absent or null."""
    self._read.add(field)
    return self._values.get(field)

  def has(self, field: str) -> bool:
    return self._values.get(field) is not None

  def error(self, field: str, expected: str) -> Refused:
    found = words.shown(self._values.get(field), 60)
    return wrong(f"{self.name(field)} must be {expected}, found {found}", self.name(field))

  def whole(self, field: str, default: Any, low: int, high: int) -> Any:
    """A whole number from low to high; what is absent is `default`."""
    value = self.take(field)
    if value is None:
      return default
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
      value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
      raise self.error(field, f"a whole number from {low} to {high}")
    if not low <= value <= high:
      raise self.error(field, f"from {low} to {high}")
    return value

  def number(self, field: str, default: float, low: float, high: float) -> float:
    value = self.take(field)
    if value is None:
      return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or not math.isfinite(value):
      raise self.error(field, f"a number from {low:g} to {high:g}")
    return float(value)

  def flag(self, field: str, default: bool = False) -> bool:
    value = self.take(field)
    if value is None:
      return default
    if not isinstance(value, bool):
      raise self.error(field, "true or false")
    return value

  def text(self, field: str, default: Any = None) -> Any:
    value = self.take(field)
    if value is None:
      return default
    if not isinstance(value, str):
      raise self.error(field, "a string")
    return whole_text(value, self.name(field))

  def listed(self, field: str) -> list[Any]:
    value = self.take(field)
    if value is None:
      return []
    if not isinstance(value, list):
      raise self.error(field, "a list")
    return value

  def object(self, field: str) -> Fields | None:
    """An object's own fields."""
    value = self.take(field)
    if value is None:
      return None
    if not isinstance(value, dict):
      raise self.error(field, "an object")
    return Fields(value, self.name(field))

  def mapping(self, field: str) -> dict[str, Any]:
    """An object as it came; {} where it is absent."""
    value = self.take(field)
    if value is None:
      return {}
    if not isinstance(value, dict):
      raise self.error(field, "an object")
    return value

  def only(self, field: str, *allowed: Any, why: str) -> None:
    """A field that is known and does nothing here: any other value is refused.

    Raises:
      Refused: it asks for something else; `why` says what to do.
    """
    value = self.take(field)
    same = (value is one or (type(value) is type(one) and value == one) for one in allowed)
    if value is not None and not any(same):
      found = words.shown(value, 60)
      raise wrong(f"{self.name(field)}={found} is not honoured here: {why}", self.name(field))

  def close(self, known: set[str] | frozenset[str] = frozenset()) -> None:
    """Raises Refused where a field was read by nobody; known: names to suggest beside those that were read."""
    import difflib

    for field, value in self._values.items():
      if field not in self._read and value is not None:
        shown = words.shown(field, 60)
        near = difflib.get_close_matches(field, sorted(self._read | known), 1)
        meant = f"; did you mean {near[0]!r}?" if near else ", and what is not honoured is refused"
        raise wrong(f"unknown field {self.name('')}{shown}{meant}", words.cut(self.name(field), 80))


def whole_text(text: str, name: str) -> str:
  """The text; Refused where it holds half of a surrogate pair, which no tokenizer reads."""
  if not text.isascii():
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise wrong(
        f"{name} holds half of a surrogate pair at character {error.start + 1}", name
      ) from None
  return text
