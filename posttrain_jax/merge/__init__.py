"""Merging: what several models learned, in one.  Operators on trees of arrays, one tensor at a time.

  merged = merge.ties([sql, maths], base=base, density=0.2)

`OPERATORS` has the same functions of the arrays of one tensor, under mergekit's names of methods.
"""

from posttrain_jax.merge import averages, task_vectors
from posttrain_jax.merge.operators import OPERATORS
from posttrain_jax.merge.soups import greedy_soup
from posttrain_jax.merge.trees import lift, passthrough, tensor_key

linear = lift(averages.linear)
soup = lift(averages.soup)
interpolate = lift(averages.interpolate)
slerp = lift(averages.slerp)
nuslerp = lift(averages.nuslerp)
multislerp = lift(averages.multislerp)
karcher = lift(averages.karcher)
task_arithmetic = lift(task_vectors.task_arithmetic)
ties = lift(task_vectors.ties)
dare = lift(task_vectors.dare)
della = lift(task_vectors.della)
breadcrumbs = lift(task_vectors.breadcrumbs)
model_stock = lift(task_vectors.model_stock)
sce = lift(task_vectors.sce)

__all__ = [
  "OPERATORS",
  "breadcrumbs",
  "dare",
  "della",
  "greedy_soup",
  "interpolate",
  "karcher",
  "lift",
  "linear",
  "model_stock",
  "multislerp",
  "nuslerp",
  "passthrough",
  "sce",
  "slerp",
  "soup",
  "task_arithmetic",
  "tensor_key",
  "ties",
]
