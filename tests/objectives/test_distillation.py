"""Distillation adds up: however a batch is cut, placed or packed, and beside rows of other sources."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import objectives
from posttrain_jax.core import distributed, sharding
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.data.packing import pack
from posttrain_jax.losses import distillation
from posttrain_jax.losses.distillation import Loss
from posttrain_jax.models import decoder
from posttrain_jax.objectives import (
  Distilled,
  Grouped,
  Imitation,
  Sft,
  Sum,
  Written,
  teacher_cache,
)
from posttrain_jax.objectives.distillation import teacher_logps
from posttrain_jax.objectives.rows import spans
from tests import tiny
from tests.marks import slow
from tests.objectives import batches
from tests.objectives.batches import assert_same, gradient, placed

KL = Loss("jsd", 0.3)


@functools.cache
def taught(kind="lora", k=0, loss=KL):
  """(objective, trainable, context with a larger teacher of the same tokens)."""
  model, trainable, context = tiny.setup(kind)
  theirs = tiny.config(hidden_size=96, num_hidden_layers=3, intermediate_size=64)
  params = decoder.init(jax.random.key(7), theirs, std=0.2)
  objective = Distilled(model, divergence=loss, teacher=None if k else Sft(theirs))
  return objective, trainable, dataclasses.replace(context, teacher=params)


@functools.cache
def asked(k=5):
  theirs = taught()[0].teacher
  return teacher_cache.Asked(theirs, k), taught()[2].teacher


def with_likeliest(batch, k=5):
  """The batch with what the teacher's hidden states say in it."""
  (reading, params), mask = asked(k), objectives.targets(batch)[1]
  hidden, head = reading.reader.hidden(params, batch), decoder.head(params)
  said = distillation.likeliest(hidden, head, k=k, mask=mask)
  turned = lambda x: np.roll(np.asarray(x), 1, axis=1)
  return {**batch, "teacher_ids": turned(said.ids), "teacher_logps": turned(said.logps)}


def plainly(objective, trainable, context, batch):
  """(value, gradient) from all logits of both at once."""
  read = lambda params, model: decoder.forward(
    params,
    batch["tokens"],
    model,
    positions=batch["positions"],
    segment_ids=batch["segment_ids"],
  )[:, :-1]
  theirs = jax.nn.log_softmax(read(context.teacher, objective.teacher.model))

  def loss(trainable):
    logits = read(objectives.policy(trainable, context), objective.model)
    values = objective.divergence(theirs, jax.nn.log_softmax(logits))
    return jnp.sum(values * batch["loss_mask"][:, 1:]) / batch["loss_mask"].sum()

  return jax.jit(jax.value_and_grad(loss))(trainable)


@functools.cache
def whole(kind="lora", k=0):
  batch = with_likeliest(tiny.batch()) if k else tiny.batch()
  return gradient(*taught(kind, k), batch)


@pytest.mark.parametrize("kind", [slow("full"), "lora"])
def test_one_batch_is_the_plain_formula(kind):
  value, wanted = plainly(*taught(kind), tiny.batch())
  grads, metrics = whole(kind)
  assert_same(grads, wanted, 1e-4)
  assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
  assert metrics["teacher/agreement"] < 0.5


@pytest.mark.parametrize(("kind", "k"), [slow("full", 0), ("lora", 0), ("lora", 5)])
def test_eight_micro_batches_are_one_batch(kind, k):
  batch = with_likeliest(tiny.batch()) if k else tiny.batch()
  grads, metrics = gradient(*taught(kind, k), batch, accumulate=8)
  assert_same(grads, whole(kind, k)[0])
  assert metrics == pytest.approx(whole(kind, k)[1], rel=1e-5)


@pytest.mark.parametrize(
  ("k", "shape"),
  [(0, dict(data=2, context=4)), slow(5, dict(fsdp=2, context=2, tensor=2)), slow(0, dict(fsdp=8))],
  ids=str,
)
def test_eight_devices_are_one(k, shape):
  objective, trainable, context = taught("lora", k)
  mesh = sharding.mesh(**shape)
  batch = with_likeliest(tiny.batch()) if k else tiny.batch()
  with jax.set_mesh(mesh):
    trainable, laid = placed(trainable, context, mesh)
    laid = dataclasses.replace(laid, teacher=placed(context.teacher, objectives.Context(), mesh)[0])
    given = distributed.global_batch(mesh, batch)
    grads, metrics = gradient(objective, trainable, laid, given)
  assert_same(grads, whole("lora", k)[0])
  assert metrics == pytest.approx(whole("lora", k)[1], rel=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_that_is_its_teacher_learns_nothing(name):
  model, trainable, context = tiny.setup("lora")
  same = jax.lax.stop_gradient(objectives.policy(trainable, context))
  objective = Distilled(model, divergence=Loss(name), teacher=Sft(model))
  taught_by_itself = dataclasses.replace(context, teacher=same)
  grads, metrics = gradient(objective, trainable, taught_by_itself, tiny.batch())
  assert abs(metrics["loss"]) < 1e-6
  assert metrics["teacher/agreement"] == 1
  away = gradient(*taught(loss=Loss(name)), tiny.batch())[0]
  largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
  assert largest(grads) < 1e-5 * largest(away)


def test_likeliest_tokens_are_kept_with_each_example(tmp_path):
  some, said = tiny.examples(6), []
  how, params = asked()
  keep = lambda examples: teacher_cache.taught(
    examples, how, params, cache=tmp_path, say=said.append
  )
  known = keep(some)
  batch = pack(known, [[0, 1], [2], [], [3, 5], [4]], 42, tiny.CHANNELS)
  grads, metrics = gradient(*taught("lora", 5), batch)
  bare = pack(some, [[0, 1], [2], [], [3, 5], [4]], 42, tiny.CHANNELS)
  wanted = gradient(*taught("lora", 5), with_likeliest(bare))
  assert_same(grads, wanted[0])
  assert metrics == pytest.approx(wanted[1], rel=1e-5)
  assert 0 < metrics["teacher/student_mass"] < metrics["teacher/mass"] < 1
  again = keep(some)
  assert "read from" in said[-1]
  (path,) = tmp_path.glob("teacher-*.safetensors")
  np.testing.assert_array_equal(again[3].teacher_logps, known[3].teacher_logps)
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  path.write_bytes(content)
  np.testing.assert_array_equal(keep(some)[3].teacher_logps, known[3].teacher_logps)
  assert any("is not what was written" in line for line in said)


def test_as_many_likeliest_tokens_as_there_are_but_one_say_what_the_whole_teacher_says():
  """The rest is then a single token; and what is kept with a token is of the place before it, as hidden states are."""
  every = taught()[0].model.vocab_size - 1
  grads, metrics = gradient(*taught("lora", every), with_likeliest(tiny.batch(), every))
  assert_same(grads, whole("lora")[0], 1e-3)
  assert metrics["loss"] == pytest.approx(whole("lora")[1]["loss"], rel=1e-4)


def streams():
  """A batch in which two groups and two answers of the data stand, and the rows of each by themselves."""
  rng = np.random.default_rng(0)
  normal = lambda rng, n: rng.normal(size=n)
  zero, one = (lambda rng, n, v=v: [v] * n for v in (0.0, 1.0))
  written = batches.groups(
    4, (3, 2), score=normal, advantage=normal, deviation=normal, gold=zero, seed=1
  )
  gold = batches.groups(3, (1,), score=zero, advantage=zero, deviation=zero, gold=one, seed=2)
  del rng
  every = [*written, *gold]
  mixed = batches.rows_of(every, [[0, 4], [1], [2], [5], [3], [6], [], []])
  own = batches.rows_of(written, [[0], [1], [2], [], [3], [], [], []])
  datas = batches.rows_of(gold, [[0], [], [], [1], [], [2], [], []])
  return mixed, own, datas


def test_each_stream_of_a_batch_has_its_own_count():
  objective, trainable, context = taught()
  model = objective.model
  policy = Grouped(model, aggregation="sequence_mean")  # by answers, of which gold ones are none
  imitation = Imitation(model, kind="prompts")
  parts = (("grouped", Written(model, part=policy), 1.0), ("sft", imitation, 0.7))
  both = Sum(model, parts=(*parts, ("distil", objective, 0.2)))
  mixed, own, datas = streams()
  grads, metrics = gradient(both, trainable, context, mixed)
  alone = [
    gradient(policy, trainable, context, own),
    gradient(imitation, trainable, context, datas),
    gradient(objective, trainable, context, mixed),
  ]
  wanted = jax.tree.map(lambda a, b, c: a + 0.7 * b + 0.2 * c, *(g for g, _ in alone))
  assert_same(grads, wanted)
  assert metrics["loss/sft"] == pytest.approx(alone[1][1]["loss"], rel=1e-5)
  assert metrics["loss/grouped"] == pytest.approx(alone[0][1]["loss"], rel=1e-4, abs=1e-6)
  in_eight, told = gradient(both, trainable, context, mixed, accumulate=8)
  assert_same(in_eight, grads)
  assert told == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_the_reverse_kl_to_the_teacher_is_taken_off_each_tokens_advantage():
  objective, trainable, context = taught()
  reader, model = objective.teacher, objective.model
  examples = batches.drawn(4)
  batch = batches.rows_of(examples, [[0], [1], [2], [3]])
  mask = spans(batch).mask
  batch["teacher_logps"] = np.asarray(teacher_logps(reader, context.teacher, batch, mask))
  by_gradient = Grouped(model, loss_name="reinforce", teacher_weight=0.6)
  grads, metrics = gradient(by_gradient, trainable, context, batch)
  assert by_gradient.teaches(batch) is None  # though every advantage of an answer were 0

  def plain(trainable):
    params = objectives.policy(trainable, context)
    scorer = Sft(model)
    forward = objectives.Forward(params, scorer.hidden(params, batch))
    logps, at = scorer.scores(forward, batch, mask).logp, spans(batch)
    mu = jnp.roll(batch["sampling_logps"], -1, axis=1)
    advantage = at.per_token(batch["advantage"]) - 0.6 * (mu - batch["teacher_logps"])
    return -jnp.sum(jnp.where(mask, advantage * logps, 0.0)) / mask.sum()

  assert_same(grads, jax.jit(jax.grad(plain))(trainable))
  gap = np.roll(batch["sampling_logps"], -1, axis=1) - batch["teacher_logps"]
  wanted = float(gap[np.asarray(mask)].mean())
  assert metrics["teacher/reverse_kl"] == pytest.approx(wanted, rel=1e-5)
  in_four, told = gradient(by_gradient, trainable, context, batch, accumulate=4)
  assert_same(in_four, grads)
  assert told == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_the_policy_gradient_of_the_reverse_kl_is_that_of_the_whole_one_on_average():
  """At the policy's own distribution E[(log q - log p) d log q] is the gradient of KL(q || p), token by token."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(5)
    p, z = jax.nn.log_softmax(rng.normal(size=9)), jnp.asarray(rng.normal(size=9))
    whole_kl = jax.grad(lambda z: distillation.reverse_kl(p, jax.nn.log_softmax(z)))(z)
    log_q = jax.nn.log_softmax(z)
    of_token = jax.jacobian(jax.nn.log_softmax)(z)  # [token, logits]
    expected = jnp.sum((jnp.exp(log_q) * (log_q - p))[:, None] * of_token, axis=0)
    np.testing.assert_allclose(expected, whole_kl, rtol=1e-9, atol=1e-14)


def test_a_loss_of_whole_answers_has_no_place_for_a_teacher_of_tokens():
  with pytest.raises(ValueError, match="a teacher says something of each token"):
    Grouped(tiny.config(), loss_name="rloo", teacher_weight=1.0)


def test_a_distillation_without_a_teacher_says_so():
  objective, trainable, context = taught()
  alone = dataclasses.replace(context, teacher=None)
  with pytest.raises(ValueError, match="there is no teacher"):
    metrics_lib.read(gradient(objective, trainable, alone, tiny.batch())[1])
