"""NF4 and FP4 against bitsandbytes itself, on its CPU kernels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.quant import blockwise, fourbit, fp4, nf4

torch = pytest.importorskip("torch", reason="needs .venv-oracle (make oracle)")
bnb = pytest.importorskip("bitsandbytes.functional", reason="needs .venv-oracle (make oracle)")

pytestmark = pytest.mark.oracle
FOUR = {"nf4": nf4, "fp4": fp4}
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
  """Values at and one float beside each midpoint of either codebook, in blocks whose scale is 1."""
  ascending = [np.sort(module.CODEBOOK) for module in FOUR.values()]
  middle = np.concatenate([(x[1:] + x[:-1]) / np.float32(2) for x in ascending])
  one = np.concatenate(
    [[1], middle, np.nextafter(middle, 2, dtype=np.float32), np.nextafter(middle, -2)]
  )
  tiny = np.finfo(
    np.float32
  ).tiny  # what is subnormal counts as zero with us, and both zeros of FP4 read as 0
  one = np.where((one != 0) & (np.abs(one) < tiny), np.copysign(tiny, one), one)
  rest = np.resize(one.astype(np.float32)[1:], (63, 64))
  return np.concatenate([np.ones((1, 64), np.float32), rest])


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
KIND = pytest.mark.parametrize("kind", FOUR)
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


def theirs(t, kind, *, double_quant, block_size=64):
  return bnb.quantize_4bit(
    t, blocksize=block_size, quant_type=kind, compress_statistics=double_quant
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
  made = {"nf4": nf4.NF4, "fp4": fp4.FP4}[state.quant_type]
  return made(
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


@KIND
@EACH_IN_EACH_DTYPE
def test_codes_scales_and_values_are_equal(name, dtype, kind):
  w, t = matrix(name, dtype)
  codes, state = theirs(t, kind, double_quant=False)
  ours, expected = FOUR[kind].quantize(w, double_quant=False), as_ours(codes, state)
  np.testing.assert_array_equal(ours.codes, expected.codes)
  np.testing.assert_array_equal(ours.scales, expected.scales)
  np.testing.assert_array_equal(dense(ours), dequantised(codes, state))


@KIND
@pytest.mark.parametrize("block_size", fourbit.BLOCK_SIZES)
def test_every_block_size(block_size, kind):
  w = np.random.default_rng(1).normal(size=(4096, 6)).astype(np.float32)
  t = torch.from_numpy(w.T.copy())
  codes, state = theirs(t, kind, double_quant=False, block_size=block_size)
  ours = FOUR[kind].quantize(w, double_quant=False, block_size=block_size)
  np.testing.assert_array_equal(ours.codes, as_ours(codes, state).codes)
  np.testing.assert_array_equal(dense(ours), dequantised(codes, state))


@KIND
@EACH_IN_EACH_DTYPE
def test_reading_double_quantised_weights_is_exact(name, dtype, kind):
  _, t = matrix(name, dtype)
  codes, state = theirs(t, kind, double_quant=True)
  read = as_ours(codes, state)
  expected = dequantised(codes, state)
  np.testing.assert_array_equal(dense(read), expected)
  rows = jax.jit(lambda q, ids: q.rows(ids))(read, jnp.arange(read.shape[0]))
  np.testing.assert_array_equal(rows.astype(jnp.float32), expected)


@KIND
@EACH
def test_double_quantisation_is_no_worse(name, kind):
  w, t = matrix(name, "float32")
  ours = FOUR[kind].quantize(w)
  expected = as_ours(*theirs(t, kind, double_quant=True))
  plain = FOUR[kind].quantize(w, double_quant=False).scales
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


@KIND
def test_real_weights(kind):
  if not SMOLLM2.exists():
    pytest.skip("needs the embedded model: posttrain fetch smollm2")
  from safetensors import safe_open

  with safe_open(SMOLLM2, framework="pt") as file:
    t = file.get_tensor("model.layers.7.mlp.down_proj.weight").contiguous()
  w = np.ascontiguousarray(t.float().numpy().T)
  codes, state = theirs(t.float(), kind, double_quant=True)
  ours, expected = FOUR[kind].quantize(w), as_ours(codes, state)
  np.testing.assert_array_equal(ours.codes, expected.codes)
  np.testing.assert_array_equal(dense(expected), dequantised(codes, state))
  assert (np.asarray(ours.scales) == np.asarray(expected.scales)).mean() >= 0.995


def dense(q):
  return np.asarray(jax.jit(lambda q: q.dense())(q).astype(jnp.float32))


def dequantised(codes, state):
  return bnb.dequantize_4bit(codes, state).float().numpy().T


@KIND
def test_codebook_is_theirs(kind):
  expected = bnb.get_4bit_type(kind, device="cpu").numpy()
  np.testing.assert_array_equal(FOUR[kind].CODEBOOK.view(np.int32), expected.view(np.int32))
