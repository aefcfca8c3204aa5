"""Filters against a loop in numpy, draws against the distribution they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.rollout import sampling
from posttrain_jax.rollout.sampling import GREEDY, Sampling
from tests.marks import few

LOGITS = np.random.default_rng(0).normal(0, 2, (4, 300)).astype(np.float32)
SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.9, 40, 0.6)]
sample = jax.jit(sampling.sample, static_argnums=2)


def kept_by_hand(row, temperature, top_k, top_p):
  """{token: logit} that stay, one token after another from the highest down."""
  row = row.astype(np.float64) / temperature
  order = np.argsort(-row)[: top_k or len(row)]
  mass = np.exp(row[order]) / np.exp(row[order]).sum()
  count = 1 + np.sum(np.cumsum(mass) < top_p) if top_p < 1 else len(order)
  return {int(token): row[token] for token in order[:count]}


def keys(rows, seed=0):
  return jax.random.split(jax.random.key(seed), rows)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_filter_keeps_what_a_loop_keeps(temperature, top_k, top_p):
  found = sampling.filter(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p)
  for row, logits in zip(np.asarray(found), LOGITS):
    expected = kept_by_hand(logits, temperature, top_k, top_p)
    assert set(np.flatnonzero(row > -np.inf)) == set(expected)
    np.testing.assert_allclose(row[list(expected)], list(expected.values()), rtol=1e-6)


def test_filter_keeps_the_most_likely_whatever_the_mass_and_all_of_a_tie():
  logits = jnp.asarray([[0.0, 5.0, 5.0, -1.0]])
  for options in (dict(top_p=1e-6), dict(top_k=1)):
    np.testing.assert_array_equal(
      sampling.filter(logits, **options)[0] > -np.inf, [False, True, True, False]
    )


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_follow_the_filtered_distribution(temperature, top_k, top_p):
  draws = 8_000
  row = LOGITS[0]
  token, _ = jax.jit(sampling.sample, static_argnums=2)(
    keys(draws), jnp.tile(row, (draws, 1)), Sampling(temperature, top_k, top_p)
  )
  kept = kept_by_hand(row, temperature, top_k, top_p)
  expected = np.zeros(len(row))
  expected[list(kept)] = np.exp(list(kept.values()))
  expected = expected / expected.sum() * draws
  counts = np.bincount(token, minlength=len(row))
  assert not counts[expected == 0].any()
  common = expected > 5
  chi2 = np.sum((counts - expected)[common] ** 2 / expected[common])
  assert chi2 < common.sum() + 5 * np.sqrt(2 * common.sum())


@pytest.mark.parametrize("how", few([Sampling(0.7, 5, 0.9), Sampling(2.0), GREEDY], Sampling(2.0)))
def test_logp_is_that_of_the_scaled_unfiltered_distribution(how):
  token, logp = sample(keys(4), jnp.asarray(LOGITS), how)
  reference = jax.nn.log_softmax(LOGITS / (how.temperature or 1.0))
  np.testing.assert_allclose(logp, reference[np.arange(4), token], rtol=1e-5)


def test_temperature_zero_is_the_most_likely_and_a_low_one_nearly_so():
  best = LOGITS.argmax(axis=1)
  for how in (GREEDY, Sampling(1e-3), Sampling(1.0, top_k=1)):
    np.testing.assert_array_equal(sample(keys(4), jnp.asarray(LOGITS), how)[0], best)


def test_a_row_draws_with_its_own_key_alone():
  together, _ = sample(keys(4), jnp.asarray(LOGITS), Sampling())
  alone = [sample(keys(4)[i, None], LOGITS[i, None], Sampling())[0][0] for i in range(4)]
  np.testing.assert_array_equal(together, alone)


def test_settings_that_mean_nothing_are_refused():
  for wrong, message in [
    (dict(temperature=-1.0), "temperature must be 0 .greedy. or more, found -1.0"),
    (dict(temperature=float("nan")), "found nan"),
    (dict(top_k=-1), "top_k must be 0 .off."),
    (dict(top_p=0.0), "top_p must be above 0"),
    (dict(top_p=1.5), "found 1.5"),
  ]:
    with pytest.raises(ValueError, match=message):
      Sampling(**wrong)
