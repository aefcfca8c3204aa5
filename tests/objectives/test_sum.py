"""Sums: what parts say is told apart, what they remember is kept apart, and a weight of 0 is no loss."""

import dataclasses

import jax
import numpy as np
import pytest

from posttrain_jax.core.metrics import read
from posttrain_jax.objectives import Context, Imitation, Preference, Reward, Scorer, Sum, evaluation
from posttrain_jax.train import step
from tests import tiny
from tests.objectives import batches, bigram


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)


MODEL = tiny.config()
DPO = Preference(MODEL)
SUM = Sum(
  MODEL,
  parts=(("preference", DPO, 1.0), ("sft", Imitation(MODEL), 0.3), ("reward", Reward(MODEL), 2.0)),
)
PARAMS, CONTEXT = bigram.params(0), Context(reference=bigram.params(1))
GIVEN = batches.rows_of(batches.pairs(), [[0, 1], [2], [3, 4, 5, 6], []], 96)


def told(objective, given=GIVEN):
  memory = objective.start(PARAMS)
  return read(jax.jit(evaluation(objective))(PARAMS, CONTEXT, memory, given))


def test_each_part_is_told_beside_the_whole():
  found = told(SUM)
  alone = {name: told(part) for name, part, _ in SUM.parts}
  for name, numbers in alone.items():
    assert found[f"loss/{name}"] == pytest.approx(numbers["loss"], rel=1e-6)
  weighted = sum(weight * alone[name]["loss"] for name, _, weight in SUM.parts)
  assert found["loss"] == pytest.approx(weighted, rel=1e-6)
  # both have rewards of answers: the first one's are told
  assert found["rewards/margins"] == pytest.approx(alone["preference"]["rewards/margins"], rel=1e-6)
  assert alone["reward"]["rewards/margins"] != pytest.approx(found["rewards/margins"], rel=1e-2)


def test_micro_batches_add_up():
  run = lambda parts: jax.jit(
    lambda p: step.gradient(SUM, p, CONTEXT, GIVEN, jax.random.key(0), accumulate=parts)
  )(PARAMS)
  (whole, metrics), (divided, others) = run(1), run(4)
  batches.assert_same(divided, whole)
  assert read(others)["loss"] == pytest.approx(read(metrics)["loss"], rel=1e-5)


def test_it_needs_a_reference_where_a_part_does():
  assert SUM.needs_reference
  assert not dataclasses.replace(SUM, parts=SUM.parts[1:]).needs_reference


@pytest.mark.slow
def test_what_parts_remember_is_kept_apart():
  """A running shift and a reference that follows, beside a part that remembers nothing."""
  main = Preference(MODEL, losses=(("bco", 1.0),), running_shift=True, sync_every=1, sync_mix=1.0)
  objective = Sum(MODEL, parts=(("sft", Imitation(MODEL), 1.0), ("preference", main, 1.0)))
  memory = objective.start(PARAMS)
  assert memory["sft"] is None
  moved = jax.tree.map(lambda x: x + 1, PARAMS)
  context = objective.context(Context(), memory)
  how = dict(memory=memory, training=True)
  totals = objective.totals(moved, context, GIVEN, jax.random.key(0), **how)
  after = objective.after_update(moved, memory, totals)
  assert float(after["preference"]["shift"].count) == 14
  jax.tree.map(np.testing.assert_array_equal, after["preference"]["reference"].trainable, moved)
  assert after["sft"] is None


def test_parts_that_remember_nothing_have_no_memory():
  objective = Sum(MODEL, parts=(("a", Imitation(MODEL), 1.0), ("b", Imitation(MODEL), 2.0)))
  assert objective.start(PARAMS) is None
  totals = objective.totals(PARAMS, Context(), GIVEN, jax.random.key(0), memory=None, training=True)
  assert objective.after_update(PARAMS, None, totals) is None


def test_the_first_part_says_whether_training_starts_at_its_reference():
  is_base = dataclasses.replace(DPO, own_base=True, starts_there=True)
  objective = Sum(MODEL, parts=(("preference", is_base, 1.0), *SUM.parts[1:]))
  with pytest.raises(ValueError, match="differ from the reference's"):
    objective.check_start(told(objective))
