"""int8: frozen matrices in 8 bits a weight plus one scale per output channel, symmetric about zero.

Codes and scales are those of bitsandbytes' LLM.int8(), but for one in ten thousand float16 values that lie halfway
between two codes.  Products are computed in the dtype of the activations, which are not quantised.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from posttrain_jax.core import struct, weight
from posttrain_jax.quant import stack

Array = jax.Array

STEP = np.float32(1 / 127)
# 127 over a smaller scale is no float32; such a channel counts as zero
SMALLEST = np.float32(2.0**-119)


@struct.dataclass
class Int8(weight.Weight):
  """w[i, o] = codes[i, o] * absmax[o] / 127, with an optional leading [layers] axis."""

  codes: Any  # int8 [..., in, out], -127 to 127
  absmax: Any  # float32 [..., out]
  # before quantisation
  dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.codes.shape)

  def apply(self, x: Array) -> Array:
    """x @ w; what is kept for the backward pass is the codes, never the matrix."""
    return _apply(x, self)

  def rows(self, ids: Array) -> Array:
    """w[ids]: dequantises those rows alone."""
    codes = self.codes[jnp.clip(ids, 0, self.shape[-2] - 1)]
    return _values(codes, self.absmax).astype(self.dtype)

  def dense(self, dtype: Any = None) -> Array:
    """w, [..., in, out], in `dtype` or (None) in the dtype it had before quantisation."""
    dtype = self.dtype if dtype is None else dtype
    return _values(self.codes, self.absmax[..., None, :]).astype(dtype)

  def like(self, w: Array) -> Int8:
    """The matrix w, [in, out] or stacked, stored as this one is."""
    return quantize(w.astype(self.dtype))

  def partition_specs(self, spec: PartitionSpec) -> Int8:
    """The PartitionSpecs of the leaves, given that of the dense [..., in, out] matrix."""
    full = (*spec, *[None] * (len(self.shape) - len(spec)))
    return dataclasses.replace(self, codes=spec, absmax=PartitionSpec(*full[:-2], full[-1]))


@jax.jit
def _values(codes: Array, absmax: Array) -> Array:
  # in this order, as bitsandbytes: absmax / 127 first would differ in the last bit
  return codes.astype(jnp.float32) * absmax * STEP


@jax.custom_vjp
def _apply(x: Array, w: Int8) -> Array:
  # Tied to x, so that no matrix is widened before its turn.
  x, w = jax.lax.optimization_barrier((x, w))
  # A scale belongs to a column: it multiplies the result, and the codes are exact in bfloat16.
  codes = w.codes.astype(weight.multiplied(x.dtype, w.dtype))
  return (weight.linear32(x, codes) * (w.absmax * STEP)).astype(x.dtype)


def _apply_forward(x, w):
  return _apply(x, w), w


def _apply_backward(w, g):
  # Tied to the gradient's arrival, or the compiler may keep the forward pass's matrix until now.
  g, w = jax.lax.optimization_barrier((g, w))
  scaled = (g.astype(jnp.float32) * (w.absmax * STEP)).astype(g.dtype)
  codes = w.codes.astype(weight.multiplied(g.dtype, w.dtype))
  return weight.product(scaled, codes, 1, jnp.float32).astype(g.dtype), None


_apply.defvjp(_apply_forward, _apply_backward)


def quantize(w: Any) -> Int8:
  """The Int8 of w: [in, out] or a stack of such; one scale per output channel.

  Raises:
    ValueError: for a shape, dtype or value that it cannot hold.
  """
  stack.check("int8", w.shape, w.dtype)
  return stack.quantize("int8", w, _quantize)


@jax.jit
def _quantize(w: Array) -> tuple[Int8, Array]:
  """(Int8, largest absolute value; NaN if any value is)."""
  if w.ndim > 2:
    return stack.over(_quantize, w)
  wide = w.astype(jnp.float32)
  return Int8(*codes_of(wide), dtype=jnp.dtype(w.dtype)), stack.largest(wide)


def codes_of(w: Array) -> tuple[Array, Array]:
  """(codes, absmax) of w: float32 [..., in, out], finite."""
  absmax = jnp.max(jnp.abs(w), axis=-2)
  factor = jnp.where(absmax < SMALLEST, 0, 127 / jnp.maximum(absmax, SMALLEST))
  return jnp.round(w * factor[..., None, :]).astype(jnp.int8), absmax


def abstract(shape: tuple[int, ...], *, dtype: Any = jnp.float32) -> Int8:
  """The Int8 of `jax.ShapeDtypeStruct`s that `quantize` would give, for programs compiled without weights."""
  stack.check("int8", shape, dtype)
  return jax.eval_shape(lambda w: _quantize(w)[0], jax.ShapeDtypeStruct(tuple(shape), dtype))
