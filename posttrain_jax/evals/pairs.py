"""Pairs out of a model's own answers to a task that can be graded: right ones over wrong ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from posttrain_jax.data import questions
from posttrain_jax.evals import tasks
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Pairs:
  """rows: prompt, chosen and rejected as messages, with the channel; the rest counts the questions asked."""

  rows: list[dict[str, Any]]
  questions: int
  all_right: int  # no wrong answer among the samples
  none_right: int  # the gold answer was chosen
  no_better: int  # no gold answer, and none of the samples better than another
  samples: int  # distinct wrong answers, over all questions, that are in no pair

  def __str__(self) -> str:
    return (
      f"{len(self.rows)} pairs from {self.questions} questions: {self.all_right} had no wrong answer, in"
      f" {self.none_right} the gold answer was taken for want of a right one"
    )


def make(
  params: Any,
  config: ModelConfig,
  tokenizer: Any,
  *,
  task: str | tasks.Task,
  split: str = "train",
  limit: int | None = None,
  samples: int = 4,
  temperature: float = 0.8,
  seed: int = 0,
  template: Any = None,
  batch_size: int = 32,
  dtype: Any = None,
  progress: Callable[[int, int], None] | None = None,
) -> Pairs:
  """One pair for each question of a split that was answered wrong at least once.

  Chosen is the best right sample, the first of equals, or the gold answer where none is right (or the best sample,
  where there is no gold answer); rejected is the worst wrong one that ended by itself, or else the worst wrong one.

  Args:
    limit: that many questions; None for the split.
    samples: answers drawn to each question.
    seed: of the drawing.

  Raises:
    ValueError: samples is below 1, or as `tasks.evaluate`.
  """
  if samples < 1:
    raise ValueError(f"samples={samples}: draw at least one answer to a question")
  rows, answers = tasks.answer(
    params,
    config,
    tokenizer,
    task=task,
    split=split,
    limit=limit,
    template=template,
    copies=samples,
    sampling=Sampling(temperature=temperature),
    seed=seed,
    batch_size=batch_size,
    dtype=dtype,
    progress=progress,
  )
  pairs, all_right, none_right, no_better, unused = [], 0, 0, 0, 0
  for i, row in enumerate(rows):
    attempts = answers[i * samples : (i + 1) * samples]
    # an empty answer is nothing to compare with
    wrong = [a for a in attempts if not a["correct"] and a["answer"].strip()]
    if not wrong:
      all_right += 1
      continue
    right = [a for a in attempts if a["correct"]]
    worst = min(wrong, key=lambda a: (not a["finished"], _first(a)))
    best = max(right or wrong, key=_first)
    if not right and row["gold"] is None and _first(best) <= _first(worst):
      no_better += 1
      continue
    none_right += not right
    chosen = row["gold"] if not right and row["gold"] is not None else best["answer"]
    unused += len({a["answer"] for a in wrong}) - 1
    pairs.append(_pair(row, chosen, worst["answer"]))
  return Pairs(pairs, len(rows), all_right, none_right, no_better, unused)


def _first(answer: Mapping[str, Any]) -> float:
  """What the first grader gives."""
  return next(iter(answer["scores"].values()))


def _pair(row: Mapping[str, Any], chosen: str, rejected: str) -> dict[str, Any]:
  """In strings where the prompt is one, else as messages."""
  turn = lambda text: [{"role": "assistant", "content": text}]
  if isinstance(row["prompt"], str):
    turn = lambda text: text
  pair = dict(prompt=row["prompt"], chosen=turn(chosen), rejected=turn(rejected))
  named = {"channel": row["channel"]} if row["channel"] != questions.NO_CHANNEL else {}
  return pair | named | {k: v for k, v in row.get("variables", {}).items() if k == "tools"}
