"""The answers that a policy wrote to a prompt, with their scores: what is told of them, and their rows in a table."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from posttrain_jax.build.prompts import Prompt
from posttrain_jax.environments.episode import Episode
from posttrain_jax.evals import keeping
from posttrain_jax.rewards.reward import LOGGED, ROUNDING, Reward, Scored
from posttrain_jax.rollout.requests import Answer


@dataclasses.dataclass
class Group:
  """The answers to a prompt, with their scores: NaN where one is missing."""

  number: int  # of the prompt among all that were asked
  prompt: Prompt
  written: dict[int, Answer] = dataclasses.field(default_factory=dict)  # by sample
  texts: list[str] = dataclasses.field(default_factory=list)
  scored: Sequence[Scored] = ()
  held_out: Sequence[Scored] = ()  # by what is not trained on, where there is such a reward
  # what functions logged of each answer, by column
  columns: dict[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  advantages: Sequence[float] | np.ndarray = ()  # of what is learned from

  @property
  def answers(self) -> list[Answer]:
    return [self.written[sample] for sample in sorted(self.written)]

  @property
  def scores(self) -> np.ndarray:
    return _array(one.total.value for one in self.scored)

  def outcomes(self, outcome: Reward) -> np.ndarray:
    """Of each answer what says whether it is right, NaN where nothing can be learned from it."""
    return _array(outcome.value(one) for one in self.scored)

  def is_dead(self, outcome: Reward) -> bool:
    """Whether its answers agree on the outcome, or on the reward, so that there is nothing to learn from them."""
    return _agree(self.outcomes(outcome)) or _agree(self.scores)

  def agree_at(self, outcome: Reward, end: int) -> bool:
    """Whether all that are scored have the lowest (end 0) or the highest (1) outcome that there is for the prompt.

    Of an outcome without such a bound that is 0 and 1.
    """
    values = self.outcomes(outcome)
    bounds = np.asarray([outcome.bounds_of(one)[end] for one in self.scored])
    ends, known = np.where(np.isfinite(bounds), bounds, end), ~np.isnan(values)
    there = np.isclose(values, ends, rtol=ROUNDING, atol=ROUNDING)
    return bool(known.any() and there[known].all())


def _of_turns(answer: Answer) -> dict[str, Any]:
  """The columns that answers of several turns have beside the others."""
  if not isinstance(answer, Episode):
    return {}
  counts = {name: getattr(answer, name) for name in ("turns", "calls", "failures", "problem")}
  return {**counts, "messages": json.dumps(list(answer.messages), ensure_ascii=False)}


def _array(values: Iterable[float | None]) -> np.ndarray:
  return np.asarray([np.nan if value is None else value for value in values], np.float64)


def _agree(values: np.ndarray) -> bool:
  known = values[~np.isnan(values)]
  spread = known.max() - known.min() if len(known) else 0.0
  return len(known) < 2 or float(spread) <= ROUNDING * max(1.0, abs(known).max())


def pass_rate(groups: Sequence[Group], outcome: Reward) -> float:
  outcomes = np.concatenate([group.outcomes(outcome) for group in groups])
  return float(np.nanmean(outcomes)) if not np.isnan(outcomes).all() else 0.0


def passed(groups: Sequence[Group], outcome: Reward) -> dict[str, float]:
  """pass@1 and pass@N; right is the highest outcome there is, {} where it has no bound.

  Each over the prompts that have so many scored answers: one that is missing is neither right nor wrong.
  """
  if not outcome.has_most:
    return {}
  right = [[outcome.is_right(one) for one in g.scored if not one.total.is_missing] for g in groups]
  counts = [(len(some), sum(some)) for some in right]
  passes = keeping.passes(counts, (1, len(groups[0].written)))
  return {f"pass@{k}": value for k, value in passes.items()}


def metrics(groups: Sequence[Group], outcome: Reward) -> dict[str, float]:
  """How long answers are, and how many groups agree on what outcome."""
  written = [answer for group in groups for answer in group.answers]
  share = lambda of: statistics.fmean(map(of, groups))
  return {
    "completions/clipped_ratio": statistics.fmean(not a.finished for a in written),
    "completions/max_length": float(max(a.drawn for a in written)),
    "completions/min_length": float(min(a.drawn for a in written)),
    "frac_groups_dead": share(lambda group: group.is_dead(outcome)),
    "frac_groups_all_worst": share(lambda group: group.agree_at(outcome, 0)),
    "frac_groups_all_best": share(lambda group: group.agree_at(outcome, 1)),
  }


def table(
  batch: int, every: Sequence[Group], used: Sequence[Group], outcome: Reward
) -> list[dict[str, Any]]:
  """A row an answer, as TRL's table of completions has them, with the columns that functions log."""
  rows = []
  for group in every:
    is_used = group in used
    for i, (answer, text, scored) in enumerate(zip(group.answers, group.texts, group.scored)):
      learned = is_used and not scored.total.is_missing
      other = group.held_out[i].total.value if group.held_out else None
      row = {
        "batch": batch,
        "prompt": json.dumps(group.prompt.asked, ensure_ascii=False),
        "completion": text,
        "number": group.number,
        "sample": i,
        "reward": scored.total.value,
        "missing": scored.total.reason,
        **{f"rewards/{name}": part.value for name, part in scored.parts.items()},
        **({"holdout": other} if group.held_out else {}),
        "outcome": outcome.value(scored),
        "advantage": float(group.advantages[i]) if learned else None,
        "tokens": answer.tokens,
        "ended": answer.ended,
        **_of_turns(answer),
        "used": learned,
      }
      for name, values in group.columns.items():
        row[f"{LOGGED}/{name}" if name in row else name] = values[i]
      rows.append(row)
  return rows
