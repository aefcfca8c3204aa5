"""Masks against sorting, draws against their probabilities."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.merge import sparsify
from tests.marks import few, slow

SIZE = 37


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sorted_mask(x, count):
  """By numpy's stable sort of the flat array: of equal entries the first stay."""
  flat = np.abs(x).ravel()
  mask = np.zeros(flat.size, bool)
  mask[np.argsort(-flat, kind="stable")[:count]] = True
  return mask.reshape(x.shape)


@jax.jit
def largest(x, count):
  return sparsify.mask(x, sparsify.largest(x, count))


@pytest.mark.parametrize("count", [0, 1, 2, 17, SIZE - 1, SIZE])
@pytest.mark.parametrize(
  "x",
  [
    normal(SIZE),
    np.round(normal(SIZE)),  # a few levels, each many times
    np.zeros(SIZE, np.float32),
    normal(SIZE) * 1e-42,  # subnormal
    np.full(SIZE, -2.5, np.float32),
    normal(SIZE, seed=1) * np.float32(1e30),
  ],
  ids=["normal", "levels", "zeros", "tiny", "equal", "huge"],
)
def test_largest_is_what_sorting_finds(x, count):
  np.testing.assert_array_equal(largest(x, count), sorted_mask(x, count))


@pytest.mark.parametrize(
  "shape",
  [(), slow((1,)), (5, 7), slow((1, 6)), slow((6, 1)), (2, 3, 4), slow((0,)), (0, 3), slow((3, 0))],
)
@pytest.mark.parametrize("levels", few([1, 4, 1000], 4))
def test_largest_of_any_shape_counts_in_the_flat_order(shape, levels):
  x = np.round(levels * normal(*shape)).astype(np.float32)
  for count in range(x.size + 1):
    np.testing.assert_array_equal(largest(x, count), sorted_mask(x, count))
  half = x.astype(jnp.bfloat16)
  wide = half.astype(np.float32)
  np.testing.assert_array_equal(largest(half, x.size // 2), sorted_mask(wide, x.size // 2))


@pytest.mark.slow
def test_accelerators_find_the_same_by_their_own_ways(monkeypatch):
  x = np.round(3 * normal(4, 5, 6))
  expected = sparsify.by_rank(jnp.asarray(x), 0.5, 0.2)
  monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x))
  for count in range(0, x.size, 7):
    mask = sparsify.mask(jnp.asarray(x), sparsify.largest(jnp.asarray(x), count))
    np.testing.assert_array_equal(mask, sorted_mask(x, count))
  found = jax.jit(sparsify.by_rank)(jnp.asarray(x), 0.5, 0.2)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_count_may_be_traced():
  x = jnp.asarray(normal(SIZE))
  mask = sparsify.mask(x, jax.jit(sparsify.largest)(x, 5))
  assert int(mask.sum()) == 5


def test_middle_is_between_two_ranks():
  x = normal(SIZE)
  found = np.asarray(sparsify.mask(jnp.asarray(x), sparsify.middle(jnp.asarray(x), 10, 3)))
  ranks = np.argsort(np.argsort(-np.abs(x)))
  np.testing.assert_array_equal(found, (ranks >= 3) & (ranks < 13))


@pytest.mark.parametrize(
  ("density", "size", "least", "expected"),
  [
    (0.2, 10, 0, 2),
    (0.29, 10, 0, 2),
    (0.0, 10, 1, 0),
    (0.01, 10, 1, 1),
    (0.5, 0, 1, 0),
    (1, 7, 1, 7),
  ],
)
def test_kept_of(density, size, least, expected):
  assert sparsify.kept_of(density, size, least=least) == expected


def test_draws_are_those_of_the_flat_array():
  key = jax.random.key(3)
  flat = jax.random.uniform(key, (12,)) < 0.4
  np.testing.assert_array_equal(sparsify.drawn(key, (3, 4), 0.4), flat.reshape(3, 4))
  assert not sparsify.drawn(key, (50,), 0.0).any()
  assert sparsify.drawn(key, (50,), 1.0).all()


@pytest.mark.parametrize("impl", few(["threefry2x32", "rbg"], "rbg"))
def test_draws_are_jax_randoms(impl):
  key = jax.random.key(11, impl=impl)
  for shape in ((), (5,), (40, 30), (3, 1, 7)):
    expected = jax.random.uniform(key, shape) < 0.3
    np.testing.assert_array_equal(
      jax.jit(sparsify.drawn, static_argnums=1)(key, shape, 0.3), expected
    )
  chances = jax.random.uniform(jax.random.key(1), (40, 30))
  expected = jax.random.uniform(key, (40, 30)) < chances
  np.testing.assert_array_equal(sparsify.drawn(key, (40, 30), chances), expected)


def test_draws_have_their_probability():
  count, density = 100_000, 0.3
  share = float(sparsify.drawn(jax.random.key(0), (count,), density).mean())
  assert share == pytest.approx(density, abs=4 * (density * (1 - density) / count) ** 0.5)


def test_by_rank_is_even_in_each_row():
  x = normal(3, 5)
  found = np.asarray(sparsify.by_rank(jnp.asarray(x), 0.5, 0.2))
  for row, probability in zip(np.abs(x), found):
    np.testing.assert_allclose(probability[np.argsort(row)], [0.3, 0.4, 0.5, 0.6, 0.7], rtol=1e-6)
  deep = sparsify.by_rank(jnp.asarray(x).reshape(1, 3, 5), 0.5, 0.2)
  np.testing.assert_array_equal(deep[0], found)
  equal = sparsify.by_rank(jnp.asarray([[1.0, -1.0, 0.5], [2.0, 2.0, 2.0]]), 0.5, 0.2)
  np.testing.assert_allclose(equal, [[0.5, 0.7, 0.3], [0.3, 0.5, 0.7]], rtol=1e-6)
  vector = sparsify.by_rank(jnp.asarray([0.1, -3.0, 1.0]), 0.5, 0.2)
  np.testing.assert_allclose(vector, [0.3, 0.7, 0.5], rtol=1e-6)
  np.testing.assert_allclose(sparsify.by_rank(jnp.ones((4, 1)), 0.5, 0.2), 0.5)
  np.testing.assert_allclose(sparsify.by_rank(jnp.float32(2.0), 0.5, 0.2), 0.5)
  assert sparsify.by_rank(jnp.ones((3, 0)), 0.5, 0.2).shape == (3, 0)
  many = np.round(normal(70, 9), 1)
  with mock.patch.object(sparsify, "BLOCK", 64):  # rows in blocks, and some left over
    found = sparsify.by_rank(jnp.asarray(many), 0.5, 0.2)
  order = np.argsort(np.argsort(np.abs(many), axis=1, kind="stable"), axis=1)
  np.testing.assert_allclose(found, 0.3 + order * 0.05, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_outside_and_inside_a_program_are_those_of_a_stable_sort(dtype):
  x, base = (jnp.asarray(np.round(8 * normal(2, 35, 9, seed=i)) / 8, dtype) for i in range(2))
  delta = np.abs(np.asarray(x, np.float32) - np.asarray(base, np.float32))
  order = np.argsort(np.argsort(delta, axis=-1, kind="stable"), axis=-1)
  with mock.patch.object(sparsify, "SORTED", 64):  # ten blocks of 7 rows
    np.testing.assert_array_equal(sparsify.ranks(x, base), order)
  np.testing.assert_array_equal(jax.jit(sparsify.ranks)(x, base), order)


def test_a_row_may_have_more_entries_than_16_bits_count():
  x = np.arange(2**16 + 1, dtype=np.float32)[::-1]
  np.testing.assert_array_equal(sparsify.ranks(jnp.asarray(x)), x)


def test_the_l1_scale_keeps_the_norm():
  x = normal(40)
  mask = np.arange(40) % 3 == 0
  scale = lambda x, mask: float(sparsify.l1_scale(jnp.asarray(x), jnp.asarray(mask)))
  assert scale(x, mask) == pytest.approx(np.abs(x).sum() / np.abs(x[mask]).sum(), rel=1e-6)
  assert scale(x, np.zeros(40, bool)) == 1
  assert scale(x * 1e-12, mask) == 1  # a sum below 1e-7 is no norm to match
  half = sparsify.largest(jnp.asarray(x), 20)
  kept = sorted_mask(x, 20)
  found = float(sparsify.l1_scale(jnp.asarray(x), half))
  assert found == pytest.approx(np.abs(x).sum() / np.abs(x[kept]).sum(), rel=1e-6)
