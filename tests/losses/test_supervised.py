"""The supervised loss in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import supervised

PROBABILITIES = np.asarray([[0.5, 0.25, 0.9], [0.125, 0.3, 1.0]])
MASK = np.asarray([[1, 1, 0], [1, 0, 1]], bool)


def test_parts_add_up_to_the_mean_over_the_trained_tokens():
  logps = jnp.log(jnp.asarray(PROBABILITIES))
  parts = [
    supervised.negative_log_likelihood(row, mask, tokens=MASK.sum())
    for row, mask in zip(logps, MASK)
  ]
  mean = -np.log(PROBABILITIES[MASK]).mean()  # (1 + 2 + 3 + 0) log 2 / 4
  assert float(sum(parts)) == pytest.approx(mean, rel=1e-6)
  assert mean == pytest.approx(1.5 * np.log(2))


@pytest.mark.parametrize("rest", [np.nan, -np.inf])
def test_what_is_not_trained_reaches_neither_loss_nor_gradient(rest):
  logps = jnp.where(MASK, jnp.log(jnp.asarray(PROBABILITIES)), rest)
  loss = lambda x: supervised.negative_log_likelihood(x, MASK, tokens=8)
  value, slope = jax.value_and_grad(loss)(logps)
  assert float(value) == pytest.approx(6 * np.log(2) / 8, rel=1e-6)
  np.testing.assert_allclose(slope, np.where(MASK, -1 / 8, 0), rtol=1e-6)


def test_nothing_to_learn_costs_nothing():
  nothing = jnp.zeros(3, bool)
  assert float(supervised.negative_log_likelihood(-jnp.ones(3), nothing, tokens=0)) == 0
