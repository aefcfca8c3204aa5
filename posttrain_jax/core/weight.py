"""A weight is anything that can multiply: a plain `[in, out]` array, or a value with the verbs of `Weight`.

`linear` is the only matrix product in any model and `embed` the only look-up; models never ask what a weight is.
Axis names used across the project: `batch group pair time vocab embed in out rank layers`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from posttrain_jax.core import ragged as ragged_lib
from posttrain_jax.core import sharding, struct
from posttrain_jax.core.leaf import Leaf

Array = jax.Array
# A Weight or a plain array; shapes alone stand for either in programs compiled without weights.
AnyWeight = Any
BITS = jnp.uint16  # of numbers in bfloat16
PRODUCT = "product"


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


def product(x: Array, w: Array, contract: int, dtype: Any = None, operands: Any = None) -> Array:
  """x @ w (contract=0) or x @ w.T (contract=1), in dtype; None for x's.

  A float32 x is rounded to bfloat16 where w is bfloat16; sums and results are float32, and gradients too, whose
  cotangents are rounded before their products.  So a CPU computes in bfloat16: its matrices are bfloat16 and what lies
  between products is float32, since XLA:CPU has no other arithmetic.  1024 x 576 x 1536 on a core with AMX takes 2.6 ms
  so, 12 in float32, and 40 where the result is bfloat16.

  Without a mesh x is flattened to two dimensions: on XLA:CPU the gradient of a low-rank factor from a three-dimensional
  operand measured 9x slower.  On a mesh it must not be, where time sharding would add an all-gather.

  A policy of what is kept for the backward pass sees no product within a derivative of its own: it is named PRODUCT.

  Args:
    w: a matrix, or the bits of one in bfloat16.
    operands: what x and w are rounded to where x is float32; None: `multiplied`.
  """
  lead = x.shape[:-1]
  if x.ndim > 2 and not sharding.active():
    x = x.reshape(-1, x.shape[-1])
  if x.dtype == jnp.float32:
    y = _product32(x, w, multiplied(x.dtype, _held(w)) if operands is None else operands, contract)
    y = checkpoint_name(y, PRODUCT)
  else:
    y = _dot(x, _operand(w, x.dtype), contract, dtype)
  return y.reshape(*lead, y.shape[-1])


def multiplied(x: Any, w: Any) -> Any:
  """What a product of dtypes x and w is computed in: bfloat16 where x is float32 and w bfloat16, else x's."""
  return w if x == jnp.float32 and w == jnp.bfloat16 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product32(x: Array, w: Array, dtype: Any, contract: int) -> Array:
  """float32 x @ w or x @ w.T, of operands in dtype.  For the backward pass w is kept as it came, bits as bits."""
  return _dot(x.astype(dtype), _operand(w, dtype), contract, jnp.float32)


def _product32_forward(
  x: Any, w: Any, dtype: Any, contract: int
) -> tuple[Array, tuple[Array | None, Array]]:
  """x is kept for the gradient of w alone: of a frozen w none exists, however it is traced."""
  y = _product32(x.value, w.value, dtype, contract)
  return y, (x.value if w.perturbed else None, w.value)


def _product32_backward(
  dtype: Any, contract: int, kept: tuple[Array | None, Array], g: Any
) -> tuple[Array | None, Array | None]:
  x, w = kept
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None
  g = g.astype(dtype)
  d_x = _dot(g, _operand(w, dtype), 1 - contract, jnp.float32)
  if x is None:
    return d_x, None
  x = x.astype(dtype)
  one, other = (x, g) if contract == 0 else (g, x)
  if other.shape[-1] < one.shape[-1]:
    # The gradient of a narrow factor, [in, rank], is computed transposed: six times as fast on XLA:CPU, which would
    # turn it back without the barrier.
    d_w = jax.lax.optimization_barrier(_over_rows(other, one)).T
  else:
    d_w = _over_rows(one, other)
  return d_x, d_w.astype(w.dtype)


def _over_rows(x: Array, g: Array) -> Array:
  """float32 sum over rows of x[row, i] g[row, o].

  XLA:CPU would multiply x as it lies, [1024, 576] by [1024, 1536] in 11 ms of bfloat16 and 10 of float32, and takes
  back a transpose that it is told.  As pairs of numbers in an integer x.T lies as it is written: 3.5 ms.
  """
  rows = tuple(range(x.ndim - 1))
  if x.dtype != jnp.bfloat16 or x.ndim != 2 or len(x) % 2 or jax.default_backend() != "cpu":
    return jax.lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
  cast, (count, columns) = jax.lax.bitcast_convert_type, x.shape
  pairs = cast(cast(x, BITS).T.reshape(columns, count // 2, 2), jnp.uint32)
  turned = jax.lax.optimization_barrier(pairs)
  turned = cast(cast(turned, BITS).reshape(columns, count), jnp.bfloat16)
  return _dot(turned, g, 0, jnp.float32)


_product32.defvjp(_product32_forward, _product32_backward, symbolic_zeros=True)


def _held(w: Array) -> Any:
  """The dtype of the numbers that w holds."""
  return jnp.bfloat16 if w.dtype == BITS else w.dtype


def _operand(w: Array, dtype: Any) -> Array:
  return (jax.lax.bitcast_convert_type(w, jnp.bfloat16) if w.dtype == BITS else w).astype(dtype)


def _dot(x: Array, w: Array, contract: int, dtype: Any) -> Array:
  """One row is two: XLA:CPU has no bfloat16 product of one, and sixty of 576 x 1536 took 66 ms for 9."""
  alone = x.dtype == jnp.bfloat16 and x.size == x.shape[-1] and jax.default_backend() == "cpu"
  rows = jnp.concatenate([x, x], axis=-2) if alone and x.ndim > 1 else x
  y = jax.lax.dot_general(
    rows, w, (((x.ndim - 1,), (contract,)), ((), ())), preferred_element_type=dtype
  )
  return y if rows is x else y[..., :1, :]


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
    return _operand(rows, self.dtype) if rows.dtype == BITS else rows

  def dense(self, dtype: Any = None) -> Array:
    return _operand(self.stored, self.dtype if dtype is None else dtype)

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
