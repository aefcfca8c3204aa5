"""Groups of scored answers: what a loss of them tells, and when there is nothing to learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core.metrics import read
from posttrain_jax.objectives import Context, Grouped, Scorer, evaluation
from tests import tiny
from tests.marks import few
from tests.objectives import batches, bigram
from tests.objectives.batches import (
  batch,
  gradient,
  setup,
)

PARAMS, REFERENCE = bigram.params(0, 0.5), bigram.params(1, 0.5)
ROWS = [[0, 1], [2, 3], [4], [5], []]


def test_a_group_that_agrees_has_no_gradient():
  objective, trainable, context, examples = setup("grpo")
  objective = dataclasses.replace(objective, kl_weight=0.0)
  flat = [
    dataclasses.replace(
      e, values=dict(score=(1.0,) * e.count, advantage=(0.0,) * e.count, deviation=(0.0,) * e.count)
    )
    for e in examples
  ]
  grads, _ = gradient(objective, trainable, context, batch(flat))
  assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads))


def told(objective, examples):
  given = batches.rows_of(examples, ROWS, 128)
  run = jax.jit(evaluation(objective))
  return read(run(PARAMS, Context(reference=REFERENCE), None, given)), given


def known(examples):
  """(values of each answer by name, log pi / pi_ref [answers, time], what is known of the answers alone)."""
  alone = bigram.of_answers(examples)
  values = {
    name: np.concatenate([np.float32(e.values[name]) for e in examples]).astype(float)
    for name in examples[0].values
  }
  log_ratios = np.asarray(alone.logps(PARAMS) - alone.logps(REFERENCE), np.float64)
  return values, log_ratios, alone


@pytest.mark.parametrize("loss", few(["ppo", "gspo"], "gspo"))
def test_what_is_told_of_groups(loss, monkeypatch):
  """Means over answers, or over their tokens; an answer that has no score counts for the reward's mean alone."""
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  examples = batches.scored()
  last = examples[-1]
  unscored = (*last.values["score"][:-1], float("nan"))
  flat = {"score": unscored, "deviation": (0.0,) * last.count}
  examples[-1] = dataclasses.replace(last, values={**last.values, **flat})
  options = dict(epsilon=0.05, epsilon_high=0.1)
  options |= {"aggregation": "sequence_mean"} if loss == "gspo" else {}
  objective = Grouped(tiny.config(), loss_name=loss, old="reference", kl_weight=0.3, **options)
  metrics, given = told(objective, examples)
  values, log_ratios, alone = known(examples)
  mask, gain = alone.mask, values["advantage"][:, None]
  whole = log_ratios.sum(1, keepdims=True) / alone.lengths[:, None]
  ratio = np.exp(log_ratios if loss == "ppo" else np.broadcast_to(whole, mask.shape))
  log_p = np.asarray(alone.log_softmax(PARAMS), np.float64)
  entropy = -(np.exp(log_p) * log_p).sum(-1)
  expected = {
    "reward": np.nanmean(values["score"]),
    "advantage": gain.mean(),
    "reward_std": values["deviation"].mean(),
    "frac_reward_zero_std": (values["deviation"] == 0).mean(),
    "completions/mean_length": alone.lengths.mean(),
    "clip_ratio/low_mean": ((ratio < 0.95) & (gain < 0))[mask].mean(),
    "clip_ratio/high_mean": ((ratio > 1.1) & (gain > 0))[mask].mean(),
    "kl": (np.exp(-log_ratios) - 1 + log_ratios)[mask].mean(),
    "entropy": entropy[mask[:, 1:]].mean(),
    "tokens": (given["segment_ids"] > 0).sum(),
  }
  assert min(expected["clip_ratio/low_mean"], expected["clip_ratio/high_mean"]) > 0
  assert {*metrics} == {"loss", *expected}
  assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
  without = dataclasses.replace(objective, kl_weight=0.0)
  assert "kl" not in told(without, examples)[0]


CORRECTIONS = {  # of a sampler that is far off: level -> lower bound, higher, what is done beyond
  "token": (0.5, 2.0, "truncate"),
  "sequence": (0.5, 2.0, "mask"),
  "geometric": (0.8, 1.2, "mask"),
}


def sampled(example, logps, mask):
  """The example with the log-probabilities that each answer's tokens were drawn with."""
  drawn = np.zeros(len(example.tokens), np.float32)
  for i in range(example.count):
    drawn[example.mask & (example.answer == i)] = logps[i][mask[i]]
  return dataclasses.replace(example, sampling_logps=drawn)


@pytest.mark.parametrize("level", few(CORRECTIONS, "token", "sequence"))
def test_what_is_told_of_a_sampler_that_is_another(level, monkeypatch):
  """verl's metrics, by a loop over answers in float64."""
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  low, high, outside = CORRECTIONS[level]
  examples = batches.scored()
  _, log_rho, alone = known(examples)
  theirs = np.asarray(alone.logps(REFERENCE), np.float64)
  starts = np.cumsum([0, *(e.count for e in examples)])
  examples = [
    sampled(e, theirs[at : at + e.count], alone.mask[at : at + e.count])
    for e, at in zip(examples, starts)
  ]
  objective = Grouped(
    tiny.config(),
    importance=level,
    importance_low=low,
    importance_high=high,
    importance_outside=outside,
  )
  metrics, _ = told(objective, examples)
  tokens, weights, answers = [], [], []
  for rho, mu, mask in zip(log_rho, theirs, alone.mask):
    u, mu = rho[mask], mu[mask]
    tokens.append(u)
    whole = {"token": u, "sequence": u.sum() + 0 * u, "geometric": u.mean() + 0 * u}[level]
    weights.append(np.exp(whole))
    answers.append((np.exp(-(mu + u).mean()), np.exp(-mu.mean()), -u.mean(), u.sum()))
  u, free = np.concatenate(tokens), np.concatenate(weights)
  ours_ppl, their_ppl, difference, total = np.asarray(answers).T
  beyond = (free > high) | (free < low)
  used = np.where(beyond, 0, free) if outside == "mask" else np.clip(free, low, high)
  expected = {
    "kl": -u.mean(),
    "k3_kl": (np.exp(u) - 1 - u).mean(),
    "training_ppl": ours_ppl.mean(),
    "rollout_ppl": their_ppl.mean(),
    "log_ppl_diff": difference.mean(),
    "log_ppl_abs_diff": np.abs(difference).mean(),
    "ppl_ratio": np.exp(difference).mean(),
    "chi2_token": (np.exp(2 * u) - 1).mean(),
    "chi2_seq": (np.exp(2 * total) - 1).mean(),
    "rollout_is_mean": free.mean(),
    "rollout_is_max": free.max(),
    "rollout_is_min": free.min(),
    "rollout_is_std": used.std(),
    "rollout_is_eff_sample_size": used.mean() ** 2 / (used**2).mean(),
    "rollout_is_ratio_fraction_high": (free > high).mean(),
    "rollout_is_ratio_fraction_low": (free < low).mean(),
  }
  if outside == "mask":
    expected["rollout_rs_masked_fraction"] = beyond.mean()
  assert 0 < beyond.mean() < 1
  names = {name for name in metrics if name.startswith("rollout_corr/")}
  assert names == {f"rollout_corr/{name}" for name in expected}
  found = {name: metrics[f"rollout_corr/{name}"] for name in expected}
  assert found == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(kl_weight=0.1, kl_estimator="k1"), "zero on average"),
    (dict(importance="token", importance_outside="mask"), "masks on one side alone"),
    (dict(kl_estimator="k4"), "known are k1, k2, k3"),
    (dict(aggregation="mean"), "prompt_mean"),
    (dict(loss_name="gspo", aggregation="token_mean"), "which would count by its tokens"),
    (dict(loss_name="gspo", aggregation="prompt_mean"), "which would count by its tokens"),
    (dict(loss_name="reinforce", old="batch"), "a batch is good for one update"),
    (dict(loss_name="reinforce", old="reference"), "has no ratio to who wrote"),
  ],
)
def test_what_means_nothing_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Grouped(tiny.config(), **fields)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"kl": 0.107}, "0.107 nats a token from the reference"),
    ({"reward_kl_penalty": 4.0, "completions/mean_length": 8.0}, "0.5 nats a token from the ref"),
    ({"kl_to_old": float("nan")}, "from who wrote the answers"),
  ],
)
def test_a_first_step_that_is_not_taken_where_it_should_be_is_refused(values, message):
  """A reference of other weights, or old log-probabilities that are computed otherwise."""
  at_start = Grouped(tiny.config(), starts_there=True)
  with pytest.raises(ValueError, match=message):
    at_start.check_start(values)
  at_start.check_start({**dict.fromkeys(values, 1e-4), "loss": 3.0})
  goes_on = Grouped(tiny.config(), starts_there=False, trains_as_it_scores=False)
  goes_on.check_start(values)


def test_extremes_are_of_all_micro_batches():
  """Also where the first of them, or what they are added to, has none."""
  mask = jnp.asarray([True, True, False])
  for of, values in (
    (metrics_lib.largest, [-3.0, -2.0, 9.0]),
    (metrics_lib.least, [3.0, 2.0, -9.0]),
  ):
    wanted = values[1]
    one = {"x": of(jnp.asarray(values), mask)}
    nothing = {"x": of(jnp.asarray(values), jnp.zeros(3, bool))}
    zeros = metrics_lib.zeros_like(one)
    for several in ((zeros, one), (zeros, nothing, one), (one, nothing), (nothing, one)):
      assert metrics_lib.read(functools.reduce(metrics_lib.add, several)) == {"x": wanted}
    assert metrics_lib.read(metrics_lib.add(zeros, nothing)) == {}
