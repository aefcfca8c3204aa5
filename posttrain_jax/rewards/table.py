"""The verifiers by name, with what each reads of a row and its options."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain_jax.rewards import (
  boxed,
  environment,
  expressions,
  gym,
  json_values,
  matching,
  numbers,
  python,
  score,
  sql,
)
from posttrain_jax.rewards.compared import Compared
from posttrain_jax.rewards.formats import Json, Regex, Schema, Tags
from posttrain_jax.rewards.judge import Judge
from posttrain_jax.rewards.length import SoftOverlong
from posttrain_jax.rewards.manners import Language, Refusal, Words
from posttrain_jax.rewards.workers import SECONDS

# what a verifier that runs programs, and one that waits for others, is told; of the reward, not of one part
UNSAFE, STOPPING = "unsafe_code", "stopping"


@dataclasses.dataclass(frozen=True)
class BuiltIn:
  """A verifier that a config can name.

  make: its options, as keywords -> the verifier.  An option `column` is the row's column with what is expected.
  says: what it scores.
  reads: other columns: a row has all of one of these tuples; () for none.
  apart: it runs in a worker process, since somebody else's code decides how long it takes.
  seconds: of one call there, where the reward does not say.
  column: that it reads where no option is named and the rows have it.
  untested: it does not ask whether an answer is right, so that rows cannot try it, and that it is no part of the
  outcome.
  """

  make: Callable[..., Any]
  says: str
  reads: tuple[tuple[str, ...], ...] = ()
  apart: bool = False
  seconds: float = SECONDS
  range: tuple[float, float] = (0.0, 1.0)
  untested: bool = False
  column: str = ""

  @property
  def options(self) -> tuple[str, ...]:
    return tuple(name for name in self._parameters if name not in (UNSAFE, STOPPING))

  @property
  def kinds(self) -> Mapping[str, Any]:
    """{option: what its value is, as the maker's annotation says}."""
    hints = typing.get_type_hints(self.make)
    return {name: hints[name] for name in self.options}

  @property
  def runs_code(self) -> bool:
    """Whether it runs what the model wrote, and is told whether that may be without isolation."""
    return UNSAFE in self._parameters

  @property
  def waits(self) -> bool:
    """Whether it waits for others, and is told when nobody waits for it any more."""
    return STOPPING in self._parameters

  @property
  def needed(self) -> tuple[str, ...]:
    """The options that have no value of their own."""
    return tuple(one.name for one in self._parameters.values() if one.default is one.empty)

  @property
  def _parameters(self) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(self.make).parameters


def _exact(column: str, within: str = "") -> Compared:
  return Compared(matching.exact, column, within, *matching.EXACT)


def _contained(column: str, within: str = "") -> Compared:
  return Compared(matching.contained, column, within, *matching.CONTAINED)


def _fuzzy(column: str, within: str = "") -> Compared:
  return Compared(matching.fuzzy, column, within, *matching.FUZZY)


def _json(column: str, within: str = "") -> Compared:
  return Compared(json_values.json_equal, column, within, *json_values.EXAMPLES, is_json=True)


def _number(column: str, within: str = "", tolerance: float = 0.0) -> Compared:
  if not 0 <= tolerance < 1:
    raise ValueError(f"number: tolerance={tolerance}; it is a share of the expected number")
  return Compared(numbers.number, column, within, *numbers.EXAMPLES, {"tolerance": tolerance})


def _boxed(column: str) -> Compared:
  return Compared(boxed.boxed, column, "", *boxed.EXAMPLES)


def _tags(names: str | Sequence[str] = ("think", "answer"), opened: bool = False) -> Tags:
  listed = names.split(",") if isinstance(names, str) else names
  return Tags(tuple(name.strip() for name in listed), opened)


def _sql(column: str) -> sql.Query:
  return sql.Query(column)


def _gym() -> gym.Gym:
  gym.check()
  return gym.Gym()


VERIFIERS: Mapping[str, BuiltIn] = {
  "exact": BuiltIn(_exact, "the answer is the expected text; only white space may differ"),
  "contained": BuiltIn(_contained, "the expected text stands in the answer, as whole words"),
  "fuzzy": BuiltIn(_fuzzy, "the share of letters that both have in common, in order"),
  "number": BuiltIn(_number, "the last number of the answer is the expected one, by value"),
  "boxed": BuiltIn(_boxed, r"what is in the last \boxed{} is the expected answer"),
  "expression": BuiltIn(
    expressions.verifier, "the last expression equals the expected one", apart=True
  ),
  "json": BuiltIn(_json, "the answer is JSON of the expected value"),
  "is_json": BuiltIn(Json, "the answer is JSON", untested=True),
  "schema": BuiltIn(
    Schema,
    "the answer is JSON that a JSON Schema describes",
    apart=True,
    untested=True,
    column="schema",
  ),
  "regex": BuiltIn(Regex, "a regular expression matches", untested=True),
  "tags": BuiltIn(
    _tags, "the answer is tags in their order, each once, and nothing else", untested=True
  ),
  "length": BuiltIn(
    SoftOverlong,
    "DAPO's penalty of long answers, in tokens",
    range=(-1.0, 0.0),
    untested=True,
  ),
  "words": BuiltIn(Words, "the answer has so many words", untested=True),
  "language": BuiltIn(Language, "the answer is in a language", untested=True),
  "refusal": BuiltIn(
    Refusal,
    "the answer refuses where its row says so, and only there",
    reads=(("refuse",),),
    untested=True,
  ),
  "gym": BuiltIn(_gym, "what reasoning-gym says", reads=((gym.COLUMN,),), apart=True),
  "sql": BuiltIn(_sql, "the query returns what the expected one returns", apart=True),
  "python": BuiltIn(
    python.verifier,
    "the program passes the row's tests",
    reads=(("tests",), ("test_list",), ("test", "entry_point")),
    apart=True,
    seconds=python.SECONDS,
  ),
  "environment": BuiltIn(
    environment.Environment,
    "what the environment of an answer gave itself",
    reads=((environment.COLUMN,),),
    range=score.ANY,
  ),
  "judge": BuiltIn(Judge, "the number that a model at an address gives", range=score.ANY),
}
