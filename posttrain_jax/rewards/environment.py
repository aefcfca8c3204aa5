"""What an environment says of an answer itself: `environment` as a part of a reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from posttrain_jax.rewards import score
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Known, Prompt, Tried

# columns that a run with an environment gives rows: its own reward, and what is known of it when an answer has ended
COLUMN, LEFT = "environment_reward", "environment_left"


@dataclasses.dataclass(frozen=True)
class Environment(Tried):
  """The reward that the environment gave; missing where it gave none.

  >>> Environment()("", "", {"environment_reward": 0.5}).value
  0.5
  """

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    del prompt, completion
    value = example.get(COLUMN)
    return score.missing("the environment gave no reward") if value is None else score.of(value)

  def known(self) -> list[Known]:
    return [Known("", {COLUMN: 1.0}, True), Known("", {COLUMN: 0.0}, False)]
