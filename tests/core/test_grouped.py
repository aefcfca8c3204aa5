"""Grouped products against a product with each row's own matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core import grouped

# rows of each of four groups: even, a group of none, all in one, none at all, none left over
SIZES = {
  "even": [10, 10, 10, 10],
  "one empty": [17, 0, 22, 1],
  "all in one": [0, 40, 0, 0],
  "nobody": [0, 0, 0, 0],
  "rows of nobody": [5, 9, 0, 12],
}
ROWS, IN, OUT = 40, 6, 5


def plain(x, w, sizes):
  """x[i] @ w[g(i)], one matrix a row, and 0 behind the last group."""
  group = np.repeat(np.arange(len(sizes)), sizes)
  whole = jnp.einsum("ri,rio->ro", x[: len(group)], w[group])
  return jnp.pad(whole, ((0, len(x) - len(group)), (0, 0)))


def drawn(seed=0):
  draw = np.random.default_rng(seed)
  return (jnp.asarray(draw.standard_normal(s), jnp.float32) for s in ((ROWS, IN), (4, IN, OUT)))


@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients_are_those_of_each_rows_own_matrix(name):
  x, w = drawn()
  sizes = np.asarray(SIZES[name], np.int32)
  weigh = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, OUT)), jnp.float32)
  ours = lambda x, w, sizes: grouped.product(x, w, grouped.groups(sizes, 10))
  np.testing.assert_allclose(jax.jit(ours)(x, w, sizes), plain(x, w, sizes), rtol=1e-5, atol=1e-6)
  gradients = lambda f: jax.grad(lambda x, w: jnp.sum(f(x, w) * weigh), argnums=(0, 1))(x, w)
  got, wanted = (
    gradients(lambda x, w: ours(x, w, sizes)),
    gradients(lambda x, w: plain(x, w, sizes)),
  )
  for one, other in zip(got, wanted):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_only_blocks_with_rows_are_multiplied():
  of = grouped.groups(jnp.asarray([17, 0, 22, 1]), 10)
  assert of.block == 8
  assert of.first.tolist() == [0, 3, 3, 6, 7]


def test_rows_are_put_in_order_and_back_with_their_gradients():
  x = jnp.arange(12.0).reshape(6, 2)
  order = jnp.asarray([3, 1, 0, 5, 2, 4])
  inverse = jnp.argsort(order)
  np.testing.assert_array_equal(
    grouped.permuted(grouped.permuted(x, order, inverse), inverse, order), x
  )
  got = jax.grad(lambda x: jnp.sum(grouped.permuted(x, order, inverse) * x))(x)
  np.testing.assert_allclose(got, x[order] + x[inverse])
