"""Averages along lines and spheres in closed form, in numpy's float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import merge
from posttrain_jax.merge import averages

SHAPE = (4, 6)


@pytest.fixture(scope="module")
def three():
  return list(np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32))


def close(found, expected, rtol=2e-6):
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def wide(arrays):
  return [np.asarray(x, np.float64) for x in arrays]


# --- straight lines --------------------------------------------------------------------------------------------------


def test_linear(three):
  a, b, c = wide(three)
  close(averages.linear(three, weights=[1, 2, -0.5]), (a + 2 * b - 0.5 * c) / 2.5)
  close(averages.linear(three, weights=[1, 2, -0.5], normalize=False), a + 2 * b - 0.5 * c)
  close(averages.linear(three), (a + b + c) / 3)
  close(averages.linear(three, weights=2.0, normalize=False), 2 * (a + b + c))
  np.testing.assert_array_equal(averages.soup(three), averages.linear(three))


def test_interpolate(three):
  a, b, _ = wide(three)
  np.testing.assert_array_equal(averages.interpolate(three[0], three[1], t=0), three[0])
  np.testing.assert_array_equal(averages.interpolate(three[0], three[1], t=1), three[1])
  close(averages.interpolate(three[0], three[1], t=0.3), 0.7 * a + 0.3 * b)


def test_sums_are_of_float32_whatever_the_files_hold():
  big, small = jnp.full(8, 256.0, jnp.bfloat16), jnp.full(8, 1.0, jnp.bfloat16)
  found = averages.linear([big, small, small], normalize=False)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, 258.0)  # in bfloat16 256 + 1 is 256
  assert averages.linear([big, small], dtype=jnp.float32).dtype == jnp.float32
  assert averages.linear([small.astype(jnp.float16), big]).dtype == jnp.float16


def test_passthrough(three):
  np.testing.assert_array_equal(averages.passthrough(three[0]), three[0])
  close(averages.passthrough(three[0], scale=0.25), 0.25 * wide(three)[0])


# --- two models on a sphere ------------------------------------------------------------------------------------------


def arc(a, b, t):
  cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
  angle = np.arccos(cosine)
  return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp(three, t):
  a, b, _ = wide(three)
  close(averages.slerp(three[0], three[1], t=t), arc(a, b, t))


def test_slerp_stays_on_the_sphere():
  a, b = np.zeros((2, 5), np.float32)
  a[0] = b[1] = 3
  half = np.asarray(averages.slerp(a, b, t=0.5))
  np.testing.assert_allclose(half[:2], 3 / np.sqrt(2), rtol=1e-6)
  assert np.linalg.norm(averages.linear([a, b])) < 0.8 * np.linalg.norm(half)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_slerp_keeps_lengths_of_any_size(three, size):
  a, b = (np.float32(size) * x for x in three[:2])
  close(averages.slerp(a, b, t=0.3), arc(*wide([a, b]), 0.3), rtol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, -0.5])
def test_slerp_of_parallel_and_opposite_vectors_is_a_straight_line(three, factor):
  a = three[0]
  found = averages.slerp(a, factor * a, t=0.25)
  close(found, (0.75 + 0.25 * factor) * wide([a])[0])
  axis = np.float32([2, 0])  # a cosine without rounding: closer to 1 than 1e-16, or not at all
  found = averages.nuslerp(axis, factor * axis, weights=[3, 1])
  close(found, (0.75 + 0.25 * factor) * wide([axis])[0])


def test_the_threshold_decides_what_is_parallel(three):
  a, b = three[0], three[0] + 0.02 * three[1]  # an angle of about 0.02, a cosine of 0.9998
  line = averages.interpolate(a, b, t=0.5)
  np.testing.assert_allclose(averages.slerp(a, b, t=0.5), line, rtol=1e-6, atol=1e-7)
  curved = averages.slerp(a, 5 * b, t=0.5, threshold=1.0)
  close(curved, arc(*wide([a, 5 * b]), 0.5), rtol=1e-5)
  assert np.abs(curved - averages.interpolate(a, 5 * b, t=0.5)).max() > 1e-5


def test_slerp_of_zeros_is_finite(three):
  zeros = np.zeros(SHAPE, np.float32)
  close(averages.slerp(zeros, three[0], t=0.5), np.sqrt(0.5) * wide(three)[0])
  np.testing.assert_array_equal(averages.slerp(zeros, zeros, t=0.5), 0)


def test_nuslerp_of_whole_arrays_rows_and_columns(three):
  a, b, base = wide(three)
  options = dict(weights=[1, 3])
  close(averages.nuslerp(three[0], three[1], **options), arc(a, b, 0.75))
  rows = np.stack([arc(x, y, 0.75) for x, y in zip(a, b)])
  close(averages.nuslerp(three[0], three[1], along="in", **options), rows)
  columns = np.stack([arc(x, y, 0.75) for x, y in zip(a.T, b.T)]).T
  close(averages.nuslerp(three[0], three[1], along="out", **options), columns)
  moved = averages.nuslerp(three[0], three[1], base=three[2], **options)
  close(moved, base + arc(a - base, b - base, 0.75))
  close(averages.nuslerp(three[0], three[1]), arc(a, b, 0.5))


def test_nuslerp_of_equal_models_is_the_model(three):
  close(averages.nuslerp(three[0], three[0], base=three[1]), wide(three)[0])
  close(averages.nuslerp(three[0], three[0], along="in"), wide(three)[0])


# --- several models on a sphere --------------------------------------------------------------------------------------


def tangent_step(points, weights):
  norms = [np.linalg.norm(p) for p in points]
  units = [p / n for p, n in zip(points, norms)]
  mean = sum(w * u for w, u in zip(weights, units))
  mean = mean / np.linalg.norm(mean)
  tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units))
  angle = np.linalg.norm(tangent)
  result = np.cos(angle) * mean + np.sin(angle) * tangent / angle
  return result * sum(w * n for w, n in zip(weights, norms))


def test_multislerp(three):
  a, b, c = wide(three)
  found = averages.multislerp(three, weights=[1, 2, 1])
  close(found, tangent_step([a, b, c], [0.25, 0.5, 0.25]))
  base = 0.5 * a - c
  moved = averages.multislerp(three[:2], base=base.astype(np.float32), weights=[1, 2])
  base = base.astype(np.float32).astype(np.float64)
  close(moved, base + tangent_step([a - base, b - base], [1 / 3, 2 / 3]))
  loose = averages.multislerp(three, weights=[0.5, 0.2, 0.1], normalize=False)
  close(loose, tangent_step([a, b, c], [0.5, 0.2, 0.1]))
  np.testing.assert_array_equal(averages.multislerp([three[0]]), three[0])


def test_multislerp_of_two_alike_is_slerp():
  a, b = np.random.default_rng(1).normal(size=(2, 30)).astype(np.float32)
  b *= np.linalg.norm(a) / np.linalg.norm(b)
  close(averages.multislerp([a, b]), arc(*wide([a, b]), 0.5))


def test_multislerp_takes_the_straight_line_where_directions_cancel(three):
  a = three[0]
  close(averages.multislerp([a, -3 * a]), -wide([a])[0])
  corners = np.asarray([[1.0, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
  np.testing.assert_allclose(
    averages.multislerp([2 * corners[0], *corners[1:]]), [0.25, 0], atol=1e-7
  )
  same = averages.multislerp([a, a, a], base=a)  # what training left alone
  np.testing.assert_array_equal(same, a)


def test_karcher_is_where_the_pulls_cancel(three):
  weights = np.asarray([0.2, 0.5, 0.3])
  found = np.asarray(averages.karcher(three, weights=weights, max_iter=50), np.float64)
  points = wide(three)
  norms = np.asarray([np.linalg.norm(p) for p in points])
  np.testing.assert_allclose(np.linalg.norm(found), weights @ norms, rtol=1e-5)
  mean = found / np.linalg.norm(found)
  pull = 0
  for w, p, n in zip(weights, points, norms):
    cosine = (p / n * mean).sum()
    angle = np.arccos(cosine)
    pull = pull + w * angle / np.sin(angle) * (p / n - cosine * mean)
  assert np.linalg.norm(pull) < 2e-5


def test_karcher_of_two_is_the_middle_of_the_arc():
  a, b = np.eye(3, dtype=np.float32)[:2]
  np.testing.assert_allclose(
    averages.karcher([2 * a, 4 * b]), [3 / np.sqrt(2)] * 2 + [0], rtol=1e-6
  )
  quarter = averages.karcher([a, b], weights=[2, 1], max_iter=30)
  np.testing.assert_allclose(quarter, [np.cos(np.pi / 6), np.sin(np.pi / 6), 0], rtol=1e-5)


def test_karcher_leaves_out_what_has_no_direction(three):
  zeros = np.zeros(SHAPE, np.float32)
  close(averages.karcher([three[0], zeros]), wide(three)[0] / 2)
  np.testing.assert_array_equal(averages.karcher([zeros, zeros]), 0)
  faint = np.float32(1e-7) * three[1]  # a norm of no more than tol
  close(averages.karcher([three[0], faint]), wide(three)[0] / 2)
  np.testing.assert_array_equal(averages.karcher([faint, faint]), 0)
  # where directions cancel, the first that is one
  axis = np.float32([2, 0])
  close(averages.karcher([0 * axis, axis, -axis]), wide([axis])[0] * 2 / 3)
  np.testing.assert_array_equal(averages.karcher([three[0]]), three[0])


# --- in general ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "merged",
  [
    lambda x: averages.linear([x, x, x], weights=[0.3, 0.5, 0.2]),
    lambda x: averages.soup([x] * 3),
    lambda x: averages.interpolate(x, x, t=0.7),
    lambda x: averages.slerp(x, x, t=0.7),
    lambda x: averages.nuslerp(x, x, weights=[1, 2]),
    lambda x: averages.multislerp([x, x, x]),
    lambda x: averages.karcher([x, x, x]),
  ],
)
def test_equal_models_are_their_own_merge(merged, three):
  close(merged(three[0]), wide(three)[0])


def test_operators_run_inside_jit(three):
  for function in (functools.partial(averages.slerp, t=0.3), averages.nuslerp):
    np.testing.assert_allclose(
      jax.jit(function)(*three[:2]), function(*three[:2]), rtol=1e-5, atol=1e-6
    )
  for function in (averages.linear, averages.multislerp, averages.karcher):
    weighted = lambda xs, w, function=function: function(xs, weights=w)
    found = jax.jit(weighted)(three, jnp.asarray([1.0, 2.0, 1.0]))
    np.testing.assert_allclose(found, function(three, weights=[1, 2, 1]), rtol=1e-5, atol=1e-6)
  slope = jax.grad(lambda w: averages.linear(three, weights=w)[0, 0])(jnp.ones(3))
  expected = [(x[0, 0] - np.mean([y[0, 0] for y in three])) / 3 for x in three]
  np.testing.assert_allclose(slope, expected, rtol=1e-4)


@pytest.mark.parametrize(
  ("call", "said"),
  [
    (lambda a, b: averages.linear([a, b], weights=[1, 2, 3]), "weights has 3 values for 2 models"),
    (lambda a, b: averages.linear([a, b], weights=[0, 0]), "all weights are zero"),
    (lambda a, b: averages.linear([a, b], weights=[1, -1]), "sum to zero"),
    (lambda a, b: averages.linear([a, b], weights=[1, float("nan")]), "finite"),
    (lambda a, b: averages.linear([]), "at least 1"),
    (
      lambda a, b: averages.linear([a, b[:2]]),
      r"models\[1\] has shape \(2, 6\), models\[0\] \(4, 6\)",
    ),
    (lambda a, b: averages.linear([a.astype(int), b]), "int64 cannot be merged"),
    (lambda a, b: averages.interpolate(a, b, t=1.5), "t=1.5: .*task_arithmetic"),
    (lambda a, b: averages.slerp(a, b, t=-0.1), "t=-0.1: write a number in"),
    (lambda a, b: averages.slerp(a, b, t=float("nan")), "t=nan"),
    (
      lambda a, b: averages.nuslerp(a, b, along="rows"),
      "along='rows': write 'all' or 'in' or 'out'",
    ),
    (lambda a, b: averages.nuslerp(a, b, weights=[1, -1]), "sum to zero"),
    (lambda a, b: averages.multislerp([a, b], weights=[0, 0]), "all weights are zero"),
    (lambda a, b: averages.karcher([a, b], weights=[2, -1]), "at least 0"),
  ],
)
def test_what_is_refused(call, said, three):
  with pytest.raises(ValueError, match=said):
    call(*three[:2])


def test_zero_weights_may_be_added():
  found = merge.linear([jnp.ones(2), jnp.ones(2)], weights=[0, 0], normalize=False)
  np.testing.assert_array_equal(found, 0)
