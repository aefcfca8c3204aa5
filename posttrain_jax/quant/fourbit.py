"""Frozen matrices in 4 bits a weight plus one scale per block: all that a type is not told by its codebook.

`nf4.NF4` and `fp4.FP4` are this class with sixteen values each.  Codes and block scales equal bitsandbytes' for the
same matrix, and its files can be read into this layout bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from posttrain_jax.core import sharding, struct, weight
from posttrain_jax.quant import blockwise, stack

Array = jax.Array

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256  # scales per block of the second quantisation
Kind = TypeVar("Kind", bound="FourBit")


@struct.dataclass
class FourBit(weight.Weight):
  """w[i, o] = CODEBOOK[code[i, o]] * scale[i // block_size, o], with optional leading axes of a stack.

  Two codes share a byte, the even row in the high half.  With double quantisation a scale is
  map[scales] * nested_absmax[block] + offset (`blockwise`, signed map), where blocks of 256 run over the scales of one
  matrix in bitsandbytes' order: along `in` first, then along `out`.
  """

  CODEBOOK: ClassVar[np.ndarray]  # float32 [16], the largest magnitude 1; not always in order

  codes: Any  # uint8 [..., in / 2, out]
  scales: Any  # float32 [..., in / block_size, out]; uint8 under double quantisation
  # float32 [..., ceil(scales of one matrix / 256)]; None without double quantisation
  nested_absmax: Any = None
  offset: Any = None  # float32 [...]: the mean of the scales; None without double quantisation
  block_size: int = struct.field(pytree_node=False, default=64)
  # before quantisation
  dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))
  # what bitsandbytes' files call the type
  name: str = struct.field(pytree_node=False, default="")

  @property
  def shape(self) -> tuple[int, ...]:
    *lead, half, out = self.codes.shape
    return (*lead, 2 * half, out)

  def apply(self, x: Array) -> Array:
    """x @ w; what is kept for the backward pass is the codes, never the matrix."""
    return _apply(x, self)

  @jax.jit  # op by op, the integers in between would each take a matrix
  def rows(self, ids: Array) -> Array:
    """w[ids]: dequantises those rows alone."""
    ids = jnp.clip(ids, 0, self.shape[-2] - 1)
    shift = (4 * (1 - ids % 2)).astype(jnp.uint8)
    codes = (self.codes[ids // 2] >> shift[..., None]) & np.uint8(15)
    return (self._decode(codes) * self._scale_rows(ids // self.block_size)).astype(self.dtype)

  def dense(self, dtype: Any = None) -> Array:
    """w, [..., in, out], in `dtype` or (None) in the dtype it had before quantisation."""
    halves = self._halves(jnp.dtype(self.dtype if dtype is None else dtype))
    return jnp.swapaxes(halves, -3, -2).reshape(self.shape)

  @functools.partial(jax.jit, static_argnames="dtype")
  def _halves(self, dtype: Any) -> Array:
    """[..., 2, in / 2, out]: the even rows of w, then the odd ones; the order in which unpacking moves no data."""
    *lead, half, out = self.codes.shape
    pairs = self.codes.reshape(*lead, 1, -1, self.block_size // 2, out)
    # Joined, not shifted by an array [4, 0]: as an operand that all matrices share, that made a TPU's compiler decode
    # several of them in one pass.
    codes = jnp.concatenate([pairs >> np.uint8(4), pairs & np.uint8(15)], axis=-4)
    w = self._decode(codes) * self._all_scales()[..., None, :, None, :]
    # Without the barrier the reshape moves up to the scales, and their float32 expansion takes as much again.
    return jax.lax.optimization_barrier(w.astype(dtype)).reshape(*lead, 2, half, out)

  def _decode(self, codes: Array) -> Array:
    """CODEBOOK[codes] as a tree of selects on the four bits.

    Estimates of the compiler for a TPU v5p, 2,048 tokens x [8192, 28672] in bf16: 2.8 ms and 144 MiB of
    temporaries, of which 2.5 ms are the product with a dense matrix.  With a gather from the table it is
    416 ms in this order of rows; in the natural order 9 ms and 1 GiB, and with selects 11 ms and 1.8 GiB.
    On XLA:CPU select and gather tie: 0.5 ms for [576, 1536], 45 ms for [2048, 8192].
    """
    return blockwise.select(codes, self.CODEBOOK)

  def _all_scales(self) -> Array:
    """float32 [..., in / block_size, out]."""
    if self.nested_absmax is None:
      return self.scales
    per_column, out = self.scales.shape[-2:]
    # A column's scales lie in at most `reach` nested blocks.  Choosing among those is elementwise: it follows the
    # matrix's sharding, where expanding nested_absmax in its own order would gather and transpose.
    start = np.arange(out) * per_column
    first, reach = start // NESTED_BLOCK, (per_column - 1) // NESTED_BLOCK + 2
    last = self.nested_absmax.shape[-1] - 1
    absmax = self.nested_absmax[..., None, first]
    # tied to the codes, as in `blockwise.select`, so that no comparison leaves the layer scan as an array
    row = np.arange(per_column)[:, None] + blockwise.nothing(self.scales, jnp.int32)
    for block in (first + k for k in range(1, reach)):
      following = self.nested_absmax[..., None, np.minimum(block, last)]
      absmax = jnp.where(row >= (NESTED_BLOCK * block - start), following, absmax)
    scales = self._unnest(self.scales, absmax, self.offset[..., None, None])
    # Materialised: fused into the product with the codes, each look-up would be redone block_size times.
    return jax.lax.optimization_barrier(scales)

  def _scale_rows(self, blocks: Array) -> Array:
    """The scales of some blocks: [...] -> float32 [..., out]."""
    if self.nested_absmax is None:
      return self.scales[blocks]
    per_column, out = self.scales.shape
    nested = (jnp.arange(out) * per_column + blocks[..., None]) // NESTED_BLOCK
    return self._unnest(self.scales[blocks], self.nested_absmax[nested], self.offset)

  def _unnest(self, codes: Array, absmax: Array, offset: Array) -> Array:
    product = blockwise.decode(codes) * absmax
    # Compilers contract product + offset into one fused multiply-add: 26 % of the scales then differ
    # in the last bit from bitsandbytes', and jit from eager.  XLA and LLVM leave a select in between
    # alone; they remove an optimization_barrier or a reduce_precision.
    return jnp.where(jnp.isfinite(product), product, blockwise.nothing(codes)) + offset

  def like(self: Kind, w: Array) -> Kind:
    """The matrix w, [in, out] or stacked, stored as this one is."""
    double_quant = self.nested_absmax is not None
    return quantize(type(self), w.astype(self.dtype), self.block_size, double_quant)

  def partition_specs(self: Kind, spec: PartitionSpec) -> Kind:
    """The PartitionSpecs of the leaves, given that of the dense [..., in, out] matrix.

    Codes and scales follow the matrix; the nested statistics, some 0.001 byte a weight, are whole on each device.
    """
    lead = (*spec, None, None, None)[: len(self.shape) - 2]
    nested = None if self.nested_absmax is None else PartitionSpec(*lead)
    return dataclasses.replace(self, codes=spec, scales=spec, nested_absmax=nested, offset=nested)


@jax.custom_vjp
def _apply(x: Array, w: FourBit) -> Array:
  # Tied to x, so that no matrix is dequantised before its turn.
  x, w = jax.lax.optimization_barrier((x, w))
  # The columns of x move instead of the rows of w: x is the smaller, and the order of a sum is free.
  even, odd = x[..., ::2], x[..., 1::2]
  halves = w._halves(weight.multiplied(x.dtype, w.dtype))
  if not sharding.active():
    return weight.linear(jnp.concatenate([even, odd], axis=-1), halves.reshape(w.shape))
  # Merging (2, in / 2) into one axis would exchange the codes of a sharded `in` between devices.
  pairs = jnp.stack([even, odd], axis=-2)
  contract = ((pairs.ndim - 2, pairs.ndim - 1), (0, 1))
  return _among_devices(pairs, halves, contract)


def _apply_forward(x, w):
  return _apply(x, w), w


def _apply_backward(w, g):
  # The barrier ties the second dequantisation to the gradient's arrival; without it the compiler may
  # merge it with the forward pass's and keep the matrix in between.
  g, w = jax.lax.optimization_barrier((g, w))
  halves, lead = w._halves(weight.multiplied(g.dtype, w.dtype)), g.shape[:-1]
  if sharding.active():
    pairs = _among_devices(g, halves, ((g.ndim - 1,), (2,)))
  else:
    pairs = weight.product(g, halves.reshape(w.shape), 1).reshape(*lead, 2, -1)
  return jnp.swapaxes(pairs, -1, -2).reshape(*lead, w.shape[0]), None


def _among_devices(x: Array, halves: Array, contract: Any) -> Array:
  rows = x.astype(halves.dtype)
  told = weight.precision(rows, halves)
  return jax.lax.dot_general(
    rows, halves, (contract, ((), ())), told, preferred_element_type=x.dtype
  )


_apply.defvjp(_apply_forward, _apply_backward)


def quantize(kind: type[Kind], w: Any, block_size: int, double_quant: bool) -> Kind:
  """w, [in, out] or a stack of such, as `kind`; blocks run along `in`.

  Layers are quantised one after the other, each as a matrix of its own.  Subnormal numbers count as zero.

  Raises:
    ValueError: for a shape, block size, dtype or value that the type cannot hold.
  """
  check(kind.__name__, w.shape, w.dtype, block_size)
  return stack.quantize(kind.__name__, w, lambda w: _quantize(w, kind, block_size, double_quant))


def check(name: str, shape: tuple[int, ...], dtype: Any, block_size: int) -> None:
  """Raises ValueError where a matrix of this shape and dtype has no form in blocks."""
  shape = tuple(shape)
  if block_size not in BLOCK_SIZES:
    raise ValueError(
      f"{name} block_size={block_size}; write one of {', '.join(map(str, BLOCK_SIZES))}"
    )
  stack.check(name, shape, dtype)
  if shape[-2] % block_size:
    fits = [size for size in BLOCK_SIZES if shape[-2] % size == 0]
    hint = f"write block_size={fits[-1]} or keep" if fits else "keep"
    raise ValueError(
      f"cannot quantise shape {shape} to {name}: in = {shape[-2]} is no multiple of block_size={block_size}; "
      f"{hint} this matrix dense"
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(
  w: Array, kind: type[Kind], block_size: int, double_quant: bool
) -> tuple[Kind, Array]:
  """(`kind`, largest absolute value; NaN if any value is)."""
  if w.ndim > 2:
    return stack.over(lambda w: _quantize(w, kind, block_size, double_quant), w)
  rows, out = w.shape
  blocks = w.astype(jnp.float32).reshape(rows // block_size, block_size, out)
  absmax = jnp.max(jnp.abs(blocks), axis=1)
  scaled = jnp.clip(blocks * blockwise.reciprocal(absmax)[:, None], -1, 1)
  codes = _encode(scaled, kind.CODEBOOK).reshape(rows // 2, 2, out)
  packed = (codes[:, 0] << 4) | codes[:, 1]
  q = kind(packed, absmax, block_size=block_size, dtype=jnp.dtype(w.dtype))
  if double_quant:
    offset = jnp.mean(absmax)
    flat = jnp.swapaxes(absmax - offset, 0, 1).reshape(-1)
    nested, nested_absmax = blockwise.quantize(flat, block_size=NESTED_BLOCK)
    nested = nested.reshape(out, rows // block_size).T
    q = dataclasses.replace(q, scales=nested, nested_absmax=nested_absmax, offset=offset)
  return q, stack.largest(w)


def _encode(scaled: Array, codebook: np.ndarray) -> Array:
  """The code of the nearest value of the codebook, ties to the lower value; of equal values the lower code first."""
  order = np.argsort(codebook, kind="stable").astype(np.uint8)
  ascending = codebook[order]
  midpoints = (ascending[1:] + ascending[:-1]) / np.float32(2)
  place = functools.reduce(jnp.add, [(scaled > m).astype(jnp.uint8) for m in midpoints])
  return place if (np.diff(order) == 1).all() else blockwise.select(place, order)


def abstract(
  kind: type[Kind], shape: tuple[int, ...], dtype: Any, block_size: int, double_quant: bool
) -> Kind:
  """The `kind` of `jax.ShapeDtypeStruct`s that `quantize` would give, for programs compiled without weights."""
  check(kind.__name__, shape, dtype, block_size)
  w = jax.ShapeDtypeStruct(tuple(shape), dtype)
  return jax.eval_shape(lambda w: _quantize(w, kind, block_size, double_quant)[0], w)
