"""Pairs: what a loss of them tells, what it remembers, and which mistakes it names."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from posttrain_jax import objectives
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core.metrics import read
from posttrain_jax.models import decoder
from posttrain_jax.objectives import (
  Context,
  Preference,
  Scorer,
)
from posttrain_jax.train import state as state_lib
from posttrain_jax.train import step
from tests import tiny
from tests.marks import few
from tests.objectives import batches, bigram
from tests.objectives.batches import (
  alone,
  batch,
  pairs,
  setup,
  told,
)


@pytest.mark.slow
def test_dpo_at_its_reference_is_log_2_with_no_margin():
  model, _, _ = tiny.setup("full")
  params = decoder.init(jax.random.key(1), model, std=tiny.STD)
  objective = Preference(model)
  (loss, metrics), _ = told(objective, params, Context(reference=params), batch(pairs()))
  assert float(loss) == pytest.approx(np.log(2), rel=1e-6)
  assert float(metrics["rewards/margins"].total) == 0.0
  assert float(metrics["rewards/margins"].count) == 7


@pytest.mark.slow
def test_evaluation_tells_the_kl_and_the_mean_logits():
  """Against the whole decoder, one pair a row; a cached reference changes nothing, and none at hand leaves it out."""
  objective, trainable, context, examples = setup("dpo")
  objective = dataclasses.replace(objective, own_base=True)
  given = batch(examples)
  measure = lambda objective, context, given: read(
    objectives.evaluation(objective)(trainable, context, None, given)
  )
  found = measure(objective, context, given)
  policy = objectives.policy(trainable, context)
  kl, logits = [], {0: [], 1: []}
  for one in pairs(share=False):
    for side in (0, 1):
      here = one.answer == side
      tokens, mask = one.tokens[here], one.mask[here]
      p, q = (
        np.asarray(alone(params, tokens, objective.model), np.float64)
        for params in (policy, context.base)
      )
      log = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))
      each = (np.exp(log(p)) * (log(p) - log(q))).sum(-1)[:-1][mask[1:]]
      kl += each.tolist()
      logits[side].append(p[:-1][mask[1:]].mean())
  assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
  assert found["kl"] > 0
  assert found["logits/chosen"] == pytest.approx(np.mean(logits[0]), rel=1e-3, abs=1e-6)
  assert found["logits/rejected"] == pytest.approx(np.mean(logits[1]), rel=1e-3, abs=1e-6)
  cached = {**given, "ref_logps": np.zeros_like(given["tokens"], np.float32)}
  assert measure(objective, context, cached)["kl"] == pytest.approx(found["kl"])
  elsewhere = dataclasses.replace(objective, own_base=False)
  assert "kl" not in measure(elsewhere, context, cached)


def test_the_histogram_of_margins_counts_every_pair():
  objective, trainable, context, examples = setup("dpo")
  (_, metrics), _ = told(objective, trainable, context, batch(examples))
  counts = metrics_lib.histograms(metrics)["rewards/margins_histogram"]
  compared = jax.jit(objective.compare)(trainable, context, batch(examples))
  margins = np.asarray(compared["chosen"] - compared["rejected"])[np.asarray(compared["present"])]
  expected = np.histogram(margins, [-np.inf, *metrics_lib.EDGES, np.inf])[0]
  np.testing.assert_array_equal(counts, expected)
  assert counts.sum() == 7


@pytest.mark.slow
def test_the_running_shift_is_the_mean_of_all_rewards_and_is_kept():
  objective, trainable, context, examples = setup("shift")
  first, second = batch(examples), batch(pairs(seed=5))
  rewards = lambda b: [
    float(told(objective, trainable, context, b)[0][1][name].total)
    for name in ("rewards/chosen", "rewards/rejected")
  ]

  @jax.jit
  def kept(memory, b):
    key = jax.random.key(0)
    totals = objective.totals(trainable, context, b, key, memory=memory, training=True)
    return objective.after_update(trainable, memory, totals)["shift"]

  memory = kept(objective.start(trainable), first)
  assert float(memory.mean) == pytest.approx(sum(rewards(first)) / 14, rel=1e-5)
  memory = kept({"shift": memory}, second)
  assert float(memory.mean) == pytest.approx(
    (sum(rewards(first)) + sum(rewards(second))) / 28, rel=1e-5
  )
  assert float(memory.count) == 28
  assert float(told(objective, trainable, context, first)[1]["shift"].count) == 0  # a measurement


def test_a_step_keeps_what_the_objective_remembers():
  objective, trainable, context, examples = setup("shift")
  optimizer = optax.sgd(0.1)
  state = state_lib.start(trainable, optimizer, context.fixed, objective.start(trainable))
  run = jax.jit(step.make(objective, optimizer))
  state, _ = run(state, context, batch(examples))
  assert float(state.memory["shift"].count) == 14
  state, _ = run(state, context, batch(examples))
  assert float(state.memory["shift"].count) == 28


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(losses=(("dop", 1.0),)), "'dop'.*known are dpo"),
    (dict(losses=()), "empty"),
    (dict(losses=(("dpo", 0.0),)), "weights are 0"),
    (dict(losses=(("sppo", 1.0),), divergence="forward_kl"), "sppo reads more"),
    (dict(divergence="kl"), "known are reverse_kl"),
    (dict(running_shift=True), "add bco"),
    (dict(losses=(("gold", 1.0),)), "third answer"),
  ],
)
def test_mistakes_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    Preference(tiny.config(), **options)


@pytest.mark.parametrize("loss", few(["dpo", "orpo"], "dpo"))
def test_what_is_told_of_pairs(loss, monkeypatch):
  """Means over pairs, and over the chosen answers' tokens; ORPO has no reference, and tells of log-odds."""
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  params, ref_params = bigram.params(0, 0.5), bigram.params(1, 0.5)
  examples = pairs(9)
  objective = Preference(tiny.config(), losses=((loss, 1.0), ("sft", 0.2)), beta=0.3)
  given = batches.rows_of(examples, [[0, 1, 2], [3, 4], [5], [6, 7, 8], []], 96)
  run = jax.jit(objectives.evaluation(objective))
  metrics = read(run(params, Context(reference=ref_params), None, given))
  alone = bigram.of_answers(examples)
  logps, ref_logps = (np.asarray(alone.logps(p), np.float64) for p in (params, ref_params))
  sides = lambda x: (x[::2], x[1::2])
  chosen, rejected = sides(logps.sum(1))
  lengths = sides(alone.lengths)
  drift = sides((logps - ref_logps).sum(1))
  rewards = (
    [0.3 * x for x in drift]
    if loss == "dpo"
    else [0.3 * chosen / lengths[0], 0.3 * rejected / lengths[1]]
  )
  correct = rewards[0] > rewards[1]
  log_p = np.asarray(alone.log_softmax(params), np.float64)
  mask = alone.mask[:, 1:]
  best = log_p.argmax(-1) == alone.tokens[:, 1:]
  expected = {
    "rewards/chosen": rewards[0].mean(),
    "rewards/rejected": rewards[1].mean(),
    "rewards/margins": (rewards[0] - rewards[1]).mean(),
    "rewards/accuracies": correct.mean(),
    "rewards/accuracies/chosen_longer": correct[lengths[0] > lengths[1]].mean(),
    "rewards/accuracies/chosen_shorter": correct[lengths[0] < lengths[1]].mean(),
    "logps/chosen": chosen.mean(),
    "logps/rejected": rejected.mean(),
    "lengths/chosen": lengths[0].mean(),
    "lengths/rejected": lengths[1].mean(),
    "nll_loss": -logps[::2].sum() / lengths[0].sum(),
    "mean_token_accuracy": best[::2][mask[::2]].mean(),
    "entropy": -(np.exp(log_p) * log_p).sum(-1)[mask].mean(),
    "tokens": (given["segment_ids"] > 0).sum(),
  }
  if loss == "dpo":
    expected |= {"logps/chosen_drift": drift[0].mean(), "logps/rejected_drift": drift[1].mean()}
  else:
    ours, theirs = chosen / lengths[0], rejected / lengths[1]
    odds = ours - theirs - np.log1p(-np.exp(ours)) + np.log1p(-np.exp(theirs))
    expected |= {"log_odds_chosen": odds.mean(), "log_odds_ratio": -np.log1p(np.exp(-odds)).mean()}
  assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
  more = {"loss", "rewards/margins_histogram", "logits/chosen", "logits/rejected"}
  assert {*metrics} - {*expected} <= more | ({"kl"} if loss == "dpo" else set())
