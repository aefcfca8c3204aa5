"""Which entries of a task vector stay, and how the rest is made up for; masks have the shape of the array.

Rows are those of the last axis: of a matrix as Hugging Face stores it, [out, in], what one output reads.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array
TINY = 1e-7  # an L1 norm that nothing is scaled to, as in mergekit


def kept_of(density: float, size: int, *, least: int = 0) -> int:
  """floor(density * size), but no fewer than least where density > 0 and there is anything.

  >>> kept_of(0.25, 10), kept_of(0.01, 10), kept_of(0.01, 10, least=1)
  (2, 0, 1)
  """
  return max(int(density * size), min(least, size) if density > 0 else 0)


def largest(x: Array, count: Array | int) -> Array:
  """True at the count largest |x|; of equal ones, those that come first in the flat order.

  The count-th largest is found bit by bit, counting how many are above: 31 passes over the array that need no
  memory and no order among devices.  32M entries took 0.7 s of two CPU cores, sorting them 10 s.
  """
  bits = _bits(x)
  # of the levels that at least count entries reach, the highest
  level = _highest(31, lambda at: jnp.sum(bits >= at) >= count)
  above, equal = bits > level, bits == level
  room = count - jnp.sum(above)
  place = _places(x.shape)

  def first_of_equals():
    end = _highest(bits.size.bit_length(), lambda at: jnp.sum(equal & (place < at)) <= room)
    return above | (equal & (place < end))

  whole = above | equal
  return jax.lax.cond(jnp.sum(equal) > room, first_of_equals, lambda: whole)


def _bits(x):
  """|x| as integers of the same order, which sort and compare faster."""
  return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def _ranks(rows):
  """Of each entry its place in its sorted row; sorting once and scattering takes half of sorting twice."""
  own = [jax.lax.broadcasted_iota(jnp.int32, rows.shape, axis) for axis in range(rows.ndim)]
  _, order = jax.lax.sort((rows, own[-1]), num_keys=1, is_stable=True)
  return jnp.zeros_like(rows).at[(*own[:-1], order)].set(own[-1], unique_indices=True)


def _places(shape):
  """Of each entry its number in the flat order, without a reshape, which would gather what devices share."""
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  own = [jax.lax.broadcasted_iota(jnp.int32, shape, a) * s for a, s in enumerate(strides)]
  return sum(own, jnp.zeros(shape, jnp.int32))


def _highest(bits, holds):
  """The greatest number of so many bits at which holds, which is true up to somewhere and false beyond."""
  higher = lambda i, at: jnp.where(
    holds(at | (1 << (bits - 1 - i))), at | (1 << (bits - 1 - i)), at
  )
  return jax.lax.fori_loop(0, bits, higher, jnp.int32(0))


def middle(x: Array, count: Array | int, above: Array | int) -> Array:
  """True at the count largest |x| that are left without the `above` largest of all."""
  return largest(x, count + above) & ~largest(x, above)


def drawn(key: Array, shape: tuple[int, ...], probability: Array | float) -> Array:
  """True with the probability given, a uniform draw an entry in the flat order: [shape].

  A draw depends on the key and on the entry's place, not on the device that makes it.
  """
  return jax.random.uniform(key, shape) < probability


def by_rank(x: Array, density: Array | float, epsilon: Array | float) -> Array:
  """density - epsilon at the smallest |x| of a row to density + epsilon at its largest, evenly by rank.

  Of equal entries the first is the smaller; a row of one entry has density.  MAGPRUNE of Deep et al. 2024 (DELLA,
  arXiv 2406.11617).
  """
  rows = _bits(x if x.ndim > 1 else x.reshape(1, -1))
  ranks = _ranks(rows)
  last = rows.shape[-1] - 1
  share = ranks.astype(jnp.float32) / last if last else jnp.full(rows.shape, 0.5)
  return ((density - epsilon) + share * 2 * epsilon).reshape(x.shape)


def l1(x: Array, mask: Array) -> Array:
  """x where the mask is True, times sum |x| / sum |x kept|; unscaled where either sum is below 1e-7."""
  kept = jnp.where(mask, x, 0.0)
  before, after = jnp.sum(jnp.abs(x)), jnp.sum(jnp.abs(kept))
  none = (before < TINY) | (after < TINY)
  return kept * jnp.where(none, 1.0, before / jnp.where(none, 1.0, after))


def expected(x: Array, mask: Array, probability: Array | float) -> Array:
  """x / probability where the mask is True, so that the mean over draws is x."""
  return jnp.where(mask, x / probability, 0.0)
