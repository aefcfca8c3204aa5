"""Advantages, KL estimates and policy gradients in closed form; TRL's are compared in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import advantage, kl, policy

# --- advantages ------------------------------------------------------------------------------------------------------


def test_group_relative():
  rewards = jnp.asarray([[1.0, 2.0, 6.0], [0.3, 0.3, 0.3]])
  centred = np.asarray([-2.0, -1.0, 3.0])
  found = advantage.group_relative(rewards)
  np.testing.assert_allclose(found[0], centred / (np.std([1, 2, 6], ddof=1) + 1e-4), rtol=1e-5)
  np.testing.assert_array_equal(found[1], 0)  # 0.1 + 0.2 would leave a rest to be scaled up
  np.testing.assert_allclose(advantage.group_relative(rewards, scale="none")[0], centred, rtol=1e-6)
  deviation = np.std(np.asarray(rewards), ddof=1)
  batch = advantage.group_relative(rewards, scale="batch")[0]
  np.testing.assert_allclose(batch, centred / (deviation + 1e-4), rtol=1e-5)


def test_what_has_no_score_takes_no_part():
  rewards = jnp.asarray([1.0, jnp.nan, 3.0])
  np.testing.assert_allclose(advantage.group_relative(rewards, scale="none"), [-1, 0, 1])
  np.testing.assert_allclose(advantage.leave_one_out(rewards), [-2, 0, 2])
  nothing = jnp.full(3, jnp.nan)
  np.testing.assert_array_equal(advantage.group_relative(nothing), 0)


def test_leave_one_out_is_the_mean_of_the_others():
  rewards = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
  expected = [[r[i] - np.delete(r, i).mean() for i in range(5)] for r in rewards]
  np.testing.assert_allclose(
    advantage.leave_one_out(jnp.asarray(rewards)), expected, rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize("function", [advantage.group_relative, advantage.leave_one_out])
def test_one_answer_is_no_group(function):
  with pytest.raises(ValueError, match="at least two"):
    function(jnp.ones((3, 1)))


def test_gae_is_the_sum_of_discounted_errors():
  rng = np.random.default_rng(0)
  rewards, values = rng.normal(size=(2, 2, 6)).astype(np.float32)
  mask = np.asarray([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
  gamma, lam = 0.9, 0.8
  found, returns = advantage.gae(rewards, values, mask, gamma=gamma, lam=lam)
  for row in range(2):
    at = np.flatnonzero(mask[row])
    r, v = rewards[row, at], np.append(values[row, at], 0)
    delta = r + gamma * v[1:] - v[:-1]
    expected = [
      sum((gamma * lam) ** k * delta[t + k] for k in range(len(at) - t)) for t in range(len(at))
    ]
    np.testing.assert_allclose(np.asarray(found)[row, at], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
      np.asarray(returns)[row, at], expected + v[:-1], rtol=1e-4, atol=1e-6
    )
  assert (np.asarray(found)[~mask] == 0).all()
  assert (np.asarray(returns)[~mask] == 0).all()


def test_gae_at_its_limits():
  rewards, values = jnp.asarray([[1.0, 2.0, 3.0]]), jnp.asarray([[0.5, 0.5, 0.5]])
  mask = jnp.ones((1, 3), bool)
  monte_carlo, returns = advantage.gae(rewards, values, mask, gamma=1.0, lam=1.0)
  np.testing.assert_allclose(returns, [[6.0, 5.0, 3.0]])
  np.testing.assert_allclose(monte_carlo, [[5.5, 4.5, 2.5]])
  one_step, _ = advantage.gae(rewards, values, mask, gamma=1.0, lam=0.0)
  np.testing.assert_allclose(one_step, [[1.0, 2.0, 2.5]])


def test_whitening_is_of_what_the_mask_has():
  rng = np.random.default_rng(0)
  values, mask = rng.normal(3, 2, (4, 5)).astype(np.float32), rng.random((4, 5)) < 0.6
  white = np.asarray(advantage.whiten(values, mask))
  assert white[mask].mean() == pytest.approx(0, abs=1e-6)
  assert white[mask].std(ddof=1) == pytest.approx(1, rel=1e-5)
  assert (white[~mask] == 0).all()
  kept = np.asarray(advantage.whiten(values, mask, shift=False))
  assert kept[mask].mean() == pytest.approx(values[mask].mean(), rel=1e-5)


# --- estimates of the KL ---------------------------------------------------------------------------------------------


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


# --- policies --------------------------------------------------------------------------------------------------------


def test_on_policy_every_surrogate_has_reinforces_gradient():
  logps, advantages = jnp.asarray([[-1.0, -2.0], [-0.5, -3.0]]), jnp.asarray([0.7, -1.2])
  mask = jnp.ones_like(logps, bool)
  slope = lambda f: jax.grad(lambda x: jnp.sum(f(x)))(logps)
  expected = slope(lambda x: policy.reinforce(x, advantages))
  np.testing.assert_allclose(expected, [[-0.7, -0.7], [1.2, 1.2]], rtol=1e-6)
  token = lambda x: policy.clipped_surrogate(x, logps, advantages, epsilon=0.2)[0]
  np.testing.assert_allclose(slope(token), expected, rtol=1e-6)
  cispo = lambda x: policy.cispo(x, logps, advantages, ceiling=5.0)[0]
  np.testing.assert_allclose(slope(cispo), expected, rtol=1e-6)
  whole = lambda x: policy.sequence_surrogate(x, logps, advantages, mask, epsilon=0.2)[0]
  np.testing.assert_allclose(slope(whole), expected / 2, rtol=1e-6)  # [batch, 1]: one an answer


def test_ppo_clips_where_it_would_go_further_and_not_where_it_comes_back():
  old = jnp.zeros(4)
  logps, advantages = (
    jnp.log(jnp.asarray([1.5, 0.5, 1.5, 0.5])),
    jnp.asarray([1.0, -1.0, -1.0, 1.0]),
  )
  loss, stats = policy.clipped_surrogate(logps, old, advantages, epsilon=0.2, epsilon_high=0.28)
  np.testing.assert_allclose(loss, [-1.28, 0.8, 1.5, -0.5], rtol=1e-6)
  np.testing.assert_array_equal(stats.clipped_high, [True, False, False, False])
  np.testing.assert_array_equal(stats.clipped_low, [False, True, False, False])


def test_dual_clip_bounds_the_loss_of_a_bad_answer():
  logps, advantages = jnp.log(jnp.asarray([10.0, 2.0, 10.0])), jnp.asarray([-1.0, -1.0, 1.0])
  loss, _ = policy.clipped_surrogate(logps, jnp.zeros(3), advantages, epsilon=0.2, dual_clip=3.0)
  np.testing.assert_allclose(loss, [3.0, 2.0, -1.2], rtol=1e-6)
  with pytest.raises(ValueError, match="above 1"):
    policy.clipped_surrogate(logps, logps, advantages, epsilon=0.2, dual_clip=0.9)


def test_the_clipped_value_loss():
  values, old, returns = jnp.asarray([1.0, 1.0]), jnp.asarray([0.0, 0.9]), jnp.asarray([2.0, 2.0])
  loss, clipped = policy.clipped_value(values, old, returns, epsilon=0.2)
  np.testing.assert_allclose(loss, [0.5 * 1.8**2, 0.5], rtol=1e-6)
  np.testing.assert_array_equal(clipped, [True, False])


def test_importance_weights():
  logps = jnp.log(jnp.asarray([[2.0, 3.0, 9.0]]))
  mask = jnp.asarray([[True, True, False]])
  weigh = lambda **how: policy.importance_weights(logps, jnp.zeros((1, 3)), mask, **how)
  np.testing.assert_allclose(weigh(level="token", ceiling=2.5), [[2.0, 2.5, 1.0]], rtol=1e-6)
  masked = weigh(level="token", ceiling=2.5, outside="mask")
  np.testing.assert_allclose(masked, [[2.0, 0.0, 1.0]], rtol=1e-6)
  np.testing.assert_allclose(weigh(level="sequence", ceiling=99.0), [[6.0]], rtol=1e-5)
  np.testing.assert_allclose(weigh(level="geometric", ceiling=99.0), [[6.0**0.5]], rtol=1e-5)
  np.testing.assert_allclose(
    weigh(level="token", ceiling=99.0, floor=2.5), [[2.5, 3.0, 2.5]], rtol=1e-6
  )
  for wrong in (dict(level="word"), dict(level="token", outside="drop")):
    with pytest.raises(ValueError, match="write"):
      weigh(ceiling=2.0, **wrong)


def test_weights_of_tokens_add_up_to_one_answer_or_token_each():
  mask = jnp.asarray([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
  np.testing.assert_allclose(policy.token_mean(mask, tokens=3).sum(), 1, rtol=1e-6)
  by_answer = policy.sequence_mean(mask, answers=2)
  np.testing.assert_allclose(by_answer.sum(1), [0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(
    policy.constant_length(mask, answers=2, length=4).sum(), 3 / 8, rtol=1e-6
  )
  np.testing.assert_allclose(policy.sequence_sum(mask, answers=2).sum(1), [1.0, 0.5], rtol=1e-6)
