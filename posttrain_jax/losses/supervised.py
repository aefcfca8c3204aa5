"""Supervised losses on log-probabilities; arrays in, (loss, stats) out, one value per token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core import struct

Array = jax.Array


@struct.dataclass
class TokenStats:
  """Per token: nll in nats, and the probability that the model gave to the label."""

  nll: Array
  probability: Array


def negative_log_likelihood(logps: Array) -> tuple[Array, TokenStats]:
  """-log p(label) per token, in nats; logps: [...] natural log-probabilities.

  The mean over trained tokens is cross-entropy; exp of it is perplexity.
  """
  return -logps, TokenStats(nll=-logps, probability=jnp.exp(logps))
