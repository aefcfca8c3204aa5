"""Objectives on answers: nothing depends on how a batch is divided, packed, ordered or laid out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, objectives
from posttrain_jax.core import distributed, sharding, tree
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core.metrics import read
from posttrain_jax.data import answers
from posttrain_jax.data.chat import Example
from posttrain_jax.data.packing import best_fit, pack_answers, slots
from posttrain_jax.models import decoder
from posttrain_jax.objectives import (
  Context,
  Grouped,
  Labelled,
  Preference,
  reference,
  reference_cache,
)
from posttrain_jax.objectives import rows as rows_lib
from posttrain_jax.train import state as state_lib
from posttrain_jax.train import step
from tests import tiny
from tests.marks import slow
from tests.objectives.test_objectives import assert_same, gradient, placed

LENGTH = 48
PAIRS = {
  "dpo": dict(losses=(("dpo", 1.0),)),
  "several": dict(losses=(("ipo", 0.5), ("bco", 0.3), ("sft", 1.0)), label_smoothing=0.1),
  "aot": dict(losses=(("aot", 1.0),)),
  "aot_unpaired": dict(losses=(("aot_unpaired", 1.0),)),
  "orpo": dict(losses=(("orpo", 1.0), ("sft_with_prompt", 1.0))),
  "simpo": dict(losses=(("simpo", 1.0),), gamma_beta_ratio=0.5),
  "ld": dict(ld_alpha=0.3),
  "weighting": dict(weighting=True),
  "shift": dict(losses=(("bco", 1.0),), running_shift=True),
}


def example(rng, prompt, length):
  tokens = np.concatenate([prompt, rng.integers(3, 250, length)]).astype(np.int32)
  return Example(tokens, np.arange(len(tokens)) >= len(prompt), None, "row", False)


def groups(count, sizes, *, share=True, seed=0, **values):
  """Answers of unequal lengths to random prompts; `values` are functions of (rng, how many)."""
  rng = np.random.default_rng(seed)
  made = []
  for i in range(count):
    prompt = rng.integers(3, 250, int(rng.integers(2, 7)))
    size = sizes[i % len(sizes)]
    several = [example(rng, prompt, int(rng.integers(1, 8))) for _ in range(size)]
    numbers = {name: make(rng, size) for name, make in values.items()}
    made.append(answers.join(several, share=share, values=numbers))
  return made


def pairs(count=7, **options):
  return groups(count, (2,), **options)


def labels(count=8):
  made = groups(count, (1,), label=lambda rng, n: [float(rng.integers(2))])
  made[0] = dataclasses.replace(made[0], values={"label": (1.0,)})
  made[1] = dataclasses.replace(made[1], values={"label": (0.0,)})
  return answers.with_companions(made, LENGTH)


def scored(count=6):
  return groups(
    count,
    (3, 2, 4),
    score=lambda rng, n: rng.normal(size=n),
    advantage=lambda rng, n: rng.normal(size=n),
    deviation=lambda rng, n: rng.uniform(size=n),
  )


def rows_of(examples, rows, length=LENGTH):
  room = max(slots(examples, length, True), max(e.count for e in examples))
  return pack_answers(examples, rows, length, room)


@functools.partial(jax.jit, static_argnames="model")
def whole_decoder(params, tokens, model):
  return decoder.forward(params, tokens, model)


def alone(params, tokens, model):
  """[time, vocab] of one sequence by itself; filled up behind, for one program to read them all."""
  padded = np.pad(tokens, (0, LENGTH - len(tokens)))[None]
  return whole_decoder(params, padded, model)[0, : len(tokens)]


@functools.partial(jax.jit, static_argnames="objective")
def told(objective, trainable, context, given):
  """What the loss tells of a batch, and the batch's totals."""
  memory = objective.start(trainable)
  context = objective.context(context, memory)
  totals = objective.totals(trainable, context, given, None, memory=memory, training=False)
  return objective.loss(trainable, context, given, totals, None, training=False), totals


def batch(examples):
  """Eight rows: some hold several examples, one is empty."""
  rows = [[0, 1], [2], [3], [4], [5], [6] if len(examples) > 6 else []]
  rows += [[7]] if len(examples) > 7 else [[]]
  return rows_of(examples, [*rows, []], 2 * LENGTH)


CASES = {
  **{name: (Preference, options, pairs) for name, options in PAIRS.items()},
  "kto": (Labelled, dict(undesirable_weight=1.3), labels),
  "grpo": (Grouped, dict(aggregation="sequence_mean", old="reference", kl_weight=0.1), scored),
  "gspo": (Grouped, dict(loss_name="gspo", old="reference", epsilon=0.5), scored),
  "rloo": (Grouped, dict(loss_name="rloo", old="reference", epsilon=0.5), scored),
}
FAST = ("several", "aot_unpaired", "kto", "grpo")


def setup(name):
  """(objective, trainable, context, examples)."""
  kind, options, make = CASES[name]
  model, trainable, context = tiny.setup("lora")
  objective = kind(model, **options)
  return objective, trainable, context, make()


@pytest.fixture(scope="module")
def whole():
  found = {}

  def of(name):
    if name not in found:
      objective, trainable, context, examples = setup(name)
      found[name] = gradient(objective, trainable, context, batch(examples))
    return found[name]

  return of


ALL = [name if name in FAST else slow(name) for name in CASES]


@pytest.mark.parametrize("name", ALL)
def test_eight_micro_batches_are_one_batch(name, whole):
  objective, trainable, context, examples = setup(name)
  grads, metrics = gradient(objective, trainable, context, batch(examples), accumulate=8)
  assert_same(grads, whole(name)[0])
  assert metrics == pytest.approx(whole(name)[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", [slow(name) if name == "aot_unpaired" else name for name in ALL])
def test_neither_order_nor_packing_nor_a_shared_prompt_changes_anything(name, whole):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_eight_devices_are_one(name, whole):
  objective, trainable, context, examples = setup(name)
  mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    trainable, moved = placed(trainable, context, mesh)
    there = distributed.global_batch(mesh, batch(examples))
    grads, metrics = gradient(objective, trainable, moved, there, accumulate=2)
  assert_same(jax.device_get(grads), whole(name)[0])
  assert metrics["loss"] == pytest.approx(whole(name)[1]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo"])
def test_a_cached_reference_is_the_base(name, whole, tmp_path):
  objective, trainable, context, examples = setup(name)
  said = []
  how = dict(scorer=objective, params=context.base, cache=tmp_path, say=said.append)
  cached = reference_cache.scored(examples, **how)
  again = reference_cache.scored(examples, **how)
  assert "computing" in said[0]
  assert "read from" in said[1]
  np.testing.assert_array_equal(cached[0].reference, again[0].reference)
  grads, metrics = gradient(objective, trainable, context, batch(cached))
  assert_same(grads, whole(name)[0])
  assert metrics == pytest.approx(whole(name)[1], rel=1e-5, abs=1e-6)
  other = jax.tree.map(lambda x: x * 1.01, context.base)
  reference_cache.scored(examples, **{**how, "params": other})
  assert "computing" in said[2]


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


def test_dpo_at_its_reference_is_log_2_with_no_margin():
  model, _, _ = tiny.setup("full")
  params = decoder.init(jax.random.key(1), model, std=tiny.STD)
  objective = Preference(model)
  (loss, metrics), _ = told(objective, params, Context(reference=params), batch(pairs()))
  assert float(loss) == pytest.approx(np.log(2), rel=1e-6)
  assert float(metrics["rewards/margins"].total) == 0.0
  assert float(metrics["rewards/margins"].count) == 7


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
  cached = {**given, "reference": np.zeros_like(given["tokens"], np.float32)}
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


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_reference_that_is_not_the_start_is_refused(name):
  objective, trainable, context, examples = setup(name)
  objective = dataclasses.replace(objective, own_base=True, starts_there=True)
  start = jax.tree.map(jnp.zeros_like, trainable)
  measure = lambda trainable: read(
    objectives.evaluation(objective)(trainable, context, None, batch(examples))
  )
  objective.check_start(measure(start))
  with pytest.raises(ValueError, match=r"differ from the reference's by .* nats a token"):
    objective.check_start(measure(trainable))
  dataclasses.replace(objective, starts_there=False).check_start(measure(trainable))


@pytest.mark.parametrize("use_dora", [slow(False), True])
def test_what_an_adapter_took_out_of_its_base_is_the_references_again(use_dora):
  """PiSSA: the reference is the model that was, not what is left of it."""
  model, _, _ = tiny.setup("full")
  params = decoder.init(jax.random.key(1), model, std=tiny.STD)
  chosen = adapters.AdapterConfig(r=4, lora_alpha=8, init_lora_weights="pissa", use_dora=use_dora)
  rest, adapter = adapters.init(jax.random.key(0), params, chosen)
  trainable, fixed = tree.partition(adapter)
  context = Context(rest, fixed)
  (loss, _), _ = told(Preference(model), trainable, context, batch(pairs()))
  assert float(loss) == pytest.approx(np.log(2), rel=1e-5)
  found = reference.reference(context)
  tokens = np.arange(3, 12)[None]
  logits = [whole_decoder(p, tokens, model) for p in (found, params)]
  np.testing.assert_allclose(*logits, atol=2e-5)


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
  import optax

  objective, trainable, context, examples = setup("shift")
  optimizer = optax.sgd(0.1)
  state = state_lib.start(trainable, optimizer, context.fixed, objective.start(trainable))
  run = jax.jit(step.make(objective, optimizer))
  state, _ = run(state, context, batch(examples))
  assert float(state.memory["shift"].count) == 14
  state, _ = run(state, context, batch(examples))
  assert float(state.memory["shift"].count) == 28


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


def test_full_fine_tuning_without_a_reference_is_refused():
  model, params, context = tiny.setup("full")
  objective = Preference(model)
  with pytest.raises(ValueError, match="give it a reference"):
    objective.loss(params, context, batch(pairs()), {"count": 7}, None, training=True)
  assert tree.size(params) > 0


@pytest.mark.parametrize("kind", ["pairs", slow("labels")])
def test_a_reference_follows_the_policy(kind):
  """TR-DPO: every second update the reference goes 0.6 of the way; the loss compares with it, evaluation too."""
  import optax

  model, params, _ = tiny.setup("full")
  make = {"pairs": Preference, "labels": Labelled}[kind]
  objective = make(model, sync_every=2)
  examples = batch(pairs() if kind == "pairs" else labels())
  optimizer = optax.sgd(0.5)
  state = state_lib.start(params, optimizer, None, objective.start(params))
  run = jax.jit(step.make(objective, optimizer))
  expected, margins = params, []
  for count in range(4):
    before, compared = state.trainable, expected
    state, metrics = run(state, Context(), examples)
    if count % 2:
      expected = jax.tree.map(lambda new, old: 0.6 * new + 0.4 * old, state.trainable, expected)
    margins.append(metrics["rewards/chosen"])
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    jax.tree.map(near, state.memory["reference"].trainable, expected)
  assert float(margins[0].total) == pytest.approx(0, abs=1e-5)
  plain = make(model)
  (_, metrics), _ = told(plain, before, Context(reference=compared), examples)
  assert float(margins[3].total) == pytest.approx(float(metrics["rewards/chosen"].total), rel=1e-4)
