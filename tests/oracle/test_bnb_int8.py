"""int8 against bitsandbytes' LLM.int8(), on its CPU kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.quant import int8

torch = pytest.importorskip("torch", reason="needs .venv-oracle (make oracle)")
bnb = pytest.importorskip("bitsandbytes.functional", reason="needs .venv-oracle (make oracle)")

pytestmark = pytest.mark.oracle

INPUTS = {
  "normal": lambda rng: 0.03 * rng.normal(size=(576, 300)),
  "heavy_tails": lambda rng: rng.standard_t(2, size=(192, 130)),
  "halves": lambda rng: np.resize([127, 0.5, 1.5, -2.5, 3.5, -126.5], (128, 64)),
  "constants": lambda rng: np.repeat(rng.normal(size=(1, 64)), 128, axis=0),
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", INPUTS)
def test_codes_scales_and_values_are_equal(name, dtype):
  w = jnp.asarray(INPUTS[name](np.random.default_rng(0)), dtype)
  t = torch.from_numpy(np.array(w.T))
  codes, absmax, _ = bnb.int8_vectorwise_quant(t)
  ours = int8.quantize(w)
  np.testing.assert_array_equal(ours.absmax, absmax.numpy())
  apart = np.asarray(ours.codes, int) - codes.numpy().T
  # of float16 values 15 in 172,800 lie halfway between two codes, and their last bit decides
  exact = 127 * np.asarray(w, np.float64) / absmax.numpy()
  halfway = np.abs(np.abs(exact % 1) - 0.5) < 1e-5
  assert (apart[~halfway] == 0).all()
  assert np.abs(apart).max() <= 1
  assert (apart != 0).mean() < 2e-4
  if dtype == "float32":
    assert (apart == 0).all()
  expected = bnb.int8_vectorwise_dequant(codes, absmax).numpy().T
  theirs = ours.replace(codes=jnp.asarray(codes.numpy().T))
  dense = jax.jit(lambda q: q.dense(jnp.float32))(theirs)
  np.testing.assert_array_equal(np.asarray(dense).view(np.int32), expected.view(np.int32))
