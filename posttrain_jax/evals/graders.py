"""How good an answer is, by name or by a function of one's own: a number, higher is better.

Built in are `exact`, `contained`, `json` and `number`, which compare an answer with the expected one and give 1 or 0.
What a model thought aloud before its answer, up to the last `</think>`, is compared by none of them.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import hashlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax import settings
from posttrain_jax.data.errors import RowError
from posttrain_jax.rewards import json_values, matching, numbers, score
from posttrain_jax.rewards.reward import Part
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Answer, Context
from posttrain_jax.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class Grader:
  """score: (answer, question) -> (a number, what is to be said of it), of a question as `data.questions` makes them.

  digest: of the code, where it is the user's.
  """

  name: str
  score: Callable[[str, Mapping[str, Any]], tuple[float, str]]
  needs_gold: bool = True
  digest: str = ""


BUILT_IN: Mapping[str, Callable[[str, str], tuple[bool, str]]] = {
  "exact": matching.exact,
  "contained": matching.contained,
  "json": json_values.json_equal,
  "number": numbers.number,
}


def load(names: str) -> tuple[Grader, ...]:
  """The graders of a list with commas: built in, or `FILE.py:name`.

  Raises:
    ConfigError: there is no such grader, no such file, or no such function in it.
  """
  graders = [_of(name.strip()) for name in names.split(",")] if names.strip() else []
  if len({grader.name for grader in graders}) < len(graders):
    raise ConfigError(f"eval.metric={names}: a metric is named twice; write each once")
  return tuple(graders)


def _of(name: str) -> Grader:
  if name in BUILT_IN:
    return Grader(name, functools.partial(_compared, BUILT_IN[name]))
  path, colon, function = name.rpartition(":")
  if not colon or not path.endswith(".py"):
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = ", ".join(BUILT_IN)
    raise ConfigError(
      f"eval.metric: there is no {name!r}: known are {known}, or a function of yours as FILE.py:name{hint}"
    )
  try:
    called, file = settings.function(path, function), Path(path).expanduser()
  except ConfigError as error:
    raise ConfigError(f"eval.metric: {error}") from error
  return Grader(
    f"{file.name}:{function}",
    functools.partial(_called, called, file, function),
    needs_gold=False,
    digest=hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest(),
  )


@dataclasses.dataclass(frozen=True)
class _Graded:
  """A grader as a part of a reward; its mistakes stop who asks, with file, line and row."""

  grader: Grader

  def scores(self, answers: Sequence[Answer], context: Context) -> list[Score]:
    return [Score(*self.grader.score(a.completion, a.example)) for a in answers]


def parts(graders: Sequence[Grader]) -> list[Part]:
  """The graders as parts of a reward whose examples are questions."""
  return [Part(grader.name, _Graded(grader)) for grader in graders]


def check(grader: Grader, question: Mapping[str, Any]) -> float:
  """What the grader gives for the expected answer itself, 1 where there is none: an answer is right that has as much.

  Raises:
    RowError: the built-in metric cannot compare with this row's expected answer.
  """
  gold = question["gold"]
  if not grader.needs_gold:
    return 1.0 if gold is None else grader.score(gold, question)[0]
  why = (
    "there is none"
    if gold is None
    else "it is empty"
    if not matching.without_thoughts(gold).strip()
    else ""
  )
  if not why:
    value, why = grader.score(gold, question)
    if value == 1:
      return value
  raise RowError(
    "nothing to compare with",
    question["origin"],
    f"the metric {grader.name!r} compares with the row's expected answer: {why}"
    + ("" if gold is None else f" ({_shown(gold)})"),
    "mend the row, or name another metric",
  )


def _compared(compare, answer, question):
  try:
    same, why = compare(
      matching.without_thoughts(answer), matching.without_thoughts(question["gold"])
    )
  except (
    ValueError
  ) as error:  # nothing can be compared with this expected answer: `check` says so with its row
    return 0.0, str(error)
  return float(same), why


def _called(called, file, name, answer, question):
  """What the user's function says, whose mistakes are told with file, line and row."""
  row = copy.deepcopy(dict(question["row"]))  # what it does to the row is not seen by the next
  if question["gold"] is not None:
    row.setdefault("gold", question["gold"])
  try:
    with settings.beside(file.parent):
      value = called(answer, row)
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    at = [frame for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    place = f"{file}:{at[-1].lineno}" if at else str(file)
    raise ConfigError(
      f"{place}: {name} raised {type(error).__name__}: {error} (row {question['origin']}, answer {_shown(answer)})"
    ) from error
  given = score.of(value)
  if given.value is None:
    raise ConfigError(
      f"{file}: {name} {given.reason} (row {question['origin']}, answer {_shown(answer)}); return a finite number,"
      " higher is better"
    )
  return given.value, given.reason


def _shown(text: str) -> str:
  return repr(text if len(text) <= 60 else text[:57] + "...")
