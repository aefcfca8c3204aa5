"""The greedy soup on a score with a known best point."""

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import merge


def trees(*points):
  return [{"layers": {"norm": {"weight": jnp.asarray([point])}}} for point in points]


def value(tree):
  return np.asarray(tree["layers"]["norm"]["weight"][0], np.float64)


def near(*point):
  return lambda tree: -float(np.linalg.norm(value(tree) - np.asarray(point)))


def test_each_is_kept_that_does_not_make_the_mean_worse():
  models = trees([8.0, 0], [1.0, 1], [0.0, 3], [-1.5, -1])
  soup, kept = merge.greedy_soup(models, near(0, 0))
  # best first: 1, 3, 2, 0; with 3 the mean is nearer, with 2 and with 0 it is further away
  assert kept == [1, 3]
  np.testing.assert_allclose(value(soup), [-0.25, 0], atol=1e-7)


def test_of_equal_scores_the_first_come_first_and_all_are_kept():
  models = trees([2.0], [2.0], [2.0])
  soup, kept = merge.greedy_soup(models, near(0))
  assert kept == [0, 1, 2]
  np.testing.assert_array_equal(value(soup), [2])


def test_how_often_it_scores():
  calls = []

  def score(tree):
    calls.append(float(value(tree)[0]))
    return -calls[-1]

  _, kept = merge.greedy_soup(trees([3.0], [1.0], [2.0]), score)
  assert kept == [1]
  assert calls == [3, 1, 2, 1.5, 2]  # alone, then with the next best, and with the next


def test_the_mean_is_taken_of_the_models_not_of_rounded_means():
  models = [{"w": jnp.asarray([x], jnp.bfloat16)} for x in (256.0, 257.0, 260.0)]
  soup, kept = merge.greedy_soup(models, lambda tree: 0.0, dtype=jnp.float32)
  assert kept == [0, 1, 2]
  exact = sum(float(m["w"][0]) for m in models) / 3
  np.testing.assert_allclose(soup["w"], exact, rtol=1e-6)


def test_a_soup_of_one_has_the_dtype_asked_for_too():
  models = [{"w": jnp.asarray([x], jnp.bfloat16)} for x in (1.0, 3.0)]
  soup, kept = merge.greedy_soup(models, lambda tree: -float(tree["w"][0]), dtype=jnp.float32)
  assert kept == [0]
  assert soup["w"].dtype == jnp.float32


def test_what_is_refused():
  with pytest.raises(ValueError, match="no models"):
    merge.greedy_soup([], lambda tree: 0.0)
  with pytest.raises(ValueError, match=r"score of models\[0\] is NaN"):
    merge.greedy_soup(trees([1.0]), lambda tree: float("nan"))
  scores = iter([1.0, 0.0, float("nan")])
  with pytest.raises(ValueError, match=r"mean of models \[0, 1\] is NaN"):
    merge.greedy_soup(trees([1.0], [2.0]), lambda tree: next(scores))
