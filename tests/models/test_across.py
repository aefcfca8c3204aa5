"""Attention on a mesh is attention on one device; no token sees another document or its own future."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core import distributed, sharding, zigzag
from posttrain_jax.models import attention, decoder
from posttrain_jax.models.attention import Places
from posttrain_jax.objectives import Sft
from posttrain_jax.train import step
from tests import tiny
from tests.marks import few
from tests.models.test_attention import drawn, packed_rows, pairs_that_share
from tests.objectives.batches import placed


def value_and_gradients(window, softcap, queries, keys):
  """(q, k, v) -> (out, gradients) of rows whose places are given."""

  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def run(q, k, v):
    out = attention.attend(q, k, v, queries, keys, window, scale=0.7, softcap=softcap)
    return jnp.sum(jnp.sin(out)), out

  def both(q, k, v):
    (_, out), gradients = run(q, k, v)
    return out, gradients

  return both


def assert_close(x, wanted):
  """To the rounding of float32: sums that cancel are as exact as their largest terms, on one device as on several."""
  np.testing.assert_allclose(x, wanted, rtol=2e-5, atol=5e-6 * float(jnp.abs(wanted).max()))


MESHES = (dict(data=2, context=4), dict(context=2, tensor=4), dict(fsdp=2, context=2, tensor=2))


@pytest.mark.parametrize("softcap", few([None, 1.5], 1.5))
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", [packed_rows, pairs_that_share])
@pytest.mark.parametrize("sizes", few(MESHES, MESHES[0], MESHES[1]), ids=str)
def test_a_mesh_changes_nothing(monkeypatch, sizes, rows, window, softcap):
  """Heads that four devices share in twos, rows in zigzag order, documents on several devices, several tiles."""
  monkeypatch.setattr(attention, "SHORT", 8)
  monkeypatch.setattr(attention, "TILES", {"default": (8, 16)})
  q, k, v = drawn(96, heads=8, kv_heads=2)
  places = rows(96)
  wanted = jax.jit(value_and_gradients(window, softcap, places, places))(q, k, v)

  def found(q, k, v):
    where, *cut = jax.tree.map(lambda x: zigzag.cut(jnp.asarray(x)), (places, q, k, v))
    out, gradients = value_and_gradients(window, softcap, where, where)(*cut)
    return jax.tree.map(lambda x: zigzag.whole(x, 96), (out, gradients))

  with jax.set_mesh(sharding.mesh(**sizes)):
    found = jax.jit(found)(q, k, v)
  jax.tree.map(assert_close, found, wanted)


def test_keys_that_stand_before_all_queries_are_seen_on_every_device():
  """Those of a prefix: no device has a part of them to gather."""
  q, k, v = drawn(21, heads=4, kv_heads=2)
  keys = packed_rows(21)
  queries = jax.tree.map(lambda x: x[:, 5:], keys)
  run = jax.jit(value_and_gradients(None, None, queries, keys))
  wanted = run(q[:, 5:], k, v)
  with jax.set_mesh(sharding.mesh(data=2, context=4)):
    found = run(q[:, 5:], k, v)
  jax.tree.map(assert_close, found, wanted)


def reached(sizes, places):
  """[tokens, tokens]: whether the hidden state of the second changes with the first."""
  time = places.segments.shape[1]
  model = tiny.config("qwen3")
  params = decoder.init(jax.random.key(0), model, std=tiny.STD)
  tokens = np.random.default_rng(0).integers(3, 250, (1, time)).astype(np.int32)
  one_changed = np.tile(tokens, (time, 1))
  one_changed[np.arange(time), np.arange(time)] += 1
  rows = lambda x: np.tile(np.asarray(x), (time, 1))
  batch = lambda tokens: {
    "tokens": tokens,
    "positions": rows(places.positions),
    "segment_ids": rows(places.segments),
    "prefix_ids": rows(places.prefixes),
  }
  run = jax.jit(lambda batch: zigzag.whole(Sft(model).hidden(params, batch), time))
  with jax.set_mesh(sharding.mesh(**sizes)):
    states, others = run(batch(np.tile(tokens, (time, 1)))), run(batch(one_changed))
  return np.abs(np.asarray(others) - np.asarray(states)).max(axis=-1) > 1e-6


@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=2, context=4)], ids=str)
def test_a_token_reaches_its_own_document_from_there_on_and_nothing_else(sizes):
  """Two pairs of answers that share their prompt, a document between them, padding: each token changed in turn."""
  lengths = [5, 4, 3, 9, 3, 2, 4, 2]
  spread = lambda values: np.repeat(values, lengths)[None].astype(np.int32)
  inside = np.concatenate([np.arange(n) for n in lengths])[None]
  places = Places(
    inside + spread([0, 5, 5, 0, 0, 3, 3, 0]),
    spread([1, 2, 3, 4, 5, 6, 7, 0]),
    spread([0, 1, 1, 0, 0, 5, 5, 0]),
  )
  is_token = places.segments[0] > 0
  wanted = np.asarray(attention.visible(places, places))[0].T
  found = reached(sizes, places)
  np.testing.assert_array_equal(found[:, is_token], wanted[:, is_token])


def collectives(text):
  """[(kind, shape, whether attention asks for it)] of a compiled program."""
  pattern = (
    r"= \w+\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\((.*)"
  )
  return [
    (kind, tuple(map(int, shape.split(","))), "shard_map" in rest)
    for shape, kind, rest in re.findall(pattern, text)
    if shape
  ]


def test_a_step_gathers_keys_and_values_and_no_other_activation():
  """Rows of 72 tokens over four devices: keys and values once forward and once backward, their gradients scattered."""
  model, trainable, context = tiny.setup("lora")
  mesh = sharding.mesh(fsdp=2, context=4)
  with jax.set_mesh(mesh):
    trainable, context = placed(trainable, context, mesh)
    batch = distributed.global_batch(mesh, tiny.batch(72))
    run = jax.jit(functools.partial(step.gradient, Sft(model, remat="names")))
    every = collectives(run.lower(trainable, context, batch, jax.random.key(0)).compile().as_text())
  whole, part = (4, 2, 72, 16), (4, 2, 18, 16)  # rows of a device, heads of keys, tokens, dim
  asked = sorted((kind, shape) for kind, shape, is_attention in every if is_attention)
  assert asked == [("all-gather", whole)] * 4 + [("reduce-scatter", part)] * 2
  others = [shape for _, shape, is_attention in every if not is_attention and {72, 18} & {*shape}]
  assert all(math.prod(shape) <= 8 * 72 for shape in others), others  # a number of each token
