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
from jax.sharding import PartitionSpec

from posttrain_jax.core import sharding, struct
from posttrain_jax.core.leaf import Leaf

Array = jax.Array
# A Weight or a plain array; shapes alone stand for either in programs compiled without weights.
AnyWeight = Any
BITS = jnp.uint16


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


def linear32(x: Array, w: AnyWeight) -> Array:
  """x @ w in float32, not rounded to x's dtype in between: for logits, where a bfloat16 step is 2^-8 of the value."""
  if isinstance(w, Weight):
    return w.apply32(x)
  return product(x, w, 0, jnp.float32)


def product(x: Array, w: Array, contract: int, dtype: Any = None) -> Array:
  """x @ w (contract=0) or x @ w.T (contract=1), in dtype; None for x's.

  A float32 x is rounded to bfloat16 where w is bfloat16, and sums and results are float32, gradients too.  So a CPU
  computes in bfloat16: its matrices are bfloat16, what lies between them is float32, and the products are those that
  the hardware has (1024 x 576 x 1536 on a core with AMX: 2.6 ms; 12 in float32, and 40 where results are bfloat16).

  Without a mesh the operand is flattened to two dimensions: on XLA:CPU the gradient of a low-rank factor from a
  three-dimensional operand measured 9x slower.  On a mesh it must not be, where time sharding would add an all-gather.
  """
  lead = x.shape[:-1]
  if x.ndim > 2 and not sharding.active():
    x = x.reshape(-1, x.shape[-1])
  if x.dtype == jnp.float32:
    y = _wide(x, w, multiplied(x.dtype, w.dtype), contract)
  else:
    y = _dot(x, w.astype(x.dtype), [x.ndim - 1], [contract], dtype)
  return y.reshape(*lead, y.shape[-1])


def multiplied(x: Any, w: Any) -> Any:
  """The dtype that a product of dtypes x and w is computed in: that of x, bfloat16 where x is float32 and w is not."""
  return w if x == jnp.float32 and w == jnp.bfloat16 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _wide(x: Array, w: Array, dtype: Any, contract: int) -> Array:
  """float32 x @ w or x @ w.T, of operands in dtype."""
  return _dot(x.astype(dtype), _operand(w, dtype), [x.ndim - 1], [contract], jnp.float32)


def _wide_forward(x: Array, w: Array, dtype: Any, contract: int) -> tuple[Array, tuple[Array, Array]]:
  return _wide(x, w, dtype, contract), (x, w)


def _wide_backward(dtype: Any, contract: int, kept: tuple[Array, Array], g: Array) -> tuple[Array, Any]:
  x, w = kept
  d_x = _dot(g.astype(dtype), _operand(w, dtype), [g.ndim - 1], [1 - contract], jnp.float32)
  if not jnp.issubdtype(w.dtype, jnp.floating):
    return d_x, None
  rows = [*range(x.ndim - 1)]
  first, second = (x.astype(dtype), g.astype(dtype))[:: 1 if contract == 0 else -1]
  if second.shape[-1] < first.shape[-1]:
    # of a narrow factor, [in, rank]: its transpose is six times as fast on XLA:CPU, which undoes it without the barrier
    d_w = jax.lax.optimization_barrier(_dot(second, first, rows, rows, jnp.float32)).T
  else:
    d_w = _dot(first, second, rows, rows, jnp.float32)
  return d_x, d_w.astype(w.dtype)


_wide.defvjp(_wide_forward, _wide_backward)


def _operand(w: Array, dtype: Any) -> Array:
  return jax.lax.bitcast_convert_type(w, dtype) if w.dtype == BITS else w.astype(dtype)


def _dot(x: Array, w: Array, of_x: list[int], of_w: list[int], dtype: Any) -> Array:
  return jax.lax.dot_general(x, w, ((of_x, of_w), ((), ())), preferred_element_type=dtype)


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
    return product(x, dense(self.base), 1)

  def apply32(self, x: Array) -> Array:
    if isinstance(self.base, Weight):
      return super().apply32(x)
    return product(x, self.base, 1, jnp.float32)

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
  stored: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.stored.shape)

  @property
  def dtype(self) -> Any:
    return jnp.dtype(jnp.bfloat16)

  def apply(self, x: Array) -> Array:
    lead = x.shape[:-1]
    if x.ndim > 2 and not sharding.active():
      x = x.reshape(-1, x.shape[-1])
    y= _wide(x, self.stored, self.dtype, 0)
    return y.reshape(*lead, y.shape[-1])

  def dense(self, dtype: Any = None) -> Array:
    w = _operand(self.stored, self.dtype)
    return w if dtype is None else w.astype(dtype)


def layer(w: AnyWeight, index: int) -> AnyWeight:
  """One layer's matrix of a stacked weight."""
  of_layer = lambda leaf: leaf if is_shared(leaf) else leaf[index]
  return jax.tree.map(of_layer, w, is_leaf=is_shared)


def unadapted(w: AnyWeight) -> AnyWeight:
  """The base under any number of bound adapters."""
  while isinstance(w, Adapted):
    w = w.base
  return w
