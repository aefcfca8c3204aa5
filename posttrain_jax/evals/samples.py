"""A model's answers to questions, several to each, and their scores: for pairs, best of n and rejection sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from posttrain_jax.core import seeds
from posttrain_jax.data import questions as questions_lib
from posttrain_jax.data.templates import Template
from posttrain_jax.models import before
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rewards.reward import Reward, Scored
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.rollout import engine, requests
from posttrain_jax.rollout.requests import Request
from posttrain_jax.rollout.sampling import Sampling

Question = Mapping[str, Any]  # as `data.questions` and the tasks of `evals.tasks` make them


@dataclasses.dataclass(frozen=True)
class Writer:
  """A model that writes.

  params: as for `rollout.engine.Engine`, which is fastest with adapters merged.
  template: None for text as it is.
  ends: the ids that end an answer.
  dtype: of the computation; None for the parameters' own.
  """

  params: Any
  config: ModelConfig
  tokenizer: Any
  template: Template | None
  ends: tuple[int, ...]
  dtype: Any = None

  def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
    return questions_lib.tokens(questions, self.tokenizer, self.template)

  def text(self, tokens: Sequence[int]) -> str:
    return self.tokenizer.decode(tokens, skip_special_tokens=True)


@dataclasses.dataclass(frozen=True)
class Plan:
  """How questions are answered.

  samples: answers to each.
  rows: the most that are written at once.
  storage: how weights are kept meanwhile, see `rollout.storage`.
  """

  samples: int
  max_new_tokens: int
  sampling: Sampling
  seed: int = 0
  rows: int = 32
  storage: str = "auto"
  stop_strings: tuple[str, ...] = ()  # an answer ends with the token by which it holds one
  min_new_tokens: int = 0

  def __post_init__(self) -> None:
    if self.samples < 1:
      raise ValueError(f"{self.samples} answers to each prompt: draw at least 1")
    seeds.check(self.seed)
    if self.rows < 1:
      raise ValueError(f"batch_size={self.rows}: it is at least 1")


@dataclasses.dataclass(frozen=True)
class Drawn:
  """An answer.  number: of its question.  tokens: with the stop token, where one was drawn;
  [] where only the text is known.

  finished: whether it came to an end of its own, not to that of its room.
  is_stopped: whether that end is a stop string, behind which no token ends it.
  """

  number: int
  sample: int
  tokens: list[int]
  text: str
  finished: bool
  is_stopped: bool = False

  @property
  def said(self) -> tuple[int, ...] | str:
    """What tells it from another answer: its tokens, or its text where nobody knows those."""
    return tuple(self.tokens) or self.text


@dataclasses.dataclass(frozen=True)
class Sample:
  """An answer with its scores."""

  drawn: Drawn
  scored: Scored

  @property
  def score(self) -> float | None:
    return self.scored.total.value


def draw(
  writer: Writer,
  prompts: Sequence[Sequence[int]],
  plan: Plan,
  *,
  done: Collection[tuple[int, int]] = (),
) -> Iterator[Drawn]:
  """The answers, each when it is whole.

  An answer depends on (seed, number, sample) alone: what is `done`, as (number, sample), and left out changes no other.
  """
  ready = engine.prepare(writer.params, writer.config, plan.storage)
  bound = before.slots(ready.stacked)
  longest = bound + max(map(len, prompts)) + plan.max_new_tokens
  whole = [(i, sample) for i in range(len(prompts)) for sample in range(plan.samples)]
  # prompts of like length side by side; the rows are as many whatever is done already
  order = sorted(set(whole) - set(done), key=lambda at: (-len(prompts[at[0]]), at))
  if not order:
    return
  machine = engine.Engine(
    ready,
    writer.config,
    rows=min(plan.rows, len(whole)),
    length=min(engine.bucket(longest), writer.config.max_length),
    dtype=writer.dtype,
    tokenizer=writer.tokenizer,
  )
  asked = (
    Request(
      prompt=prompts[number],
      max_new_tokens=plan.max_new_tokens,
      sampling=plan.sampling,
      min_new_tokens=min(plan.min_new_tokens, plan.max_new_tokens),
      stop_tokens=writer.ends,
      stop_strings=plan.stop_strings,
      seed=plan.seed,
      number=number,
      sample=sample,
    )
    for number, sample in order
  )
  for place, answer in machine.run(asked):
    number, sample = order[place]
    text, is_stopped = writer.text(answer.tokens), answer.ended == requests.STRING
    yield Drawn(number, sample, answer.tokens, text, answer.finished, is_stopped)


def score(
  reward: Reward,
  questions: Sequence[Question],
  drawn: Sequence[Drawn],
  example: Callable[[Question], Mapping[str, Any]],
) -> list[Sample]:
  """The answers with their scores, in order.

  Args:
    example: what a verifier is given of a question.
  """
  asked = [questions[one.number] for one in drawn]
  answers = [
    Answer(question["prompt"], one.text, example(question), one.tokens, one.number)
    for question, one in zip(asked, drawn, strict=True)
  ]
  scored = reward.score(answers).answers if answers else ()
  return [Sample(one, given) for one, given in zip(drawn, scored, strict=True)]


def answered(
  writer: Writer,
  questions: Sequence[Question],
  plan: Plan,
  reward: Reward,
  example: Callable[[Question], Mapping[str, Any]],
  *,
  progress: Callable[[int, int | None], None] | None = None,
) -> list[list[Sample]]:
  """The answers to each question, in order, drawn and scored at once."""
  drawn, total = [], len(questions) * plan.samples
  for one in draw(writer, writer.prompts(questions), plan):
    drawn.append(one)
    if progress is not None:
      progress(len(drawn), total)
  drawn.sort(key=lambda one: (one.number, one.sample))
  samples = score(reward, questions, drawn, example)
  n = plan.samples
  return [samples[i * n : (i + 1) * n] for i in range(len(questions))]
