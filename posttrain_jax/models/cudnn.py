"""Attention by cuDNN on GPUs, for rows of one document each: the call has no segments, and no soft-cap."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from posttrain_jax.models.attention import Places

Array = jax.Array
LARGEST = 128  # dimensions of a head, both ways on every generation of GPUs
KERNEL: Literal["cudnn", "xla"] = "cudnn"  # "xla": jax's own formula, which tests compare with


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
  """`attention.attend` of rows that are one document from their first token on, with padding behind.

  Args:
    windows: the one size that a traced window has where it does not reach over the whole row.

  Raises:
    ValueError: for soft-caps, prefixes, and keys that are not the queries' own tokens.
  """
  if softcap is not None or queries.prefixes is not None or q.shape[1] != k.shape[1]:
    raise ValueError("attention=cudnn has no soft-cap and no tokens that several documents see")
  lengths = jnp.sum(keys.segments != 0, axis=1, dtype=jnp.int32)
  call = functools.partial(
    jax.nn.dot_product_attention,
    scale=scale,
    is_causal=True,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation=KERNEL,
  )
  near = lambda size: lambda: call(q, k, v, local_window_size=(size - 1, 0))
  if window is None:
    out = call(q, k, v)
  elif isinstance(window, int):
    out = near(window)()
  else:
    out = jax.lax.cond(window == windows[0], near(windows[0]), lambda: call(q, k, v))
  out = jnp.where((queries.segments != 0)[:, :, None, None], out, 0)
  return out.astype(dtype or q.dtype)
