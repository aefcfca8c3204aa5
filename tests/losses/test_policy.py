"""Policy losses against loops over tokens and answers in float64; TRL's trainers are compared in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import policy, spans
from posttrain_jax.losses.spans import Spans
from tests.losses.closed_form import assert_is
from tests.marks import few

# three answers in two rows, of lengths 3, 2 and 4, with prompts before them and a token inside one that is not scored
SLOTS = 2
ANSWER = np.asarray([[2, 0, 0, 0, 2, 1, 1, 2], [2, 0, 0, 0, 0, 0, 2, 2]])
MASK = np.asarray([[0, 1, 1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1, 0, 0]], bool)
SPANS = Spans(jnp.asarray(MASK), jnp.asarray(ANSWER), jnp.asarray([[1, 1], [1, 0]], bool))
ANSWERS, TOKENS, LENGTHS = 3, 9, {(0, 0): 3, (0, 1): 2, (1, 0): 4}
ADVANTAGES = {(0, 0): 0.8, (0, 1): -1.3, (1, 0): 1.7}

LOGPS = np.random.default_rng(0).normal(-2, 0.6, MASK.shape)
RATIO = np.ones(MASK.shape)
RATIO[MASK] = [1.3, 1.7, 1.1, 1.8, 0.3, 0.7, 1.35, 0.5, 1.23]  # on all sides of the bounds below
OLD = LOGPS - np.log(RATIO)


def scored():
  """(row, time, answer) of each scored token."""
  return [(row, time, (row, ANSWER[row, time])) for row, time in np.argwhere(MASK)]


def per_token():
  advantages = np.zeros(MASK.shape)
  for row, time, answer in scored():
    advantages[row, time] = ADVANTAGES[answer]
  return advantages


def looped(each):
  """[rows, time] of each(ratio, A, logp), 0 where not scored: a formula of the log-probabilities."""

  def formula(logps):
    values = np.zeros(MASK.shape)
    for row, time, answer in scored():
      ratio = np.exp(logps[row, time] - OLD[row, time])
      values[row, time] = each(ratio, ADVANTAGES[answer], logps[row, time])
    return values

  return formula


def by_answer(each, normalise):
  """The same of the ratio of the whole answer."""

  def formula(logps):
    total = dict.fromkeys(ADVANTAGES, 0.0)
    for row, time, answer in scored():
      total[answer] += logps[row, time] - OLD[row, time]
    values = np.zeros(MASK.shape)
    for row, time, answer in scored():
      log_ratio = total[answer] / (LENGTHS[answer] if normalise else 1)
      values[row, time] = each(np.exp(log_ratio), ADVANTAGES[answer], None)
    return values

  return formula


def ppo(low, high):
  return lambda ratio, a, _: -min(ratio * a, min(max(ratio, low), high) * a)


def dual(ratio, a, _):
  loss = ppo(0.8, 1.2)(ratio, a, _)
  return min(loss, -1.3 * a) if a < 0 else loss


def two_sided(ratio, a, _):
  return -min(min(ratio, 1.5) * a, min(max(ratio, 0.8), 1.2) * a)


def cispo_formula(logps):
  """The ratio is a constant, so that it is of LOGPS wherever the formula is asked."""
  weight = np.minimum(RATIO, 1.1) * per_token()
  return np.where(MASK, -weight * logps, 0)


def dppo_formula(divergence, low, high):
  """What is kept, and its weight, are constants, as cispo's."""
  p, q = np.exp(LOGPS), np.exp(OLD)
  far = (
    np.abs(p - q) if divergence == "tv" else q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
  )
  gain = per_token()
  cut = np.where(gain > 0, (p > q) & (far > high), (p < q) & (far > low))
  for way in (gain > 0, gain < 0):
    assert 0 < cut[MASK & way].mean() < 1
  weight = np.where(cut, 0.0, np.minimum(RATIO, 1.32)) * gain
  return lambda logps: np.where(MASK, -weight * logps, 0)


clipped, sequence = policy.clipped_surrogate, policy.sequence_surrogate
LOSSES = {  # name -> (the loss of (logps, old, advantages), its formula of logps)
  "reinforce": (
    lambda x, old, a: policy.reinforce(x, a, MASK),
    looped(lambda _, a, logp: -a * logp),
  ),
  "ppo": (lambda x, old, a: clipped(x, old, a, MASK, epsilon=0.2), looped(ppo(0.8, 1.2))),
  "dapo": (
    lambda x, old, a: clipped(x, old, a, MASK, epsilon=0.2, epsilon_high=0.5),
    looped(ppo(0.8, 1.5)),
  ),
  "dual_clip": (
    lambda x, old, a: clipped(x, old, a, MASK, epsilon=0.2, dual_clip=1.3),
    looped(dual),
  ),
  "two_sided": (
    lambda x, old, a: clipped(x, old, a, MASK, epsilon=0.2, ceiling=1.5),
    looped(two_sided),
  ),
  "cispo": (lambda x, old, a: policy.cispo(x, old, a, MASK, ceiling=1.1), cispo_formula),
  **{
    f"dppo_{by}": (
      lambda x, old, a, by=by, low=low, high=high: policy.dppo(
        x, old, a, MASK, divergence=by, epsilon=low, epsilon_high=high, ceiling=1.32
      ),
      dppo_formula(by, low, high),
    )
    for by, low, high in (("tv", 0.05, 0.035), ("kl", 0.02, 0.006))
  },
  "gspo": (
    lambda x, old, a: sequence(x, old, a, SPANS, epsilon=0.2, epsilon_high=0.25),
    by_answer(ppo(0.8, 1.25), normalise=True),
  ),
  "rloo": (
    lambda x, old, a: sequence(x, old, a, SPANS, epsilon=0.4, normalise=False),
    by_answer(ppo(0.6, 1.4), normalise=False),
  ),
}
EACH = pytest.mark.parametrize("name", LOSSES)


@EACH
def test_each_is_its_formula(name, float64):
  loss, formula = LOSSES[name]
  assert_is(lambda x: loss(x, jnp.asarray(OLD), jnp.asarray(per_token()))[0], formula, LOGPS)


@EACH
@pytest.mark.parametrize("rest", [np.nan, np.inf, 93.0])
def test_what_was_not_sampled_has_neither_loss_nor_gradient(name, rest, float64):
  loss, formula = LOSSES[name]
  filled = lambda x, value: jnp.asarray(np.where(MASK, x, value))
  logps, old, advantages = filled(LOGPS, rest), filled(OLD, 0.0), filled(per_token(), rest)
  values, pullback, stats = jax.vjp(lambda x: loss(x, old, advantages), logps, has_aux=True)
  np.testing.assert_allclose(values, formula(LOGPS), rtol=1e-12)
  assert (np.asarray(values)[~MASK] == 0).all()
  (slope,) = pullback(jnp.ones_like(values))
  assert np.isfinite(slope).all()
  assert (np.asarray(slope)[~MASK] == 0).all()
  for stat in (stats.ratio, stats.clipped_low, stats.clipped_high):
    assert (np.asarray(stat)[~MASK] == 0).all()
  assert (np.asarray(stats.ratio)[MASK] > 0).all()


@EACH
@pytest.mark.parametrize("far", few([93.0, -93.0, 1e4], 93.0))
def test_without_an_advantage_there_is_nothing_however_far_the_ratio(name, far):
  loss, _ = LOSSES[name]
  old = jnp.asarray(LOGPS - far, jnp.float32)
  nothing = jnp.zeros(MASK.shape)
  slope, values = jax.grad(
    lambda x: (jnp.sum(loss(x, old, nothing)[0]), loss(x, old, nothing)[0]), has_aux=True
  )(jnp.asarray(LOGPS, jnp.float32))
  np.testing.assert_array_equal(values, 0)
  np.testing.assert_array_equal(slope, 0)


@EACH
def test_a_good_answer_is_made_likelier_and_a_bad_one_less(name):
  """Where the policy is the one that sampled: a step down the loss moves with the advantage's sign."""
  logps, advantages = jnp.asarray(LOGPS, jnp.float32), jnp.asarray(per_token(), jnp.float32)
  slope = jax.grad(lambda x: jnp.sum(LOSSES[name][0](x, logps, advantages)[0]))(logps)
  np.testing.assert_array_equal(np.sign(-slope), np.sign(advantages))


def test_an_advantage_a_row_is_that_of_each_token():
  logps, old = (jnp.asarray(x, jnp.float32) for x in (LOGPS, OLD))
  rows = jnp.asarray([0.7, -1.2])
  tokens = jnp.repeat(rows[:, None], MASK.shape[1], axis=1)
  for loss, _ in LOSSES.values():
    values = loss(logps, old, rows)[0]
    np.testing.assert_array_equal(values, loss(logps, old, tokens)[0])
    assert np.abs(values).max() > 0


def test_without_a_mask_every_token_counts():
  logps, old = (jnp.asarray(x, jnp.float32) for x in (LOGPS, OLD))
  advantages, everywhere = jnp.asarray([0.7, -1.2]), np.ones(MASK.shape, bool)
  for loss in (
    lambda *mask: policy.reinforce(logps, advantages, *mask),
    lambda *mask: policy.clipped_surrogate(logps, old, advantages, *mask, epsilon=0.2),
    lambda *mask: policy.cispo(logps, old, advantages, *mask, ceiling=1.1),
  ):
    jax.tree.map(np.testing.assert_array_equal, loss(), loss(everywhere))
    assert (np.asarray(loss()[0]) != 0).all()


def test_a_ratio_ends_at_twenty_nats():
  old = jnp.full((1, 3), -100.0)
  logps = old + jnp.asarray([[93.0, -93.0, 19.0]])
  values, pullback, stats = jax.vjp(
    lambda x: policy.clipped_surrogate(x, old, -jnp.ones(1), epsilon=0.2),
    logps,
    has_aux=True,
  )
  np.testing.assert_allclose(stats.ratio, np.exp([[20.0, -20.0, 19.0]]), rtol=1e-5)
  np.testing.assert_allclose(values, [[np.exp(20), 0.8, np.exp(19)]], rtol=1e-5)
  np.testing.assert_allclose(*pullback(jnp.ones((1, 3))), [[0, 0, np.exp(19)]], rtol=1e-5)


def test_what_the_bounds_took_away_is_counted():
  logps = jnp.log(jnp.asarray([[1.5, 0.5, 1.5, 0.5, 1.25]]))
  advantages = jnp.asarray([[1.0, -1.0, -1.0, 1.0, 1.0]])
  loss, stats = policy.clipped_surrogate(
    logps, jnp.zeros((1, 5)), advantages, epsilon=0.2, epsilon_high=0.28
  )
  np.testing.assert_allclose(loss, [[-1.28, 0.8, 1.5, -0.5, -1.25]], rtol=1e-6)
  np.testing.assert_array_equal(stats.clipped_high, [[True, False, False, False, False]])
  np.testing.assert_array_equal(stats.clipped_low, [[False, True, False, False, False]])
  _, stats = policy.cispo(logps, jnp.zeros((1, 5)), advantages, ceiling=1.3)
  np.testing.assert_array_equal(stats.clipped_high, [[True, False, True, False, False]])
  assert not stats.clipped_low.any()


def test_dppo_lets_a_rare_token_rise_and_holds_a_likely_one():
  """The reverse of PPO's clip: 0.001 to 0.01 is a ratio of 10, 0.5 to 0.8 one of 1.6; a certain token is no NaN."""
  logps, old = (
    jnp.log(jnp.asarray([[0.01, 0.8, 1.0, 1.0]])),
    jnp.log(jnp.asarray([[0.001, 0.5, 1.0, 0.9]])),
  )
  for divergence, low in (("tv", 0.15), ("kl", 0.05)):
    values, stats = policy.dppo(logps, old, jnp.ones(1), divergence=divergence, epsilon=low)
    np.testing.assert_array_equal(stats.clipped_high, [[False, True, False, divergence == "kl"]])
    np.testing.assert_allclose(values[0, :2], [-10 * np.log(0.01), 0], rtol=1e-5)
    assert np.isfinite(values).all()
  with pytest.raises(ValueError, match="write tv or kl"):
    policy.dppo(logps, old, jnp.ones(1), divergence="js", epsilon=0.1)


def test_each_prompt_counts_as_its_own():
  """Two answers of 3 and 2 tokens to one prompt, and one of 4 to another; then all three to different ones."""
  weigh = lambda group, prompts: policy.prompt_mean(SPANS, jnp.asarray(group), prompts=prompts)
  expected = np.zeros(MASK.shape)
  for row, time, _ in scored():
    expected[row, time] = 1 / 2 / (5 if row == 0 else 4)
  np.testing.assert_allclose(weigh([[0, 0], [0, 0]], 2), expected, rtol=1e-6)
  for row, time, answer in scored():
    expected[row, time] = 1 / 3 / LENGTHS[answer]
  np.testing.assert_allclose(weigh([[0, 1], [0, 0]], 3), expected, rtol=1e-6)


def test_a_dual_clip_lies_above_one():
  with pytest.raises(ValueError, match="above 1"):
    clipped(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), epsilon=0.2, dual_clip=0.9)


def test_the_clipped_value_loss():
  mask = jnp.asarray([True, True, False])
  values, old, returns = (
    jnp.asarray(x) for x in ([1.0, 1.0, jnp.nan], [0.0, 0.9, 0.0], [2.0, 2.0, jnp.inf])
  )
  loss, clipped = policy.clipped_value(values, old, returns, mask, epsilon=0.2)
  np.testing.assert_allclose(loss, [0.5 * 1.8**2, 0.5, 0], rtol=1e-6)
  np.testing.assert_array_equal(clipped, [True, False, False])
  slope = jax.grad(lambda v: jnp.sum(policy.clipped_value(v, old, returns, mask, epsilon=0.2)[0]))
  np.testing.assert_allclose(slope(values), [0, -1, 0], rtol=1e-6)


# --- what other weights sampled --------------------------------------------------------------------------------------


def weights(**options):
  logps = jnp.log(jnp.asarray([[2.0, 3.0, 9.0, 4.0]]))
  sampling = jnp.asarray([[0.0, 0.0, jnp.nan, jnp.nan]])
  mask = jnp.asarray([[True, True, False, True]])  # the last one's server did not say
  return policy.importance_weights(logps, sampling, spans.whole(mask), **options)


def test_importance_weights():
  tight = dict(rtol=1e-5)
  token = dict(level="token", ceiling=2.5)
  np.testing.assert_allclose(weights(**token), [[2, 2.5, 0, 1]], **tight)
  np.testing.assert_allclose(weights(**token, outside="mask"), [[2, 0, 0, 1]], **tight)
  np.testing.assert_allclose(weights(**token, floor=1.5), [[2, 2.5, 0, 1.5]], **tight)
  np.testing.assert_allclose(weights(**token, floor=1.5, outside="mask"), [[2, 0, 0, 0]], **tight)
  np.testing.assert_allclose(weights(level="sequence", ceiling=99.0), [[6, 6, 0, 6]], **tight)
  each = 6 ** (1 / 3)
  np.testing.assert_allclose(
    weights(level="geometric", ceiling=99.0), [[each, each, 0, each]], **tight
  )
  for wrong in (dict(level="word"), dict(level="token", outside="drop")):
    with pytest.raises(ValueError, match="write"):
      weights(ceiling=2.0, **wrong)


def test_importance_is_of_each_answer_of_a_row_and_no_gradient():
  weigh = lambda x: policy.importance_weights(
    x, jnp.asarray(OLD), SPANS, level="geometric", ceiling=1e9
  )
  expected = by_answer(lambda ratio, *_: ratio, normalise=True)(LOGPS)
  np.testing.assert_allclose(weigh(jnp.asarray(LOGPS)), expected, rtol=1e-5)
  far = policy.importance_weights(
    jnp.full(MASK.shape, 93.0), jnp.zeros(MASK.shape), SPANS, level="token", ceiling=1e30
  )
  np.testing.assert_allclose(far, np.where(MASK, np.exp(20), 0), rtol=1e-5)
  slope = jax.grad(lambda x: jnp.sum(weigh(x)))(jnp.asarray(LOGPS))
  np.testing.assert_array_equal(slope, 0)


# --- how tokens add up -----------------------------------------------------------------------------------------------

AGGREGATIONS = {  # name -> (weights, the weight of one token of an answer of that length)
  "token_mean": (lambda s, tokens, answers: policy.token_mean(s, tokens=tokens), lambda _: 1 / 9),
  "sequence_mean": (
    lambda s, tokens, answers: policy.sequence_mean(s, answers=answers),
    lambda length: 1 / length / 3,
  ),
  "constant_length": (
    lambda s, tokens, answers: policy.constant_length(s, answers=answers, length=7),
    lambda _: 1 / 7 / 3,
  ),
  "sequence_sum": (
    lambda s, tokens, answers: policy.sequence_sum(s, answers=answers),
    lambda _: 1 / 3,
  ),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_each_answer_of_a_row_counts_as_its_own(name):
  weigh, weight = AGGREGATIONS[name]
  expected = np.zeros(MASK.shape)
  for row, time, answer in scored():
    expected[row, time] = weight(LENGTHS[answer])
  np.testing.assert_allclose(weigh(SPANS, TOKENS, ANSWERS), expected, rtol=1e-6)
  nothing = jax.tree.map(jnp.zeros_like, SPANS)
  np.testing.assert_array_equal(weigh(nothing, 0, 0), np.zeros(MASK.shape))


def test_the_mean_over_a_sequence_of_its_ratio_is_one_loss_an_answer(float64):
  """RLOO: -min(rho A, clip(rho) A) of each answer, averaged over answers."""
  values, _ = sequence(
    jnp.asarray(LOGPS), jnp.asarray(OLD), per_token(), SPANS, epsilon=0.4, normalise=False
  )
  expected = 0.0
  for (row, slot), a in ADVANTAGES.items():
    tokens = MASK[row] & (ANSWER[row] == slot)
    ratio = np.exp((LOGPS - OLD)[row, tokens].sum())
    expected += ppo(0.6, 1.4)(ratio, a, None) / ANSWERS
  total = jnp.sum(values * policy.sequence_mean(SPANS, answers=ANSWERS))
  assert float(total) == pytest.approx(expected, rel=1e-12)
