"""How the engine keeps matrices: turned, and in fewer bits where that is asked for.

A token reads every weight once, so bytes are time.  Matrices lie [out, in], which products of few rows read faster on a
CPU (16 rows through SmolLM2-135M on one core: 92 ms for 113), and every product is accumulated in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from posttrain_jax.core import struct, tree, weight
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.quant import int8

Array = jax.Array
Params = Any
AUTO, BFLOAT16, INT8 = "auto", "bfloat16", "int8"
STORAGES = (AUTO, BFLOAT16, INT8)
LEVELS = 128  # of each of the two halves of an activation


@struct.dataclass
class Turned(weight.Weight):
  """The matrix w, [in, out], kept as `stored`: [..., out, in], in its own dtype or in bfloat16; of a stack the bits."""

  stored: Any
  dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))  # that w came in

  @property
  def shape(self) -> tuple[int, ...]:
    *lead, outs, ins = self.stored.shape
    return (*lead, ins, outs)

  def apply(self, x: Array) -> Array:
    return self.apply32(x).astype(x.dtype)

  def apply32(self, x: Array) -> Array:
    """x @ w in float32.

    Where w came in bfloat16, x is rounded to it once, as whoever trains does.  Where it was rounded to be kept here,
    x is the sum of two bfloat16 numbers, 16 bits of it; twice the rows take as long as one, being read against the
    same weights.
    """
    is_rounded = self.stored.dtype in (jnp.bfloat16, weight.BITS) and self.dtype != jnp.bfloat16
    if not is_rounded or x.dtype == jnp.bfloat16:
      return weight.product(x, self.stored, 1, jnp.float32)
    # not a cast there and back, which XLA takes for no rounding at all
    high = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    halves = jnp.stack([high, x - high]).astype(jnp.bfloat16)
    return jnp.sum(weight.product(halves, self.stored, 1, jnp.float32), axis=0)

  def dense(self, dtype: Any = None) -> Array:
    stored = weight.Bfloat16(self.stored) if self.stored.dtype == weight.BITS else self.stored
    w = jnp.swapaxes(weight.dense(stored), -1, -2)
    return w if dtype is None else w.astype(dtype)

  def partition_specs(self, spec: PartitionSpec) -> Turned:
    return dataclasses.replace(self, stored=_turned_spec(spec, self.stored.ndim))


@struct.dataclass
class Turned8(weight.Weight):
  """w[i, o] = codes[o, i] * step[o], codes in 8 bits; activations are used in 15 bits.

  An activation is 128 high + low, both in 8 bits, so that one product of integers with twice the rows does it, exactly.
  What is left of the error is that of the weights: 8 bits and a scale for each output channel.
  """

  codes: Any  # int8 [..., out, in]
  step: Any  # float32 [..., out]
  dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

  @property
  def shape(self) -> tuple[int, ...]:
    *lead, outs, ins = self.codes.shape
    return (*lead, ins, outs)

  def apply(self, x: Array) -> Array:
    return self.apply32(x).astype(x.dtype)

  def apply32(self, x: Array) -> Array:
    """x @ w, x rounded to 15 bits of the largest entry of its row."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    step = jnp.where(largest == 0, 1.0, largest / (LEVELS * (LEVELS - 1))) + _spoilt(wide, -1)
    high = jnp.round(wide / (step * LEVELS))
    low = jnp.round(wide / step - LEVELS * high)
    halves = jnp.stack([high, low]).astype(jnp.int8)
    sums = weight.product(halves, self.codes, 1, jnp.int32).astype(jnp.float32)
    return (sums[0] * LEVELS + sums[1]) * step * self.step

  def dense(self, dtype: Any = None) -> Array:
    w = jnp.swapaxes(self.codes.astype(jnp.float32) * self.step[..., None], -1, -2)
    return w.astype(self.dtype if dtype is None else dtype)

  def partition_specs(self, spec: PartitionSpec) -> Turned8:
    turned = _turned_spec(spec, self.codes.ndim)
    return dataclasses.replace(self, codes=turned, step=PartitionSpec(*turned[:-1]))


def _turned_spec(spec: PartitionSpec, ndim: int) -> PartitionSpec:
  """Of the stored array, given that of [..., in, out]."""
  *lead, ins, outs = [*spec, *[None] * (ndim - len(spec))]
  return PartitionSpec(*lead, outs, ins)


def store(params: Params, config: ModelConfig, storage: str) -> Params:
  """params with every matrix that multiplies kept so, those under a bound adapter and quantised ones as well.

  auto: plain matrices alone, turned in the dtype that they are multiplied in.  A tied head is stored beside the
  embedding where it is not multiplied as it lies; the rows of an embedding are read as they are.

  Raises:
    ValueError: no such storage, or layers that are apart (`decoder.unstack`).
  """
  if storage not in STORAGES:
    raise ValueError(f"storage={storage!r}: weights are stored as {', '.join(STORAGES)}")
  if isinstance(params["layers"], tuple):
    raise ValueError(
      "the layers are apart already: store the parameters first, then take them apart"
    )
  leaves = dict(tree.items(params))
  table = weight.unadapted(leaves["embed_tokens/weight"])
  is_trained = isinstance(table, weight.Bfloat16)  # whose rows are not rounded, as its products are
  if config.tied and (storage != AUTO or is_trained):
    leaves["lm_head/weight"] = jnp.swapaxes(weight.dense(table), -1, -2)
  if is_trained:
    leaves["embed_tokens/weight"] = table.stored
  # a router chooses by small differences
  apart = ("score/weight", *((tree.ROUTER,) if storage != AUTO else ()))
  multiplies = lambda path: tree.turned(path) and path not in apart
  kept = lambda path, leaf: matrix(leaf, storage) if multiplies(path) else leaf
  return tree.unflatten((path, kept(path, leaf)) for path, leaf in leaves.items())


def matrix(w: Any, storage: str) -> Any:
  """One matrix, [..., in, out], kept so."""
  if isinstance(w, weight.Adapted):
    return w.replace(base=matrix(w.base, storage))
  dtype = jnp.dtype(w.dtype)
  if storage == BFLOAT16 or (isinstance(w, weight.Bfloat16) and storage == AUTO):
    is_stack = len(w.shape) > 2 and jax.default_backend() == "cpu"
    stored = weight.bits(w).stored if is_stack else weight.dense(w, jnp.bfloat16)
    return Turned(jnp.swapaxes(stored, -1, -2), dtype)
  if storage == AUTO:
    return w if isinstance(w, weight.Weight) else Turned(jnp.swapaxes(w, -1, -2), dtype)
  if isinstance(w, int8.Int8):
    return Turned8(jnp.swapaxes(w.codes, -1, -2), w.absmax * int8.STEP, dtype)
  wide = weight.dense(w, jnp.float32)
  codes, absmax = int8.codes_of(wide)
  step = absmax * int8.STEP + _spoilt(wide, -2)[..., 0, :]
  return Turned8(jnp.swapaxes(codes, -1, -2), step, dtype)


def drawing(params: Params, config: ModelConfig) -> Params:
  """params as they are read token by token on a CPU, their layers apart (`decoder.unstack`).

  A product that is in no scan reads numbers in bfloat16 as they lie, and the rows of a table are read of its bits: in
  the loop over tokens XLA:CPU would widen the whole table.
  """
  leaves = dict(tree.items(decoder.unstack(store(params, config, AUTO), config)))
  table = leaves["embed_tokens/weight"]
  if not isinstance(table, weight.Weight) and table.dtype == jnp.bfloat16:
    leaves.setdefault("lm_head/weight", Turned(table, table.dtype))
    leaves["embed_tokens/weight"] = weight.bits(table)
  is_turned = lambda w: isinstance(w, Turned)
  return jax.tree.map(
    lambda w: _numbers(w) if is_turned(w) else w, tree.unflatten(leaves), is_leaf=is_turned
  )


def _numbers(w: Turned) -> Turned:
  is_bits = w.stored.dtype == weight.BITS
  return dataclasses.replace(w, stored=weight.Bfloat16(w.stored).dense()) if is_bits else w


def _spoilt(x: Array, axis: int) -> Array:
  """Zeros; NaN where an entry along the axis is not finite, which a maximum on a CPU and a code in 8 bits forget."""
  return jnp.sum(x * 0, axis=axis, keepdims=True)
