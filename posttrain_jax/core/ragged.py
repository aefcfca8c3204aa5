"""Products of sorted rows with their groups' matrices where a backend has them, and their gradients.

`jax.lax.ragged_dot` of a TPU multiplies each row with the matrix of its group alone, forward and for the rows'
gradient.  The gradient of the matrices is there a product of every row for every group (libtpu 0.0.42: 64 groups, 64
times the products), so that one is made here, block by block.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import struct
from posttrain_jax.core.product import precision

Array = jax.Array
SMALLEST, LARGEST = (
  8,
  256,
)  # rows of a block: the power of two next below the mean, so that little is computed in vain


@struct.dataclass
class Groups:
  """Of sorted rows: how many each group has, and the blocks that they are cut into.

  What is behind the last group's rows belongs to nobody, and its products are 0.
  """

  sizes: Array  # [groups]
  ends: Array  # [groups]: the row behind a group's last
  first: Array  # [groups + 1]: blocks of the groups before; the last is the count of all
  block: int = struct.field(pytree_node=False, default=SMALLEST)

  def at(self, i: Array) -> tuple[Array, Array]:
    """(the group of block i, its first row)."""
    group = jnp.searchsorted(self.first, i, side="right") - 1
    return group, self.ends[group] - self.sizes[group] + (i - self.first[group]) * self.block

  def rows(self, begin: Array, group: Array) -> Array:
    """[block, 1]: whether a row of the block that begins there is the group's."""
    return (begin + jnp.arange(self.block) < self.ends[group])[:, None]


def groups(sizes: Array, mean: int) -> Groups:
  """The groups of these sizes, [groups] of integers; mean: rows of a group as expected, which blocks are made for."""
  sizes = jnp.asarray(sizes)
  block = min(max(2 ** int(math.log2(max(mean, 1))), SMALLEST), LARGEST)
  each = -(-sizes // block)
  first = jnp.concatenate([jnp.zeros(1, sizes.dtype), jnp.cumsum(each)])
  return Groups(sizes, jnp.cumsum(sizes), first, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dot(x: Array, w: Array, sizes: Array, operands: Any) -> Array:
  """y[i] = x[i] @ w[g(i)] in float32; x: [rows, in], w: [groups, in, out], both rounded to `operands`.

  Cotangents are rounded to it too.  What is behind the last group means nothing.
  """
  x, w = x.astype(operands), w.astype(operands)
  return jax.lax.ragged_dot(x, w, sizes.astype(jnp.int32), precision(x, w), jnp.float32)


def _backward(operands: Any, kept: Any, g: Array) -> tuple[Array, Array, None]:
  x, w, sizes = kept
  d_x = dot(g, jnp.swapaxes(w, 1, 2), sizes, operands)
  of = groups(sizes, len(x) // len(sizes))
  pad = lambda rows: jnp.pad(rows.astype(operands), ((0, of.block), (0, 0)))
  rows, slopes = pad(x), pad(g)

  def body(i: Array, sums: Array) -> Array:
    group, begin = of.at(i)
    some, of_some = (jax.lax.dynamic_slice_in_dim(a, begin, of.block) for a in (rows, slopes))
    of_some = jnp.where(of.rows(begin, group), of_some, 0)
    product = jnp.matmul(
      some.T, of_some, precision=precision(some, of_some), preferred_element_type=jnp.float32
    )
    return sums.at[group].add(product)

  d_w = jax.lax.fori_loop(0, of.first[-1], body, jnp.zeros(w.shape, jnp.float32))
  return d_x.astype(x.dtype), d_w.astype(w.dtype), None


dot.defvjp(lambda x, w, sizes, operands: (dot(x, w, sizes, operands), (x, w, sizes)), _backward)
