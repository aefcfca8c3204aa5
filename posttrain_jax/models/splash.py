"""Attention by the splash kernel of TPUs: packed documents, windows and soft-caps, on any mesh.

The kernel masks inside a block by segments and by the order of tokens.  Which blocks it reads are tables: here they are
of each row, so that a block that nobody sees into (another document, what is later or behind the window) is neither
loaded nor multiplied.  Prefixes and segments that everyone sees have no place in it.  Its products of float32 are asked
for as `core.product.precision` asks for all others.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from posttrain_jax.core import zigzag
from posttrain_jax.core.product import precision
from posttrain_jax.models import across, attention
from posttrain_jax.models.attention import Places

Array = jax.Array
BLOCK, LANES = 512, 128  # queries and keys of a block at most; blocks are multiples of the second
INTERPRET = (
  False  # whether XLA runs the kernel's steps one by one, as tests have it where there is no TPU
)


def attend(
  q: Array,
  k: Array,
  v: Array,
  queries: Places,
  keys: Places,
  window: Array | int | None = None,
  *,
  windows: tuple[int, ...] = (),
  scale: float,
  softcap: float | None = None,
  dtype: Any = None,
) -> Array:
  """`attention.attend` of rows whose documents stand in order; over a `context` axis as `zigzag.cut` has them.

  Args:
    windows: the one size that a traced window has where it does not reach over the whole row.

  Raises:
    ValueError: for keys that are not the queries' own tokens, and for prefixes.
  """
  if queries.prefixes is not None or keys.segments.shape != queries.segments.shape:
    raise ValueError(
      "attention=splash: tokens that several documents see have no place in it; write xla"
    )
  batch, time, heads, dim = q.shape
  dtype = dtype or q.dtype
  k, v = across.repeated(q, k, v)
  folded = (q * scale).reshape(batch, time, k.shape[2], -1, dim).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  lies = across.layout(folded, k)
  size = window if isinstance(window, int) else windows[0] if windows else None
  run = functools.partial(_own, lies, size, softcap)
  inputs = (lies.queries, lies.keys, lies.keys, lies.where())
  out = across.mapped(run, inputs, lies.queries)(folded, k, v, (queries, keys, window))
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, dim).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Sees:
  """Whether a query sees a key by their numbers in a row: none that is later.

  A query that has a window comes as -1 - number.
  """

  window: int | None

  def __call__(self, queries: Array, keys: Array) -> Array:
    if self.window is None:
      return keys <= queries
    numbers = jnp.where(queries < 0, -1 - queries, queries)
    return (keys <= numbers) & ((queries >= 0) | (keys > numbers - self.window))


def _own(lies, size, softcap, q, k, v, where):
  """A device's part: [batch, kv_heads, groups, time, dim] of queries, and [batch, kv_heads, keys, dim]."""
  queries, keys, window = where
  time = q.shape[3]
  k, v = lies.gathered(k, v)
  numbers = jnp.arange(time)
  if lies.is_cut:
    k, v = zigzag.in_order(k, 2), zigzag.in_order(v, 2)
    keys = jax.tree.map(lambda x: zigzag.in_order(x, 1), keys)
    numbers = zigzag.numbers(time)
  height, width = _block(time), _block(k.shape[2])
  flat = _padded(q.reshape(q.shape[0], -1, *q.shape[3:]), 2, height)
  k, v = _padded(k, 2, width), _padded(v, 2, width)
  keys = jax.tree.map(lambda x: _padded(x, 1, width), keys)
  places = jax.tree.map(lambda x: _padded(x, 1, height), queries)
  numbers = _padded(numbers[None], 1, height)[0]
  is_local = window is not None and (isinstance(window, int) or window == size)
  told = jnp.where(is_local, -1 - numbers, numbers)
  row = functools.partial(_row, (height, width), Sees(size), softcap)
  rows = jax.vmap(row, in_axes=(*[0] * 5, *[None] * 3))
  run = rows if precision(q, k, v) is None else _exact(rows)
  out = run(flat, k, v, places, keys, numbers, told, window)[:, :, :time].reshape(q.shape)
  return jnp.where((queries.segments != 0)[:, None, None, :, None], out, 0)


def _exact(run):
  """run with products of float32 forward and backward: the kernel, which has no argument for it, rounds to bfloat16."""
  highest = jax.default_matmul_precision("highest")

  @jax.custom_vjp
  def exact(*inputs):
    with highest:
      return run(*inputs)

  def forward(*inputs):
    with highest:
      return jax.vjp(run, *inputs)

  def backward(pullback, gradient):
    with highest:
      return pullback(gradient)

  exact.defvjp(forward, backward)
  return exact


def _row(blocks, sees, softcap, q, k, v, queries, keys, numbers, told, window):
  height, width = blocks
  alone = lambda places: jax.tree.map(lambda x: x[None], places)
  seen = attention.seen(alone(queries), alone(keys), window, height, width)
  # a query of padding sees something, too: its softmax is of no block otherwise
  seen |= numbers[::height, None] // width == jnp.arange(seen.shape[1])
  by_row = _tables(seen, told)
  by_column = _tables(seen.T, told)
  turned = by_column._replace(
    data_next=by_column.data_next.swapaxes(1, 2), block_mask=by_column.block_mask.swapaxes(1, 2)
  )
  kernel = kernels.SplashAttentionKernel(
    by_row,
    by_row,
    turned,
    block_sizes=kernels.BlockSizes(
      *(height, width, width),
      block_q_dkv=height,
      block_kv_dkv=width,
      block_kv_dkv_compute=width,
      block_q_dq=height,
      block_kv_dq=width,
    ),
    is_mqa=False,
    save_residuals=False,
    mask_value=kernels.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=softcap,
    residual_checkpoint_name="context",
    mask_function=sees,
    interpret=INTERPRET,
  )
  return kernel(q, k, v, kernels.SegmentIds(queries.segments, keys.segments))


def _tables(seen, numbers):
  """Of each block the ones that it is computed with, first, and how many they are; the last is not loaded again."""
  order, count = jnp.argsort(~seen, axis=1, stable=True), jnp.sum(seen, axis=1)[:, None]
  turn = jnp.arange(seen.shape[1])
  which = jnp.take_along_axis(order, jnp.minimum(turn, jnp.maximum(count - 1, 0)), axis=1)
  small = jnp.int8 if max(seen.shape) <= 127 else jnp.int16
  return MaskInfo(
    data_next=which[None].astype(small),
    mask_next=None,
    block_mask=(turn < count)[None].astype(jnp.int8),
    partial_mask_blocks=None,
    q_sequence=numbers,
  )


def _block(length):
  return min(BLOCK, -(-length // LANES) * LANES)


def _padded(x, axis, size):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % size)
  return jnp.pad(x, widths)
