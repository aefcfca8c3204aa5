"""Preference losses in closed form; TRL's trainers are compared in tests/oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import preference
from tests.losses.closed_form import assert_is
from tests.marks import few

CHOSEN, REJECTED = np.asarray([1.0, -0.5, 0.1, 4.0]), np.asarray([-0.5, 2.0, -0.5, 3.0])
BETA, E = 0.3, 0.1
sigma = lambda x: 1 / (1 + np.exp(-x))
softplus = lambda x: np.log1p(np.exp(x))  # -log sigma(-x)


def modulated(z):
  share = sigma(z / 0.05)
  return (1 - share) * softplus(-z) + share * np.exp(-z)


def exo(z):
  q = sigma(z)
  return q * np.log(q / (1 - E)) + (1 - q) * np.log((1 - q) / E)


with_beta = lambda f, **options: functools.partial(f, beta=BETA, **options)
OF_RATIOS = {  # name -> (loss, its formula of x = beta r_w and y = beta r_l)
  "dpo": (with_beta(preference.dpo), lambda x, y: softplus(y - x)),
  "conservative": (
    with_beta(preference.dpo, label_smoothing=E),
    lambda x, y: (1 - E) * softplus(y - x) + E * softplus(x - y),
  ),
  "robust": (
    with_beta(preference.robust, label_smoothing=E),
    lambda x, y: ((1 - E) * softplus(y - x) - E * softplus(x - y)) / (1 - 2 * E),
  ),
  "ipo": (with_beta(preference.ipo), lambda x, y: ((x - y) / BETA - 1 / (2 * BETA)) ** 2),
  "hinge": (with_beta(preference.hinge), lambda x, y: np.maximum(0, 1 - (x - y))),
  "exo": (with_beta(preference.exo, label_smoothing=E), lambda x, y: exo(x - y)),
  "nca": (
    with_beta(preference.nca),
    lambda x, y: softplus(-x) + 0.5 * softplus(x) + 0.5 * softplus(y),
  ),
  "bco": (with_beta(preference.bco), lambda x, y: softplus(-x) + softplus(y)),
  "bco_shifted": (
    with_beta(preference.bco, shift=0.2),
    lambda x, y: softplus(-(x - 0.2)) + softplus(y - 0.2),
  ),
  "apo_zero": (with_beta(preference.apo_zero), lambda x, y: 1 - sigma(x) + sigma(y)),
  "apo_down": (with_beta(preference.apo_down), lambda x, y: sigma(x) + 1 - sigma(x - y)),
  "sppo": (
    with_beta(preference.sppo),
    lambda x, y: ((x - 0.5) / BETA) ** 2 + ((y + 0.5) / BETA) ** 2,
  ),
  "discopop": (with_beta(preference.discopop), lambda x, y: modulated(x - y)),
}
OF_LOGPS = {  # without a reference; log-probabilities in the place of log-ratios
  "cpo": (
    with_beta(preference.cpo, label_smoothing=E),
    lambda x, y: (1 - E) * softplus(y - x) + E * softplus(x - y),
  ),
  "simpo": (
    with_beta(preference.simpo, gamma_beta_ratio=0.55),
    lambda x, y: softplus(-(x - y - 0.55 * BETA)),
  ),
  "tpo": (with_beta(preference.tpo), lambda x, y: softplus(y - x)),
  "tpo_with_margin": (
    with_beta(preference.tpo, gamma_beta_ratio=0.8),
    lambda x, y: softplus(-(x - y - 0.8 * BETA)),
  ),
}


@pytest.mark.parametrize("name", [*OF_RATIOS, *OF_LOGPS])
def test_each_is_its_formula(name, float64):
  loss, formula = (OF_RATIOS | OF_LOGPS)[name]
  scaled = lambda chosen, rejected: formula(BETA * chosen, BETA * rejected)
  assert_is(lambda *x: loss(*x)[0], scaled, CHOSEN, REJECTED)
  _, stats = loss(CHOSEN, REJECTED)
  np.testing.assert_allclose(stats.chosen, BETA * CHOSEN)
  np.testing.assert_allclose(stats.margin, BETA * (CHOSEN - REJECTED))
  np.testing.assert_array_equal(stats.correct, CHOSEN > REJECTED)


# of those that have a least loss where r_l = -r_w: the margin d that they ask for, times beta
LEAST = {
  "conservative": np.log((1 - E) / E),
  "exo": np.log((1 - E) / E),
  "ipo": 0.5,
  "nca": 2 * np.log(3),
  "sppo": 1.0,
}


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("beta", few([0.1, 0.5], 0.1))
def test_a_higher_beta_asks_for_less_movement(name, beta):
  loss, _ = OF_RATIOS[name]
  d = jnp.linspace(-50, 50, 10001)
  values, _ = loss(d / 2, -d / 2, beta=beta)
  assert float(d[jnp.argmin(values)]) == pytest.approx(LEAST[name] / beta, abs=0.02)


def test_an_exo_that_believes_what_the_label_says_costs_nothing():
  loss, _ = preference.exo(np.log(9) / BETA, 0.0, beta=BETA, label_smoothing=0.1)
  assert abs(float(loss)) < 1e-6


@pytest.mark.parametrize("name", OF_RATIOS)
def test_extreme_log_ratios_stay_finite(name):
  far = jnp.asarray([-2000.0, 2000.0])
  if name == "discopop":
    far = far / 200  # exp(-z) is what its paper has
  loss, slope = jax.value_and_grad(lambda x: jnp.sum(OF_RATIOS[name][0](x, -x)[0]))(far)
  assert jnp.isfinite(loss)
  assert jnp.isfinite(slope).all()


def test_a_tie_is_not_correct_and_costs_log_2():
  loss, stats = preference.dpo(-1.0, -1.0, beta=0.1)
  assert float(loss) == pytest.approx(np.log(2))
  assert not stats.correct


@pytest.mark.parametrize(
  ("loss", "smoothing", "message"),
  [
    (preference.robust, 0.5, "below 0.5"),
    (preference.robust, -0.1, "at least 0"),
    (preference.exo, 0.0, "above 0"),
    (preference.exo, 1.0, "below 1"),
  ],
)
def test_labels_that_say_nothing_are_refused(loss, smoothing, message):
  with pytest.raises(ValueError, match=message):
    loss(1.0, 0.0, beta=BETA, label_smoothing=smoothing)


# --- sorted losses ---------------------------------------------------------------------------------------------------

BATCHES = {
  "distinct": (
    np.asarray([2.0, -3.0, 0.5, 1.0, -1.5, 4.0]),
    np.asarray([0.3, 1.7, -2.0, 5.0, -0.4, 1.1]),
  ),
  # three margins tie, and two of the other side: whoever stands first must not take all
  "ties": (
    np.asarray([1.0, -3.0, 1.0, 1.0, -1.5, 4.0]),
    np.asarray([0.3, 1.7, -2.0, 5.0, -2.0, 1.1]),
  ),
  "all_equal": (np.ones(6), np.asarray([0.3, 1.7, -2.0, 5.0, -0.4, 1.1])),
  "one": (np.asarray([1.0]), np.asarray([3.0])),
}
SORTED = {"aot": preference.aot, "aot_unpaired": preference.aot_unpaired}
SORTED_EACH = pytest.mark.parametrize("name", SORTED)
OPTIONS = dict(beta=BETA, label_smoothing=E)


def sorted_against_sorted(first, second):
  """Algorithm 1: the sum of dpo over the differences of the two sorted arrays."""
  z = BETA * (jnp.sort(first) - jnp.sort(second))
  return jnp.sum((1 - E) * jnp.logaddexp(0, -z) + E * jnp.logaddexp(0, z))


def shared_by_ties(slope, values):
  """Equal values may change places: the slope of each is the mean of theirs."""
  return np.asarray([slope[values == value].mean() for value in values])


def expected_slopes(name, first, second):
  slopes = jax.grad(sorted_against_sorted, (0, 1))(jnp.asarray(first), jnp.asarray(second))
  shared = [shared_by_ties(np.asarray(s), x) for s, x in zip(slopes, (first, second))]
  return shared[0], shared[1] if name == "aot_unpaired" else np.zeros_like(second)


@SORTED_EACH
@pytest.mark.parametrize("batch", BATCHES)
def test_sorted_losses_add_up_to_the_algorithm(name, batch, float64):
  """aot's second argument is the reference's, which is not differentiated."""
  first, second = BATCHES[batch]
  total = lambda *x: jnp.sum(SORTED[name](*x, **OPTIONS)[0])
  value, slopes = jax.value_and_grad(total, (0, 1))(jnp.asarray(first), jnp.asarray(second))
  assert float(value) == pytest.approx(float(sorted_against_sorted(first, second)), rel=1e-12)
  for slope, expected in zip(slopes, expected_slopes(name, first, second)):
    np.testing.assert_allclose(slope, expected, rtol=1e-10, atol=1e-14)


@SORTED_EACH
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rounding", few([0.0, 1e-7], 1e-7))
def test_parts_of_a_batch_add_up_to_the_whole(name, batch, rounding, float64):
  """Two pairs a part, in any order, of a batch with places that hold no pair; parts are computed anew, and round."""
  first, second = BATCHES[batch]
  among = tuple(
    jnp.asarray(np.random.default_rng(1).permutation([*x, np.inf, np.inf]).reshape(-1, 1))
    for x in (first, second)
  )
  loss = lambda *x: jnp.sum(SORTED[name](*x, among=among, **OPTIONS)[0])
  total, slopes = 0.0, []
  for start in range(0, len(first), 2):
    part = [jnp.asarray(x[None, start : start + 2] + rounding) for x in (first, second)]
    value, slope = jax.value_and_grad(loss, (0, 1))(*part)
    total += float(value)
    slopes.append(slope)
  assert total == pytest.approx(float(sorted_against_sorted(first, second)), rel=1e-6)
  for which, expected in enumerate(expected_slopes(name, first, second)):
    joined = np.concatenate([slope[which][0] for slope in slopes])
    np.testing.assert_allclose(joined, expected, rtol=1e-5, atol=1e-14)


@SORTED_EACH
def test_a_sorted_loss_stands_where_its_pair_does(name, float64):
  """Value i is of the first array's value i against the one of its rank in the second."""
  first, second = BATCHES["distinct"]
  opposite = np.sort(second)[np.argsort(np.argsort(first))]
  expected, _ = preference.dpo(first, opposite, **OPTIONS)
  loss, stats = SORTED[name](jnp.asarray(first), jnp.asarray(second), **OPTIONS)
  np.testing.assert_allclose(loss, expected, rtol=1e-12)
  np.testing.assert_allclose(stats.margin, BETA * (first - second))


@SORTED_EACH
def test_a_batch_without_a_pair_is_finite(name):
  among = (jnp.full(4, jnp.inf), jnp.full(4, jnp.inf))
  total = lambda *x: jnp.sum(SORTED[name](*x, among=among, **OPTIONS)[0])
  value, slopes = jax.value_and_grad(total, (0, 1))(jnp.zeros(2), jnp.zeros(2))
  assert float(value) == 0
  np.testing.assert_array_equal(slopes, np.zeros((2, 2)))


# --- other divergences, and pieces -----------------------------------------------------------------------------------


def test_divergences(float64):
  r = np.asarray([-2.0, 0.0, 1.5])
  assert_is(preference.reverse_kl, lambda r: r, r)
  assert_is(preference.forward_kl, lambda r: 1 - np.exp(-r), r)
  assert_is(preference.jensen_shannon, lambda r: np.log(2 * sigma(r)), r)
  half = functools.partial(preference.alpha_divergence, alpha=0.5)
  assert_is(half, lambda r: (np.exp(-0.5 * r) - 1) / -0.5, r)
  near = preference.alpha_divergence(r, alpha=1.0001)
  np.testing.assert_allclose(near, preference.alpha_divergence(r, alpha=1), rtol=1e-3)


def test_divergences_end_before_float32_does():
  far = jnp.asarray(-1e4, jnp.float32)
  assert jnp.isfinite(preference.forward_kl(far))
  assert jnp.isfinite(preference.alpha_divergence(far, alpha=0.5))


def test_tokens_past_the_shorter_answer_count_alpha():
  assert float(preference.length_desensitised(-10.0, -6.0, alpha=0.25)) == -7.0


# --- odds ------------------------------------------------------------------------------------------------------------


def test_orpo_is_of_the_odds(float64):
  odds = lambda logp: np.exp(logp) / (1 - np.exp(logp))
  formula = lambda w, l: -BETA * np.log(sigma(np.log(odds(w) / odds(l))))
  chosen, rejected = np.asarray([-0.5, -3.0]), np.asarray([-0.9, -0.1])
  assert_is(lambda *x: preference.orpo(*x, beta=BETA)[0], formula, chosen, rejected)


@pytest.mark.parametrize("logp", [-1e-9, -1e-4, -0.3, -0.69, -0.70, -5.0, -80.0])
def test_odds_are_exact_at_both_ends(logp):
  kept = np.float64(min(logp, -1e-7))
  expected = kept - np.log(-np.expm1(kept))
  odds = preference.log_odds_ratio(jnp.asarray(logp), jnp.log(0.5))
  assert float(odds) == pytest.approx(expected, rel=1e-4, abs=1e-5)
  slope = jax.grad(lambda x: preference.log_odds_ratio(x, jnp.log(0.5)))(jnp.float32(logp))
  assert jnp.isfinite(slope)


# --- labels ----------------------------------------------------------------------------------------------------------

LABELS = np.asarray([True, False, True, False])
WEIGHTS = dict(desirable_weight=1.5, undesirable_weight=2.0)


def weighed(desirable, undesirable):
  return np.where(LABELS, 1.5 * desirable, 2.0 * undesirable)


def test_kto_weighs_classes(float64):
  kto = lambda r: preference.kto(r, LABELS, 0.2, beta=BETA, **WEIGHTS)
  z = lambda r: BETA * (r - 0.2)
  assert_is(lambda r: kto(r)[0], lambda r: weighed(1 - sigma(z(r)), 1 - sigma(-z(r))), CHOSEN)
  np.testing.assert_allclose(kto(CHOSEN)[1], BETA * CHOSEN)


def test_apo_zero_of_labels_is_kto_without_its_kl(float64):
  loss = lambda r: preference.apo_zero_unpaired(r, LABELS, beta=BETA, **WEIGHTS)[0]
  assert_is(loss, lambda r: weighed(1 - sigma(BETA * r), sigma(BETA * r)), CHOSEN)


def test_ktos_kl_is_kept_fixed_and_not_negative():
  loss = lambda kl: jnp.sum(preference.kto(jnp.asarray(CHOSEN), LABELS, kl, beta=BETA)[0])
  assert float(jax.grad(loss)(0.2)) == 0
  ratios = jnp.asarray([1.0, -0.5, jnp.nan])
  mask = jnp.asarray([True, True, False])
  assert float(preference.mismatched_kl(ratios[:2])) == pytest.approx(0.25)
  assert float(preference.mismatched_kl(ratios, mask)) == pytest.approx(0.25)
  assert float(preference.mismatched_kl(-ratios, mask)) == 0
  assert float(preference.mismatched_kl(ratios, jnp.zeros(3, bool))) == 0
  slope = jax.grad(lambda r: preference.mismatched_kl(r, mask))(ratios)
  np.testing.assert_array_equal(slope, 0)


def test_a_pair_counts_by_how_likely_it_is_and_the_weight_has_no_gradient():
  chosen, rejected = jnp.asarray([-0.1, -2.0]), jnp.asarray([-0.3, -1.0])
  np.testing.assert_allclose(
    preference.wpo_weight(chosen, rejected), np.exp([-0.4, -3.0]), rtol=1e-6
  )
  gradient = jax.grad(lambda x: jnp.sum(preference.wpo_weight(x, rejected)))(chosen)
  np.testing.assert_array_equal(gradient, 0)


def test_a_running_mean_is_that_of_all_values_that_were_there():
  first, second = jnp.asarray([1.0, 2.0, jnp.nan]), jnp.asarray([6.0])
  mean, count = preference.running_mean(0.0, 0.0, first, jnp.asarray([True, True, False]))
  mean, count = preference.running_mean(mean, count, second, jnp.asarray([True]))
  assert float(mean) == pytest.approx(3.0)
  assert float(count) == 3
  assert float(preference.running_mean(0.0, 0.0, second, jnp.asarray([False]))[0]) == 0.0
