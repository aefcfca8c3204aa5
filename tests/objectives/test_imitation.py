"""The likelihood of the better answers: which they are, in rows of every kind."""

import dataclasses

import jax
import numpy as np
import pytest

from posttrain_jax.core.metrics import read
from posttrain_jax.objectives import Context, Imitation, Scorer, evaluation
from tests import tiny
from tests.objectives import batches, bigram

NAN = np.nan


def steps(example, labels):
  at = np.flatnonzero(example.mask)
  values = np.full(len(example.tokens), NAN, np.float32)
  values[at[: len(labels)]] = labels
  return dataclasses.replace(example, steps=values)


SOME = batches.groups(4, (1,))
ALL = lambda *each: lambda rng, n: each[:n]
CASES = {  # kind: (examples, which answers are imitated, in order)
  "pairs": (batches.pairs(2), [True, False, True, False]),
  "labels": (batches.groups(2, (3,), label=ALL(1.0, 0.0, 1.0)), [True, False, True] * 2),
  "outcomes": (batches.groups(2, (2,), label=ALL(0.0, 1.0)), [False, True] * 2),
  "scored": (batches.groups(2, (3,), advantage=ALL(0.5, 0.0, -0.5)), [True, False, False] * 2),
  "steps": (
    [steps(one, labels) for one, labels in zip(SOME, ([1.0], [0.0], [], [1.0]))],
    [True, False, True, True],
  ),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_better_answers_are_imitated_and_no_other(kind, monkeypatch):
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  examples, better = CASES[kind]
  params = bigram.params(0)
  alone = bigram.of_answers(examples)
  where = alone.mask & np.asarray(better)[:, None]
  expected = -alone.logps(params, where).sum() / where.sum()
  given = batches.rows_of(examples, [[0, 1], list(range(2, len(examples))), []], 96)
  run = jax.jit(evaluation(Imitation(tiny.config(), kind=kind)))
  found = read(run(params, Context(), None, given))
  assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
  assert found["nll_loss"] == found["loss"]


def test_rows_without_a_better_answer_have_no_loss(monkeypatch):
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  examples = batches.groups(2, (2,), advantage=ALL(0.0, -1.0))
  objective = Imitation(tiny.config(), kind="scored")
  given = batches.rows_of(examples, [[0], [1]], 48)

  def loss(params):
    totals = objective.totals(params, Context(), given, None, memory=None, training=True)
    return objective.loss(params, Context(), given, totals, None, training=True)[0]

  value, slope = jax.jit(jax.value_and_grad(loss))(bigram.params(0))
  assert float(value) == 0
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))
