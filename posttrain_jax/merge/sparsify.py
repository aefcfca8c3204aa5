"""Which entries of a task vector stay, and how the rest is made up for; masks have the shape of the array.

Rows are those of the last axis: of a matrix as Hugging Face stores it, [out, in], what one output reads.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from posttrain_jax.core import files

Array = jax.Array
TINY = 1e-7  # an L1 norm that nothing is scaled to, as in mergekit
DIGIT = 4  # bits of a threshold found in one pass
BLOCK = 2**20  # entries sorted at once on CPUs
SORTED = 2**17  # and by numpy


def kept_of(density: float, size: int, *, least: int = 0) -> int:
  """floor(density * size), but no fewer than least where density > 0 and there is anything.

  >>> kept_of(0.25, 10), kept_of(0.01, 10), kept_of(0.01, 10, least=1)
  (2, 0, 1)
  """
  return max(int(density * size), min(least, size) if density > 0 else 0)


class Cut(NamedTuple):
  """What the largest entries of an array reach: |x| above the level, or equal to it and before the end."""

  level: Array  # the bits of a float32
  end: tuple[Array, ...]  # a place in the array; an index an axis


# what is kept: what reaches a cut, what reaches the first of two and not the second, or where an array is True
Kept = Cut | tuple[Cut, Cut] | Array


def largest(x: Array, count: Array | int, minus: Array | None = None) -> Cut:
  """What exactly the count largest |x - minus| reach; of equal ones, those that come first in the flat order.

  The level is found four bits at a time, by counting the entries that reach each of 15 levels: 8 passes, and one for
  equals, that keep no difference in memory and no order among devices.  33M differences of bfloat16 took 0.07 s of two
  CPU cores, bit by bit 1 s, sorting them 10 s.
  """
  if not x.size:
    return Cut(jnp.int32(0), (jnp.int32(0),) * x.ndim)
  bits, level, left = _bits(x, minus), jnp.int32(0), 31
  while left:
    digit = min(DIGIT, left)
    left -= digit
    reached = _counts([bits >= level + (step << left) for step in range(1, 1 << digit)])
    enough = jnp.stack([jnp.sum(rows) >= count for rows in reached])
    level += jnp.sum(enough, dtype=jnp.int32) << left
  above, equal = _counts([bits > level, bits == level])
  return Cut(level, _end(x, minus, level, count - jnp.sum(above), equal))


def middle(
  x: Array, count: Array | int, above: Array | int, minus: Array | None = None
) -> tuple[Cut, Cut]:
  """What the count largest |x - minus| reach that are left without the `above` largest of all."""
  return largest(x, count + above, minus), largest(x, above, minus)


def mask(x: Array, kept: Kept) -> Array:
  """True at the entries of x that are kept."""
  if isinstance(kept, Cut):
    return _reaching(x, kept)
  if isinstance(kept, tuple):
    return _reaching(x, kept[0]) & ~_reaching(x, kept[1])
  return kept


def _reaching(x, cut):
  bits = _bits(x)
  before = x.ndim == 0  # a number has no place but its own
  for axis, end in reversed(list(enumerate(cut.end))):
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    before = (place < end) | ((place == end) & before)
  return (bits > cut.level) | ((bits == cut.level) & before)


def _bits(x, minus=None):
  """|x - minus| as integers of the same order, which compare faster."""
  x = x.astype(jnp.float32)
  x = x if minus is None else x - minus.astype(jnp.float32)
  return jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)


def _counts(masks):
  """How many are True in each row of the first axis: [rows] of each mask, of all in one pass."""
  ones = [jnp.atleast_2d(mask).astype(jnp.int32) for mask in masks]
  return _reduced(ones, range(1, ones[0].ndim))


def _end(x, minus, level, room, equal=None):
  """The place before which room entries are equal to the level: [] for a number, else an index an axis."""
  if x.ndim == 0:
    return ()
  here = _bits(x, minus) == level
  if x.ndim == 1:
    return (jnp.sum(jnp.cumsum(here, dtype=jnp.int32) <= room),)
  if equal is None:
    (equal,) = _counts([here])
  until = jnp.cumsum(equal)
  # so many rows are before the end with all that they have, the next with a part
  whole = jnp.sum(until <= room)
  row = jnp.minimum(whole, len(equal) - 1)
  in_row = jax.tree.map(lambda x: _row(x, row), (x, minus))
  return (whole, *_end(*in_row, level, room - (until - equal)[row]))


def _row(x, row):
  """x[row].  Indexing would gather what devices share, so on accelerators it is a sum of which one term is not zero."""

  def summed(x):
    is_row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == row
    return jnp.sum(jnp.where(is_row, x, jnp.zeros((), x.dtype)), axis=0)

  indexed = lambda x: jax.lax.dynamic_index_in_dim(x, row, keepdims=False)
  return jax.lax.platform_dependent(x, cpu=indexed, default=summed)


def drawn(key: Array, shape: tuple[int, ...], probability: Array | float) -> Array:
  """True with the probability given, a uniform draw an entry in the flat order: [shape].

  jax.random.uniform(key, shape) < probability, to the bit (of jax's default, the partitionable Threefry).  A draw
  depends on the key and on the entry's place, not on the device that makes it.
  """
  words = jax.random.key_data(key)
  # a key of another generator, or places that may need a second word
  if words.shape != (2,) or math.prod(shape) > 2**31:
    return jax.random.uniform(key, shape) < probability
  bits = _threefry(words[0], words[1], _places(shape))
  unit = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
  return unit - 1 < probability


def _threefry(first, second, low):
  """The two words of Threefry-2x32 of 20 rounds, xored; the counter is (0, low).  Salmon et al. 2011, section 4.

  What jax.random draws with.  Written out, so that XLA fuses it with what it is compared with; on CPUs jax's is a loop
  with four arrays in memory, and took 28 times as long.
  """
  keys = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
  a, b = keys[0], low + keys[1]
  for i in range(5):
    for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
      a = a + b
      b = a ^ ((b << turn) | (b >> (32 - turn)))
    a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + jnp.uint32(i + 1)
  return a ^ b


def _places(shape):
  """The number of each entry in the flat order, without a reshape, which would gather what devices share."""
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  along_axes = [
    jax.lax.broadcasted_iota(jnp.uint32, shape, a) * np.uint32(s) for a, s in enumerate(strides)
  ]
  return sum(along_axes, jnp.zeros(shape, jnp.uint32))


def by_rank(x: Array, density: Array | float, epsilon: Array | float) -> Array:
  """density - epsilon at the smallest |x| of a row to density + epsilon at its largest, evenly by rank.

  Of equal entries the first is the smaller; a row of one entry has density.  MAGPRUNE of Deep et al. 2024 (DELLA,
  arXiv 2406.11617).
  """
  return evenly(ranks(x), density, epsilon)


def evenly(ranks: Array, density: Array | float, epsilon: Array | float) -> Array:
  """density - epsilon at rank 0 of a row to density + epsilon at its last."""
  row = ranks.shape[-1] if ranks.ndim else 1
  share = ranks.astype(jnp.float32) / (row - 1) if row > 1 else jnp.full(ranks.shape, 0.5)
  return (density - epsilon) + share * 2 * epsilon


def ranks(x: Array, minus: Array | None = None) -> Array:
  """The place of each |x - minus| in its sorted row, as whole numbers; of equal ones the first is the smaller."""
  if not isinstance(x, Tracer | np.ndarray) and x.size:
    (device, *others) = x.devices()
    if device.platform == "cpu" and not others:
      return jax.device_put(_ranks_by_numpy(x, minus), device, may_alias=True)
  rows = _bits(x, minus).reshape(_rows(x))
  found = jax.lax.platform_dependent(rows, cpu=_ranks_by_blocks, default=jax.vmap(_ranks))
  return found.reshape(x.shape)


def _rows(x):
  """The shape of x as a matrix."""
  return math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1


def _ranks_by_numpy(x, minus):
  """`_ranks` of all rows, a block that stays in a cache at a time: numpy sorts with vectors, 5 ns an entry for 40."""
  shape, (rows, row) = x.shape, _rows(x)
  x, minus = (None if array is None else array.reshape(rows, row) for array in (x, minus))
  count = min(rows, max(1, SORTED // row))
  ranks = files.room((rows, row), np.dtype(np.uint16 if row <= 2**16 else np.int32))
  in_order = np.tile(np.arange(row, dtype=ranks.dtype), count)
  # the last block may have rows of the one before it
  for first in [*range(0, rows - count, count), rows - count]:
    pairs = np.sort(_pairs_of(x, minus, first, count=count), axis=-1)
    ranks[first : first + count].reshape(-1)[(pairs & 0xFFFFFFFF).reshape(-1)] = in_order
  return ranks.reshape(shape)


@functools.partial(jax.jit, static_argnames="count")
def _pairs_of(x, minus, first, *, count):
  rows = lambda x: jax.lax.dynamic_slice_in_dim(x, first, count)
  bits = _bits(rows(x), None if minus is None else rows(minus))
  return _pairs(bits, jax.lax.iota(jnp.int32, bits.size).reshape(bits.shape))


def _pairs(bits, places):
  """Numbers of 64 bits, the entry above and its place below: sorting them takes a fifth of sorting pairs on CPUs."""
  with jax.enable_x64(True):
    wide = lambda x: jax.lax.convert_element_type(x, jnp.int64)
    return jax.lax.shift_left(wide(bits), jnp.int64(32)) | wide(places)


def _ranks(row):
  """The place of each entry in the sorted row."""
  places = jax.lax.iota(jnp.int32, row.size)
  with jax.enable_x64(True):
    pairs = jax.lax.sort(_pairs(row, places))
    order = jax.lax.convert_element_type(pairs, jnp.int32)  # the lower half
  return jnp.zeros_like(row).at[order].set(places, unique_indices=True)


def _ranks_by_blocks(rows):
  """`_ranks` of so many rows at once that what sorting keeps is small beside the array."""
  return jax.lax.map(_ranks, rows, batch_size=max(1, BLOCK // max(1, rows.shape[-1])))


def l1_scale(x: Array, kept: Kept) -> Array:
  """sum |x| / sum |x kept|: what gives the entries kept the norm of all; 1 where either sum is below 1e-7."""
  size = jnp.abs(x)
  before, after = _sums([size, jnp.where(mask(x, kept), size, 0.0)])
  none = (before < TINY) | (after < TINY)
  return jnp.where(none, 1.0, before / jnp.where(none, 1.0, after))


def _sums(arrays):
  """The sum of each array, of all in one pass where they have rows."""
  if arrays[0].ndim > 1:
    arrays = _reduced(arrays, [arrays[0].ndim - 1])
  return [jnp.sum(array) for array in arrays]


def _reduced(arrays, axes):
  """Sums over the axes.  A reduction of several operands is one that XLA fuses with what makes them, on CPUs."""
  add = lambda left, right: [a + b for a, b in zip(left, right)]
  zeros = [jnp.zeros((), array.dtype) for array in arrays]
  return jax.lax.reduce(arrays, zeros, add, tuple(axes))
