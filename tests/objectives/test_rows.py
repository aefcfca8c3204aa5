"""Objectives on answers: nothing depends on how a batch is divided, packed, ordered or laid out."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from posttrain_jax.core import distributed, sharding
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.data import answers
from posttrain_jax.data.packing import best_fit
from posttrain_jax.objectives import (
  Context,
  Grouped,
  Preference,
  Reward,
  Scorer,
  evaluation,
)
from posttrain_jax.objectives import rows as rows_lib
from tests import tiny
from tests.marks import few
from tests.objectives import bigram
from tests.objectives.batches import (
  CASES,
  FAST,
  LENGTH,
  alone,
  assert_same,
  batch,
  example,
  gradient,
  pairs,
  placed,
  rows_of,
  setup,
  whole,
)

ALL = few(CASES, *FAST)


@pytest.mark.parametrize("name", ALL)
def test_eight_micro_batches_are_one_batch(name):
  objective, trainable, context, examples = setup(name)
  grads, metrics = gradient(objective, trainable, context, batch(examples), accumulate=8)
  assert_same(grads, whole(name)[0])
  assert metrics == pytest.approx(whole(name)[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", few(CASES, "several"))
def test_neither_order_nor_packing_nor_a_shared_prompt_changes_anything(name):
  objective, trainable, context, examples = setup(name)
  order = np.random.default_rng(0).permutation(len(examples))
  fitted = best_fit([len(examples[i]) for i in order], 2 * LENGTH)
  rows = [[int(order[i]) for i in row] for row in fitted]
  grads, metrics = gradient(objective, trainable, context, rows_of(examples, rows, 2 * LENGTH))
  assert_same(grads, whole(name)[0])
  assert metrics["loss"] == pytest.approx(whole(name)[1]["loss"], rel=1e-5)
  if CASES[name][2] is pairs:
    apart = pairs(share=False)
    assert sum(map(len, apart)) > sum(map(len, examples))
    grads, _ = gradient(objective, trainable, context, batch(apart))
    assert_same(grads, whole(name)[0])


def backward_passes(monkeypatch):
  """A list that grows with each backward pass through the decoder."""
  passes, hidden = [], Scorer.hidden_and_load

  @jax.custom_vjp
  def counted(x):
    return x

  def back(_, gradient):
    jax.debug.callback(lambda: passes.append(1))
    return (gradient,)

  counted.defvjp(lambda x: (x, None), back)
  monkeypatch.setattr(Scorer, "hidden_and_load", lambda *args, **how: counted(hidden(*args, **how)))
  return passes


@pytest.mark.parametrize(
  "name", few([n for n, (kind, _, _) in CASES.items() if kind is Grouped], "gspo", "grpo")
)
def test_answers_that_agree_need_no_backward_pass(name, monkeypatch):
  """The update is the same but for rounding, and so is all that is told."""
  passes = backward_passes(monkeypatch)
  objective, trainable, context, examples = setup(name)
  flat = lambda e: e.values | {"advantage": (0.0,) * e.count, "deviation": (0.0,) * e.count}
  agree = [dataclasses.replace(e, values=flat(e)) if i % 2 else e for i, e in enumerate(examples)]
  rows = rows_of(agree, [[i] for i in range(len(agree))], 2 * LENGTH)
  grads, metrics = gradient(objective, trainable, context, rows, accumulate=len(agree))
  jax.effects_barrier()
  assert len(passes) == (len(agree) if objective.kl_weight else len(agree) // 2)
  monkeypatch.setattr(Grouped, "teaches", Scorer.teaches)
  whole, wanted = gradient(objective, trainable, context, rows, accumulate=len(agree))
  assert_same(grads, whole, 1e-6)
  assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
  ("name", "sizes"),
  few(
    itertools.product(CASES, (dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, context=4))),
    *((name, dict(fsdp=2, context=4)) for name in FAST),
  ),
  ids=str,
)
def test_eight_devices_are_one(name, sizes):
  objective, trainable, context, examples = setup(name)
  mesh = sharding.mesh(**sizes)
  with jax.set_mesh(mesh):
    trainable, moved = placed(trainable, context, mesh)
    there = distributed.global_batch(mesh, batch(examples))
    grads, metrics = gradient(objective, trainable, moved, there, accumulate=2)
  assert_same(jax.device_get(grads), whole(name)[0])
  assert metrics["loss"] == pytest.approx(whole(name)[1]["loss"], rel=1e-5)


MEASURED = {
  "dpo": (Preference, dict(ld_alpha=0.3), pairs),
  "orpo": (Preference, dict(losses=(("orpo", 1.0), ("sft_with_prompt", 1.0))), pairs),
  "reward": (Reward, {}, pairs),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_measured_is_the_same_where_rows_are_cut(name, monkeypatch):
  """What reads neighbours, ranks of tokens within an answer, means over an answer's logits and the KL among it."""
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  kind, options, make = MEASURED[name]
  context, params = Context(reference=bigram.params(1)), bigram.params(0)
  measure = jax.jit(evaluation(kind(tiny.config(), **options)))
  rows = batch(make())
  wanted = metrics_lib.read(measure(params, context, None, rows))
  mesh = sharding.mesh(fsdp=2, context=4)
  with jax.set_mesh(mesh):
    found = measure(params, context, None, distributed.global_batch(mesh, rows))
  assert metrics_lib.read(found) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_sums_are_those_of_each_answer_alone():
  """Against the whole decoder on one answer a row, without packing."""
  model, trainable, _ = tiny.setup("full")
  rng = np.random.default_rng(3)
  prompt = rng.integers(3, 250, 5)
  several = [example(rng, prompt, n) for n in (3, 6, 1)]
  made = answers.join(several)
  objective = Preference(model)
  packed = rows_of([made, made], [[0, 1]])

  @jax.jit
  def sums(trainable, packed):
    at = rows_lib.spans(packed)
    forward = objective.forward(trainable, Context(), packed, None, training=False)
    return at.per_answer(objective.scores(forward, packed, at.mask).logp)

  found = sums(trainable, packed)
  for i, one in enumerate(several * 2):
    logits = np.asarray(alone(trainable, one.tokens, model), np.float64)
    logps = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[
      np.arange(len(one) - 1), one.tokens[1:]
    ]
    expected = logps[one.mask[1:]].sum()
    assert float(found[0, i]) == pytest.approx(expected, rel=1e-5)
  assert made.lengths == (3, 6, 1)
