"""Booleans of a vocabulary as words of 32 bits: what a filter kept, at an eighth of a byte a token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
WORD = 32


def words(count: int) -> int:
  """How many words hold that many booleans."""
  return -(-count // WORD)


def pack(kept: Array) -> Array:
  """[..., vocab] of booleans -> [..., words(vocab)] uint32, bit i of word w being entry 32 w + i.

  >>> pack(jnp.arange(34) % 32 == 1).tolist()
  [2, 2]
  """
  vocab = kept.shape[-1]
  ends = [(0, 0)] * (kept.ndim - 1) + [(0, -vocab % WORD)]
  padded = jnp.pad(kept, ends).reshape(*kept.shape[:-1], -1, WORD)
  return jnp.sum(padded.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32), axis=-1)


def unpack(packed: Array, count: int) -> Array:
  """`pack`, back: [..., words(count)] -> [..., count] booleans.

  >>> [i for i, is_kept in enumerate(unpack(jnp.asarray([2, 2], jnp.uint32), 34)) if is_kept]
  [1, 33]
  """
  each = packed[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)
  return (each & 1).astype(bool).reshape(*packed.shape[:-1], -1)[..., :count]
