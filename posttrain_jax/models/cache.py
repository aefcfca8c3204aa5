"""Keys and values of what each row has read so far."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import struct, weight
from posttrain_jax.models.config import ModelConfig

Array = jax.Array
BLOCK = 128  # slots that attention reads at once


@struct.dataclass
class Cache:
  """Keys and values of each row: those of its token at position p in slot p, `lengths` of them.

  k: [layers, blocks, rows, kv_heads, head_dim, block], v: [layers, blocks, rows, kv_heads, block, head_dim]; lengths:
  [rows].  Slot p is place p % block of block p // block: what attention reads at once lies together, as its products
  want it, since a strided copy of it took 85 of 390 ms of a step on two busy cores.  What lies behind a row's length is
  seen by no query and overwritten by the tokens that come next.  Numbers in bfloat16 are kept as their bits on a CPU,
  which moves no bfloat16: a step of 32 rows of SmolLM2-135M looks at them in 52 ms of a core, and in 95 in float32.
  """

  k: Array
  v: Array
  lengths: Array

  @property
  def slots(self) -> int:
    return self.k.shape[1] * self.k.shape[-1]

  def row(self, index: Array | int) -> Cache:
    """One row as a cache of its own."""
    one = lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=2)
    return Cache(one(self.k), one(self.v), jax.lax.dynamic_slice_in_dim(self.lengths, index, 1))

  def with_row(self, index: Array | int, row: Cache) -> Cache:
    """With a cache of one row as the row of that index."""
    put = lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one, index, axis=2)
    lengths = jax.lax.dynamic_update_slice_in_dim(self.lengths, row.lengths, index, axis=0)
    return Cache(put(self.k, row.k), put(self.v, row.v), lengths)

  def grown(self, slots: int) -> Cache:
    """With `slots` slots a row, no fewer than it has."""
    more = slots // self.k.shape[-1] - self.k.shape[1]
    wide = lambda x: jnp.pad(x, [(0, more if axis == 1 else 0) for axis in range(x.ndim)])
    return Cache(wide(self.k), wide(self.v), self.lengths)


def written(
  k: Array, v: Array, new_k: Array, new_v: Array, layer: Array | int, at: Array
) -> tuple[Array, Array]:
  """(k, v) of a cache with new_k, new_v: [rows, time, kv_heads, head_dim] behind each row's `at` slots of a layer."""
  rows, time = new_k.shape[:2]
  slot = at[:, None] + jnp.arange(time, dtype=jnp.int32)
  block, place = slot // k.shape[-1], slot % k.shape[-1]
  row = jnp.arange(rows)[:, None]
  put = lambda x, new: x.set(new, mode="promise_in_bounds", unique_indices=True)
  k = put(k.at[layer, block, row, :, :, place], _stored(new_k, k.dtype))
  return k, put(v.at[layer, block, row, :, place], _stored(new_v, v.dtype))


def _stored(x: Array, dtype: Any) -> Array:
  if dtype != weight.BITS:
    return x.astype(dtype)
  return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), weight.BITS)


def numbers(stored: Array, *, wide: bool = False) -> Array:
  """The keys or values that a part of a cache stands for; wide: bits are widened to float32, exactly."""
  if stored.dtype != weight.BITS:
    return stored
  if wide:
    return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
  return jax.lax.bitcast_convert_type(stored, jnp.bfloat16)


def fitting(tokens: int) -> int:
  """The least number of slots that holds so many tokens in whole blocks; below one block, in sixteens.

  >>> [fitting(n) for n in (1, 16, 100, 128, 129)]
  [16, 16, 112, 128, 256]
  """
  step = 16 if tokens <= BLOCK else BLOCK
  return -(-tokens // step) * step


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: Any) -> Cache:
  """A cache of `slots` tokens, as `fitting` gives them, for each of `rows` rows.

  Zeros, not `empty`: 0 * NaN would reach the output.
  """
  block = min(slots, BLOCK)
  if slots % block:
    raise ValueError(f"a cache of {slots} slots: above {BLOCK} it must be a multiple of that")
  shape = (config.num_layers, slots // block, rows, config.num_kv_heads)
  k = jnp.zeros((*shape, config.head_dim, block), dtype)
  v = jnp.zeros((*shape, block, config.head_dim), dtype)
  return Cache(k, v, jnp.zeros(rows, jnp.int32))
