"""TRL's reward functions, unchanged: f(prompts, completions, completion_ids, **columns) -> a number or None for each.

None says that the function does not apply to a row, so its part is left out of that row's sum, as TRL does; NaN is
missing.  A function gets what it takes: `prompts`, `completions`, `completion_ids`, columns of the data, and
`trainer_state`, `log_extra` and `log_metric`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, ValuesView
from concurrent import futures
from types import MappingProxyType, SimpleNamespace
from typing import Any, Protocol, runtime_checkable

from posttrain_jax.core import words
from posttrain_jax.rewards import score
from posttrain_jax.rewards.environment import LEFT
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import OUTSIDE, Answer, Context, raised
from posttrain_jax.rewards.workers import SECONDS, Failed, Workers

GIVEN = ("prompts", "completions", "completion_ids")
GOLD = "gold"  # the column with the text of the row's own answer
HELPERS = ("trainer_state", "log_extra", "log_metric")
ENVIRONMENTS = "environments"  # what is left of each answer's environment: its public attributes
NOT_PASSED = {"prompt", "completion", "completion_ids", LEFT}  # columns that others stand for


def is_one(function: Callable[..., Any]) -> bool:
  """Whether a function is written as TRL calls it: it takes lists, or keywords alone.

  >>> is_one(lambda completions, **columns: []), is_one(lambda prompt, completion, example: 0)
  (True, False)
  """
  parameters = inspect.signature(function).parameters
  kinds = {parameter.kind for parameter in parameters.values()}
  return not {*GIVEN, ENVIRONMENTS}.isdisjoint(parameters) or kinds == {
    inspect.Parameter.VAR_KEYWORD
  }


def check(
  function: Callable[..., Any],
  name: str,
  columns: Collection[str],
  partly: Mapping[str, str] = MappingProxyType({}),
) -> None:
  """Raises ValueError where the function reads a column that the data does not have.

  partly: {column that some rows have and not all: the first row without it}.
  """
  there = {*columns} - NOT_PASSED | ({ENVIRONMENTS} if LEFT in columns else set())
  needed = [
    parameter.name
    for parameter in inspect.signature(function).parameters.values()
    if parameter.default is parameter.empty
    and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
  ]
  unknown = [column for column in needed if column not in {*GIVEN, *HELPERS, *there}]
  if unknown:
    listed = sorted(there) or ["none beside prompt and completion"]
    raise ValueError(
      f"{name} reads the column {unknown[0]!r}, {absent(unknown[0], listed, partly)}"
    )


def absent(column: str, columns: Collection[str], partly: Mapping[str, str]) -> str:
  """What is said of a column that no row has, or not every one; see `check`."""
  if column in partly:
    return f"which not all rows have; the first without it is {partly[column]}"
  listed = ", ".join(sorted(columns, key=GOLD.__eq__))
  known = ", which is the row's own answer" if GOLD in columns else ""
  return f"which the data does not have; its columns are {listed}{known}"


@dataclasses.dataclass(frozen=True)
class Function:
  """A reward function of TRL's as a part of a reward.

  Args:
    workers: run it in a process with a deadline of `seconds` for each answer; None: here, without one.
  """

  function: Callable[..., Any]
  name: str
  workers: Workers | None = None
  seconds: float = SECONDS

  @property
  def reads_environments(self) -> bool:
    """Whether it asks what environments were left as."""
    return ENVIRONMENTS in inspect.signature(self.function).parameters

  def scores(self, answers: Sequence[Answer], context: Context) -> list[Score]:
    task = Call(self.function)
    if self.workers is None:
      given: Any = task(answers, context.trainer_state)
    else:
      (given,) = self.workers.run(
        task, [(answers, context.trainer_state)], [self.seconds * len(answers)]
      )
    reason = given.reason if isinstance(given, Failed) else given.get("reason")
    if reason is not None:
      return [score.missing(reason)] * len(answers)
    if "refused" in given:
      raise ValueError(
        f"{self.name} returned {given['refused']}; it returns a list with a number for each completion, None where it"
        " does not apply"
      )
    values = given["values"]
    if len(values) != len(answers):
      raise ValueError(
        f"{self.name} returned {words.count(len(values), 'reward')} for {words.count(len(answers), 'completion')}; it"
        " returns one for each, None where it does not apply"
      )
    for column, listed in given["columns"].items():
      if len(listed) != len(answers):
        raise ValueError(
          f"{self.name} logged {words.count(len(listed), 'value')} of {column!r} for"
          f" {words.count(len(answers), 'completion')}; log one for each"
        )
      context.columns.setdefault(column, {}).update(enumerate(listed))
    for metric, numbers in given["metrics"].items():
      context.metrics.setdefault(metric, []).extend(numbers)
    return [Score(*value) for value in values]


@dataclasses.dataclass(frozen=True)
class Call:
  """A call of such a function as a task of workers; its result is JSON."""

  function: Callable[..., Any]

  def __call__(self, answers: Sequence[Answer], trainer_state: Any = OUTSIDE) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {}
    metrics: dict[str, list[float]] = {}
    helpers = {
      "trainer_state": trainer_state,
      "log_extra": lambda column, values: columns.update({column: [*values]}),
      "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
    }
    try:
      returned = self.function(**taken(self.function, {**arguments(answers), **helpers}))
      listed = _awaited(returned) if inspect.isawaitable(returned) else returned
      if not _is_list(listed):
        return {"refused": f"{words.shown(listed, 60)} ({type(listed).__name__})"}
      values = [dataclasses.astuple(_score(value)) for value in listed]
    except (Exception, SystemExit) as error:
      return {"reason": raised(error)}
    return {"values": values, "columns": columns, "metrics": metrics}


@runtime_checkable
class _Array(Protocol):
  """What NumPy, JAX, PyTorch and pandas call an array, a tensor and a series."""

  @property
  def shape(self) -> Sequence[int]: ...

  def __iter__(self) -> Iterator[Any]: ...


def _is_list(value: Any) -> bool:
  """Whether going through it gives the scores, in order: of a dict that gives keys, of a set no order.

  >>> _is_list([1.0]), _is_list(iter([1.0])), _is_list({"a": 1.0}), _is_list("1"), _is_list(1.0)
  (True, True, False, False, False)
  """
  if isinstance(value, str | bytes | Mapping):
    return False
  if isinstance(value, _Array):
    return len(value.shape) > 0 and all(size == 1 for size in value.shape[1:])
  return isinstance(value, Sequence | Iterator | ValuesView)


def _awaited(coroutine: Any) -> Any:
  """What it returns, from a thread of its own: in a notebook this one has a loop already."""

  async def result() -> Any:
    return await coroutine

  with futures.ThreadPoolExecutor(1) as thread:
    return thread.submit(asyncio.run, result()).result()


def _score(value: Any) -> Score:
  while isinstance(value, _Array) and len(value.shape) > 0 and value.shape[0] == 1:  # of a column
    (value,) = value
  return score.not_applicable() if value is None else score.of(value)


def arguments(answers: Sequence[Answer]) -> dict[str, list[Any]]:
  """What TRL calls a function with; a completion is a list of one message where the prompt is a list of messages.

  A column that one of the rows does not have is None there.
  """
  named = {column: None for answer in answers for column in answer.example}
  held = [SimpleNamespace(**(answer.example.get(LEFT) or {})) for answer in answers]
  return {
    **({ENVIRONMENTS: held} if LEFT in named else {}),
    "prompts": [answer.prompt for answer in answers],
    "completions": [_completion(answer) for answer in answers],
    "completion_ids": [
      None if answer.tokens is None else [int(token) for token in answer.tokens]
      for answer in answers
    ],
    **{
      column: [answer.example.get(column) for answer in answers]
      for column in named
      if column not in NOT_PASSED
    },
  }


def _completion(answer: Answer) -> str | list[Mapping[str, Any]]:
  if answer.messages is not None:
    return [*answer.messages]
  if isinstance(answer.prompt, str):
    return answer.completion
  return [{"role": "assistant", "content": answer.completion}]


def taken(function: Callable[..., Any], named: Mapping[str, Any]) -> dict[str, Any]:
  """Those of the arguments that a function takes; all, where it has a `**` parameter."""
  parameters = inspect.signature(function).parameters
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
    return dict(named)
  return {name: value for name, value in named.items() if name in parameters}
