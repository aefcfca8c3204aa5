"""Preference losses in closed form; TRL's formulas are compared in tests/oracle."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import preference, reward

CHOSEN, REJECTED = jnp.asarray([-3.0, -8.0, -2.0]), jnp.asarray([-5.0, -4.0, -2.5])
REF_CHOSEN, REF_REJECTED = jnp.asarray([-4.0, -7.5, -2.0]), jnp.asarray([-4.5, -6.0, -2.0])
ALL = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
D = np.asarray((CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED))
R_W, R_L = np.asarray(CHOSEN - REF_CHOSEN), np.asarray(REJECTED - REF_REJECTED)
BETA = 0.3
sigma = lambda x: 1 / (1 + np.exp(-x))
WITH_REFERENCE = ("dpo", "robust", "ipo", "hinge", "exo", "nca", "bco", "apo_zero", "apo_down")
WITH_REFERENCE += ("sppo", "discopop")


def run(name, *given, **options):
  function = getattr(preference, name)
  if "label_smoothing" in inspect.signature(function).parameters:
    options.setdefault("label_smoothing", 0.1)
  return function(*given, beta=BETA, **options)


EXPECTED = {
  "dpo": -0.9 * np.log(sigma(BETA * D)) - 0.1 * np.log(sigma(-BETA * D)),
  "robust": (-0.9 * np.log(sigma(BETA * D)) + 0.1 * np.log(sigma(-BETA * D))) / 0.8,
  "ipo": (D - 1 / (2 * BETA)) ** 2,
  "hinge": np.maximum(0, 1 - BETA * D),
  "nca": -np.log(sigma(BETA * R_W))
  - 0.5 * np.log(sigma(-BETA * R_W))
  - 0.5 * np.log(sigma(-BETA * R_L)),
  "bco": -np.log(sigma(BETA * R_W)) - np.log(sigma(-BETA * R_L)),
  "apo_zero": 1 - sigma(BETA * R_W) + sigma(BETA * R_L),
  "apo_down": sigma(BETA * R_W) + 1 - sigma(BETA * D),
  "sppo": (R_W - 0.5 / BETA) ** 2 + (R_L + 0.5 / BETA) ** 2,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_is_its_formula(name):
  loss, stats = run(name, *ALL)
  np.testing.assert_allclose(loss, EXPECTED[name], rtol=1e-5)
  np.testing.assert_allclose(stats.margin, BETA * D, rtol=1e-5)
  np.testing.assert_array_equal(stats.correct, D > 0)


def test_exo_is_a_divergence_between_two_coins():
  loss, _ = run("exo", *ALL)
  q = sigma(BETA * D)
  np.testing.assert_allclose(loss, q * np.log(q / 0.9) + (1 - q) * np.log((1 - q) / 0.1), rtol=1e-5)
  at = np.log(9) / BETA  # where the policy believes just what the label says
  assert abs(float(preference.exo(at, 0.0, 0.0, 0.0, beta=BETA, label_smoothing=0.1)[0])) < 1e-6


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_higher_beta_asks_for_less_movement(name):
  """The minimum over the margin, of those that have one, comes nearer the reference as beta grows."""
  if name not in ("ipo", "sppo"):
    return
  d = jnp.linspace(-30, 30, 20001)
  best = lambda beta: float(
    d[jnp.argmin(getattr(preference, name)(d / 2, -d / 2, 0.0, 0.0, beta=beta)[0])]
  )
  assert best(0.1) > best(0.5) > 0


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_extreme_log_ratios_stay_finite(name):
  far = jnp.asarray([-2000.0, 2000.0])
  value = lambda x: jnp.sum(run(name, x, -x, jnp.zeros(2), jnp.zeros(2))[0])
  if name == "discopop":
    far = far / 200  # exp(-z) is what its paper has
  loss, slope = jax.value_and_grad(value)(far)
  assert jnp.isfinite(loss)
  assert jnp.isfinite(slope).all()


def test_a_tie_is_not_correct_and_costs_log_2():
  loss, stats = preference.dpo(-1.0, -1.0, -1.0, -1.0, beta=0.1)
  assert float(loss) == pytest.approx(np.log(2))
  assert not stats.correct


def test_the_shift_moves_bcos_logits():
  loss, _ = preference.bco(*ALL, beta=BETA, shift=0.2)
  expected = -np.log(sigma(BETA * R_W - 0.2)) - np.log(sigma(-(BETA * R_L - 0.2)))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_sorting_pairs_ranks_and_not_rows():
  order = jnp.asarray([2, 0, 1])
  for name in ("aot", "aot_unpaired"):
    loss = run(name, *ALL)[0]
    again = run(name, *(x[order] for x in ALL))[0]
    np.testing.assert_allclose(loss, again, rtol=1e-6)
  paired = -np.sort(CHOSEN - REJECTED) + np.sort(REF_CHOSEN - REF_REJECTED)
  np.testing.assert_allclose(
    preference.aot(*ALL, beta=BETA)[0], np.log1p(np.exp(BETA * paired)), rtol=1e-5
  )


def test_divergences():
  r = jnp.asarray([-2.0, 0.0, 1.5])
  np.testing.assert_allclose(preference.forward_kl(r), 1 - np.exp(-r), rtol=1e-6)
  np.testing.assert_allclose(preference.jensen_shannon(r), np.log(2 / (1 + np.exp(-r))), rtol=1e-5)
  np.testing.assert_allclose(
    preference.alpha_divergence(r, alpha=0.5), (np.exp(-0.5 * r) - 1) / -0.5, rtol=1e-6
  )
  near = preference.alpha_divergence(r, alpha=1.0001)
  np.testing.assert_allclose(near, preference.alpha_divergence(r, alpha=1), rtol=1e-3)
  assert jnp.isfinite(preference.forward_kl(jnp.asarray(-1e4)))


def test_simpo_has_the_papers_ratio():
  chosen, rejected = jnp.asarray(-0.5), jnp.asarray(-0.9)
  loss, stats = preference.simpo(chosen, rejected, beta=2.5, gamma_beta_ratio=0.55)
  assert float(loss) == pytest.approx(float(-np.log(sigma(2.5 * 0.4 - 1.375))), rel=1e-5)
  assert float(stats.margin) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("logp", [-1e-9, -1e-4, -0.3, -0.69, -0.70, -5.0, -80.0])
def test_odds_are_exact_at_both_ends(logp):
  p = np.exp(np.float64(min(logp, -1e-7)))
  expected = np.log(p) - np.log1p(-p) - (np.log(0.5) - np.log(0.5))
  found = preference.log_odds_ratio(jnp.asarray(logp), jnp.log(0.5))
  assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)
  slope = jax.grad(lambda x: preference.log_odds_ratio(x, jnp.log(0.5)))(jnp.float32(logp))
  assert jnp.isfinite(slope)


def test_kto_weighs_classes_and_keeps_its_kl_fixed():
  policy, ref = jnp.asarray([-2.0, -3.0]), jnp.asarray([-3.0, -2.5])
  label = jnp.asarray([True, False])
  f = lambda p, kl: jnp.sum(
    preference.kto(p, ref, label, kl, beta=BETA, desirable_weight=1.5, undesirable_weight=2.0)[0]
  )
  expected = 1.5 * (1 - sigma(BETA * 0.8)) + 2.0 * (1 - sigma(BETA * (0.2 + 0.5)))
  assert float(f(policy, 0.2)) == pytest.approx(expected, rel=1e-5)
  assert float(jax.grad(f, argnums=1)(policy, 0.2)) == 0
  assert float(preference.mismatched_kl(policy, ref)) == pytest.approx(0.25)
  assert float(preference.mismatched_kl(policy, ref, label)) == pytest.approx(1.0)
  assert float(preference.mismatched_kl(ref, policy, label)) == 0.0


@pytest.mark.parametrize(
  ("name", "smoothing", "message"),
  [("robust", 0.5, "below 0.5"), ("robust", -0.1, "at least 0"), ("exo", 0.0, "above 0")],
)
def test_labels_that_say_nothing_are_refused(name, smoothing, message):
  with pytest.raises(ValueError, match=message):
    run(name, *ALL, label_smoothing=smoothing)


def test_tokens_past_the_shorter_answer_count_alpha():
  assert float(preference.length_desensitised(-10.0, -6.0, alpha=0.25)) == -7.0


# --- reward models ---------------------------------------------------------------------------------------------------


def test_bradley_terry():
  chosen, rejected = jnp.asarray([1.0, 0.2]), jnp.asarray([0.5, 0.4])
  loss, stats = reward.bradley_terry(
    chosen, rejected, margin=jnp.asarray([0.3, 0.0]), centering=0.01
  )
  expected = -np.log(sigma(np.asarray([0.2, -0.2]))) + 0.01 * np.asarray([1.5, 0.6]) ** 2
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_array_equal(stats.correct, [True, False])


def test_a_step_is_right_or_wrong():
  loss, right = reward.binary_cross_entropy(jnp.asarray([2.0, -1.0, 3.0]), jnp.asarray([1, 0, 0]))
  np.testing.assert_allclose(loss, np.log1p(np.exp([-2.0, -1.0, 3.0])), rtol=1e-5)
  np.testing.assert_array_equal(right, [True, True, False])
