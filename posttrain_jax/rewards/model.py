"""A reward model as a part of a reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from posttrain_jax.rewards.verifier import Answer, Context, Prompt


@dataclasses.dataclass(frozen=True)
class Model:
  """score: [(prompt, completion), ...] -> a number for each; called with at most `rows` of them at a time."""

  score: Callable[[Sequence[tuple[Prompt, str]]], Sequence[Any]]
  rows: int = 8

  def scores(self, answers: Sequence[Answer], context: Context) -> list[Any]:
    given: list[Any] = []
    for start in range(0, len(answers), self.rows):
      some = [(a.prompt, a.completion) for a in answers[start : start + self.rows]]
      numbers = [*self.score(some)]
      if len(numbers) != len(some):
        raise ValueError(
          f"the reward model gave {len(numbers)} scores for {len(some)} answers; it gives one for each"
        )
      given += numbers
    return given
