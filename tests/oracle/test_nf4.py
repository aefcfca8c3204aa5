"""NF4 against bitsandbytes itself, on its CPU kernels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.quant import blockwise, nf4

torch = pytest.importorskip("torch", reason="needs .venv-oracle (make oracle)")
bnb = pytest.importorskip("bitsandbytes.functional", reason="needs .venv-oracle (make oracle)")

pytestmark = pytest.mark.oracle
SMOLLM2 = Path.home() / ".cache/posttrain_jax/models/smollm2/model.safetensors"


def heavy_tails(rng):
  return rng.standard_t(2, size=(192, 130)).astype(np.float32)


def zero_blocks(rng):
  w = rng.normal(size=(256, 96)).astype(np.float32)
  w[64:128] = 0
  w[:, 5] = 0
  return w


def constants(rng):
  return np.repeat(rng.normal(size=(1, 64)).astype(np.float32), 128, axis=0)


def on_thresholds(rng):
  """Values at and one float beside each midpoint, in blocks whose scale is 1."""
  middle = (nf4.CODEBOOK[1:] + nf4.CODEBOOK[:-1]) / np.float32(2)
  one = np.concatenate(
    [[1], middle, np.nextafter(middle, 2, dtype=np.float32), np.nextafter(middle, -2)]
  )
  return np.resize(one.astype(np.float32), (64, 32))


INPUTS = {
  "normal": lambda rng: 0.03 * rng.normal(size=(576, 1536)).astype(np.float32),
  "long_columns": lambda rng: rng.normal(size=(19200, 3)).astype(np.float32),
  "heavy_tails": heavy_tails,
  "zero_blocks": zero_blocks,
  "zeros": lambda rng: np.zeros((128, 64), np.float32),
  "constants": constants,
  "on_thresholds": on_thresholds,
  "tiny": lambda rng: 1e-30 * rng.normal(size=(128, 64)).astype(np.float32),
  "huge": lambda rng: 1e30 * rng.normal(size=(128, 64)).astype(np.float32),
}
EACH = pytest.mark.parametrize("name", INPUTS)
EACH_IN_EACH_DTYPE = pytest.mark.parametrize(
  ("name", "dtype"),
  [
    (name, dtype)
    for name in INPUTS
    for dtype in ("float32", "bfloat16", "float16")
    if dtype != "float16" or name not in ("tiny", "huge")  # float16 holds neither
  ],
)


def matrix(name, dtype):
  """(for us [in, out], for bitsandbytes [out, in]), equal bits."""
  w = jnp.asarray(INPUTS[name](np.random.default_rng(0))).astype(dtype)
  back = torch.from_numpy(np.array(w.T.astype(jnp.float32))).to(getattr(torch, dtype))
  return w, back.contiguous()


def theirs(t, *, double_quant, block_size=64):
  return bnb.quantize_4bit(
    t, blocksize=block_size, quant_type="nf4", compress_statistics=double_quant
  )


def as_ours(codes, state):
  """A bitsandbytes weight in our layout, without computing anything."""
  out, rows = state.shape
  turn = lambda x, n: jnp.asarray(x.numpy().reshape(out, n).T)
  nested = {}
  if state.nested:
    nested = {
      "nested_absmax": jnp.asarray(state.state2.absmax.numpy()),
      "offset": jnp.asarray(state.offset.numpy()),
    }
  return nf4.NF4(
    turn(codes, rows // 2),
    turn(state.absmax, rows // state.blocksize),
    block_size=state.blocksize,
    dtype=jnp.dtype(str(state.dtype).removeprefix("torch.")),
    **nested,
  )


def test_dynamic_maps_are_equal():
  for signed in (True, False):
    expected = bnb.create_dynamic_map(signed).numpy()
    np.testing.assert_array_equal(blockwise.dynamic_map(signed), expected)


@EACH_IN_EACH_DTYPE
def test_codes_scales_and_values_are_equal(name, dtype):
  w, t = matrix(name, dtype)
  codes, state = theirs(t, double_quant=False)
  ours, expected = nf4.quantize(w, double_quant=False), as_ours(codes, state)
  np.testing.assert_array_equal(ours.codes, expected.codes)
  np.testing.assert_array_equal(ours.scales, expected.scales)
  np.testing.assert_array_equal(dense(ours), dequantised(codes, state))


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_every_block_size(block_size):
  w = np.random.default_rng(1).normal(size=(4096, 6)).astype(np.float32)
  t = torch.from_numpy(w.T.copy())
  codes, state = theirs(t, double_quant=False, block_size=block_size)
  ours = nf4.quantize(w, double_quant=False, block_size=block_size)
  np.testing.assert_array_equal(ours.codes, as_ours(codes, state).codes)
  np.testing.assert_array_equal(dense(ours), dequantised(codes, state))


@EACH_IN_EACH_DTYPE
def test_reading_double_quantised_weights_is_exact(name, dtype):
  _, t = matrix(name, dtype)
  codes, state = theirs(t, double_quant=True)
  read = as_ours(codes, state)
  expected = dequantised(codes, state)
  np.testing.assert_array_equal(dense(read), expected)
  rows = jax.jit(lambda q, ids: q.rows(ids))(read, jnp.arange(read.shape[0]))
  np.testing.assert_array_equal(rows.astype(jnp.float32), expected)


@EACH
def test_double_quantisation_is_no_worse(name):
  w, t = matrix(name, "float32")
  ours = nf4.quantize(w)
  expected = as_ours(*theirs(t, double_quant=True))
  plain = nf4.quantize(w, double_quant=False).scales
  np.testing.assert_array_equal(ours.codes, expected.codes)
  np.testing.assert_allclose(ours.offset, expected.offset, rtol=1e-6)
  # The mean is summed in another order: an ulp of the offset moves what is left of each scale, and where nothing
  # else is left (all scales equal, but for that) its code means nothing.
  ulp = 2e-6 * float(np.abs(ours.offset))
  np.testing.assert_allclose(ours.nested_absmax, expected.nested_absmax, rtol=1e-6, atol=ulp)
  distance = lambda q: np.abs(np.asarray(q._all_scales() - plain, np.float64))
  assert (distance(ours) <= distance(expected) + ulp).all()
  if float(ours.nested_absmax.max()) > 10 * ulp:
    apart = np.abs(np.asarray(ours.scales, int) - np.asarray(expected.scales, int))
    assert (apart == 0).mean() >= 0.995
    assert apart.max() <= 1
  else:
    assert name in ("zeros", "on_thresholds")


def test_real_weights():
  if not SMOLLM2.exists():
    pytest.skip("needs the embedded model: posttrain fetch smollm2")
  from safetensors import safe_open

  with safe_open(SMOLLM2, framework="pt") as file:
    t = file.get_tensor("model.layers.7.mlp.down_proj.weight").contiguous()
  w = np.ascontiguousarray(t.float().numpy().T)
  codes, state = theirs(t.float(), double_quant=True)
  ours, expected = nf4.quantize(w), as_ours(codes, state)
  np.testing.assert_array_equal(ours.codes, expected.codes)
  np.testing.assert_array_equal(dense(expected), dequantised(codes, state))
  assert (np.asarray(ours.scales) == np.asarray(expected.scales)).mean() >= 0.995


def dense(q):
  return np.asarray(jax.jit(lambda q: q.dense())(q).astype(jnp.float32))


def dequantised(codes, state):
  return bnb.dequantize_4bit(codes, state).float().numpy().T
