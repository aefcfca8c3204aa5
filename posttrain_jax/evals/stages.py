"""What a model that was trained in stages kept: R[t][i] is its result on task i after stage t, higher is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Row = Mapping[str, float]


def forgetting(results: Sequence[Row], task: str) -> float | None:
  """max over t < T of R[t][i] - R[T][i]: what was reached once and is gone.  Chaudhry et al. 2018, eq. 3.

  None where there is no earlier result.

  >>> forgetting([{"a": 0.2}, {"a": 0.9}, {"a": 0.5}], "a")
  0.4
  """
  earlier = [row[task] for row in results[:-1] if task in row]
  return max(earlier) - results[-1][task] if earlier and task in results[-1] else None


def backward_transfer(results: Sequence[Row], tasks: Sequence[str]) -> float | None:
  """mean over i < T of R[T][i] - R[i][i], task i being stage i's.  Lopez-Paz and Ranzato 2017, eq. 3.

  results: a row for each stage, in order.  tasks: the task of each.  None for a single stage.

  >>> backward_transfer([{"a": 0.5, "b": 0.25}, {"a": 0.25, "b": 0.75}], ["a", "b"])
  -0.25
  """
  changes = [results[-1][task] - results[i][task] for i, task in enumerate(tasks[:-1])]
  return sum(changes) / len(changes) if changes else None


def forward_transfer(base: Row, results: Sequence[Row], tasks: Sequence[str]) -> float | None:
  """mean over i > 1 of R[i - 1][i] - base[i]: what earlier stages gave a task before it was trained.

  >>> forward_transfer({"a": 0.0, "b": 0.25}, [{"a": 0.5, "b": 0.5}, {"a": 0.25, "b": 0.75}], ["a", "b"])
  0.25
  """
  changes = [results[i - 1][tasks[i]] - base[tasks[i]] for i in range(1, len(tasks))]
  return sum(changes) / len(changes) if changes else None


def tax(before: Row, after: Row, trained: Sequence[str]) -> float | None:
  """mean over tasks that were not trained of before - after; above 0 ability was paid.  None where there are none.

  >>> tax({"maths": 0.5, "sql": 0.0}, {"maths": 0.25, "sql": 0.9}, ["sql"])
  0.25
  """
  others = [before[task] - after[task] for task in before if task in after and task not in trained]
  return sum(others) / len(others) if others else None
