"""A stack of adapters once it is known which of them each row has: the row's factors lie beside it.

Gathering 16 rows' factors out of a stack reads and writes them once more: of LoRA of rank 8 on every matrix of
SmolLM2-135M, 156 MB, that takes 13 ms of a Zen 4's core (34 where a rank's numbers did not lie side by side), and the
two products 5 and 6, where the core reads 26 GB a second and so takes 6 for both at least.  Kept in bfloat16 they took
longer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.node import Change
from posttrain_jax.core import struct
from posttrain_jax.core.product import precision
from posttrain_jax.core.weight import linear

Array = jax.Array


@struct.dataclass
class Seated(Change):
  """y = x @ W + (x @ a[n].T) @ b[n], then y * columns[n], where n is x's row.

  A matrix costs what its rows' adapters need, where `acts` says how much that is: what the base does where none changes
  anything, and what lies `beyond` where one has such ranks.
  """

  a: Array  # [layers, rows, rank, in], or without layers
  b: Array  # [layers, rows, rank, out], scales and masks multiplied in
  columns: Array | None = None  # [layers, rows, out]: DoRA's factors, 1 for other adapters
  # [layers, rows]: 0 where it changes nothing here, 1, or 2 where it has ranks beyond; None where that is not asked
  acts: Array | None = None
  beyond: Seated | None = None  # further ranks

  def of_live(self, live: Array) -> Seated:
    """The node where the rows that are not live may be answered as the base does; live: [rows]."""
    return (
      self if self.acts is None else dataclasses.replace(self, acts=jnp.where(live, self.acts, 0))
    )

  def parted(self, narrow: int) -> Seated:
    """The same with the ranks from `narrow` on beyond the others, and what each row needs found out."""
    if self.a.shape[-2] <= narrow:
      acts = self._changes().astype(jnp.int32) if self.acts is None else self.acts
      return dataclasses.replace(self, acts=acts)
    cut = lambda low, high: Seated(self.a[..., low:high, :], self.b[..., low:high, :])
    beyond = cut(narrow, None)
    first = dataclasses.replace(cut(0, narrow), columns=self.columns)
    acts = jnp.where(beyond._changes(), 2, first._changes().astype(jnp.int32))
    return dataclasses.replace(first, beyond=beyond, acts=acts)

  def _changes(self) -> Array:
    """[layers, rows]: zeros beyond an adapter's own rank change nothing."""
    some = lambda x: jnp.any(x != 0, (-1, -2))
    changes = some(self.a) & some(self.b)
    return changes if self.columns is None else changes | jnp.any(self.columns != 1, -1)

  def apply(self, x: Array, base: Any, key: Array | None = None) -> Array:
    """x: [rows, ..., in]."""
    y = linear(x, base)
    narrow = lambda y: self.scaled(y + self._product(x), x.dtype)
    if self.acts is None:
      return narrow(y)
    beyond = self.beyond
    if beyond is None:
      return jax.lax.cond(jnp.any(self.acts), narrow, lambda y: y, y)
    wide = lambda y: self.scaled(y + self._product(x) + beyond._product(x), x.dtype)
    return jax.lax.switch(jnp.max(self.acts), [lambda y: y, narrow, wide], y)

  def _product(self, x: Array) -> Array:
    a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
    down = jnp.einsum("n...i,nri->n...r", x, a, precision=precision(x, a))
    return jnp.einsum("n...r,nro->n...o", down, b, precision=precision(down, b))

  def scaled(self, y: Array, dtype: Any) -> Array:
    """y: [rows, ..., out], times the columns, in dtype."""
    if self.columns is None:
      return y.astype(dtype)
    columns = self.columns.reshape(y.shape[0], *[1] * (y.ndim - 2), y.shape[-1])
    return (y * columns).astype(dtype)

  def dense(self, base: Any, dtype: Any = None) -> Array:
    raise ValueError("the adapters of several rows are many matrices: merge them one at a time")

  def size(self) -> int:
    """Numbers as stored; none of them trains."""
    stored = (self.a, self.b, self.columns, self.beyond)
    return sum(leaf.size for leaf in jax.tree.leaves(stored))

  def partition_specs(self, spec: PartitionSpec) -> Seated:
    *lead, rows, columns = [*[None] * (self.a.ndim - 1 - len(spec)), *spec]
    none, wide = PartitionSpec(), PartitionSpec(*lead, None, columns)
    return dataclasses.replace(
      self,
      a=PartitionSpec(*lead, None, None, rows),
      b=PartitionSpec(*lead, None, None, columns),
      columns=None if self.columns is None else wide,
      acts=None if self.acts is None else none,
      beyond=None if self.beyond is None else self.beyond.partition_specs(spec),
    )
