"""Plain arrays, transposed views and adapted weights all multiply alike."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import PartitionSpec as P

from posttrain_jax.adapters.lora import LoRA
from posttrain_jax.adapters.node import Change
from posttrain_jax.core import sharding, weight
from posttrain_jax.core.weight import Adapted, Transposed, Weight

IN, OUT = 4, 6


@struct.dataclass
class Doubled(Change):
  """2 W, the smallest adapter node."""

  def apply(self, x, base, key=None):
    return 2 * weight.linear(x, base)

  def rows(self, ids, base, key=None):
    return 2 * weight.embed(ids, base)

  def dense(self, base, dtype=None):
    return 2 * weight.dense(base, dtype)


def drawn(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def plain():
  return drawn(IN, OUT)


def transposed():
  return Transposed(drawn(OUT, IN))


def twice_transposed():
  return Transposed(Transposed(drawn(IN, OUT)))


def adapted():
  return Adapted(drawn(IN, OUT), Doubled())


def adapted_twice():
  return Adapted(Adapted(drawn(IN, OUT), Doubled()), Doubled())


def transposed_adapted():
  return Transposed(Adapted(drawn(OUT, IN), Doubled()))


WEIGHTS = [plain, transposed, twice_transposed, adapted, adapted_twice, transposed_adapted]
every = pytest.mark.parametrize("make", WEIGHTS, ids=lambda f: f.__name__)


@every
def test_linear_is_a_product_with_dense(make):
  w = make()
  matrix = np.asarray(weight.dense(w), np.float64)
  assert weight.shape(w) == matrix.shape == (IN, OUT)
  for lead in [(), (3,), (2, 3), (2, 1, 3)]:
    x = drawn(*lead, IN, seed=1)
    found = weight.linear(x, w)
    assert found.shape == (*lead, OUT)
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ matrix, rtol=1e-5, atol=1e-6)


@every
def test_embed_is_rows_of_dense(make):
  w = make()
  ids = np.array([[0, 3], [2, 2]])
  np.testing.assert_allclose(weight.embed(ids, w), weight.dense(w)[ids], rtol=1e-6)


@every
def test_the_product_is_in_the_operands_type_and_dense_in_the_asked(make):
  w = make()
  assert weight.linear(drawn(2, IN).astype(jnp.bfloat16), w).dtype == jnp.bfloat16
  assert weight.dense(w, jnp.bfloat16).dtype == jnp.bfloat16
  assert weight.dense(w).dtype == jnp.float32


@every
def test_stacked_weights_scan_as_slices(make):
  one = make()
  stack = jax.tree.map(lambda a: jnp.stack([a, a + 1, 2 * a]), one)
  assert weight.shape(stack) == (3, IN, OUT)
  x = drawn(5, IN, seed=1)
  _, found = jax.lax.scan(lambda _, w: (None, weight.linear(x, w)), None, stack)
  for i in range(3):
    layer = jax.tree.map(lambda a: a[i], stack)  # noqa: B023
    np.testing.assert_allclose(found[i], weight.linear(x, layer), rtol=1e-5, atol=1e-6)


def test_ids_beyond_the_table_read_its_last_row_not_nan():
  table = drawn(3, 2)
  np.testing.assert_array_equal(weight.embed(jnp.array([7]), table)[0], table[2])


def test_wrappers_are_weights_and_arrays_need_not_be():
  assert isinstance(adapted(), Weight)
  assert isinstance(transposed(), Weight)
  assert not isinstance(plain(), Weight)


def test_unadapted_takes_every_adapter_off():
  base = drawn(IN, OUT)
  assert weight.unadapted(base) is base
  assert weight.unadapted(Adapted(Adapted(base, Doubled()), Doubled())) is base


def test_operands_are_flat_without_a_mesh_and_not_with_one():
  """Flat is 9x quicker for the gradient of a low-rank factor on a CPU; on a mesh it gathers sharded time."""
  x, w = drawn(8, 3, IN), drawn(IN, OUT)

  def ranks():
    text = jax.jit(lambda x: weight.linear(x, w)).lower(x).as_text()
    return [
      line.count("x") for line in re.findall(r"dot_general .* : \(tensor<([\dx]+)xf32>", text)
    ]

  assert ranks() == [1]
  with jax.set_mesh(sharding.mesh(fsdp=8)):
    assert ranks() == [2]
    found = weight.linear(x, w)
  np.testing.assert_allclose(found, np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-6)


def test_a_bound_weight_lies_as_its_base_and_its_node_do():
  base = drawn(IN, OUT)
  pair = LoRA(drawn(IN, 2), drawn(2, OUT), jnp.float32(1))
  spec, over = P("fsdp", "tensor"), Adapted(Transposed(base.T), pair)
  specs = over.partition_specs(spec)
  assert jax.tree.structure(specs) == jax.tree.structure(over)
  assert specs.base.base == P("tensor", "fsdp")
  assert (specs.node.a, specs.node.b) == (P("fsdp", None), P(None, ("tensor", "fsdp")))


# in bfloat16 ----------------------------------------------------------------------------------------------------------

WIDE, ROWS, NARROW = 48, 24, 5


def rounded(x):
  return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def halves(w):
  """The ways to say that a product is in bfloat16, with what each gives of w.T."""
  plain = w.astype(jnp.bfloat16)
  return {
    "plain": plain,
    "bits": weight.bits(w),
    "trained": weight.Bfloat16(w),
    "turned": Transposed(plain.T),
    "turned bits": Transposed(weight.bits(w.T)),
  }


@pytest.mark.parametrize("kind", ["plain", "bits", "trained", "turned", "turned bits"])
@pytest.mark.parametrize("lead", [(), (1,), (ROWS,), (2, 3)])
def test_a_product_in_bfloat16_is_that_of_rounded_operands(kind, lead):
  """Forward and backward; nothing but the operands is rounded, of which the cotangent is one."""
  x, w, g = drawn(*lead, WIDE), drawn(WIDE, 8, seed=1), drawn(*lead, 8, seed=2)
  y, back = jax.vjp(lambda x: weight.linear(x, halves(w)[kind]), x)
  assert y.dtype == jnp.float32
  near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  near(y, rounded(x) @ rounded(w))
  near(back(g)[0], rounded(g) @ rounded(w).T)
  if lead:  # and it is not the product of what was not rounded
    assert np.max(np.abs(y - np.asarray(x, np.float64) @ np.asarray(w, np.float64))) > 1e-3


@pytest.mark.parametrize("columns", [NARROW, 2 * WIDE])
@pytest.mark.parametrize("turned", [False, True])
def test_the_gradient_of_what_trains_is_not_rounded(columns, turned):
  x, g = drawn(2, ROWS, WIDE), drawn(2, ROWS, columns, seed=2)
  w = drawn(columns, WIDE, seed=1) if turned else drawn(WIDE, columns, seed=1)
  of = lambda w: Transposed(weight.Bfloat16(w)) if turned else weight.Bfloat16(w)
  (found,) = jax.vjp(lambda w: weight.linear32(x, of(w)), w)[1](g)
  flat = lambda z: rounded(z).reshape(2 * ROWS, -1)
  expected = flat(x).T @ flat(g)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected.T if turned else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [NARROW, 2 * WIDE])
def test_a_product_in_float32_stays_one(columns):
  x, w, g = drawn(ROWS, WIDE), drawn(WIDE, columns, seed=1), drawn(ROWS, columns, seed=2)
  y, back = jax.vjp(weight.linear, x, w)
  wide = lambda z: np.asarray(z, np.float64)
  near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  near(y, wide(x) @ wide(w))
  near(back(g)[0], wide(g) @ wide(w).T)
  near(back(g)[1], wide(x).T @ wide(g))


@pytest.mark.parametrize("columns", [NARROW, 2 * WIDE])
@pytest.mark.parametrize("turned", [False, True])
def test_the_gradient_of_a_float32_matrix_is_not_rounded_to_16_bits_of_x(columns, turned):
  x, g = (drawn(2, ROWS, n, seed=n).astype(jnp.bfloat16) for n in (WIDE, columns))
  w = drawn(columns, WIDE, seed=1) if turned else drawn(WIDE, columns, seed=1)
  y, back = jax.vjp(lambda x, w: weight.linear(x, Transposed(w) if turned else w), x, w)
  d_x, d_w = back(g)
  assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  wide = lambda z: np.asarray(z, np.float64).reshape(-1, z.shape[-1])
  of_w = rounded(w).T if turned else rounded(w)
  step = 2**-8  # of bfloat16
  np.testing.assert_allclose(wide(y), wide(x) @ of_w, rtol=step, atol=step)
  np.testing.assert_allclose(wide(d_x), wide(g) @ of_w.T, rtol=step, atol=step)
  expected = wide(x).T @ wide(g)
  np.testing.assert_allclose(d_w, expected.T if turned else expected, rtol=1e-5, atol=1e-5)


def test_of_a_frozen_float32_matrix_nothing_is_kept_but_itself():
  x, w = drawn(2, WIDE).astype(jnp.bfloat16), drawn(WIDE, NARROW)
  _, back = jax.vjp(lambda x: weight.linear(x, w), x)
  assert [leaf.shape for leaf in jax.tree.leaves(back)] == [w.shape]


def test_bits_are_the_matrix():
  w = drawn(3, IN, OUT)
  kept, near = weight.bits(w), w.astype(jnp.bfloat16)
  assert (kept.dtype, kept.shape, kept.stored.dtype) == (jnp.bfloat16, (3, IN, OUT), jnp.uint16)
  np.testing.assert_array_equal(kept.dense(), near)
  np.testing.assert_array_equal(weight.bits(np.asarray(near)).stored, kept.stored)
  np.testing.assert_array_equal(weight.like(2 * w, kept).dense(), 2 * near)
  np.testing.assert_array_equal(weight.embed(jnp.array([2]), weight.layer(kept, 1)), near[1, 2:3])
  assert weight.bits(kept) is kept
  assert kept.partition_specs(P(None, "fsdp")).stored == P(None, "fsdp")


def test_rows_of_a_table_that_trains_are_not_rounded():
  table = drawn(5, OUT)
  np.testing.assert_array_equal(weight.embed(jnp.array([4]), weight.Bfloat16(table)), table[4:])
