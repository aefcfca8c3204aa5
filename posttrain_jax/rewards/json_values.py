"""JSON in texts, compared by value."""

from __future__ import annotations

import decimal
import json
import re
from typing import Any

from posttrain_jax.rewards.matching import RIGHT

# (answer, expected): those that are equal, and those that are not
EXAMPLES = (
  (('```json\n{"b": [1.0], "a": null}\n```', '{"a": null, "b": [1]}'),),
  (("[2, 1]", "[1, 2]"), ("{'a': 1}", '{"a": 1}')),
)


def json_equal(answer: str, gold: str) -> tuple[bool, str]:
  """Both are JSON (RFC 8259) of the same value.

  The order of an object's keys and white space do not matter, the order of an array does; numbers are compared exactly
  as numbers (1 is 1.0 and 1e0), true is not 1, and strings are compared letter by letter.  A key that stands twice in
  one object, NaN and Infinity are no JSON.  Where the whole answer is none, the text inside its last code fence (```)
  is read.

  >>> json_equal('```json\\n{"b": [1.0], "a": null}\\n```', '{"a": null, "b": [1]}')[0]
  True

  Raises:
    ValueError: the expected text is no JSON.
  """
  try:
    wanted = read(gold)
  except RecursionError:
    raise ValueError("nested too deeply") from None
  except ValueError as error:
    raise ValueError(f"not JSON: {error}") from None
  try:
    is_same = _same(read(answer), wanted)
  except RecursionError:
    return False, "nested too deeply"
  except ValueError as error:
    return False, f"not JSON: {error}"
  return is_same, RIGHT if is_same else "another value"


_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def read(text: str) -> Any:
  """The value of a JSON text, or of the text in its last code fence; numbers with a point are exact decimals.

  Raises:
    ValueError: it is no JSON.
    RecursionError: it is nested too deeply.
  """
  try:
    return _DECODER.decode(text.strip())
  except ValueError:
    fenced = _FENCE.findall(text)
    if not fenced:
      raise
  return _DECODER.decode(fenced[-1].strip())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    raise ValueError("a key stands twice in an object")
  return value


def _no_constant(name: str) -> Any:
  raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(
  object_pairs_hook=_object, parse_float=decimal.Decimal, parse_constant=_no_constant
)


def _same(one: Any, other: Any) -> bool:
  if isinstance(one, dict) and isinstance(other, dict):
    return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
  if isinstance(one, list) and isinstance(other, list):
    return len(one) == len(other) and all(map(_same, one, other))
  if isinstance(one, bool) or isinstance(other, bool):
    return one is other
  return one == other
