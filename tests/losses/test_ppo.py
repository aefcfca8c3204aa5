"""PPO's pieces on the batches that TRL's trainer computed (`tests/oracle/trl_ppo.py` made the numbers), in float64."""

import json
import pathlib

import jax
import numpy as np
import pytest

from posttrain_jax.losses import advantage, kl, policy

TRL = json.loads((pathlib.Path(__file__).parent / "trl_ppo.json").read_text())


@pytest.fixture(autouse=True)
def in_float64():
  with jax.enable_x64(True):
    yield


def arrays(case):
  """(what was given, what TRL made of it, its options, the mask of the answers' tokens)."""
  known = {name: np.asarray(value) for name, value in TRL[case]["given"].items()}
  found = {name: np.asarray(value) for name, value in TRL[case]["found"].items()}
  lengths = np.asarray(TRL[case]["lengths"])
  return known, found, TRL[case]["options"], np.arange(5) < lengths[:, None]


def collected(case):
  """(advantages, returns) by ours: the score is the last token's."""
  given, _, options, mask = arrays(case)
  estimate = kl.ESTIMATES[options["kl_estimator"]]
  rewards = -options["kl_coef"] * np.asarray(
    estimate(given["logprobs"], given["ref_logprobs"], mask)
  )
  rewards[np.arange(len(mask)), mask.sum(1) - 1] += given["scores"]
  how = dict(gamma=options["gamma"], lam=options["lam"])
  advantages, returns = advantage.gae(rewards, given["values"], mask, **how)
  return np.asarray(advantage.whiten(advantages, mask)), np.asarray(returns)


@pytest.mark.parametrize("case", TRL)
def test_advantages_and_returns_are_trls(case):
  _, found, _, mask = arrays(case)
  advantages, returns = collected(case)
  # TRL has n / (n - 1) in float32
  np.testing.assert_allclose(advantages, found["advantages"], rtol=1e-7)
  np.testing.assert_allclose(returns[mask], found["returns"][mask], rtol=1e-9)


@pytest.mark.parametrize("case", TRL)
def test_losses_and_gradients_are_trls(case):
  """The values' where answers are whole: of others TRL's mean has one position more, behind their end."""
  given, found, options, mask = arrays(case)
  advantages, returns = collected(case)
  mean = lambda x: (x * mask).sum() / mask.sum()
  clip = options["cliprange"]

  def actor(logps):
    losses = policy.clipped_surrogate(logps, given["logprobs"], advantages, mask, epsilon=clip)[0]
    return mean(losses)

  def critic(values):
    bound = options["cliprange_value"]
    losses, clipped = policy.clipped_value(values, given["values"], returns, mask, epsilon=bound)
    return mean(losses), mean(clipped)

  loss, slope = jax.value_and_grad(actor)(given["new_logprobs"])
  np.testing.assert_allclose(loss, found["pg_loss"], rtol=1e-6)
  np.testing.assert_allclose(slope, found["d_new_logprobs"], rtol=1e-7)
  if mask.all():
    (loss, clipped), slope = jax.value_and_grad(critic, has_aux=True)(given["vpred"])
    np.testing.assert_allclose(loss, found["vf_loss"], rtol=1e-9)
    np.testing.assert_allclose(clipped, found["vf_clipfrac"], rtol=1e-7)
    assert 0 < clipped < 1
    weight = options["vf_coef"]
    np.testing.assert_allclose(weight * slope, found["d_vpred"], rtol=1e-9, atol=1e-12)


def test_whitening_is_trls_however_much_of_the_batch_a_mask_leaves():
  case = "ragged"
  given, _, _, mask = arrays(case)
  x = given["values"][mask]
  for shift in (True, False):
    wanted = (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8) + (0 if shift else x.mean())
    found = np.asarray(advantage.whiten(given["values"], mask, shift=shift))
    np.testing.assert_allclose(found[mask], wanted, rtol=1e-9)
