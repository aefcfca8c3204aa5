"""Estimates of KL(pi || pi_ref) per token, from tokens that pi has sampled.

With u = log pi_ref - log pi: the value of each is an estimate of the KL; what its gradient estimates is another matter.
All are 0, with a gradient of 0, where the mask is False, whatever stands there.  Schulman 2020 ("Approximating KL
divergence").

In a loss k2 is the one to take: its gradient is that of the reverse KL.  k3's is the forward KL's, which is what GRPO
has.  k1 in a loss is no penalty; it belongs in the reward, where the policy gradient makes the reverse KL's of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
# nats: exp of a log-ratio past this is taken at this, 4.9e8, long before float32 ends at 88
LIMIT = 20.0


def k1(logps: Array, ref_logps: Array, mask: Array | None = None) -> Array:
  """log pi - log pi_ref: unbiased, of high variance, often negative.  Its gradient has mean zero: no penalty."""
  return -_log_ratio(logps, ref_logps, mask)


def k2(logps: Array, ref_logps: Array, mask: Array | None = None) -> Array:
  """(log pi - log pi_ref)^2 / 2: biased, of low variance.  Its mean gradient is that of the reverse KL."""
  return 0.5 * _log_ratio(logps, ref_logps, mask) ** 2


def k3(logps: Array, ref_logps: Array, mask: Array | None = None) -> Array:
  """exp(u) - 1 - u: unbiased and never negative.  Its mean gradient is that of the forward KL(pi_ref || pi).

  u is at most LIMIT, where value and gradient stop growing and the gradient is 0; DeepSeek's GRPO and TRL leave u as it
  is, and have infinity from a u of 89 on.
  """
  u = jnp.minimum(_log_ratio(logps, ref_logps, mask), LIMIT)
  return jnp.expm1(u) - u


ESTIMATES = {"k1": k1, "k2": k2, "k3": k3}


def adapted(
  coefficient: float, found: float, *, target: float, horizon: float, answers: int
) -> float:
  """coefficient * (1 + clip(found / target - 1, -0.2, 0.2) * min(answers / horizon, 1)).

  It grows while the KL is above its target; both are nats an answer.  Ziegler et al. 2019, arXiv 1909.08593, 2.2, where
  a batch of five horizons without a KL would leave a coefficient of 0, and a larger one a reward for going far.

  Args:
    horizon: answers over which an error of 0.2 changes it by that part, the most for one batch.

  >>> adapted(0.1, 12.0, target=6.0, horizon=100, answers=10), adapted(0.1, 6.0, target=6.0, horizon=9, answers=9)
  (0.10200000000000001, 0.1)
  """
  error = min(max(found / target - 1, -0.2), 0.2)
  return coefficient * (1 + error * min(answers / horizon, 1))


def _log_ratio(logps: Array, ref_logps: Array, mask: Array | None) -> Array:
  """u, 0 where the mask is False."""
  u = ref_logps - logps
  return u if mask is None else jnp.where(mask, u, 0.0)
