"""Estimates of KL(pi || pi_ref) per token, from tokens that pi has sampled.

With u = log pi_ref - log pi: the value of each is an estimate of the KL; what its gradient estimates is another matter.
Schulman 2020 ("Approximating KL divergence").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def k1(logps: Array, ref_logps: Array) -> Array:
  """log pi - log pi_ref: unbiased, of high variance, often negative.  Its gradient has mean zero: no penalty."""
  return logps - ref_logps


def k2(logps: Array, ref_logps: Array) -> Array:
  """(log pi - log pi_ref)^2 / 2: biased, of low variance.  Its mean gradient is that of the reverse KL."""
  return 0.5 * (logps - ref_logps) ** 2


def k3(logps: Array, ref_logps: Array) -> Array:
  """exp(u) - 1 - u: unbiased and never negative.  Its mean gradient is that of the forward KL(pi_ref || pi)."""
  u = ref_logps - logps
  return jnp.expm1(u) - u
