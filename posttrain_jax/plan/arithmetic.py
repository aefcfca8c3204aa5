"""The memory of a config's train step by arithmetic, component by component."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from posttrain_jax.build import decisions
from posttrain_jax.core import sharding, tree
from posttrain_jax.core.weight import Weight
from posttrain_jax.losses import logprob
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.plan import program
from posttrain_jax.plan.program import Program
from posttrain_jax.train import state as state_lib


def arithmetic(built: Program) -> dict[str, int]:
  """{component: bytes a device}: stored arrays exactly, by their shardings; activations by the remat mode."""
  fixed = [built.context.base, built.state.carried]
  dtype = decisions.between(decisions.products(built.config), built.device.platform)
  parts = decisions.micro_batches(built.config, state_lib.devices(built.state))
  count = tokens(built, parts)
  other = built.context.reference
  compared = {} if other is None else {"reference": program.bytes_a_device(other)}
  return {
    "base": sum(map(program.bytes_a_device, fixed)),
    **compared,
    "trained": program.bytes_a_device(built.state.trainable),
    "optimizer": program.bytes_a_device(built.state.optimizer),
    "gradients": program.bytes_a_device(built.state.trainable),
    "activations": saved(built.model, built.config.model.remat, jnp.dtype(dtype).itemsize) * count,
    "dense weights": largest_dense(built, dtype),
    "logits": logits(built.model, count),
  }


def tokens(built: Program, parts: int = 1) -> int:
  """Of a device, in one of so many micro-batches."""
  rows = math.ceil(built.config.batch.rows / parts / _row_shards(built))
  count = rows * built.config.data.length
  return count if built.mesh is None else math.ceil(count / built.mesh.shape["context"])


def saved(model: ModelConfig, remat: str, itemsize: int) -> int:
  """Bytes a token that the backward pass finds saved by the layers: their inputs, and what the remat mode adds.

  `none` is a lower bound: what norms, softmax and activations keep depends on the compiler's fusions.
  """
  heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
  inputs, attention = model.hidden_size, heads + 2 * kv
  mlp = 2 * model.mlp_width
  softmax = 2 * model.num_heads * 4 // itemsize  # a query's maximum and sum, float32
  kept = {
    "full": 0,
    "host": -inputs,
    "names": attention + heads + softmax + model.hidden_size + mlp,  # decoder.KEPT
    "dots": attention + heads + 2 * model.hidden_size + mlp,  # every product of a layer
    "none": 2 * (attention + heads) + 4 * model.hidden_size + 2 * mlp,
  }
  return model.num_layers * itemsize * (inputs + kept[remat])


def largest_dense(built: Program, dtype: Any) -> int:
  """Bytes of the one matrix that a quantised base has dense at a time."""
  itemsize = jnp.dtype(dtype).itemsize
  stacks = [leaf for _, leaf in tree.items(built.context.base or {}) if isinstance(leaf, Weight)]
  return max((itemsize * math.prod(leaf.shape[-2:]) for leaf in stacks), default=0)


def logits(model: ModelConfig, tokens: int) -> int:
  """Bytes of the logits that exist at once, float32, and of their gradient."""
  return 2 * 4 * min(tokens, logprob.CHUNK) * model.vocab_size


def _row_shards(built: Program) -> int:
  """Over how many devices the rows are spread."""
  if built.mesh is None:
    return 1
  return sharding.row_shares(built.mesh)
