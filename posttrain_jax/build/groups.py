"""The answers that a policy wrote to a prompt, with their scores: what is told of them, and their rows in a table."""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain_jax.build.prompts import Prompt
from posttrain_jax.rewards.reward import Scored
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

  @property
  def answers(self) -> list[Answer]:
    return [self.written[sample] for sample in sorted(self.written)]

  @property
  def scores(self) -> np.ndarray:
    totals = (one.total.value for one in self.scored)
    return np.asarray([np.nan if value is None else value for value in totals], np.float32)

  def outcomes(self, part: str) -> np.ndarray:
    """Of each answer the score of a part, before anything shapes it; "" for the total."""
    if not part:
      return self.scores
    values = (one.parts[part].value for one in self.scored)
    return np.asarray([np.nan if value is None else value for value in values], np.float32)

  def is_dead(self, part: str) -> bool:
    """Whether its answers agree, so that there is nothing to learn from them."""
    known = self.outcomes(part)
    known = known[~np.isnan(known)]
    return len(known) < 2 or float(known.max() - known.min()) <= 1e-6 * max(1.0, abs(known).max())


def pass_rate(groups: Sequence[Group], part: str) -> float:
  outcomes = np.concatenate([group.outcomes(part) for group in groups])
  return float(np.nanmean(outcomes)) if len(outcomes) else 0.0


def passed(groups: Sequence[Group], most: float | None) -> dict[str, float]:
  """pass@1 and pass@N of what has a score; right is the highest reward there is, {} where it has no bound."""
  known = [group.scores[~np.isnan(group.scores)] for group in groups]
  known = [scores for scores in known if len(scores)]
  if most is None or not known:
    return {}
  right = [float(np.mean(scores >= most - 1e-6)) for scores in known]
  return {
    "pass@1": statistics.fmean(right),
    f"pass@{len(groups[0].written)}": statistics.fmean(share > 0 for share in right),
  }


def metrics(groups: Sequence[Group], part: str) -> dict[str, float]:
  """How long answers are, and how many groups agree on what.

  Args:
    part: of the reward, that says whether a group agrees; "" for the total.
  """
  written = [answer for group in groups for answer in group.answers]
  dead = [group.outcomes(part) for group in groups if group.is_dead(part)]
  known = [outcomes[~np.isnan(outcomes)] for outcomes in dead]
  agreed = collections.Counter(round(float(some.mean()), 3) for some in known if len(some))
  return {
    "completions/clipped_ratio": statistics.fmean(not a.finished for a in written),
    "completions/max_length": float(max(len(a.tokens) for a in written)),
    "completions/min_length": float(min(len(a.tokens) for a in written)),
    "frac_groups_dead": len(dead) / len(groups),
    "frac_groups_all_zero": agreed.get(0.0, 0) / len(groups),
    "frac_groups_all_one": agreed.get(1.0, 0) / len(groups),
  }


def table(batch: int, every: Sequence[Group], used: Sequence[Group]) -> list[dict[str, Any]]:
  """A row an answer, as TRL's table of completions has them."""
  rows = []
  for group in every:
    for i, (answer, text, scored) in enumerate(zip(group.answers, group.texts, group.scored)):
      other = group.held_out[i].total.value if group.held_out else None
      rows.append(
        {
          "batch": batch,
          "prompt": json.dumps(group.prompt.asked, ensure_ascii=False),
          "completion": text,
          "number": group.number,
          "sample": i,
          "reward": scored.total.value,
          "missing": scored.total.reason,
          **{f"rewards/{name}": part.value for name, part in scored.parts.items()},
          **({"holdout": other} if group.held_out else {}),
          "tokens": answer.tokens,
          "ended": answer.ended,
          "used": group in used,
        }
      )
  return rows
