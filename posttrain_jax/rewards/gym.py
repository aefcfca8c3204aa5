"""Tasks of reasoning-gym: rows that it draws, and its own scores of answers to them."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

from posttrain_jax.rewards import score
from posttrain_jax.rewards.compared import tagged
from posttrain_jax.rewards.matching import without_thoughts
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Known, Prompt

COLUMN = "gym"  # of the rows: {"name", "metadata"}, what the task needs to score an answer


def check() -> None:
  """Raises ValueError where reasoning-gym is not installed."""
  if importlib.util.find_spec("reasoning_gym") is None:
    raise ValueError("gym needs reasoning-gym: pip install 'posttrain-jax[gym]'")


def rows(name: str, size: int, *, seed: int = 0, **config: Any) -> list[dict[str, Any]]:
  """Questions of a task of reasoning-gym: prompt, answer (None where many are right) and `gym`.

  Args:
    config: the task's own options, such as `min_digits`.

  Raises:
    ValueError: it is not installed, or has no task or option of that name.
  """
  check()
  import reasoning_gym

  try:
    drawn = reasoning_gym.create_dataset(name, size=size, seed=seed, **config)
  except (TypeError, ValueError, AssertionError) as error:
    raise ValueError(f"gym: {name}: {error}") from error
  return [
    {
      "prompt": entry["question"],
      "answer": entry["answer"],
      COLUMN: {"name": name, "metadata": entry["metadata"]},
    }
    for entry in drawn
  ]


@dataclasses.dataclass(frozen=True)
class Gym:
  """What the row's task says of the answer, in [0, 1]: of what its last `<answer>` holds, or of all of it."""

  column: str = COLUMN

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    import reasoning_gym

    task = example.get(self.column)
    if not isinstance(task, Mapping) or not {"name", "metadata"} <= task.keys():
      return score.missing(f"the row's {self.column} is not that of a task of reasoning-gym")
    text = without_thoughts(completion)
    inside = tagged(text, "answer")
    entry = {
      "question": prompt,
      "answer": example.get("answer"),
      "metadata": copy.deepcopy(task["metadata"]),
    }
    given = reasoning_gym.get_score_answer_fn(task["name"])(
      (text if inside is None else inside).strip(), entry
    )
    return score.of(given)

  def known(self) -> list[Known]:
    row = rows("basic_arithmetic", 1, seed=1)[0]
    return [
      Known(f"<answer>{row['answer']}</answer>", row, True),
      Known("<answer>none</answer>", row, False),
    ]
