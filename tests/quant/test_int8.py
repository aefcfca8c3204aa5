"""int8 against a numpy loop, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.quant import int8


def test_codes_are_the_nearest_step_of_each_channel():
  w = np.random.default_rng(0).standard_t(3, size=(50, 7)).astype(np.float32)
  w[:, 3] = 0
  q = int8.quantize(w)
  for o in range(7):
    largest = np.abs(w[:, o]).max()
    steps = np.arange(-127, 128) * np.float64(largest) / 127
    distance = np.abs(w[:, o, None] - steps).min(axis=1)
    assert q.absmax[o] == largest
    np.testing.assert_allclose(np.abs(w[:, o] - q.dense()[:, o]), distance, atol=3e-7 * largest)
  assert np.abs(q.codes).max() == 127
  assert (q.dense()[:, 3] == 0).all()


def test_ties_go_to_the_even_code():
  w = jnp.asarray([[127.0], [0.5], [1.5], [-0.5], [-2.5]])
  np.testing.assert_array_equal(int8.quantize(w).codes[:, 0], [127, 0, 2, 0, -2])


@pytest.mark.parametrize(
  ("w", "message"),
  [
    (np.ones((64, 8), np.int32), r"int32.*cast to float32"),
    (np.ones(64, np.float32), r"expected \[in, out\]"),
    (np.full((64, 8), np.nan, np.float32), r"largest absolute value is nan"),
    (np.full((2, 64, 8), np.inf, np.float32), r"largest absolute value is inf"),
  ],
)
def test_what_cannot_be_quantised_is_refused(w, message):
  with pytest.raises(ValueError, match=message):
    int8.quantize(w)


def test_a_channel_too_small_to_scale_is_zero():
  w = jnp.asarray([[1e-37, 1.0], [-1e-37, 0.5]])
  dense = int8.quantize(w).dense()
  assert (dense[:, 0] == 0).all()
  np.testing.assert_allclose(dense[:, 1], [1, 0.5], rtol=1e-2)
