"""Pairs out of a model's own answers to a task that can be graded: right ones over wrong ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from posttrain_jax.data import questions
from posttrain_jax.evals import graders, samples
from posttrain_jax.evals.samples import Plan, Writer
from posttrain_jax.evals.tasks import Task
from posttrain_jax.rewards.reward import Reward


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
  writer: Writer,
  task: Task,
  plan: Plan,
  *,
  split: str = "train",
  limit: int | None = None,
  progress: Callable[[int, int | None], None] | None = None,
) -> Pairs:
  """One pair for each question of a split that was answered wrong at least once.

  Chosen is the best right sample, the first of equals, or the gold answer where none is right (or the best sample,
  where there is no gold answer); rejected is the worst wrong one that ended by itself, or else the worst wrong one.

  Args:
    limit: that many questions; None for the split.

  Raises:
    ValueError: as `tasks.evaluate`.
  """
  rows = task.examples(split, n=limit)
  reward = Reward(graders.parts(task.graders), retries=0)
  groups = samples.answered(writer, rows, plan, reward, dict, progress=progress)
  first = task.graders[0].name
  value = lambda sample: sample.scored.parts[first].value
  pairs, all_right, none_right, no_better, unused = [], 0, 0, 0, 0
  for row, attempts in zip(rows, groups, strict=True):
    bar = row.get("best", {}).get(first, 1.0)
    # an empty answer is nothing to compare with
    wrong = [s for s in attempts if value(s) < bar and s.drawn.text.strip()]
    if not wrong:
      all_right += 1
      continue
    right = [s for s in attempts if value(s) >= bar]
    worst = min(wrong, key=lambda s: (not s.drawn.finished, value(s)))
    best = max(right or wrong, key=value)
    if not right and row["gold"] is None and value(best) <= value(worst):
      no_better += 1
      continue
    none_right += not right
    chosen = row["gold"] if not right and row["gold"] is not None else best.drawn.text
    unused += len({s.drawn.text for s in wrong}) - 1
    pairs.append(_pair(row, chosen, worst.drawn.text))
  return Pairs(pairs, len(rows), all_right, none_right, no_better, unused)


def _pair(row: Mapping[str, Any], chosen: str, rejected: str) -> dict[str, Any]:
  """In strings where the prompt is one, else as messages."""
  turn = lambda text: [{"role": "assistant", "content": text}]
  if isinstance(row["prompt"], str):
    turn = lambda text: text
  pair = dict(prompt=row["prompt"], chosen=turn(chosen), rejected=turn(rejected))
  return pair | questions.carried(row)
