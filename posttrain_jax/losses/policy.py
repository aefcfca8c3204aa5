"""Policy-gradient losses on log-probabilities: one value per token, to be summed with the weights of an aggregation.

All log-probabilities are of the distribution that was sampled from (temperature included), [batch, time]; advantages
are [batch] (one an answer) or [batch, time].  Where the mask is False nothing was sampled.  The loss is to be lowered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core import struct

Array = jax.Array


@struct.dataclass
class PolicyStats:
  """[batch, time], or [batch, 1] of whole answers: pi / pi_old, and where a bound took the gradient away."""

  ratio: Array
  clipped_low: Array
  clipped_high: Array


def _over_time(advantages, logps):
  advantages = jnp.asarray(advantages)
  return advantages[..., None] if advantages.ndim == logps.ndim - 1 else advantages


def reinforce(logps: Array, advantages: Array) -> Array:
  """-A log pi.  Williams 1992; with a baseline in A, and whitened over the batch, REINFORCE++ (Hu 2025)."""
  return -_over_time(advantages, logps) * logps


def clipped_surrogate(
  logps: Array,
  old_logps: Array,
  advantages: Array,
  *,
  epsilon: float,
  epsilon_high: float | None = None,
  dual_clip: float | None = None,
  ceiling: float | None = None,
) -> tuple[Array, PolicyStats]:
  """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), rho = pi / pi_old of the token.

  Schulman et al. 2017 (PPO), eq. 7.  epsilon_high above epsilon is DAPO's asymmetric clip (Yu et al. 2025, eq. 10).

  Args:
    dual_clip: c > 1: where A < 0 the loss is at most -c A (Ye et al. 2020, eq. 5).
    ceiling: the unclipped rho is at most this (INTELLECT-2's two-sided clip).

  Raises:
    ValueError: dual_clip is not above 1.
  """
  ratio = jnp.exp(logps - old_logps)
  return _clipped(ratio, _over_time(advantages, logps), epsilon, epsilon_high, dual_clip, ceiling)


def sequence_surrogate(
  logps: Array,
  old_logps: Array,
  advantages: Array,
  mask: Array,
  *,
  epsilon: float,
  epsilon_high: float | None = None,
  normalise: bool = True,
) -> tuple[Array, PolicyStats]:
  """`clipped_surrogate` of the whole answer's ratio, the same for each of its tokens; [batch, 1].

  normalise=True is GSPO: exp of the mean log-ratio per token (Zheng et al. 2025, arXiv 2507.18071, eq. 7).
  normalise=False is the ratio of the answers' probabilities, as in RLOO (Ahmadian et al. 2024).
  """
  total = jnp.sum(jnp.where(mask, logps - old_logps, 0.0), axis=-1, keepdims=True)
  count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
  ratio = jnp.exp(total / count if normalise else total)
  return _clipped(ratio, _over_time(advantages, logps), epsilon, epsilon_high, None, None)


def cispo(
  logps: Array, old_logps: Array, advantages: Array, *, ceiling: float
) -> tuple[Array, PolicyStats]:
  """-sg(min(rho, ceiling)) A log pi: the weight is cut, no token loses its gradient.

  ceiling is absolute (5.0), not 1 + epsilon.  MiniMax 2025 (CISPO, arXiv 2506.13585), eq. 4.
  """
  ratio = jax.lax.stop_gradient(jnp.exp(logps - old_logps))
  loss = -jnp.minimum(ratio, ceiling) * _over_time(advantages, logps) * logps
  return loss, PolicyStats(ratio, jnp.zeros_like(ratio, bool), ratio > ceiling)


def _clipped(ratio, advantages, epsilon, epsilon_high, dual_clip, ceiling):
  low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
  free = ratio if ceiling is None else jnp.minimum(ratio, ceiling)
  gain = jnp.minimum(free * advantages, jnp.clip(ratio, low, high) * advantages)
  if dual_clip is not None:
    if dual_clip <= 1:
      raise ValueError(f"dual_clip={dual_clip}: a bound on the loss of a bad answer lies above 1")
    gain = jnp.where(advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain)
  stats = PolicyStats(
    ratio=ratio,
    clipped_low=(ratio < low) & (advantages < 0),
    clipped_high=(ratio > high) & (advantages > 0),
  )
  return -gain, stats


def clipped_value(
  values: Array, old_values: Array, returns: Array, *, epsilon: float
) -> tuple[Array, Array]:
  """max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2) / 2; stats: where the clipped one is larger.

  Schulman et al. 2017, as in OpenAI's baselines.
  """
  near = jnp.clip(values, old_values - epsilon, old_values + epsilon)
  free, clipped = (values - returns) ** 2, (near - returns) ** 2
  return 0.5 * jnp.maximum(free, clipped), clipped > free


# --- what was sampled by other weights, or another program -----------------------------------------------------------


def importance_weights(
  logps: Array,
  sampling_logps: Array,
  mask: Array,
  *,
  level: str,
  ceiling: float,
  floor: float | None = None,
  outside: str = "truncate",
) -> Array:
  """pi / mu of what was sampled from mu, for correcting a loss; not differentiated; [batch, time] or [batch, 1].

  Args:
    level: "token"; "sequence", the product over an answer's tokens; "geometric", its geometric mean per token.
    ceiling, floor: bounds; floor None for none.
    outside: "truncate" moves a weight to the bound, "mask" makes it 0.

  Raises:
    ValueError: level or outside is none of these.
  """
  difference = jnp.where(mask, logps - sampling_logps, 0.0)
  difference = jnp.where(jnp.isnan(difference), 0.0, difference)
  if level == "sequence":
    difference = jnp.sum(difference, axis=-1, keepdims=True)
  elif level == "geometric":
    count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    difference = jnp.sum(difference, axis=-1, keepdims=True) / count
  elif level != "token":
    raise ValueError(f"level={level!r}: write token, sequence or geometric")
  weight = jax.lax.stop_gradient(jnp.exp(difference))
  low = 0.0 if floor is None else floor
  if outside == "truncate":
    return jnp.clip(weight, low, ceiling)
  if outside == "mask":
    return jnp.where((weight >= low) & (weight <= ceiling), weight, 0.0)
  raise ValueError(f"outside={outside!r}: write truncate or mask")


# --- how tokens add up to a loss -------------------------------------------------------------------------------------
# Each gives weights [batch, time] that are multiplied with the losses per token and summed.  `answers` and `tokens`
# count the whole optimizer batch, of which `mask` may be a part.


def token_mean(mask: Array, *, tokens: Array) -> Array:
  """mask / tokens: every token of the batch counts alike (DAPO, section 3.3)."""
  return mask / jnp.maximum(tokens, 1)


def sequence_mean(mask: Array, *, answers: Array) -> Array:
  """mask / (|o_i| answers): every answer counts alike, a token of a long one less (GRPO, eq. 3)."""
  lengths = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
  return mask / lengths / jnp.maximum(answers, 1)


def constant_length(mask: Array, *, answers: Array, length: int) -> Array:
  """mask / (length answers): divided by the longest length allowed, for all alike (Dr. GRPO, section 3.2)."""
  return mask / length / jnp.maximum(answers, 1)


def sequence_sum(mask: Array, *, answers: Array) -> Array:
  """mask / answers: summed over an answer, averaged over answers (RLOO; LUSPO)."""
  return mask / jnp.maximum(answers, 1)
