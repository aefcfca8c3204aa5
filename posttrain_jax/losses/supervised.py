"""The supervised loss on log-probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def negative_log_likelihood(logps: Array, mask: Array, *, tokens: Array | int) -> Array:
  """sum(-log p(label)) / tokens over what the mask has, in nats: cross-entropy, of which exp is the perplexity.

  Args:
    logps: [...] natural log-probabilities of the labels.
    mask: [...] bool, True where a label is learned; what logps is elsewhere, NaN included, does not matter.
    tokens: how many are learned in the whole optimizer batch, of which the arguments may be a part; contributions of
      the parts add up to the mean over the batch.

  >>> logps = jnp.log(jnp.array([0.5, 0.25, 0.9]))
  >>> round(float(negative_log_likelihood(logps, jnp.array([True, True, False]), tokens=2)), 4)
  1.0397
  """
  return -jnp.sum(jnp.where(mask, logps, 0.0)) / jnp.maximum(tokens, 1)
