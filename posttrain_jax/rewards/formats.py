"""Whether an answer has a form: it matches an expression, is JSON, is JSON of a schema, or has tags in their order."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

from posttrain_jax.core import patterns, words
from posttrain_jax.rewards import json_values, score
from posttrain_jax.rewards.matching import RIGHT, without_thoughts
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Known, Prompt, Tried


@dataclasses.dataclass(frozen=True)
class Regex:
  """1 where the expression matches somewhere in the answer, or with `whole` all of it; a point matches line ends, too.

  Thoughts are part of the answer here, since a format may be about them.  A match that takes longer than
  `seconds` is missing.
  """

  pattern: str
  whole: bool = False
  seconds: float = 1.0

  def __post_init__(self):
    reason = patterns.wrong(self.pattern)
    if reason:
      raise ValueError(f"regex: {self.pattern!r} {reason}")

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    try:
      matches = patterns.stands_in(self.pattern, completion, whole=self.whole, seconds=self.seconds)
    except ValueError as error:
      return score.missing(str(error))
    return Score(float(matches), RIGHT if matches else "no match")


@dataclasses.dataclass(frozen=True)
class Json(Tried):
  """1 where the answer without its thoughts, or what its last code fence holds, is JSON (RFC 8259)."""

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    value = _read(completion)
    return value if isinstance(value, Score) else Score(1.0, RIGHT)

  def known(self) -> list[Known]:
    return [Known('```json\n{"a": [1]}\n```', {}, True), Known("{'a': 1}", {}, False)]


@dataclasses.dataclass(frozen=True)
class Schema:
  """1 where the answer is JSON that a JSON Schema describes, of the row's `column` or for every row `schema`."""

  schema: Mapping[str, Any] | bool | None = None
  column: str = ""

  def __post_init__(self):
    if importlib.util.find_spec("jsonschema") is None:
      raise ValueError("schema needs jsonschema: pip install 'posttrain-jax[schema]'")
    if (self.schema is None) == (not self.column):
      raise ValueError(
        "schema: write one of its options schema, a JSON Schema for every row, and column, the column that holds each"
        " row's (without both it is the column `schema`, if the data has it)"
      )
    if self.schema is not None:
      reason = _wrong_schema(self.schema)
      if reason:
        raise ValueError(f"schema: {reason}")

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    import jsonschema
    import referencing.exceptions

    schema: Any = self.schema
    if self.column:
      if example.get(self.column) is None:
        return score.missing(f"the row has no {self.column}")
      schema = example[self.column]
      try:
        schema = json_values.read(schema) if isinstance(schema, str) else schema
      except ValueError as error:
        return score.missing(f"the row's {self.column} is no JSON: {error}")
      reason = _wrong_schema(schema)
      if reason:
        return score.missing(f"the row's {self.column} {reason}")
    value = _read(completion)
    if isinstance(value, Score):
      return value
    checker = jsonschema.validators.validator_for(schema)(schema)
    try:
      error = next(iter(checker.iter_errors(_floats(value))), None)
    except RecursionError:
      return score.missing("the schema refers to itself without an end")
    except referencing.exceptions.Unresolvable as absent:
      return score.missing(f"the schema refers to what it does not hold: {absent.ref}")
    return Score(float(error is None), RIGHT if error is None else words.cut(error.message, 200))


def _wrong_schema(schema: Any) -> str:
  import jsonschema

  if not isinstance(schema, Mapping | bool):
    return f"is no JSON Schema: {words.shown(schema)} is neither an object nor true or false"
  if isinstance(schema, Mapping) and not isinstance(schema.get("$schema", ""), str):
    return f"is no JSON Schema: its $schema is {words.shown(schema['$schema'])}, not an address"
  try:
    jsonschema.validators.validator_for(schema).check_schema(schema)
  except jsonschema.SchemaError as error:
    return f"is no JSON Schema: at {error.json_path}, {words.cut(error.message, 200)}"
  return ""


def _read(completion: str) -> Any:
  """The answer's value, or the score of one that is no JSON."""
  try:
    return json_values.read(without_thoughts(completion))
  except RecursionError:
    return Score(0.0, "nested too deeply")
  except ValueError as error:
    return Score(0.0, f"not JSON: {error}")


def _floats(value: Any) -> Any:
  """The value with Python's own numbers, as jsonschema knows them."""
  if isinstance(value, dict):
    return {key: _floats(inner) for key, inner in value.items()}
  if isinstance(value, list):
    return [_floats(inner) for inner in value]
  is_plain = value is None or isinstance(value, str | int)
  return value if is_plain else float(value)


@dataclasses.dataclass(frozen=True)
class Tags(Tried):
  """1 where the answer is `<think>...</think>` and then `<answer>...</answer>`, each once, with nothing around them.

  Args:
    names: of the tags, in their order.
    opened: the prompt ends with the first tag, so the answer begins inside of it.
  """

  names: tuple[str, ...] = ("think", "answer")
  opened: bool = False

  def __post_init__(self):
    if not self.names or len({*self.names}) < len(self.names):
      raise ValueError(f"tags: names={self.names!r}; name at least one, and each once")

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    reason = self._wrong(f"<{self.names[0]}>{completion}" if self.opened else completion)
    return Score(float(not reason), reason or RIGHT)

  def _wrong(self, text: str) -> str:
    marks = [mark for name in self.names for mark in (f"<{name}>", f"</{name}>")]
    for mark in marks:
      if text.count(mark) != 1:
        return f"{mark} stands {text.count(mark)} times"
    places = [text.index(mark) for mark in marks]
    if places != sorted(places):
      return "the tags are in another order"
    outside = text[: places[0]]
    for i in range(0, len(marks), 2):
      end = places[i + 1] + len(marks[i + 1])
      outside += text[end : places[i + 2] if i + 2 < len(marks) else None]
    return "there is text outside of the tags" if outside.strip() else ""

  def known(self) -> list[Known]:
    right = "\n".join(f"<{name}>1</{name}>" for name in self.names)
    wrong = (right.replace("</", "<", 1), right + "\n2", "1")
    start = len(f"<{self.names[0]}>") if self.opened else 0
    return [Known(right[start:], {}, True)] + [Known(text[start:], {}, False) for text in wrong]
