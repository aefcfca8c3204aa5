"""Reward models: where a score is read, and what is told of it."""

import jax
import numpy as np
import pytest

from posttrain_jax.core.metrics import read
from posttrain_jax.objectives import Context, Reward, Scorer, evaluation
from tests import tiny
from tests.objectives import batches, bigram
from tests.objectives.test_imitation import steps

PARAMS = bigram.params(0)
ROWS = [[0, 1], [2, 3], []]


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def told(kind, examples, **options):
  given = batches.rows_of(examples, ROWS, 96)
  objective = Reward(tiny.config(), kind=kind, **options)
  return read(jax.jit(evaluation(objective))(PARAMS, Context(), None, given))


def last(examples):
  """[answers]: the scores at their last tokens."""
  alone = bigram.of_answers(examples)
  scores = np.asarray(alone.rewards(PARAMS), np.float64)
  return scores[np.arange(len(scores)), alone.inside.sum(1) - 1]


@pytest.mark.parametrize("share", [True, False])
def test_pairs(share):
  examples = batches.pairs(4, share=share, margin=lambda rng, n: [0.5] * n)
  scores = last(examples)
  chosen, rejected = scores[::2], scores[1::2]
  d = chosen - rejected
  found = told("pairs", examples, centering=0.1)
  each = -np.log(sigmoid(d - 0.5)) + 0.1 * (chosen + rejected) ** 2
  expected = {
    "loss": each.mean(),
    "accuracy": (d > 0).mean(),
    "margin": d.mean(),
    "rewards/margins": d.mean(),
    "mean_reward": scores.mean(),
    "rewards/chosen": chosen.mean(),
    "rewards/rejected": rejected.mean(),
  }
  assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_outcomes():
  each = iter([(1.0,), (0.0,), (0.0,), (1.0,)])
  examples = batches.groups(4, (1,), label=lambda rng, n: next(each))
  scores, labels = last(examples), np.array([1, 0, 0, 1])
  found = told("outcomes", examples)
  right = np.where(labels, sigmoid(scores), sigmoid(-scores))
  expected = {
    "loss": -np.log(right).mean(),
    "accuracy": (right > 0.5).mean(),
    "mean_reward": scores.mean(),
  }
  assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_steps():
  """A solution without a labelled step counts for nothing."""
  labels = ([1.0, 0.0], [0.0], [], [1.0, 1.0, 0.0])
  examples = [steps(one, some) for one, some in zip(batches.groups(4, (1,), seed=3), labels)]
  found = told("steps", examples)
  score = lambda token: float(
    PARAMS["embed_tokens"]["weight"][token] @ PARAMS["score"]["weight"][:, 0]
  )
  known = [(score(t), y) for e in examples for t, y in zip(e.tokens, e.steps) if not np.isnan(y)]
  right = np.array([sigmoid(s if y else -s) for s, y in known])
  expected = {
    "loss": -np.log(right).mean(),
    "accuracy": (right > 0.5).mean(),
    "mean_reward": np.mean([s for s, _ in known]),
  }
  assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_score_is_read_at_the_last_token_of_each_answer():
  examples = batches.groups(3, (2, 3), seed=1)
  given = batches.rows_of(examples, [[0, 1], [2]], 96)
  objective = Reward(tiny.config())
  found = np.asarray(objective.rewards(PARAMS, given))[given["present"]]
  np.testing.assert_allclose(found, last(examples), rtol=1e-5)


def test_another_kind_is_refused():
  with pytest.raises(ValueError, match="learns from pairs, outcomes or steps"):
    Reward(tiny.config(), kind="pair")
