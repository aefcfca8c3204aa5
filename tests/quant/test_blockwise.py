"""The 8-bit blockwise map against its definition and a numpy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.quant import blockwise


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_seven_decades_of_doubling_resolution(signed):
  table = blockwise.dynamic_map(signed)
  assert table.shape == (256,)
  assert table.dtype == np.float32
  assert (np.diff(table) > 0).all()
  assert table[-1] == 1
  positive = table[table > 0][:-1]
  for decade in range(7):
    inside = positive[
      (positive > 10.0 ** (decade - 7) * (1 + 1e-6)) & (positive < 10.0 ** (decade - 6))
    ]
    assert len(inside) == 2 ** (decade if signed else decade + 1)
    steps = np.diff(np.float64(inside))
    np.testing.assert_allclose(steps, 0.9 * 10.0 ** (decade - 6) / len(inside), rtol=1e-3)
  np.testing.assert_array_equal(
    table[table < 0], -positive[::-1] if signed else np.zeros(0, np.float32)
  )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [256, 1000, 7])
def test_codes_are_the_nearest_values(n, signed):
  x = np.random.default_rng(n).normal(size=(3, n)).astype(np.float32) ** 3
  x = x if signed else np.abs(x)
  codes, absmax = blockwise.quantize(jnp.asarray(x), block_size=256, signed=signed)
  table = blockwise.dynamic_map(signed)
  assert codes.dtype == jnp.uint8
  assert absmax.shape == (3, -(-n // 256))
  for row in range(3):
    for block in range(absmax.shape[1]):
      part = slice(256 * block, 256 * (block + 1))
      scale = np.abs(x[row, part]).max()
      assert absmax[row, block] == scale
      distance = np.abs(np.float64(x[row, part]) / scale - table[:, None].astype(np.float64))
      chosen = np.take_along_axis(distance, np.asarray(codes)[None, row, part], axis=0)[0]
      assert (chosen <= distance.min(axis=0) + 1e-7).all()


def test_dequantised_values_are_map_times_absmax():
  x = jax.random.normal(jax.random.key(0), (2, 300))
  codes, absmax = blockwise.quantize(x, block_size=128)
  back = blockwise.dequantize(codes, absmax, block_size=128)
  expected = blockwise.dynamic_map()[np.asarray(codes)] * np.repeat(absmax, 128, axis=1)[:, :300]
  np.testing.assert_array_equal(back, expected)
  assert float(jnp.abs(back - x).mean()) < 0.02


def test_zeros_come_back_as_zeros():
  codes, absmax = blockwise.quantize(jnp.zeros((2, 256)))
  assert (absmax == 0).all()
  assert (blockwise.dequantize(codes, absmax) == 0).all()


def test_select_is_a_table_lookup():
  codes = jnp.arange(256, dtype=jnp.uint8)
  table = blockwise.dynamic_map(False)
  np.testing.assert_array_equal(blockwise.select(codes, table), table)
  np.testing.assert_array_equal(blockwise.decode(codes, False), table)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("wrap", [lambda f, **_: f, jax.jit], ids=["op by op", "jit"])
def test_computed_map_is_the_table_bit_for_bit(wrap, signed):
  computed = wrap(blockwise.computed, static_argnames="signed")
  found = np.asarray(computed(jnp.arange(256, dtype=jnp.uint8), signed=signed))
  np.testing.assert_array_equal(found.view(np.int32), blockwise.dynamic_map(signed).view(np.int32))


@pytest.mark.parametrize("signed", [True, False])
def test_computed_map_stands_fused_multiply_adds(signed):
  """Its products are exact in float32, so contracting them with the sums changes no bit."""
  _, high, low, _ = blockwise._line(signed)
  k = np.arange(1, 128 if signed else 256)
  decade = np.log2(k).astype(int)
  u = (k + 0.5) / 2.0**decade - 1
  for slope in (high, low):
    product = u * slope[decade].astype(np.float64)
    np.testing.assert_array_equal(product.astype(np.float32), product)


def test_selected_values_are_the_table():
  table = np.random.default_rng(0).normal(size=16).astype(np.float32)
  codes = np.arange(16, dtype=np.uint8)
  np.testing.assert_array_equal(blockwise.select(jnp.asarray(codes), table), table)
