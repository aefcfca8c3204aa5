"""Supervised losses in closed form."""

import jax.numpy as jnp
import numpy as np

from posttrain_jax.losses import supervised


def test_negative_log_likelihood():
  loss, stats = supervised.negative_log_likelihood(jnp.log(jnp.asarray([0.5, 1.0, 0.125])))
  np.testing.assert_allclose(loss, [np.log(2), 0.0, 3 * np.log(2)], rtol=1e-6)
  np.testing.assert_array_equal(stats.nll, loss)
  np.testing.assert_allclose(stats.probability, [0.5, 1.0, 0.125], rtol=1e-6)
