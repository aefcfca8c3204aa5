"""What tests of the memory-saving optimizers update: a small tree of every kind of parameter, away from zero."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from posttrain_jax.core import sharding
from posttrain_jax.core.tree import items
from posttrain_jax.models import decoder, partition
from posttrain_jax.optim import chain
from tests import tiny

# heads of 16 in a model 64 wide with 6 query and 2 key heads: head_dim is not hidden / heads
MODEL = tiny.config(
  "qwen2", num_attention_heads=6, num_key_value_heads=2, head_dim=16, intermediate_size=160
)
AXES = {path: spec.axes for path, spec in items(decoder.specs(MODEL))}
NEW = ("adamw8bit", "adam_mini", "galore", "galore8bit")
HEADS = MODEL.head_dim


def params():
  """Every leaf random: fresh norms are ones and biases zeros, which hides mistakes."""
  return like(decoder.abstract(MODEL), 0)


def like(tree, seed, scale=1.0):
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32)
  return jax.tree.map(draw, tree)


def made(name, **options):
  defaults: dict[str, Any] = dict(
    lr=0.02, steps=20, schedule="constant", weight_decay=0.1, rank=8, update_gap=2
  )
  defaults |= dict(axes=AXES, head_dim=HEADS)
  return chain.chain(name, **(defaults | options))[0]


def after(optimizer, params, gradients, *, state=None):
  """(parameters, state) after one update with each of the gradients."""
  state = optimizer.init(params) if state is None else state

  @jax.jit
  def update(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  for gradient in gradients:
    params, state = update(params, state, gradient)
  return params, state


def spread(params, mesh):
  """params laid out as the decoder's rules say."""
  rules = partition.RULES
  put = lambda path, x: jax.device_put(
    x, sharding.named(mesh, sharding.spec_for(path, rules), x.shape)
  )
  keys = lambda path: "/".join(key.key for key in path)
  return jax.tree_util.tree_map_with_path(lambda path, x: put(keys(path), x), params)


def nbytes(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def assert_close(found, wanted, rtol=1e-5, atol=1e-6):
  one = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)
  jax.tree.map(one, found, wanted)
