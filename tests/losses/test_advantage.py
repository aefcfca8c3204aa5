"""Advantages in closed form."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import advantage
from posttrain_jax.settings import fields


def test_group_relative():
  rewards = jnp.asarray([[1.0, 2.0, 6.0], [0.3, 0.3, 0.3]])
  centred = np.asarray([-2.0, -1.0, 3.0])
  advantages = advantage.group_relative(rewards)
  np.testing.assert_allclose(advantages[0], centred / (np.std([1, 2, 6], ddof=1) + 1e-4), rtol=1e-5)
  np.testing.assert_array_equal(advantages[1], 0)
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
  advantages, returns = advantage.gae(rewards, values, mask, gamma=gamma, lam=lam)
  for row in range(2):
    at = np.flatnonzero(mask[row])
    r, v = rewards[row, at], np.append(values[row, at], 0)
    delta = r + gamma * v[1:] - v[:-1]
    expected = [
      sum((gamma * lam) ** k * delta[t + k] for k in range(len(at) - t)) for t in range(len(at))
    ]
    np.testing.assert_allclose(np.asarray(advantages)[row, at], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
      np.asarray(returns)[row, at], expected + v[:-1], rtol=1e-4, atol=1e-6
    )
  assert (np.asarray(advantages)[~mask] == 0).all()
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


def test_explained_variance_is_of_what_the_mask_has_and_of_all_at_once():
  rng = np.random.default_rng(0)
  returns, mask = rng.normal(7, 2, (6, 5)), rng.random((6, 5)) < 0.6
  values = 0.5 * returns + rng.normal(0, 0.3, returns.shape) + 100  # an offset explains nothing
  r, v = returns[mask], values[mask]
  wanted = 1 - ((r - v - (r - v).mean()) ** 2).mean() / ((r - r.mean()) ** 2).mean()
  assert advantage.explained_variance(values, returns, mask) == pytest.approx(wanted, rel=1e-12)
  parts = [advantage.explained_variance(values[i], returns[i], mask[i]) for i in range(6)]
  assert np.mean([part for part in parts if part is not None]) != pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("returns", [[0.3, 0.3, 0.1 + 0.2], [0.0, 0.0, 0.0], [1.0, np.nan, 1.0]])
def test_returns_that_agree_leave_nothing_to_explain(returns):
  mask = ~np.isnan(returns)
  assert advantage.explained_variance([1.0, 5.0, -2.0], np.nan_to_num(returns), mask) is None
  assert advantage.explained_variance([1.0], [2.0], [False]) is None


CENTRED = {
  "group": advantage.group_relative,
  "batch": functools.partial(advantage.group_relative, scale="batch"),
  "none": functools.partial(advantage.group_relative, scale="none"),
  "leave_one_out": advantage.leave_one_out,
  "whiten": advantage.whiten,
}


@pytest.mark.parametrize("function", CENTRED.values(), ids=CENTRED)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, -1.0, 1e6])
def test_rewards_a_rounding_apart_give_no_advantage(function, magnitude):
  """The whole batch agrees but for float32's last digits, which a division by their deviation would make whole ones."""
  same = np.float32(0.3 * magnitude)
  next_ = np.nextafter(same, np.float32(np.inf))
  above = np.nextafter(next_, np.float32(np.inf))
  rewards = jnp.asarray([[same, next_, same, same], [above, same, same, np.nan]], jnp.float32)
  mask = ~jnp.isnan(rewards)
  advantages = function(rewards, mask) if function is advantage.whiten else function(rewards)
  np.testing.assert_array_equal(advantages, 0)


@pytest.mark.parametrize("function", CENTRED.values(), ids=CENTRED)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e6])
def test_rewards_a_little_apart_do(function, magnitude):
  rewards = jnp.asarray([[1.0, 1.0001, 1.0, 1.0001]]) * magnitude
  advantages = np.asarray(function(rewards))[0]
  assert (advantages[[0, 2]] < 0).all()
  assert (advantages[[1, 3]] > 0).all()


def test_sums_in_another_order_agree():
  one, other = sum([np.float32(0.1)] * 10, np.float32(0)), np.float32(1)
  assert one != other
  np.testing.assert_array_equal(advantage.group_relative(jnp.asarray([one, other])), 0)


def test_groups_of_several_sizes_are_filled_with_nan():
  padded = jnp.asarray([[1.0, 2.0, 6.0], [1.0, 4.0, jnp.nan]])
  deviation = np.std([1, 2, 6, 1, 4], ddof=1) + 1e-4
  expected = np.asarray([[-2, -1, 3], [-1.5, 1.5, 0]])
  np.testing.assert_allclose(
    advantage.group_relative(padded, scale="batch"), expected / deviation, rtol=1e-5
  )
  np.testing.assert_allclose(
    advantage.leave_one_out(padded), [[-3, -1.5, 4.5], [-3, 3, 0]], rtol=1e-5
  )


def test_a_scale_that_there_is_not():
  with pytest.raises(ValueError, match="write group, batch or none"):
    advantage.group_relative(jnp.ones((2, 2)), scale="groups")


@pytest.mark.parametrize(
  ("offset", "spread"), [(1e3, 1e-3), (1e6, 1.0), (0, 1e-6), (0, 1e20), (0, 1e30), (-1e30, 1e30)]
)
@pytest.mark.parametrize("how", ["group", "batch", "none", "leave_one_out", "whitened"])
def test_rewards_of_any_size_have_the_advantages_of_a_reference_in_float64(how, offset, spread):
  rewards = offset + spread * np.asarray([[0.0, 1.0, 0.25, np.nan], [0.5, 0.0, 1.0, 0.75]])
  centred = rewards - np.nanmean(rewards, axis=1, keepdims=True)
  count = np.sum(~np.isnan(rewards), axis=1, keepdims=True)
  wanted = {
    "group": centred / (np.nanstd(rewards, axis=1, ddof=1, keepdims=True) + advantage.EPSILON),
    "batch": centred / (np.nanstd(rewards, ddof=1) + advantage.EPSILON),
    "none": centred,
    "leave_one_out": centred * count / (count - 1),
    "whitened": (centred - np.nanmean(centred)) / np.sqrt(np.nanstd(centred, ddof=1) ** 2 + 1e-8),
  }[how]
  np.testing.assert_allclose(
    advantage.named(how, rewards),
    np.nan_to_num(wanted),
    rtol=1e-6,
    atol=1e-9 * np.nanmax(abs(wanted)),
  )


def test_what_agrees_has_no_advantage_when_others_are_whitened():
  rewards = np.random.default_rng(0).uniform(size=(5, 7))
  rewards[2] = 0.3
  assert np.abs(advantage.named("whitened", rewards)[2]).max() == 0


def test_a_name_that_is_none_is_refused_with_all_that_are():
  with pytest.raises(ValueError, match=r"advantage='nope': write group, .*, whitened or max_rl"):
    advantage.named("nope", np.ones((2, 2)))
  assert fields.FIELDS["objective.advantage"].domain.names == (*advantage.NAMES, "gae")
