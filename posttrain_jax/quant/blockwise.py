"""8-bit blockwise storage: value = map[code] * absmax[block], blocks along the last axis.

The map is bitsandbytes' dynamic one (Dettmers 2015, arXiv 1511.04561): 7 decades, finer towards +-1.
NF4 stores its scales this way (double quantisation).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
  """The 256 sorted values of bitsandbytes' `create_dynamic_map`, float32, bit for bit.

  +1 is a value and -1 is not.

  >>> dynamic_map().size, float(dynamic_map()[0]), float(dynamic_map()[-1])
  (256, -0.992968738079071, 1.0)
  """
  values = [np.float32(0), np.float32(1)]
  for decade in range(7):
    edges = _tenth_to_one(2 ** (decade if signed else decade + 1) + 1)
    positive = np.float32(10.0 ** (decade - 6)) * ((edges[1:] + edges[:-1]) / np.float32(2))
    values += [*positive, *(-positive if signed else ())]
  table = np.sort(np.array(values, np.float32))
  table.setflags(write=False)
  return table


def _tenth_to_one(n: int) -> np.ndarray:
  """torch.linspace(0.1, 1, n) in float32: counted from the nearer end, one rounding per value.

  numpy.linspace rounds 24 of 129 values differently.
  """
  start, stop = np.float32(0.1), np.float32(1)
  step = np.float64((stop - start) / np.float32(n - 1))
  i = np.arange(n)
  return np.where(i < n // 2, start + step * i, stop - step * (n - 1 - i)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("block_size", "signed"))
def quantize(x: Array, *, block_size: int = 256, signed: bool = True) -> tuple[Array, Array]:
  """(codes, absmax): the nearest value of the map to x / absmax of its block, ties to the lower.

  x: [..., n] -> codes uint8 [..., n], absmax float32 [..., ceil(n / block_size)]; the last block may be short.
  """
  x = x.astype(jnp.float32)
  n = x.shape[-1]
  pad = [(0, 0)] * (x.ndim - 1) + [(0, -n % block_size)]
  blocks = jnp.pad(x, pad).reshape(*x.shape[:-1], -1, block_size)
  absmax = jnp.max(jnp.abs(blocks), axis=-1)
  table = dynamic_map(signed)
  midpoints = jnp.asarray((table[1:] + table[:-1]) / np.float32(2))
  scaled = jnp.clip(x * spread(reciprocal(absmax), n, block_size), -1, 1)
  return jnp.searchsorted(midpoints, scaled).astype(jnp.uint8), absmax


@functools.partial(jax.jit, static_argnames=("block_size", "signed"))
def dequantize(codes: Array, absmax: Array, *, block_size: int = 256, signed: bool = True) -> Array:
  """map[codes] * absmax, float32 [..., n]."""
  return decode(codes, signed) * spread(absmax, codes.shape[-1], block_size)


@functools.partial(jax.jit, static_argnames="signed")
def decode(codes: Array, signed: bool = True) -> Array:
  """map[codes], float32."""
  table = dynamic_map(signed)
  # A TPU v5p gathers 3.7 million bytes in 6.5 ms and selects them in 0.1; a CPU is the other way round.
  return jax.lax.platform_dependent(
    codes,
    tpu=lambda codes: computed(codes, signed),
    default=lambda codes: jnp.asarray(table).at[codes].get(mode="promise_in_bounds"),
  )


def computed(codes: Array, signed: bool = True) -> Array:
  """dynamic_map(signed)[codes] bit for bit, by arithmetic: a quarter of the operations of `select`.

  With 255 selects for each matrix of a layer, forward and backward, a 70B step compiled for a TPU in over ten minutes.
  Count k from the beginning of the first decade, so that decade d = floor(log2 k) has 2^d values; they lie at
  0.1 + 0.9 u of the decade, u = (k - 2^d + 1/2) / 2^d.
  """
  start, high, low, corrections = _line(signed)
  k = jnp.abs(codes.astype(jnp.int32) - 127) if signed else codes.astype(jnp.int32) + 1
  bits = jax.lax.bitcast_convert_type(jnp.maximum(k, 1).astype(jnp.float32), jnp.int32)
  power = bits & np.int32(0xFF << 23)  # 2^d, as the bits of a float
  as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)
  u = (as_float(bits) - as_float(power) + 0.5) * as_float(np.int32(254 << 23) - power)
  decade = ((power >> 23) - 127).astype(jnp.uint8)
  # both products are exact, so that fused multiply-adds change nothing
  value = select(decade, start) + u * select(decade, high) + u * select(decade, low)
  word = select((k >> 3).astype(jnp.uint8), corrections)
  correction = ((word >> (4 * (k & 7))) & 15) - 8
  value = as_float(jax.lax.bitcast_convert_type(value, jnp.int32) + correction)
  sign = jnp.sign(codes.astype(jnp.int32) - 127 if signed else codes.astype(jnp.int32))
  return jnp.where(codes == 255, nothing(codes) + 1, value * sign.astype(jnp.float32))


@functools.cache
def _line(signed: bool) -> tuple[np.ndarray, ...]:
  """(start, high, low) of start + u (high + low) for each decade, and how many float32 steps the map is away.

  high and low have 16 bits, u at most 8.  The corrections, plus 8, are nibbles: eight k a word.
  """
  last = 6 if signed else 7  # the decade below 1; an unsigned map has no decade of one value
  count = 2 ** (last + 1)
  d = np.arange(8)
  start, slope = (0.1 * 10.0 ** (d - last)).astype(np.float32), 0.9 * 10.0 ** (d - last)
  high = _rounded(slope, 16)
  low = _rounded(slope - high, 16)
  k = np.arange(1 if signed else 2, count)
  decade = np.log2(k).astype(int)
  u = ((k + 0.5) / 2.0**decade - 1).astype(np.float32)
  line = start[decade] + u * high[decade] + u * low[decade]
  values = dynamic_map(signed)[-1 - len(k) : -1]
  away = np.zeros(count, np.int64)
  away[-len(k) :] = values.view(np.int32).astype(np.int64) - line.view(np.int32)
  nibbles = (away + 8).reshape(-1, 8) << (4 * np.arange(8))
  return start, high, low, nibbles.sum(1).astype(np.uint32).view(np.int32)


def _rounded(x: np.ndarray, bits: int) -> np.ndarray:
  fraction, exponent = np.frexp(x)
  return np.ldexp(np.round(np.ldexp(fraction, bits)), exponent - bits).astype(np.float32)


def select(codes: Array, table: np.ndarray) -> Array:
  """table[codes] as a binary tree of selects on the bits of the codes, for tables of 2^n entries."""
  # Each value is tied to the codes: what depends on nothing, differentiation moves out of a scan, where every value
  # of the table is an array of the codes' shape.
  zero = nothing(codes, table.dtype)
  values = [zero + value for value in table]
  bit = 1
  while len(values) > 1:
    is_set = (codes & np.uint8(bit)) != 0
    values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2])]
    bit *= 2
  return values[0]


def nothing(x: Array, dtype: Any = jnp.float32) -> Array:
  """Zeros that depend on x, of integers; the compiler removes them."""
  return (x & 0).astype(dtype)


def spread(per_block: Array, n: int, block_size: int) -> Array:
  """[..., blocks] -> [..., n]: each element's own block value."""
  return jnp.repeat(per_block, block_size, axis=-1)[..., :n]


def reciprocal(absmax: Array) -> Array:
  """1 / max(absmax, 1e-38), as bitsandbytes scales: a block of zeros divides by nothing.

  The bound 1e-38 itself is subnormal, and XLA:CPU flushes it to zero; hence the smallest normal number.
  """
  tiny = np.finfo(np.float32).tiny
  return jnp.where(absmax < tiny, np.float32(1e38), 1 / jnp.maximum(absmax, tiny))
