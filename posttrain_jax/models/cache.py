"""Keys and values of what was read so far."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import struct
from posttrain_jax.models.config import ModelConfig

Array = jax.Array


@struct.dataclass
class Cache:
  """Keys and values of what was read so far: every row writes the same slot, ragged prompts are padded on the left.

  k, v: [layers, batch, slots, kv_heads, head_dim]; positions, segments: [batch, slots], segment 0 an empty slot;
  length: slots in use.
  """

  k: Array
  v: Array
  positions: Array
  segments: Array
  length: Array

  def repeated(self, batch: int) -> Cache:
    """A cache of one row as that of `batch` rows."""
    rows = lambda x, axis: jnp.repeat(x, batch, axis=axis, total_repeat_length=batch)
    places = (rows(self.positions, 0), rows(self.segments, 0), self.length)
    return Cache(rows(self.k, 1), rows(self.v, 1), *places)

  def cut(self, length: Array | int) -> Cache:
    """As if no more than the first `length` slots had been written."""
    segments = jnp.where(jnp.arange(self.segments.shape[1]) < length, self.segments, 0)
    return dataclasses.replace(self, segments=segments, length=jnp.asarray(length, jnp.int32))

  def grown(self, more: int) -> Cache:
    """With so many empty slots more."""
    if not more:
      return self
    wide = lambda x, axis: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
    places = (wide(self.positions, 1), wide(self.segments, 1), self.length)
    return Cache(wide(self.k, 2), wide(self.v, 2), *places)


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: Any) -> Cache:
  """A cache of `slots` tokens for each of `batch` rows.  Zeros, not `empty`: 0 * NaN would reach the output."""
  shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
  none = jnp.zeros((batch, slots), jnp.int32)
  return Cache(
    jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), none, none, jnp.zeros((), jnp.int32)
  )
