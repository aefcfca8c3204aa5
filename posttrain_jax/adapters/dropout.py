"""Dropout of an adapter's input, in training alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def dropout(x: Array, rate: float, key: Array | None) -> Array:
  """x / (1 - rate) with probability 1 - rate, else 0; x itself without a key."""
  if key is None or rate == 0.0:
    return x
  kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)
