"""NF4 and FP4 against a numpy loop, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.quant import blockwise, fp4, nf4, report
from tests.marks import slow

FOUR = pytest.mark.parametrize("module", [nf4, fp4], ids=["nf4", "fp4"])
DOUBLE = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])


def normal(*shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def by_hand(q):
  """The matrix from the stored bytes, one weight at a time, in bitsandbytes' flattened order."""
  rows, out = q.shape
  per_column = rows // q.block_size
  w = np.zeros((rows, out), np.float32)
  for o in range(out):
    for b in range(per_column):
      scale = np.asarray(q.scales)[b, o]
      if q.nested_absmax is not None:
        absmax = np.asarray(q.nested_absmax)[(o * per_column + b) // 256]
        scale = np.float32(blockwise.dynamic_map()[scale] * absmax) + np.asarray(q.offset)
      for i in range(b * q.block_size, (b + 1) * q.block_size):
        byte = int(q.codes[i // 2, o])
        w[i, o] = q.CODEBOOK[byte >> 4 if i % 2 == 0 else byte & 15] * scale
  return w


@FOUR
@DOUBLE
# One nested block, many columns to a block, blocks that end within a column, columns longer than a block.
@pytest.mark.parametrize("shape", [slow((64, 8)), (192, 130), slow((9600, 2))])
def test_dense_is_what_the_bytes_say(shape, double_quant, module):
  q = module.quantize(normal(*shape), block_size=32, double_quant=double_quant)
  q = jax.tree.map(np.asarray, q)
  expected = by_hand(q)
  q = jax.tree.map(jnp.asarray, q)
  np.testing.assert_array_equal(q.dense(), expected)
  np.testing.assert_array_equal(jax.jit(lambda q: q.dense())(q), expected)


@FOUR
def test_codes_are_the_nearest_of_the_codebook(module):
  w = normal(128, 3)
  q = module.quantize(w, double_quant=False)
  scales = np.repeat(np.abs(w.reshape(2, 64, 3)).max(axis=1), 64, axis=0)
  nearest = np.abs(np.asarray(w)[..., None] / scales[..., None] - module.CODEBOOK).argmin(axis=-1)
  np.testing.assert_allclose(q.dense(), module.CODEBOOK[nearest] * scales, rtol=1e-6)


def test_error_on_normal_values_is_bitsandbytes():
  # bitsandbytes 0.50.2, tests/test_functional.py, error_stats for nf4 and blocks of 64.
  w = normal(1024, 1024, seed=3)
  error = report.error(w, nf4.quantize(w, double_quant=False))
  assert error.mean_abs == pytest.approx(0.072798, rel=2e-3)
  assert error.relative == pytest.approx(0.203339, rel=5e-3)
  doubled = report.error(w, nf4.quantize(w))
  assert error.mean_abs < doubled.mean_abs < 1.01 * error.mean_abs
  # The widest gap of the codebook, -1 to -0.696, is rounded from its middle.
  assert 0.1 * jnp.abs(w).max() < error.max_abs < 0.152 * jnp.abs(w).max()


@FOUR
def test_zeros_and_constants_are_exact(module):
  w = jnp.zeros((128, 4)).at[:64, 1].set(-0.3).at[64:, 2].set(7.0)
  np.testing.assert_array_equal(module.quantize(w, double_quant=False).dense(), w)
  assert (module.quantize(jnp.zeros((64, 8))).dense() == 0).all()


def test_fp4_is_sign_exponent_and_mantissa():
  """1 sign, 2 exponent and 1 mantissa bit in bitsandbytes' order, 12 the largest value and 1/16 the smallest."""
  assert set(12 * np.abs(fp4.CODEBOOK)) == {0, 0.0625, 2, 3, 4, 6, 8, 12}
  np.testing.assert_array_equal(fp4.CODEBOOK[8:], -fp4.CODEBOOK[:8])
  assert (np.sign(fp4.CODEBOOK[1:8]) == 1).all()


@pytest.mark.parametrize(
  ("w", "kwargs", "message"),
  [
    (np.ones((100, 8), np.float32), {}, r"\(100, 8\).*no multiple of block_size=64.*dense"),
    (np.ones((96, 8), np.float32), {}, r"write block_size=32 or keep"),
    (np.ones((64, 8), np.int32), {}, r"int32.*cast to float32"),
    (np.ones((64, 8), np.float32), {"block_size": 48}, r"block_size=48; write one of 32, 64"),
    (np.ones(64, np.float32), {}, r"expected \[in, out\]"),
    (np.full((64, 8), np.nan, np.float32), {}, r"largest absolute value is nan"),
    (np.full((2, 64, 8), np.inf, np.float32), {}, r"largest absolute value is inf"),
  ],
)
def test_what_cannot_be_quantised_is_refused(w, kwargs, message):
  with pytest.raises(ValueError, match=message):
    nf4.quantize(w, **kwargs)
