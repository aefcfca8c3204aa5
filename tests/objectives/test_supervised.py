"""Contributions add up: one batch, micro-batches and devices give the same gradient as the plain formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, objectives
from posttrain_jax.core import distributed, sharding
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.data.packing import pack
from posttrain_jax.losses import logprob
from posttrain_jax.models import decoder
from posttrain_jax.objectives import Sft
from tests import tiny
from tests.marks import few, slow
from tests.objectives.batches import assert_same, gradient, placed

KINDS = ("full", "lora", "qlora")
SPECIAL = (100, 101, 102)


def make(kind, **options):
  model, trainable, context = tiny.setup(kind)
  return Sft(model, channels=tiny.CHANNELS, special_tokens=SPECIAL, **options), trainable, context


def plainly(objective, trainable, context, batch):
  """(value, gradient) from all logits of all tokens at once."""

  def loss(trainable, context, batch):
    params = objectives.policy(trainable, context)
    logits = decoder.forward(
      params,
      batch["tokens"],
      objective.model,
      positions=batch["positions"],
      segment_ids=batch["segment_ids"],
    )
    logps = jax.nn.log_softmax(logits[:, :-1])
    nll = -jnp.take_along_axis(logps, batch["tokens"][:, 1:, None], -1)[..., 0]
    return jnp.sum(nll * batch["loss_mask"][:, 1:]) / batch["loss_mask"].sum()

  return jax.jit(jax.value_and_grad(loss))(trainable, context, batch)


@functools.cache
def whole(kind):
  """Gradient and metrics of one batch of 8."""
  return gradient(*make(kind), tiny.batch())


@pytest.mark.parametrize("kind", few(KINDS, "lora", "qlora"))
def test_one_batch_is_the_plain_formula(kind):
  objective, trainable, context = make(kind)
  if context.base is not None:  # no quantised weight is left
    context = context.replace(base=adapters.merge(context.base))
  value, wanted = plainly(objective, trainable, context, tiny.batch())
  grads, metrics = whole(kind)
  assert_same(grads, wanted)
  assert metrics["loss"] == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize("kind", few(KINDS, "lora"))
def test_eight_micro_batches_are_one_batch(kind):
  grads, metrics = gradient(*make(kind), tiny.batch(), accumulate=8)
  assert_same(grads, whole(kind)[0])
  assert metrics == pytest.approx(whole(kind)[1], rel=1e-6)


@pytest.mark.parametrize(
  ("kind", "shape", "accumulate"),
  [
    slow("full", dict(data=8), 1),
    slow("full", dict(data=2, fsdp=2, tensor=2), 2),
    slow("lora", dict(fsdp=8), 1),
    slow("qlora", dict(fsdp=4, tensor=2), 2),
    slow("full", dict(fsdp=2, context=2, tensor=2), 1),
    ("lora", dict(data=2, context=4), 1),
  ],
  ids=str,
)
def test_eight_devices_are_one(kind, shape, accumulate):
  objective, trainable, context = make(kind, remat="dots")
  mesh = sharding.mesh(**shape)
  with jax.set_mesh(mesh):
    trainable, context = placed(trainable, context, mesh)
    batch = distributed.global_batch(mesh, tiny.batch())
    grads, metrics = gradient(objective, trainable, context, batch, accumulate)
  assert_same(grads, whole(kind)[0])
  assert metrics == pytest.approx(whole(kind)[1], rel=1e-5)


def test_the_order_of_rows_changes_nothing():
  order = np.random.default_rng(1).permutation(8)
  grads, metrics = gradient(*make("lora"), {k: v[order] for k, v in tiny.batch().items()})
  assert_same(grads, whole("lora")[0])
  assert metrics == pytest.approx(whole("lora")[1], rel=1e-6)


def test_packed_examples_have_the_log_probabilities_of_their_own_rows():
  model, trainable, context = tiny.setup("lora")
  params = objectives.policy(trainable, context)
  some = tiny.examples(5)

  @jax.jit
  def logps(batch):
    hidden = decoder.hidden(
      params,
      batch["tokens"],
      model,
      positions=batch["positions"],
      segment_ids=batch["segment_ids"],
    )
    labels, mask = objectives.targets(batch)
    return logprob.token_logps(hidden, decoder.head(params), labels, mask=mask)

  apart = logps(pack(some, [[i] for i in range(5)], 14, tiny.CHANNELS))
  packed = pack(some, [[3, 0, 4], [1], [2], [], []], 42, tiny.CHANNELS)
  found, segments = np.asarray(logps(packed)), packed["segment_ids"]
  for example, row, segment in [(3, 0, 1), (0, 0, 2), (4, 0, 3), (1, 1, 1), (2, 2, 1)]:
    length = len(some[example])
    assert (segments[row] == segment).sum() == length
    mine, alone = found[row][segments[row] == segment], np.asarray(apart[example])[:length]
    np.testing.assert_allclose(mine, alone, rtol=1e-5, atol=1e-6)
    assert (mine != 0).sum() == some[example].mask.sum()


def test_metrics_are_means_over_the_tokens_they_name():
  kinds = (("tool", SPECIAL[1:]), ("think", (260,)))
  objective, trainable, context = make("lora", markers=kinds)
  batch = tiny.batch()
  batch["tokens"][:, 10] = SPECIAL[1]  # trained in some rows
  batch["tokens"][:, 11] = SPECIAL[0]  # of no kind
  metrics = jax.jit(objectives.evaluation(objective))(trainable, context, None, batch)
  found = metrics_lib.read(metrics)
  logits = decoder.forward(
    objectives.policy(trainable, context),
    batch["tokens"],
    objective.model,
    positions=batch["positions"],
    segment_ids=batch["segment_ids"],
  )
  logits = np.asarray(logits, np.float64)[:, :-1]
  logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  labels, mask, channel = (batch[k][:, 1:] for k in ("tokens", "loss_mask", "channel"))
  nll = -np.take_along_axis(logps, labels[..., None], -1)[..., 0]
  special = np.isin(labels, SPECIAL) & mask
  assert special.any()
  wanted = {
    "loss": nll[mask].mean(),
    "mean_token_accuracy": (logits.argmax(-1) == labels)[mask].mean(),
    "entropy": -(np.exp(logps) * logps).sum(-1)[mask].mean(),
    "loss/special": nll[special].mean(),
    "loss/special/tool": nll[np.isin(labels, SPECIAL[1:]) & mask].mean(),
    "loss/sql": nll[mask & (channel == 0)].mean(),
    "loss/talk": nll[mask & (channel == 1)].mean(),
    "tokens": (batch["segment_ids"] > 0).sum(),
  }
  assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
  assert found["loss/special/tool"] != pytest.approx(found["loss/special"], rel=1e-3)
  assert "loss/special/think" not in found  # the batch has none


def test_a_channel_without_a_token_is_left_out():
  objective, trainable, context = make("lora")
  batch = {**tiny.batch()}
  batch["channel"] = np.where(batch["channel"] == 1, -1, batch["channel"])
  found = metrics_lib.read(
    jax.jit(objectives.evaluation(objective))(trainable, context, None, batch)
  )
  assert "loss/sql" in found
  assert "loss/talk" not in found


def test_a_batch_with_nothing_to_learn_has_a_zero_gradient():
  objective, trainable, context = make("lora")
  batch = {**tiny.batch(), "loss_mask": np.zeros((8, 28), bool)}
  grads, metrics = gradient(objective, trainable, context, batch)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))
  assert "loss" not in metrics


def test_shifted_attention_is_of_training_alone():
  """LongLoRA: groups in training, all of the text where it is measured."""
  plain, trainable, context = make("full")
  shifted, batch, key = make("full", attention_group=4)[0], tiny.batch(), jax.random.key(0)

  @functools.partial(jax.jit, static_argnames=("objective", "training"))
  def hidden(objective, trainable, context, batch, training):
    return objective.forward(trainable, context, batch, key, training=training).hidden

  run = functools.partial(hidden, trainable=trainable, context=context, batch=batch)
  np.testing.assert_array_equal(run(shifted, training=False), run(plain, training=False))
  assert not np.allclose(run(shifted, training=True), run(plain, training=True))
