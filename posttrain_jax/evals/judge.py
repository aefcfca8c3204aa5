"""Reward models at work: they score answers and steps, and take the best of several."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from posttrain_jax.core import progress, seeds
from posttrain_jax.data import answers as answer_lib
from posttrain_jax.data import bounds, held_out, schema, turns
from posttrain_jax.data.errors import SHORTEN, RowError
from posttrain_jax.data.packing import pack_answers
from posttrain_jax.evals import graders, tasks
from posttrain_jax.evals import samples as samples_lib
from posttrain_jax.evals.samples import Plan, Writer
from posttrain_jax.models import before
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.objectives import Reward
from posttrain_jax.rewards.model import Model
from posttrain_jax.rewards.reward import Part
from posttrain_jax.rewards.reward import Reward as Scores
from posttrain_jax.rewards.score import Score, missing
from posttrain_jax.rewards.verifier import Prompt
from posttrain_jax.rollout.sampling import Sampling

ROWS = 8  # prompts in a batch


class Judge:
  """A reward model, ready to score.

  Args:
    params: with its adapter bound or merged.
    template: the chat template that it was trained with; None: text as it is.
    chat: whether a prompt and an answer in strings are turns of it.
    system: the message that stood before such a prompt in training.
    dtype: of the computation; None: the parameters' own.
  """

  def __init__(
    self,
    params: Any,
    config: ModelConfig,
    tokenizer: Any,
    template: Any,
    *,
    chat: bool = True,
    system: str | None = None,
    dtype: Any = None,
  ):
    self.params, self.config, self.dtype = params, config, dtype
    self.tokenizer, self.template = tokenizer, template
    self.chat = chat and template is not None
    self.system = system if self.chat else None

  def read(self, source: str, columns: Mapping[str, Any] | None = None) -> Sequence[schema.Row]:
    """The rows of a file of answers, as the model was trained to read them."""
    system = self.system
    if system is not None and not turns.in_strings(schema.read(source, columns=columns), source):
      system = None  # rows that bring their messages bring that one, too
    return schema.read(source, columns=columns, chat=self.chat, system=system)

  def encode(self, rows: Sequence[schema.Row]) -> Sequence[answer_lib.Answers]:
    try:
      return self._encoded(rows)
    except RowError as error:
      raise error.instead(SHORTEN) from None

  def _encoded(self, rows: Sequence[schema.Row]) -> Sequence[answer_lib.Answers]:
    room = self.config.max_length
    examples = answer_lib.encode_all(
      rows, self.tokenizer, self.template, kind="judged", max_length=sys.maxsize
    ).examples
    within = bounds.Bounds(self.config.vocab_size, room, before.slots(self.params))
    kept, _ = bounds.kept(
      examples, within, truncate="error", on_error="raise", tokenizer=self.tokenizer
    )
    return kept

  def scores(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
    """Of each (prompt, completion) the score; missing where it cannot be read: too long, or empty."""
    rows = [self._row(prompt, completion, i) for i, (prompt, completion) in enumerate(pairs)]
    try:
      read = dict(enumerate(self.encode(rows)))
      unread = {}
    except RowError:
      read, unread = self._one_by_one(rows)
    values = dict(zip(read, self.rewards([*read.values()]) if read else []))
    return [Score(values[i][0]) if i in values else missing(unread[i]) for i in range(len(rows))]

  def _row(self, prompt: Prompt, completion: str, number: int) -> schema.Row:
    fields: dict[str, Any] = {"prompt": prompt, "completion": completion}
    origin = f"answer {number + 1}"
    if not isinstance(prompt, str):
      said = {"role": "assistant", "content": completion.strip()}
      fields = {"prompt": [*prompt], "completion": [said]}
    elif self.chat:
      fields = schema.as_chat(fields, origin, self.system)
    return schema.Row(fields, origin, "prompt_completion")

  def _one_by_one(
    self, rows: Sequence[schema.Row]
  ) -> tuple[dict[int, answer_lib.Answers], dict[int, str]]:
    """({place: what can be read}, {place: why it cannot})."""
    read, unread = {}, {}
    for i, row in enumerate(rows):
      try:
        (read[i],) = self.encode([row])
      except RowError as error:
        unread[i] = error.detail
    return read, unread

  def rewards(self, examples: Sequence[answer_lib.Answers]) -> list[list[float]]:
    """The rewards of each example, in order: one number an answer, or where it is told apart into steps, one a step."""
    return _scored(self.params, self.config, examples, self.dtype)


def _scored(params: Any, config: ModelConfig, examples, dtype: Any) -> list[list[float]]:
  scorer = Reward(config, dtype=dtype)
  stepwise = examples[0].steps is not None

  @jax.jit
  def score(params, batch):
    return scorer.of_tokens(params, batch) if stepwise else scorer.rewards(params, batch)

  slots = max(example.count for example in examples)
  order = np.argsort([len(example) for example in examples], kind="stable").tolist()
  rewards: list[list[float]] = [[] for _ in examples]
  for start in progress.told(range(0, len(order), ROWS), "scoring"):
    some = order[start : start + ROWS]
    length = -(-len(examples[some[-1]]) // 64) * 64
    rows = [[i] for i in some] + [[]] * (ROWS - len(some))
    values = np.asarray(score(params, pack_answers(examples, rows, length, slots)))
    for row_values, i in zip(values, some):
      example = examples[i]
      wanted = np.arange(example.count)
      if example.steps is not None:
        wanted = np.flatnonzero(~np.isnan(example.steps))
      rewards[i] = row_values[wanted].tolist()
  return rewards


def score(
  judge: Judge, source: str, limit: int, columns: Mapping[str, Any] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """(a line for every row of a file: its rewards; a summary: rows, mean reward, how far labels agree).

  Raises:
    ValueError: rows of several schemas.
  """
  rows = judge.read(source, columns or None)
  rows = held_out.limited(rows, limit, seed=0) if limit else rows
  kinds = schema.kinds(rows)
  if len(kinds) > 1:
    raise ValueError(
      f"{source} holds rows of several schemas ({', '.join(kinds)}); score each apart"
    )
  (kind,) = kinds
  rewards = judge.rewards(judge.encode(rows))
  lines = [{"row": row.origin, **named(kind, values)} for row, values in zip(rows, rewards)]
  summary: dict[str, Any] = {
    "rows": len(rows),
    "mean_reward": float(np.mean(np.concatenate(rewards))),
  }
  agreed = agreement(kind, rows, rewards)
  return lines, summary if agreed is None else {**summary, "accuracy": agreed}


def named(kind: str, values: list[float]) -> dict[str, Any]:
  """The rewards of a row of a schema, by the name of what each is of."""
  match kind:
    case "preference":
      return {"chosen": values[0], "rejected": values[1]}
    case "scored":
      return {"rewards": values}
    case "stepwise" | "steps":
      return {"steps": values}
  return {"reward": values[0]}


def agreement(kind: str, rows: Sequence[schema.Row], rewards: list[list[float]]) -> float | None:
  """The share of pairs in which the chosen answer has more, of labels on whose side of 0 the reward is."""
  match kind:
    case "preference":
      right = [values[0] > values[1] for values in rewards]
    case "unpaired":
      right = [(values[0] > 0) == row.fields["label"] for row, values in zip(rows, rewards)]
    case "stepwise":
      right = [
        (value > 0) == label
        for row, values in zip(rows, rewards)
        for value, label in zip(values, row.fields["labels"])
      ]
    case _:
      return None
  return float(np.mean(right))


def check_best_of(task: str, samples: int, seed: int) -> None:
  """Raises ValueError where samples is below 2, there is no such task, or a seed is none."""
  seeds.check(seed)
  if samples < 2:
    raise ValueError(f"samples={samples}: draw at least two answers to choose among")
  if task not in tasks.TASKS:
    raise ValueError(
      f"task={task!r}: best of several answers a built-in task: {', '.join(tasks.TASKS)}"
    )


def best_of(
  judge: Judge, writer: Writer, *, task: str, samples: int, limit: int, seed: int
) -> dict[str, float]:
  """How many of a task's questions are answered right by the answer that a reward model likes best of several.

  Beside it: the share of all answers that are right (one drawn at random), and of questions with any right answer.
  """
  asked = tasks.known(task)
  rows = asked.examples("test", n=limit or None)
  (grader,) = graders.parts(asked.graders[:1])
  reward = Scores([grader, Part("liked", Model(judge.scores, rows=len(rows) * samples))], retries=0)
  plan = Plan(samples, asked.max_new_tokens, Sampling(temperature=1.0), seed)
  groups = samples_lib.answered(writer, rows, plan, reward, dict)
  value = lambda name, none: np.asarray(
    [[none if (v := s.scored.parts[name].value) is None else v for s in group] for group in groups]
  )
  right, best = value(grader.name, 0.0) >= 1, value("liked", -np.inf).argmax(1)
  return {
    "questions": len(rows),
    "samples": samples,
    "accuracy_best": float(right[np.arange(len(rows)), best].mean()),
    "accuracy_of_one": float(right.mean()),
    "accuracy_of_any": float(right.any(1).mean()),
  }
