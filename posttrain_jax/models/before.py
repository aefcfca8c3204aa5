"""What is bound to stand before the tokens of every text: a soft prompt, a prefix of keys and values.

Both are nodes in the tree of parameters, at `PROMPT` and `PREFIX`.  `slots` is how many they take, `segments(batch)` ->
[batch, slots] the segment of each: `attention.EVERYONE`, and 0 where a row's own is shorter.  `read(batch)` ->
embeddings [batch, slots, embed], or keys and values [..., batch, slots, kv_heads * head_dim].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core.sharding import constrain
from posttrain_jax.models.attention import Places

Array = jax.Array
Params = Any
PROMPT, PREFIX = "prompt/embeddings", "layers/self_attn/prefix"


def slots(params: Params) -> int:
  """Slots of a cache that they take before the first token."""
  return sum(node.slots for node in bound(params) if node is not None)


def bound(params: Params) -> tuple[Any, Any]:
  """(prefix of keys and values, soft prompt), None for what is not bound; layers stacked or apart."""
  layers = params["layers"]
  layer = layers[0] if isinstance(layers, tuple) else layers
  return layer["self_attn"].get("prefix"), params.get("prompt", {}).get("embeddings")


def put(params: Params, x: Array, places: Places) -> tuple[Array, Places, Places]:
  """(x, places of keys, places of queries) with what is bound put before the tokens.

  A soft prompt is part of x, as queries and as keys; a prefix is of the keys alone.
  """
  prefix, prompt = bound(params)
  if prompt is not None:
    which = prompt.segments(x.shape[0])
    x = jnp.concatenate([prompt.read(x.shape[0]).astype(x.dtype), x], axis=1)
    x = constrain(x, "batch time embed")
    places = _joined(which, places)
  if prefix is None:
    return x, places, places
  which = prefix.segments(x.shape[0])
  keys = _joined(which, places)
  queries = dataclasses.replace(places, positions=keys.positions[:, which.shape[1] :])
  return x, keys, queries


def _joined(which: Array, places: Places) -> Places:
  """The places of slots in front and of what stands behind them, which counts on."""
  used = jnp.sum(which != 0, axis=1, keepdims=True, dtype=jnp.int32)
  prefixes = places.prefixes
  return Places(
    jnp.concatenate([counted(which), places.positions + used], axis=1),
    jnp.concatenate([which, places.segments], axis=1),
    None if prefixes is None else jnp.pad(prefixes, ((0, 0), (which.shape[1], 0))),
  )


def counted(segments: Array) -> Array:
  """[batch, time]: how many tokens that are no padding stand before each."""
  return jnp.maximum(jnp.cumsum(segments != 0, axis=1, dtype=jnp.int32) - 1, 0)


def extend(layer: Params, batch: int) -> Callable[[Array, Array], tuple[Array, Array]]:
  """(k, v) -> the keys and values that a text read whole sees in this layer: its own, and before them the prefix."""
  prefix = layer["self_attn"].get("prefix")
  if prefix is None:
    return lambda k, v: (k, v)

  def joined(prefixed, x):
    prefixed = prefixed.reshape(*prefixed.shape[:2], *x.shape[2:]).astype(x.dtype)
    return jnp.concatenate([prefixed, x], axis=1)

  def both(k, v):
    keys, values = prefix.read(batch)
    return joined(keys, k), joined(values, v)

  return both
