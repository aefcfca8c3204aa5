"""What an environment says of an answer itself: `environment` as a part of a reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Prompt

# columns that a run with an environment gives rows: its own reward, and what is known of it when an answer has ended
COLUMN, LEFT = "environment_reward", "environment_left"


def environment(prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
  """The reward that the environment gave; missing where it gave none.

  >>> environment("", "", {"environment_reward": 0.5}).value
  0.5
  """
  del prompt, completion
  value = example.get(COLUMN)
  if value is None:
    return Score(None, "the environment gave no reward")
  return Score(float(value), "")


def made() -> Any:
  """The verifier, by its name in a config."""
  return environment
