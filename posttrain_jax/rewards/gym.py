"""Tasks of reasoning-gym: rows that it draws, and its own scores of answers to them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from typing import Any

from posttrain_jax.rewards import score
from posttrain_jax.rewards.compared import tagged
from posttrain_jax.rewards.matching import without_thoughts
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Known, Prompt, Tried

COLUMN = "gym"  # of the rows: which draw of which task a question is


def check() -> None:
  """Raises ValueError where reasoning-gym is not installed."""
  if importlib.util.find_spec("reasoning_gym") is None:
    raise ValueError("gym needs reasoning-gym: pip install 'posttrain-jax[gym]'")


def rows(name: str, size: int, *, seed: int = 0, **config: Any) -> list[dict[str, Any]]:
  """Questions of a task of reasoning-gym: prompt, answer (None where many are right) and `gym`.

  `gym` says how the question was drawn, from which it is drawn again when an answer is scored: what tasks keep to score
  an answer is not always JSON, and their scores depend on their options.

  Args:
    config: the task's own options, such as `min_digits`.

  Raises:
    ValueError: it is not installed, or has no task or option of that name.
  """
  check()
  try:
    options = json.dumps(config)  # as text: tables give every row the keys of all of them
    task = _task(name, size, seed, options)
  except (TypeError, ValueError, AssertionError) as error:
    raise ValueError(f"gym: {name}: {error}") from error
  return [
    {
      "prompt": task[i]["question"],
      "answer": task[i]["answer"],
      COLUMN: {"name": name, "size": size, "seed": seed, "index": i, "config": options},
    }
    for i in range(size)
  ]


@functools.lru_cache(maxsize=64)
def _task(name: str, size: int, seed: int, config: str) -> Any:
  import reasoning_gym

  return reasoning_gym.create_dataset(name, size=size, seed=seed, **json.loads(config))


@dataclasses.dataclass(frozen=True)
class Gym(Tried):
  """What the row's task says of the answer, in [0, 1]: of what its last `<answer>` holds, or of all of it."""

  def __reduce__(self) -> tuple[Callable[[], Gym], tuple[()]]:
    return _loaded, ()

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    drawn = example.get(COLUMN)
    if (
      not isinstance(drawn, Mapping)
      or not {"name", "size", "seed", "index", "config"} <= drawn.keys()
    ):
      return score.missing(f"the row's {COLUMN} is not that of a task of reasoning-gym")
    task = _task(drawn["name"], drawn["size"], drawn["seed"], drawn["config"])
    entry = task[drawn["index"]]
    if entry["answer"] != example.get("answer"):
      return score.missing(
        "this reasoning-gym draws another question than the row's; draw the rows anew"
      )
    text = without_thoughts(completion)
    inside = tagged(text, "answer")
    return score.of(task.score_answer((text if inside is None else inside).strip(), entry))

  def known(self) -> list[Known]:
    (row,) = rows("basic_arithmetic", 1, seed=1)
    return [
      Known(f"<answer>{row['answer']}</answer>", row, True),
      Known("<answer>none</answer>", row, False),
    ]


def _loaded() -> Gym:
  """A worker imports reasoning-gym as it reads this, in no call's time."""
  import reasoning_gym  # noqa: F401

  return Gym()
