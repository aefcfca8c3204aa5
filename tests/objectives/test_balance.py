"""The loss that spreads tokens over experts, beside the loss of the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import objectives
from posttrain_jax.adapters import layout
from posttrain_jax.core import distributed, metrics, sharding
from posttrain_jax.losses import balance
from posttrain_jax.models import decoder
from posttrain_jax.objectives import Context
from posttrain_jax.train import step
from tests.marks import few
from tests.models import families

CONFIG = families.config("qwen3_moe", num_hidden_layers=2)
WEIGHT = 0.5


def sums(**how):
  rows, even = objectives.Sft(CONFIG, **how), objectives.Balance(CONFIG, **how)
  return objectives.Sum(CONFIG, parts=(("rows", rows, 1.0), ("balance", even, WEIGHT)), **how)


def batch():
  """Four rows of which the last two are half padding."""
  tokens = families.tokens(4, 12)
  segments = np.where(np.arange(12) < np.asarray([[12], [12], [6], [6]]), 1, 0).astype(np.int32)
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), (4, 12))
  channel = np.zeros_like(segments)
  return dict(
    tokens=tokens,
    positions=positions,
    segment_ids=segments,
    loss_mask=(segments > 0) & (positions > 0),  # nothing predicts the first
    channel=channel,
  )


@functools.cache
def gradient(accumulate):
  run = jax.jit(
    lambda p, b: step.gradient(sums(), p, Context(), b, jax.random.key(0), accumulate=accumulate)
  )
  return run(families.params(CONFIG), batch())


def test_the_loss_is_that_of_the_rows_and_the_weighted_balance():
  params, rows = families.params(CONFIG), batch()
  _, found = gradient(1)
  _, load = decoder.hidden_and_load(
    params, rows["tokens"], CONFIG, segment_ids=jnp.asarray(rows["segment_ids"])
  )
  even = float(balance.load_balance(load.chosen, load.probability, load.tokens))
  read = metrics.read(found)
  np.testing.assert_allclose(read["loss/balance"], even, rtol=1e-5)
  np.testing.assert_allclose(read["loss"], read["loss/rows"] + WEIGHT * even, rtol=1e-5)
  np.testing.assert_allclose(read["router/imbalance"], even / CONFIG.experts_per_token, rtol=1e-5)
  assert float(load.tokens[0]) == 36
  assert 1 <= read["router/busiest"] <= CONFIG.experts / CONFIG.experts_per_token


def test_micro_batches_are_balanced_by_themselves_and_weighted_by_tokens():
  _, found = gradient(2)
  params, rows = families.params(CONFIG), batch()
  parts = []
  for k in range(2):  # rows k and k + 2, 18 tokens each
    part = {name: jnp.asarray(x[k::2]) for name, x in rows.items()}
    _, load = decoder.hidden_and_load(
      params, part["tokens"], CONFIG, segment_ids=part["segment_ids"]
    )
    parts.append(float(balance.load_balance(load.chosen, load.probability, load.tokens)))
  np.testing.assert_allclose(metrics.read(found)["loss/balance"], np.mean(parts), rtol=1e-5)


def test_a_model_of_one_mlp_has_no_such_metrics():
  plain = families.config("qwen3", num_hidden_layers=1)
  objective = objectives.Sft(plain)
  run = jax.jit(lambda p, b: step.gradient(objective, p, Context(), b, jax.random.key(0))[1])
  assert not [name for name in run(families.params(plain), batch()) if name.startswith("router")]


ACROSS = (dict(expert=2, context=4), dict(expert=2, context=2, tensor=2), dict(fsdp=4, context=2))


@pytest.mark.parametrize("sizes", few(ACROSS, ACROSS[0]), ids=str)
def test_devices_that_share_rows_and_experts_are_one(sizes):
  """A row's tokens lie on several devices, zeros behind them, and so do the experts that they choose."""
  mesh = sharding.mesh(**sizes)
  with jax.set_mesh(mesh):
    there = layout.laid_out(families.params(CONFIG), mesh)
    rows = distributed.global_batch(mesh, batch())
    run = jax.jit(lambda p, b: step.gradient(sums(), p, Context(), b, jax.random.key(0)))
    found, measured = run(there, rows)
  wanted, alone = gradient(1)
  assert metrics.read(measured) == pytest.approx(metrics.read(alone), rel=1e-5, abs=1e-6)
  for x, one in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, one, rtol=1e-3, atol=1e-5 * float(jnp.abs(one).max()))
