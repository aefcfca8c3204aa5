"""PPO's two losses: each by its formula, neither in the other's way, and nothing depends on how a batch is divided."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.adapters import layout
from posttrain_jax.core import distributed, sharding, tree
from posttrain_jax.core.metrics import read
from posttrain_jax.objectives import (
  CRITIC,
  ActorCritic,
  Context,
  Grouped,
  Scorer,
  evaluation,
  of_policy,
)
from posttrain_jax.objectives.rows import spans
from tests import tiny
from tests.marks import few
from tests.objectives import batches, bigram

HOW = dict(old="batch", epsilon=0.2, epsilon_high=0.28)
MODEL = tiny.config()
ROWS = [[0, 1], [2, 3], [4], [5], []]


def given(rows=ROWS, length=96, seed=5):
  """A batch with what a critic's run has of each token, away from where either bound would not show."""
  batch = batches.rows_of(batches.scored(), rows, length)
  rng, shape = np.random.default_rng(seed), batch["tokens"].shape
  normal = lambda mean, spread: rng.normal(mean, spread, shape).astype(np.float32)
  return batch | {
    "advantages": normal(0, 1),
    "returns": normal(0.3, 1),
    "old_values": normal(0, 0.4),
    "old_logps": normal(-5.5, 0.4),
  }


def with_head(critic, seed=7, size=MODEL.hidden_size):
  head = np.random.default_rng(seed).normal(0, 0.3, (size, 1)).astype(np.float32)
  return {**critic, "score": {"weight": jnp.asarray(head)}}


def lora(trunk):
  """(objective, trainable, context) of adapters that are away from their start, the critic's from the policy's."""
  model, trainable, context = tiny.setup("lora")
  critic, fixed = {}, {}
  if trunk == "own":
    critic, fixed = jax.tree.map(lambda x: 0.7 * x, trainable), context.fixed
  objective = ActorCritic(model, part=Grouped(model, **HOW), trunk=trunk)
  trainable = {**trainable, CRITIC: with_head(critic)}
  fixed = {**context.fixed, CRITIC: {**fixed, "score": {"weight": None}}}
  return objective, trainable, dataclasses.replace(context, fixed=fixed)


@pytest.mark.parametrize("trunk", few(["own", "shared"], "own"))
def test_eight_micro_batches_are_one_batch(trunk):
  objective, trainable, context = lora(trunk)
  batch = given([[0], [1], [2], [3], [4], [5], [], []])
  whole, wanted = batches.gradient(objective, trainable, context, batch)
  parts, found = batches.gradient(objective, trainable, context, batch, accumulate=8)
  batches.assert_same(parts, whole)
  assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["own", "shared"])
@pytest.mark.parametrize(
  "sizes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, context=4)], ids=str
)
def test_eight_devices_are_one(trunk, sizes):
  objective, trainable, context = lora(trunk)
  batch = given([[0], [1], [2], [3], [4], [5], [], []])
  wanted, metrics = batches.gradient(objective, trainable, context, batch)
  mesh = sharding.mesh(**sizes)
  with jax.set_mesh(mesh):
    placed = lambda x: layout.laid_out(x, mesh)
    both = tree.combine(trainable, context.fixed)
    apart = [tree.partition(placed(x)) for x in (of_policy(both), both[CRITIC])]
    moved = {**apart[0][0], CRITIC: apart[1][0]}
    there = Context(placed(context.base), {**apart[0][1], CRITIC: apart[1][1]})
    rows = distributed.global_batch(mesh, batch)
    found, told = batches.gradient(objective, moved, there, rows, accumulate=2)
  batches.assert_same(jax.device_get(found), wanted)
  assert told["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


def small(trunk="own", **options):
  """(objective, trainable) of the bigram model in full fine-tuning."""
  actor = Grouped(MODEL, **HOW)
  objective = ActorCritic(MODEL, part=actor, trunk=trunk, **options)
  policy, other = bigram.params(0, 0.5), bigram.params(2, 0.5)
  trunk_of = {"embed_tokens": other["embed_tokens"]} if trunk == "own" else {}
  return objective, {**policy, CRITIC: with_head(trunk_of, size=bigram.EMBED)}


@pytest.mark.parametrize("trunk", ["own", "shared"])
@pytest.mark.parametrize("epsilon", [0.2, None])
def test_the_loss_is_the_actors_and_half_the_squared_error_of_values(trunk, epsilon, monkeypatch):
  """By a loop over tokens in float64; the mean is over all tokens of the batch."""
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  objective, trainable = small(trunk, weight=0.7, epsilon=epsilon)
  batch = given()
  measure = lambda o, t: read(jax.jit(evaluation(o))(t, Context(), None, batch))
  told, alone = measure(objective, trainable), measure(objective.inner, of_policy(trainable))
  at = spans(jax.tree.map(jnp.asarray, batch))
  table = (trainable[CRITIC] if trunk == "own" else trainable)["embed_tokens"]["weight"]
  values = np.float64(table)[batch["tokens"]] @ np.float64(trainable[CRITIC]["score"]["weight"])
  losses, clipped, moved = [], [], []
  for r, t in np.argwhere(np.asarray(at.mask)):
    v, old, aim = values[r, t, 0], float(batch["old_values"][r, t]), float(batch["returns"][r, t])
    near = v if epsilon is None else min(max(v, old - epsilon), old + epsilon)
    losses.append(max((v - aim) ** 2, (near - aim) ** 2) / 2)
    clipped.append((near - aim) ** 2 > (v - aim) ** 2)
    moved.append(abs(v - old))
  assert (0 < np.mean(clipped) < 1) == (epsilon is not None)
  assert told["loss/value_avg"] == pytest.approx(np.mean(losses), rel=1e-4)
  assert told["val/clipfrac_avg"] == pytest.approx(np.mean(clipped), rel=1e-6)
  assert told["critic/moved"] == pytest.approx(np.mean(moved), rel=1e-4)
  assert told["loss/policy_avg"] == pytest.approx(alone["loss"], rel=1e-6)
  assert told["loss"] == pytest.approx(alone["loss"] + 0.7 * np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_a_critic_reaches_the_policy_by_a_shared_trunk_alone(trunk, monkeypatch):
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  objective, trainable = small(trunk)
  batch = given()
  both, _ = batches.gradient(objective, trainable, Context(), batch)
  actor, _ = batches.gradient(objective.inner, of_policy(trainable), Context(), batch)
  apart = lambda name: float(jnp.abs(both[name]["weight"] - actor[name]["weight"]).max())
  assert apart("lm_head") == 0
  assert (apart("embed_tokens") > 1e-4) == (trunk == "shared")
  assert float(jnp.abs(both[CRITIC]["score"]["weight"]).max()) > 1e-4


def test_an_advantage_is_of_its_token(monkeypatch):
  """The loss of each answer's tokens by their own advantages, and not by a mean of them."""
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  objective, trainable = small()
  batch = given()
  of = lambda changed: batches.gradient(
    objective.inner, of_policy(trainable), Context(), batch | changed
  )[1]["loss"]
  assert of({"advantage": batch["advantage"] + 3}) == of({})
  assert of({"advantages": -batch["advantages"]}) != pytest.approx(of({}), rel=1e-2)


def test_values_that_are_not_those_of_the_batch_are_refused_at_the_start():
  objective, _ = small()
  objective.check_start({"critic/moved": 1e-6, "critic/values/mean": 0.5})
  with pytest.raises(ValueError, match=r"values are 0\.3 off those that its returns"):
    objective.check_start({"critic/moved": 0.3, "critic/values/mean": 0.5})
  with pytest.raises(ValueError, match=r"0\.5 nats a token from who wrote"):  # as its actor would
    objective.check_start({"kl_to_old": 0.5})


def test_what_is_no_critic_is_refused():
  with pytest.raises(ValueError, match="known are own, shared"):
    ActorCritic(MODEL, part=Grouped(MODEL), trunk="both")
  with pytest.raises(ValueError, match="stands around another objective"):
    ActorCritic(MODEL)
