"""The operators by mergekit's names of methods: functions of the arrays of one tensor.

Arrays are given by position (one sequence of them; to slerp, nuslerp and passthrough one by one) and as `base`;
options by name.  To draw, a caller hands in `trees.tensor_key(key, name)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from posttrain_jax.merge import averages, task_vectors

OPERATORS: dict[str, Callable[..., Any]] = {
  "linear": averages.linear,
  "slerp": averages.slerp,
  "nuslerp": averages.nuslerp,
  "multislerp": averages.multislerp,
  "karcher": averages.karcher,
  "passthrough": averages.passthrough,
  "task_arithmetic": task_vectors.task_arithmetic,
  "ties": task_vectors.ties,
  "dare_linear": partial(task_vectors.dare, election=None),
  "dare_ties": partial(task_vectors.dare, election="sum"),
  "della": partial(task_vectors.della, election="sum"),
  "della_linear": partial(task_vectors.della, election=None),
  "breadcrumbs": partial(task_vectors.breadcrumbs, election=None),
  "breadcrumbs_ties": partial(task_vectors.breadcrumbs, election="sum"),
  "model_stock": task_vectors.model_stock,
  "sce": task_vectors.sce,
}
