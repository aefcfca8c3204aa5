"""Labelled answers: what KTO tells of its rewards and of the KL that it estimates."""

import dataclasses

import jax
import numpy as np
import pytest

from posttrain_jax.core.metrics import read
from posttrain_jax.objectives import Context, Labelled, Scorer, evaluation
from tests import tiny
from tests.objectives import batches, bigram

EXAMPLES = batches.labels(7)
PARAMS, REFERENCE = bigram.params(0), bigram.params(1)


def ratios(examples):
  alone = bigram.of_answers(examples)
  return np.asarray(alone.logps(PARAMS) - alone.logps(REFERENCE), np.float64).sum(1)


@pytest.mark.parametrize("sign", [1, -1])
def test_rewards_and_the_kl(sign, monkeypatch):
  """The KL is that of other prompts' answers, and never below 0: one of two policies has it at 0."""
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  policy, other = (PARAMS, REFERENCE)[::sign]
  objective = Labelled(tiny.config(), beta=0.2)
  given = batches.rows_of(EXAMPLES, [[0, 1], [2, 3, 4], [5], [6], []], 96)
  run = jax.jit(evaluation(objective))
  found = read(run(policy, Context(reference=other), None, given))
  label = np.array([e.values["label"][0] for e in EXAMPLES]) > 0.5
  rewards = sign * 0.2 * ratios(EXAMPLES)
  alone = bigram.of_answers(EXAMPLES)
  logps = np.asarray(alone.logps(policy), np.float64).sum(1)
  expected = {
    "logps/chosen": logps[label].mean(),
    "logps/rejected": logps[~label].mean(),
    "lengths/chosen": alone.lengths[label].mean(),
    "lengths/rejected": alone.lengths[~label].mean(),
    "tokens": (given["segment_ids"] > 0).sum(),
    "rewards/chosen": rewards[label].mean(),
    "rewards/rejected": rewards[~label].mean(),
    "rewards/margins": rewards[label].mean() - rewards[~label].mean(),
    "kl": max(0.0, sign * ratios([e.companion for e in EXAMPLES]).mean()),
  }
  assert {*found} == {"loss", *expected}
  assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
  bare = {name: x for name, x in given.items() if name != "companion"}
  unestimated = dataclasses.replace(objective, estimate_kl=False)
  assert "kl" not in read(
    jax.jit(evaluation(unestimated))(policy, Context(reference=other), None, bare)
  )
