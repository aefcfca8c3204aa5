"""Estimates of the KL: what they and their gradients are estimates of, and where they end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import kl
from tests.losses.closed_form import assert_is
from tests.marks import few

FORMULAS = {
  kl.k1: lambda logps, ref: logps - ref,
  kl.k2: lambda logps, ref: (logps - ref) ** 2 / 2,
  kl.k3: lambda logps, ref: np.exp(ref - logps) - 1 - (ref - logps),
}
ESTIMATES = pytest.mark.parametrize("estimate", FORMULAS, ids=lambda f: f.__name__)


@ESTIMATES
def test_each_is_its_formula(estimate, float64):
  logps, ref = np.random.default_rng(0).normal(-2, 1.5, (2, 3, 4))
  assert_is(estimate, FORMULAS[estimate], logps, ref)


@pytest.fixture
def distributions():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=7), jnp.float32)
  ref = jax.nn.log_softmax(jnp.asarray(rng.normal(size=7), jnp.float32))
  return logits, ref


def test_the_mean_of_k1_and_k3_is_the_kl(distributions):
  logits, ref = distributions
  logps = jax.nn.log_softmax(logits)
  exact = float(jnp.sum(jnp.exp(logps) * (logps - ref)))
  for estimate in (kl.k1, kl.k3):
    assert float(jnp.sum(jnp.exp(logps) * estimate(logps, ref))) == pytest.approx(exact, rel=1e-5)
  assert float(kl.k3(logps, ref).min()) >= 0
  assert float(jnp.sum(jnp.exp(logps) * kl.k2(logps, ref))) != pytest.approx(exact, rel=0.01)


def test_what_their_gradients_are_the_gradient_of(distributions):
  """k1's is nothing, k2's the reverse KL's, k3's the forward KL's; expectations over what was sampled."""
  logits, ref = distributions

  def mean_slope(estimate):
    weights = jax.nn.softmax(logits)
    return jax.grad(lambda x: jnp.sum(weights * estimate(jax.nn.log_softmax(x), ref)))(logits)

  reverse = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - ref)))(logits)
  forward = jax.grad(lambda x: -jnp.sum(jnp.exp(ref) * jax.nn.log_softmax(x)))(logits)
  np.testing.assert_allclose(mean_slope(kl.k1), 0, atol=1e-6)
  np.testing.assert_allclose(mean_slope(kl.k2), reverse, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(mean_slope(kl.k3), forward, rtol=1e-4, atol=1e-6)


def test_k3_and_its_gradient_end_where_exp_would():
  # of tokens that the reference gives for sure, but the last
  logps = jnp.asarray([-93.0, -20.5, -19.5, 93.0])
  value, slope = jax.vjp(lambda x: kl.k3(x, jnp.zeros(4)), logps)
  most = np.exp(20) - 21
  np.testing.assert_allclose(value, [most, most, np.exp(19.5) - 20.5, 92], rtol=1e-5)
  np.testing.assert_allclose(*slope(jnp.ones(4)), [0, 0, 1 - np.exp(19.5), 1], rtol=1e-5)


@ESTIMATES
@pytest.mark.parametrize("rest", few([np.nan, np.inf, 93.0], 93.0, np.inf))
def test_what_the_mask_leaves_out_has_neither_value_nor_gradient(estimate, rest):
  mask = jnp.asarray([True, False])
  logps, ref = jnp.where(mask, -1.0, -rest), jnp.where(mask, -2.0, rest)
  value, slope = jax.vjp(lambda x: estimate(x, ref, mask), logps)
  kept, kept_slope = jax.vjp(lambda x: estimate(x, ref[:1]), logps[:1])
  np.testing.assert_array_equal(value, [*kept, 0])
  np.testing.assert_array_equal(*slope(jnp.ones(2)), [*kept_slope(jnp.ones(1))[0], 0])


@pytest.mark.parametrize(
  ("found", "factor"), [(6.0, 1.0), (6.6, 1.001), (60.0, 1.002), (5.4, 0.999), (-3.0, 0.998)]
)
def test_a_coefficient_follows_the_kl_to_its_target(found, factor):
  """By a tenth of what the KL is off, at most a fifth, for as many answers as the horizon has."""
  moved = kl.adapted(0.05, found, target=6.0, horizon=3200, answers=32)
  assert moved == pytest.approx(0.05 * factor, rel=1e-12)


@pytest.mark.parametrize("answers", [32, 320, 3200])
def test_a_coefficient_moves_by_a_fifth_of_itself_a_batch_at_most(answers):
  """Ziegler's line alone would be 0 at five horizons of answers and negative beyond: a KL that is paid for."""
  for found, most in ((0.0, 0.8), (60.0, 1.2)):
    assert kl.adapted(0.05, found, target=6.0, horizon=8, answers=answers) == pytest.approx(
      0.05 * most
    )
