"""The greedy soup: which of many models are worth averaging, as a held-out score has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from posttrain_jax.merge import averages
from posttrain_jax.merge.trees import lift

_soup = lift(averages.soup)


def greedy_soup(
  models: Sequence[Any], score: Callable[[Any], float], *, dtype: Any = None
) -> tuple[Any, list[int]]:
  """(the mean of the models kept, their places in models): best first, each kept where the mean gets no worse.

  Wortsman et al. 2022 (arXiv 2203.05482), recipe 1.  Scores 2 n - 1 trees for n models; means are taken in float32 of
  all that are kept, so that nothing is rounded twice.

  Args:
    score: of a tree on held-out data; higher is better.

  Raises:
    ValueError: no models, trees that do not agree, or a score that is no number.

  >>> import jax.numpy as jnp
  >>> models = [{"w": jnp.array([x])} for x in (0.0, 9.0, 4.0)]
  >>> soup, kept = greedy_soup(models, lambda tree: -abs(float(tree["w"][0]) - 2))
  >>> soup["w"].tolist(), kept
  ([2.0], [0, 2])
  """
  models = list(models)
  if not models:
    raise ValueError("no models: write at least one")
  alone = [_number(score(model), f"models[{i}]") for i, model in enumerate(models)]
  best, *others = sorted(range(len(models)), key=lambda i: -alone[i])
  kept, soup, reached = [best], _soup([models[best]], dtype=dtype), alone[best]
  for i in others:
    tried = _soup([models[j] for j in (*kept, i)], dtype=dtype)
    value = _number(score(tried), f"the mean of models {[*kept, i]}")
    if value >= reached:
      kept, soup, reached = [*kept, i], tried, value
  return soup, kept


def _number(score, of):
  score = float(score)
  if math.isnan(score):
    raise ValueError(f"the score of {of} is NaN: a soup is chosen by numbers, higher is better")
  return score
