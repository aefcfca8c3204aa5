"""Policy-gradient losses on log-probabilities: one value per token, to be summed with the weights of an aggregation.

All log-probabilities are of the distribution that was sampled from (temperature included), [rows, time]; advantages are
[rows, time], or [rows] where a row is one answer.  Where the mask is False nothing was sampled: loss, gradient and
statistics are 0 there, whatever stands in the arrays, NaN included.  The loss is to be lowered.

A log-ratio counts between -LIMIT and LIMIT (20 nats), so that no ratio is infinite; past them it has no gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core import struct
from posttrain_jax.losses.kl import LIMIT
from posttrain_jax.losses.spans import Spans

Array = jax.Array


@struct.dataclass
class PolicyStats:
  """[rows, time]: pi / pi_old, and where a bound took the gradient away; 0 and False where the mask is False."""

  ratio: Array
  clipped_low: Array
  clipped_high: Array


def reinforce(
  logps: Array, advantages: Array, mask: Array | None = None
) -> tuple[Array, PolicyStats]:
  """-A log pi.  Williams 1992; with a baseline in A, and whitened over the batch, REINFORCE++ (Hu 2025)."""
  mask = _mask(mask, logps)
  loss = -_over_time(advantages, mask) * jnp.where(mask, logps, 0.0)
  nowhere = jnp.zeros_like(mask)
  return loss, PolicyStats(mask.astype(loss.dtype), nowhere, nowhere)


def clipped_surrogate(
  logps: Array,
  old_logps: Array,
  advantages: Array,
  mask: Array | None = None,
  *,
  epsilon: float,
  epsilon_high: float | None = None,
  dual_clip: float | None = None,
  ceiling: float | None = None,
) -> tuple[Array, PolicyStats]:
  """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), rho = pi / pi_old of the token.

  Schulman et al. 2017 (PPO), eq. 7.  epsilon_high above epsilon is DAPO's asymmetric clip (Yu et al. 2025, eq. 10);
  None is epsilon.

  Args:
    dual_clip: c > 1: where A < 0 the loss is at most -c A (Ye et al. 2020, eq. 5).
    ceiling: the unclipped rho is at most this (INTELLECT-2's two-sided clip).

  Raises:
    ValueError: dual_clip is not above 1.

  >>> values, stats = clipped_surrogate(
  ...   jnp.log(jnp.array([[1.5, 0.9]])), jnp.zeros((1, 2)), jnp.ones(1), epsilon=0.2
  ... )
  >>> [round(value, 3) for value in values[0].tolist()], stats.clipped_high.tolist()
  ([-1.2, -0.9], [[True, False]])
  """
  mask = _mask(mask, logps)
  ratio = jnp.exp(_log_ratio(logps, old_logps, mask))
  advantages = _over_time(advantages, mask)
  return _clipped(ratio, advantages, mask, epsilon, epsilon_high, dual_clip, ceiling)


def sequence_surrogate(
  logps: Array,
  old_logps: Array,
  advantages: Array,
  spans: Spans,
  *,
  epsilon: float,
  epsilon_high: float | None = None,
  normalise: bool = True,
) -> tuple[Array, PolicyStats]:
  """`clipped_surrogate` with the ratio of the whole answer in place of a token's, the same for each of its tokens.

  normalise=True is GSPO: exp of the mean log-ratio per token (Zheng et al. 2025, arXiv 2507.18071, eq. 7).
  normalise=False is the ratio of the answers' probabilities, as in RLOO (Ahmadian et al. 2024), which has one loss an
  answer: that is what `sequence_mean` makes of these values, as all tokens of an answer have one.
  """
  total = spans.per_answer(logps - old_logps)
  log_ratio = _bounded(total / spans.lengths if normalise else total)
  ratio = jnp.exp(spans.per_token(log_ratio))
  advantages = _over_time(advantages, spans.mask)
  return _clipped(ratio, advantages, spans.mask, epsilon, epsilon_high, None, None)


def cispo(
  logps: Array,
  old_logps: Array,
  advantages: Array,
  mask: Array | None = None,
  *,
  ceiling: float,
) -> tuple[Array, PolicyStats]:
  """-sg(min(rho, ceiling)) A log pi: the weight is cut, no token loses its gradient.

  ceiling is absolute (5.0), not 1 + epsilon.  MiniMax 2025 (CISPO, arXiv 2506.13585), eq. 4.
  """
  mask = _mask(mask, logps)
  ratio = jax.lax.stop_gradient(jnp.exp(_log_ratio(logps, old_logps, mask)))
  weight = jnp.minimum(ratio, ceiling) * _over_time(advantages, mask)
  loss = -weight * jnp.where(mask, logps, 0.0)
  cut = mask & (ratio > ceiling)
  return loss, PolicyStats(jnp.where(mask, ratio, 0.0), jnp.zeros_like(mask), cut)


def dppo(
  logps: Array,
  old_logps: Array,
  advantages: Array,
  mask: Array | None = None,
  *,
  divergence: str,
  epsilon: float,
  epsilon_high: float | None = None,
  ceiling: float = 20.0,
) -> tuple[Array, PolicyStats]:
  """-sg(keep min(rho, ceiling)) A log pi; a token is kept until its probability has gone too far the way A drives it.

  Qi et al. 2026 (DPPO, arXiv 2602.04879), the binary variants; p = pi and q = pi_old of the token.  A rare token may
  change by a large ratio, a likely one by a small probability alone: the reverse of PPO's clip.

  Args:
    divergence: "tv", p - q; "kl", of (q, 1 - q) from (p, 1 - p).
    epsilon, epsilon_high: how far it may fall where A < 0, and rise where A > 0; epsilon_high None is epsilon.
    ceiling: bound on rho, absolute (section 5.4).

  Raises:
    ValueError: divergence is neither.
  """
  if divergence not in ("tv", "kl"):
    raise ValueError(f"divergence={divergence!r}: write tv or kl")
  mask = _mask(mask, logps)
  advantages = _over_time(advantages, mask)
  log_ratio = jax.lax.stop_gradient(_log_ratio(logps, old_logps, mask))
  ratio = jnp.exp(log_ratio)
  probability = lambda x: jnp.exp(jax.lax.stop_gradient(jnp.where(mask, x, 0.0)))
  p, q = probability(logps), probability(old_logps)
  if divergence == "tv":
    far = jnp.abs(p - q)
  else:
    log_rest = lambda x: jnp.log1p(-jnp.minimum(x, 1 - 1e-7))  # finite where the token is certain
    far = (1 - q) * (log_rest(q) - log_rest(p)) - q * log_ratio
  high = epsilon if epsilon_high is None else epsilon_high
  low_cut = mask & (advantages < 0) & (p < q) & (far > epsilon)
  high_cut = mask & (advantages > 0) & (p > q) & (far > high)
  weight = jnp.where(low_cut | high_cut, 0.0, jnp.minimum(ratio, ceiling)) * advantages
  loss = -weight * jnp.where(mask, logps, 0.0)
  return loss, PolicyStats(jnp.where(mask, ratio, 0.0), low_cut, high_cut)


def clipped_value(
  values: Array,
  old_values: Array,
  returns: Array,
  mask: Array | None = None,
  *,
  epsilon: float,
) -> tuple[Array, Array]:
  """max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2) / 2; stats: where the clipped one is larger.

  Schulman et al. 2017, as in OpenAI's baselines.
  """
  mask = _mask(mask, values)
  values, old_values, returns = (jnp.where(mask, x, 0.0) for x in (values, old_values, returns))
  near = jnp.clip(values, old_values - epsilon, old_values + epsilon)
  free, clipped = (values - returns) ** 2, (near - returns) ** 2
  return 0.5 * jnp.maximum(free, clipped), clipped > free


def _mask(mask: Array | None, like: Array) -> Array:
  return jnp.ones(jnp.shape(like), bool) if mask is None else jnp.asarray(mask, bool)


def _over_time(advantages: Array, mask: Array) -> Array:
  """[rows, time] advantages of [rows, time] or [rows] ones, 0 where the mask is False."""
  advantages = jnp.asarray(advantages)
  if advantages.ndim == mask.ndim - 1:
    advantages = advantages[..., None]
  return jnp.where(mask, advantages, 0.0)


def _log_ratio(logps: Array, old_logps: Array, mask: Array) -> Array:
  return _bounded(jnp.where(mask, logps - old_logps, 0.0))


def _bounded(log_ratio: Array) -> Array:
  return jnp.clip(log_ratio, -LIMIT, LIMIT)


def _clipped(
  ratio: Array,
  advantages: Array,
  mask: Array,
  epsilon: float,
  epsilon_high: float | None,
  dual_clip: float | None,
  ceiling: float | None,
) -> tuple[Array, PolicyStats]:
  """PPO's loss of finite ratios and of advantages that are 0 where the mask is False."""
  low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
  free = ratio if ceiling is None else jnp.minimum(ratio, ceiling)
  gain = jnp.minimum(free * advantages, jnp.clip(ratio, low, high) * advantages)
  if dual_clip is not None:
    if dual_clip <= 1:
      raise ValueError(f"dual_clip={dual_clip}: a bound on the loss of a bad answer lies above 1")
    gain = jnp.where(advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain)
  stats = PolicyStats(
    ratio=jnp.where(mask, ratio, 0.0),
    clipped_low=(ratio < low) & (advantages < 0),
    clipped_high=(ratio > high) & (advantages > 0),
  )
  return -gain, stats


# --- what was sampled by other weights, or another program -----------------------------------------------------------


def importance_weights(
  logps: Array,
  sampling_logps: Array,
  spans: Spans,
  *,
  level: str,
  ceiling: float,
  floor: float | None = None,
  outside: str = "truncate",
) -> Array:
  """pi / mu of what was sampled from mu, for correcting a loss; [rows, time], not differentiated, 0 where not scored.

  A token whose sampling_logps is NaN (a server that did not say it) counts as one that both programs give alike.

  Args:
    level: "token"; "sequence", the product over an answer's tokens; "geometric", its geometric mean per token.
    ceiling, floor: bounds; floor None for none.
    outside: "truncate" moves a weight to the bound, "mask" makes it 0.

  Raises:
    ValueError: level or outside is none of these.
  """
  log_ratio = logps - sampling_logps
  log_ratio = jnp.where(jnp.isnan(log_ratio), 0.0, log_ratio)
  if level == "sequence":
    log_ratio = spans.per_token(spans.per_answer(log_ratio))
  elif level == "geometric":
    log_ratio = spans.per_token(spans.per_answer(log_ratio) / spans.lengths)
  elif level != "token":
    raise ValueError(f"level={level!r}: write token, sequence or geometric")
  weight = jnp.exp(_bounded(log_ratio))
  low = 0.0 if floor is None else floor
  if outside == "truncate":
    weight = jnp.clip(weight, low, ceiling)
  elif outside == "mask":
    weight = jnp.where((weight >= low) & (weight <= ceiling), weight, 0.0)
  else:
    raise ValueError(f"outside={outside!r}: write truncate or mask")
  return jax.lax.stop_gradient(jnp.where(spans.mask, weight, 0.0))


# --- how tokens add up to a loss -------------------------------------------------------------------------------------
# Each gives weights [rows, time], 0 where no token is scored, that are multiplied with the losses per token and summed.
# `answers` and `tokens` count the whole optimizer batch, of which `spans` may be a part; every answer of a row counts
# as one.


def token_mean(spans: Spans, *, tokens: Array | int) -> Array:
  """1 / tokens: every token of the batch counts alike (DAPO, section 3.3)."""
  return spans.mask / jnp.maximum(tokens, 1)


def sequence_mean(spans: Spans, *, answers: Array | int) -> Array:
  """1 / (|o_i| answers): every answer counts alike, a token of a long one less (GRPO, eq. 3)."""
  return spans.mask * spans.per_token(1 / spans.lengths) / jnp.maximum(answers, 1)


def prompt_mean(spans: Spans, group: Array, *, prompts: Array | int) -> Array:
  """1 / (tokens of all answers to the prompt, prompts): every prompt counts alike (ScaleRL, arXiv 2510.13786).

  Args:
    group: [rows, slots]: which of its row's prompts an answer is to, from 0.
  """
  counts = spans.per_answer(spans.mask)
  add = lambda row, of: jnp.zeros_like(row).at[of].add(row)
  tokens = jnp.take_along_axis(jax.vmap(add)(counts, group), group, axis=1)
  weights = spans.per_token(1 / jnp.maximum(tokens, 1))
  return spans.mask * weights / jnp.maximum(prompts, 1)


def constant_length(spans: Spans, *, answers: Array | int, length: int) -> Array:
  """1 / (length answers): divided by the longest length allowed, for all alike (Dr. GRPO, section 3.2)."""
  return spans.mask / length / jnp.maximum(answers, 1)


def sequence_sum(spans: Spans, *, answers: Array | int) -> Array:
  """1 / answers: summed over an answer, averaged over answers (LUSPO)."""
  return spans.mask / jnp.maximum(answers, 1)
