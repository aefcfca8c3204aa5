"""DoRA: LoRA of a matrix's direction, and a trained magnitude of each of its columns.  Liu et al. 2024.

The norm of a column takes no gradient, and is found without the matrix a @ b:

  ||W + s a b||^2 = ||W||^2 + sum_r s b (2 (a.T W) + (a.T a) (s b)),   a column at a time

where ||W|| is a field of the node and the rest are products of rank r, so that a quantised base serves as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.dropout import dropout
from posttrain_jax.adapters.ia3 import IA3
from posttrain_jax.adapters.lora import LoRA, of_rows
from posttrain_jax.core import sharding, struct, weight
from posttrain_jax.core.product import exact
from posttrain_jax.core.weight import Adapted, embed, linear, linear32

Array = jax.Array

# Of ||W||^2 + ||s a b||^2, what is left of it where the two cancel: float32 sums resolve no less.
FLOOR = 1e-6
TINY = 1e-15  # the norm of a column of zeros


@struct.dataclass
class DoRA(LoRA):
  """x @ (magnitude * V / ||V||), V = W + scale * a @ b, with the norm of each column, magnitude: [out].

  In training with dropout the change alone reads the dropped input, as in PEFT:
  x @ W + dropped @ (magnitude * V / ||V|| - W).  A layer of rank 0 is its base.
  """

  magnitude: Any = None  # [out], [layers, out] or [layers, experts, out]
  norm: Any = None  # ||W|| of each column of the base, likewise
  TRAINED = ("a", "b", "magnitude")

  def apply(self, x: Array, base: Any, key: Array | None = None) -> Array:
    factor = self.factor(base, x.dtype)
    if key is None or self.dropout == 0.0:
      return (factor * self._direction(x, linear(x, base))).astype(x.dtype)
    dropped = dropout(x, self.dropout, key)
    whole, part = linear(jnp.stack([x, dropped]), base)  # one product: the base is decoded once
    return whole + (factor * self._direction(dropped, part) - part).astype(x.dtype)

  def ragged(self, x: Array, sizes: Array, base: Any, key: Array | None = None) -> Array:
    factor = jax.vmap(lambda node, base: node.factor(base, x.dtype))(self, base)
    factor = of_rows(factor, sizes, len(x))
    whole = weight.ragged(x, base, sizes)
    if key is None or self.dropout == 0.0:
      return (factor * (whole + self._change(x, sizes))).astype(x.dtype)
    dropped = dropout(x, self.dropout, key[0])
    part = weight.ragged(dropped, base, sizes)
    return whole + (factor * (part + self._change(dropped, sizes)) - part).astype(x.dtype)

  def _direction(self, x: Array, from_base: Array) -> Array:
    """x @ V.  The magnitude's gradient reads it, so the backward pass keeps it or computes x @ W again."""
    down = checkpoint_name(linear(x, self.a), "down") * self._scales().astype(x.dtype)
    return checkpoint_name(from_base + linear(down, self.b), "direction")

  def rows(self, ids: Array, base: Any, key: Array | None = None) -> Array:
    """An adapted embedding; as in PEFT it has no dropout."""
    rows = embed(ids, base)
    update = linear(embed(ids, self.a) * self._scales(), self.b)
    return ((rows + update) * self.factor(base, update.dtype)).astype(rows.dtype)

  def factor(self, base: Any, dtype: Any) -> Array:
    """magnitude / ||V||, float32 [out]; 1 where the layer is not adapted.

    Args:
      dtype: of the product a.T W; it is summed in float32.
    """
    a, b = self.a, self._scales()[:, None] * self.b
    across = linear32(a.T.astype(dtype), _still(base))
    unit = jnp.square(self.norm) + TINY**2
    update = jnp.sum(b * exact(exact(a.T, a), b), axis=0) / unit
    # in units of ||W||: a fresh factor is 1 to the bit, whether root and quotient are rounded once or twice
    square = 1 + 2 * jnp.sum(b * across, axis=0) / unit + update
    square = jnp.maximum(square, FLOOR * (1 + update))
    growth = checkpoint_name(jax.lax.stop_gradient(jnp.sqrt(square)), "column_norm")
    factor = self.magnitude / (self.norm + TINY) / growth
    return factor if self.mask is None else jnp.where(jnp.any(self.mask > 0), factor, 1)

  def dense(self, base: Any, dtype: Any = None) -> Array:
    """magnitude * V / ||V||, in float32 and rounded once."""
    w = weight.dense(base)
    wide = w.astype(jnp.float32)
    direction = wide + exact(self.a * self._scales()[..., None, :], self.b)
    square = jnp.sum(jnp.square(direction), axis=-2, keepdims=True)
    scaled = self.magnitude[..., None, :] / jnp.sqrt(square + TINY**2) * direction
    if self.mask is not None:
      scaled = jnp.where(jnp.any(self.mask > 0, axis=-1)[..., None, None], scaled, wide)
    return scaled.astype(dtype or w.dtype)

  def settled(self, base: Any) -> Adapted:
    """A LoRA whose columns are scaled, by factors that are computed once; of experts, itself."""
    if self.a.ndim > 3:
      return super().settled(base)
    factor = lambda pair: pair[0].factor(pair[1], jnp.float32)
    find = factor if self.a.ndim == 2 else functools.partial(jax.lax.map, factor)
    gain = jax.jit(find)((self, base))
    lora = LoRA(**{f.name: vars(self)[f.name] for f in dataclasses.fields(LoRA)})
    return Adapted(Adapted(base, lora), IA3(gain))

  def size(self) -> int:
    return super().size() + int(np.sum(self.ranks() > 0)) * self.b.shape[-1]

  def partition_specs(self, spec: PartitionSpec) -> DoRA:
    columns = PartitionSpec(*[*[None] * (self.a.ndim - len(spec)), *spec[:-2], spec[-1]])
    specs: Any = super().partition_specs(spec)
    return dataclasses.replace(specs, magnitude=columns, norm=columns)


def over(node: LoRA, base: Any) -> DoRA:
  """The DoRA of node's factors on base, its magnitude that of W + scale a b."""
  lead = node.a.shape[:-2]
  if not lead:
    norm, magnitude = _columns(base, node)
  else:
    of = lambda at: _columns(weight.layer(base, at), weight.layer(node, at))
    columns = zip(*[of(at) for at in np.ndindex(lead)])
    norm, magnitude = (jnp.stack(x).reshape(*lead, -1) for x in columns)
  fields: Any = {f.name: vars(node)[f.name] for f in dataclasses.fields(LoRA)}
  return DoRA(**fields, magnitude=magnitude, norm=norm)


@jax.jit
def _columns(base, node):
  """(||W||, ||W + scale a b||) of each column."""
  w = weight.dense(base, jnp.float32)
  norm, moved = jnp.linalg.norm(w, axis=-2), jnp.linalg.norm(node.dense(w), axis=-2)
  if sharding.active():  # on every device: each process lays out its own share
    whole = PartitionSpec()
    norm, moved = jax.lax.with_sharding_constraint((norm, moved), (whole, whole))
  # a fresh one's are the same number, not two sums that a compiler may add up in two ways
  return norm, jnp.where(jnp.any(node.a) & jnp.any(node.b), moved, norm)


def _still(base: Any) -> Any:
  """base without the dropout of what is bound in it: a.T W is no input of a layer."""
  if not isinstance(base, Adapted):
    return base
  return base.replace(base=_still(base.base), key=None)
