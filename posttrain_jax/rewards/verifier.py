"""A verifier is a plain function (prompt, completion, example) -> a number, a bool or a Score.

prompt is a string or a list of messages, completion the text that the model wrote, and example the row as a dict with
its own columns.  Where the token ids of the completion are known the example has them as `completion_ids`.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from posttrain_jax.core import words
from posttrain_jax.rewards import score
from posttrain_jax.rewards.score import Score

Prompt = str | Sequence[Mapping[str, Any]]
HERE = os.path.dirname(__file__)
IDS = "completion_ids"  # the column of an example that holds an answer's tokens; TRL's name


@dataclasses.dataclass(frozen=True)
class Answer:
  """What is scored.  example: the row.  tokens: the ids of the completion, where they are known.

  group: answers of one prompt have one group; None where that is not known.
  messages: the turns of an answer that has several, with what tools said between them; the completion is then the words
    that it ends with.
  """

  prompt: Prompt
  completion: str
  example: Mapping[str, Any]
  tokens: Sequence[int] | None = None
  group: int | None = None
  messages: Sequence[Mapping[str, Any]] | None = None

  @property
  def row(self) -> dict[str, Any]:
    """The example as a verifier is given it."""
    return {**self.example, **({} if self.tokens is None else {IDS: self.tokens})}


Verifier = Callable[[Prompt, str, Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class TrainerState:
  """Where a run stands, under the names of Transformers' TrainerState, for TRL's functions.

  global_step: updates taken so far, of max_steps; outside of a run 0 of 1, since functions divide by the latter.
  epoch: passes over the prompts.
  """

  global_step: int = 0
  max_steps: int = 1
  epoch: float = 0.0


OUTSIDE = TrainerState()  # of what is scored outside of a run, or before it


@dataclasses.dataclass
class Context:
  """What a batch is scored in: what functions are told of the run, and what they log beside their scores.

  columns: of the table of answers, {column: {place of the answer: value}}.
  """

  trainer_state: Any = OUTSIDE
  columns: dict[str, dict[int, Any]] = dataclasses.field(default_factory=dict)
  metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)


class Batch(Protocol):
  """A verifier that is given many answers at once, as a model is, or a process that has a deadline."""

  def scores(self, answers: Sequence[Answer], context: Context) -> Sequence[Any]:
    """A number or Score for each answer, in order."""
    ...


@dataclasses.dataclass(frozen=True)
class Known:
  """An answer of which is known whether it is right."""

  completion: str
  example: Mapping[str, Any]
  is_right: bool
  tokens: Sequence[int] | None = None


class Tried(abc.ABC):
  """A verifier that knows right and wrong answers, which are tried before a run."""

  @abc.abstractmethod
  def known(self) -> list[Known]:
    """At least one right and one wrong answer."""


def called(verifier: Verifier, answer: Answer) -> Score:
  """What the verifier says of the answer; missing, with file and line, where it raises.

  >>> called(lambda prompt, completion, example: len(completion), Answer("?", "four", {})).value
  4.0
  """
  try:
    return score.of(verifier(answer.prompt, answer.completion, answer.row))
  except (Exception, SystemExit) as error:
    return score.missing(raised(error))


def raised(error: BaseException) -> str:
  """The error in a line, with the last line of the file that was called first.

  A fault in json/decoder.py is of no help to who wrote the verifier; the line that called it is.
  """
  frames = traceback.extract_tb(error.__traceback__)
  outside = [frame for frame in frames if not frame.filename.startswith(HERE)] or frames
  own = [frame for frame in outside if frame.filename == outside[0].filename]
  place = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
  text = " ".join(str(error).split())
  return (
    f"{place}raised {type(error).__name__}: {text if len(text) <= 300 else words.shown(text, 300)}"
  )
