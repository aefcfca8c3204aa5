"""A weight is anything that can multiply: a plain `[in, out]` array, or a value with the verbs of `Weight`.

`linear` is the only matrix product in any model and `embed` the only look-up; models never ask what a weight is.
Axis names used across the project: `batch group pair time vocab embed in out rank layers`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from posttrain_jax.core import ragged as ragged_lib
from posttrain_jax.core import sharding, struct
from posttrain_jax.core.leaf import Leaf
from posttrain_jax.core.product import BITS as BITS
from posttrain_jax.core.product import PRODUCT as PRODUCT
from posttrain_jax.core.product import multiplied as multiplied
from posttrain_jax.core.product import operand
from posttrain_jax.core.product import precision as precision
from posttrain_jax.core.product import product as product

Array = jax.Array
# A Weight or a plain array; shapes alone stand for either in programs compiled without weights.
AnyWeight = Any


class Weight(Leaf):
  """What a stored matrix `[in, out]` must be able to do; it has a shape and a dtype, as an array has.

  A base class and no Protocol: models ask at every product, and a class is told by one look.
  """

  @property
  def shape(self) -> tuple[int, ...]:
    """The logical one, [..., in, out]."""
    raise TypeError(f"{type(self).__name__} has no shape")

  @property
  def dtype(self) -> Any:
    """The dtype of the matrix that it stands for."""
    raise TypeError(f"{type(self).__name__} has no dtype")

  def apply(self, x: Array) -> Array:
    """x: [..., in] -> [..., out], in the dtype of x."""
    raise TypeError(f"{type(self).__name__} is no weight that multiplies")

  def apply32(self, x: Array) -> Array:
    """What `apply` gives, in float32; a type that can leaves out the rounding to x's dtype."""
    return self.apply(x).astype(jnp.float32)

  def ragged(self, x: Array, sizes: Array) -> Array:
    """`ragged` with self a stack [groups, in, out]."""
    return ragged(x, self.dense(multiplied(x.dtype, self.dtype)), sizes)

  def rows(self, ids: Array) -> Array:
    """Embedding look-up: ids: [...] -> [..., out]."""
    raise TypeError(f"{type(self).__name__} is no table of embeddings")

  def dense(self, dtype: Any = None) -> Array:
    """The matrix itself, [in, out], in `dtype` or (None) in that of the weight."""
    raise TypeError(f"{type(self).__name__} has no dense form")

  def like(self, w: Array) -> Any:
    """The matrix w stored as this one is."""
    return w.astype(self.dtype)


def linear(x: Array, w: AnyWeight) -> Array:
  """x @ w with x: [..., in], w: [in, out], in x's dtype; `product` says how it is computed."""
  if isinstance(w, Weight):
    return w.apply(x)
  return product(x, w, 0)


def ragged(x: Array, w: AnyWeight, sizes: Array) -> Array:
  """Rows of x, [rows, in], sorted by group, each times the matrix of its group; w: [groups, in, out], sizes: [groups].

  `core.ragged`, for backends that have one: `core.grouped` says which.  What is behind the last group means nothing.
  """
  if isinstance(w, Weight):
    return w.ragged(x, sizes)
  return ragged_lib.dot(x, w, sizes, multiplied(x.dtype, w.dtype)).astype(x.dtype)


def linear32(x: Array, w: AnyWeight) -> Array:
  """x @ w in float32, not rounded to x's dtype in between: for logits, where a bfloat16 step is 2^-8 of the value."""
  if isinstance(w, Weight):
    return w.apply32(x)
  return product(x, w, 0, jnp.float32)


def embed(ids: Array, w: AnyWeight) -> Array:
  """Rows of w: ids: [...] of integers, w: [vocab, out] -> [..., out]."""
  if isinstance(w, Weight):
    return w.rows(ids)
  return jnp.take(w, ids, axis=0, mode="clip")


def dense(w: AnyWeight, dtype: Any = None) -> Array:
  """w as a plain [in, out] array, in `dtype` or (None) in the dtype it is stored in."""
  if isinstance(w, Weight):
    return w.dense(dtype)
  return w if dtype is None else w.astype(dtype)


def shape(w: AnyWeight) -> tuple[int, ...]:
  """The logical shape, [..., in, out]: what the matrix would have if it were dense."""
  return tuple(w.shape)


def like(w: Array, base: AnyWeight) -> AnyWeight:
  """The matrix w stored as base is: quantised where base is quantised, rounded to its dtype where it is dense."""
  return base.like(w) if isinstance(base, Weight) else w.astype(base.dtype)


@struct.dataclass
class Shared:
  """An array that every layer of a stack reads whole: VeRA's projections, a row's adapter.  The scan closes over it."""

  value: Any


@struct.dataclass
class Rows(Shared):
  """What belongs to the rows of a batch, one entry of the first axis each: the index of a row's adapter."""


def is_shared(x: Any) -> bool:
  return isinstance(x, Shared)


def batch_rows(tree: Any) -> int | None:
  """Rows of the batch that the tree is bound for; None where it serves any."""
  sizes = {
    leaf.value.shape[0]
    for leaf in jax.tree.leaves(tree, is_leaf=is_shared)
    if isinstance(leaf, Rows)
  }
  if len(sizes) > 1:
    raise ValueError(f"parameters are bound for batches of different sizes: {sorted(sizes)}")
  return next(iter(sizes), None)


def take_rows(tree: Any, rows: Any) -> Any:
  """The tree bound for those rows of its batch, in their order."""
  one = lambda leaf: Rows(leaf.value[rows]) if isinstance(leaf, Rows) else leaf
  return jax.tree.map(one, tree, is_leaf=is_shared)


@struct.dataclass
class Adapted(Weight):
  """A frozen base and the adapter node that changes it; made by `adapters.bind`."""

  base: Any
  node: Any
  key: Any = None  # a PRNG key (or one a layer) for adapter dropout in training; None in evaluation

  @property
  def shape(self) -> tuple[int, ...]:
    return shape(self.base)

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  def apply(self, x: Array) -> Array:
    return self.node.apply(x, self.base, self.key)

  def ragged(self, x: Array, sizes: Array) -> Array:
    return self.node.ragged(x, sizes, self.base, self.key)

  def rows(self, ids: Array) -> Array:
    return self.node.rows(ids, self.base, self.key)

  def dense(self, dtype: Any = None) -> Array:
    return self.node.dense(self.base, dtype)

  def partition_specs(self, spec: PartitionSpec) -> Self:
    base, node = sharding.specs(self.base, spec), sharding.specs(self.node, spec)
    key = None if self.key is None else PartitionSpec()
    return dataclasses.replace(self, base=base, node=node, key=key)


@struct.dataclass
class Transposed(Weight):
  """The view w.T of a stored weight w: [out, in]; a tied head is `Transposed(embedding)`."""

  base: Any

  @property
  def shape(self) -> tuple[int, ...]:
    *lead, rows, columns = shape(self.base)
    return (*lead, columns, rows)

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  def apply(self, x: Array) -> Array:
    return self._product(x, None)

  def apply32(self, x: Array) -> Array:
    return self._product(x, jnp.float32)

  def _product(self, x: Array, dtype: Any) -> Array:
    if isinstance(self.base, Bfloat16):
      return self.base.product(x, 1, dtype)
    return product(x, dense(self.base), 1, dtype)

  def rows(self, ids: Array) -> Array:
    return jnp.take(self.dense(), ids, axis=0, mode="clip")

  def dense(self, dtype: Any = None) -> Array:
    return jnp.swapaxes(dense(self.base, dtype), -1, -2)

  def partition_specs(self, spec: PartitionSpec) -> Self:
    *lead, rows, columns = [*[None] * (len(self.shape) - len(spec)), *spec]
    turned = PartitionSpec(*lead, columns, rows)
    return dataclasses.replace(self, base=sharding.specs(self.base, turned))


@struct.dataclass
class Bfloat16(Weight):
  """x @ round(W), rounded to bfloat16; W is kept as bits where it is frozen, as float32 where it trains.

  A CPU has its frozen matrices as integers, because XLA:CPU moves no bfloat16: a scan over a stack of layers would
  widen the whole stack to float32 before it began.  The gradient of a float32 W is not rounded.
  """

  stored: Any  # uint16 or float32 [..., in, out]

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.stored.shape)

  @property
  def dtype(self) -> Any:
    return jnp.dtype(jnp.bfloat16)

  def apply(self, x: Array) -> Array:
    return self.product(x, 0)

  def apply32(self, x: Array) -> Array:
    return self.product(x, 0, jnp.float32)

  def product(self, x: Array, contract: int, dtype: Any = None) -> Array:
    return product(x, self.stored, contract, dtype, self.dtype)

  def rows(self, ids: Array) -> Array:
    """Those of a table that trains are not rounded: nothing is multiplied."""
    rows = jnp.take(self.stored, ids, axis=0, mode="clip")
    return operand(rows, self.dtype) if rows.dtype == BITS else rows

  def dense(self, dtype: Any = None) -> Array:
    return operand(self.stored, self.dtype if dtype is None else dtype)

  def like(self, w: Array) -> Bfloat16:
    """The matrix w frozen."""
    return bits(w)

  def partition_specs(self, spec: PartitionSpec) -> Bfloat16:
    return Bfloat16(spec)


def bits(w: Any) -> Bfloat16:
  """The matrix w, of any kind, rounded to bfloat16 and kept as bits; a numpy array stays one."""
  if isinstance(w, np.ndarray):
    return Bfloat16(w.astype(jnp.bfloat16).view(np.uint16))
  if isinstance(w, Bfloat16) and w.stored.dtype == BITS:
    return w
  return Bfloat16(jax.lax.bitcast_convert_type(dense(w, jnp.bfloat16), BITS))


def layer(w: AnyWeight, index: Any) -> AnyWeight:
  """The matrix at an index of a stacked weight: a layer, or (layer, expert)."""
  of_layer = lambda leaf: leaf if is_shared(leaf) else leaf[index]
  return jax.tree.map(of_layer, w, is_leaf=is_shared)


def unadapted(w: AnyWeight) -> AnyWeight:
  """The base under any number of bound adapters."""
  while isinstance(w, Adapted):
    w = w.base
  return w
