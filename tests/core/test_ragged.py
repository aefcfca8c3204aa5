"""Products that a backend has for sorted rows, and the gradients that are made here, against each row's own matrix."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from posttrain_jax.core import grouped, ragged
from posttrain_jax.plan import topology
from tests.core.test_grouped import OUT, ROWS, SIZES, drawn, plain
from tests.marks import needs_libtpu


@pytest.mark.parametrize("name", SIZES)
def test_gradients_are_those_of_each_rows_own_matrix(name):
  """Of the rows that have a group; what is behind the last means nothing."""
  x, w = drawn()
  sizes = np.asarray(SIZES[name], np.int32)
  used = sizes.sum()
  weigh = np.random.default_rng(1).standard_normal((ROWS, OUT)).astype(np.float32)
  weigh[used:] = 0
  ours = lambda x, w: ragged.dot(x, w, jnp.asarray(sizes), jnp.float32)
  np.testing.assert_allclose(ours(x, w)[:used], plain(x, w, sizes)[:used], rtol=1e-5, atol=1e-6)
  gradients = lambda f: jax.grad(lambda x, w: jnp.sum(f(x, w) * weigh), argnums=(0, 1))(x, w)
  got, wanted = gradients(ours), gradients(lambda x, w: plain(x, w, sizes))
  np.testing.assert_allclose(got[0][:used], wanted[0][:used], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got[1], wanted[1], rtol=1e-5, atol=1e-5)


def test_gradients_have_the_dtypes_of_what_they_are_of():
  x, w = drawn()
  sizes = jnp.asarray(SIZES["even"])
  loss = lambda x, w: jnp.sum(ragged.dot(x, w, sizes, jnp.bfloat16) ** 2)
  exact = jax.grad(lambda x, w: jnp.sum(plain(x, w, SIZES["even"]) ** 2), (0, 1))(x, w)
  found = jax.grad(loss, (0, 1))(x.astype(jnp.bfloat16), w)
  assert [d.dtype for d in found] == [jnp.bfloat16, jnp.float32]
  for one, wanted in zip(found, exact):
    error = np.linalg.norm(np.asarray(one, np.float32) - wanted)
    assert error <= 0.02 * np.linalg.norm(wanted)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chips", ["v5e:2x2", "v5p:2x2x1"])
def test_no_product_of_a_tpu_is_of_every_row_with_every_matrix(chips):
  """64 groups of 1,024 rows: each row's own products forward and backward, and blocks for the matrices' gradient."""
  groups, rows, width = 64, 1024, 256
  where = SingleDeviceSharding(topology.target(chips).devices[0])
  of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  x, w = of((rows, width), jnp.bfloat16), of((groups, width, width), jnp.float32)

  def loss(x, w, sizes):
    y = grouped.product(x, w, grouped.groups(sizes, rows // groups))
    return jnp.sum(jnp.square(y.astype(jnp.float32)))

  run = jax.jit(jax.grad(loss, (0, 1)))
  compiled = run.lower(x, w, of((groups,), jnp.int32)).compile()
  text = compiled.as_text()
  assert (
    len(re.findall(r"%ragged-dot-none\S* = ", text)) == 2
  )  # the products, and the rows' gradient
  dense = re.findall(rf"= \w+\[{groups},{width},{width}\]\S* (?:convolution|dot)\(", text)
  assert dense == []
  # what a loop does is counted once
  assert compiled.cost_analysis()["flops"] < 3 * 2 * rows * width * width
