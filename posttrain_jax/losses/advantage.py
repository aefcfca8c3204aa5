"""How much better an action was than expected: rewards in, advantages out; nothing here is differentiated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Array = jax.Array
NAMES = ("group", "batch", "none", "leave_one_out", "whitened", "max_rl")  # as `named` takes them
EPSILON = 1e-4  # added to a standard deviation, as TRL does
# of the largest value: what lies no further apart is equal but for float32's rounding, in whatever order it was added
ROUNDING = 4 * float(jnp.finfo(jnp.float32).eps)


def named(how: str, rewards: ArrayLike) -> np.ndarray:
  """The advantage that goes by that name: [groups, group] each, computed in float64 and on the host again.

  In float32 the mean of rewards with an offset of 1000 is off by 3e-5, and the square of one above 1e19 is infinite.

  "group", "batch" or "none" (of a deviation to divide by), "leave_one_out", "max_rl", or "whitened": centred in its
  group, then whitened over all groups (REINFORCE++ with a baseline; Hu 2025).

  Raises:
    ValueError: "max_rl" of a reward below 0, or another name.

  >>> named("max_rl", jnp.array([[1.0, -1.0]]))
  Traceback (most recent call last):
  ValueError: advantage=max_rl divides by the mean reward: rewards are from 0 on, found -1
  """
  if how not in NAMES:
    raise ValueError(f"advantage={how!r}: write {', '.join(NAMES[:-1])} or {NAMES[-1]}")
  with jax.enable_x64(True):
    return np.asarray(_named(how, jnp.asarray(rewards, jnp.float64)))


def _named(how: str, rewards: Array) -> Array:
  if how == "leave_one_out":
    return leave_one_out(rewards)
  if how == "max_rl":
    if (least := float(jnp.nanmin(rewards))) < 0:
      raise ValueError(
        f"advantage=max_rl divides by the mean reward: rewards are from 0 on, found {least:g}"
      )
    return over_mean(rewards)
  if how == "whitened":
    centred = group_relative(rewards, scale="none")
    # the mean that is taken off is 0 but for rounding: what agrees stays without an advantage
    return jnp.where(centred == 0, 0.0, whiten(centred, ~jnp.isnan(rewards)))
  return group_relative(rewards, scale=how)


def group_relative(rewards: Array, *, scale: str = "group", epsilon: float = EPSILON) -> Array:
  """(R_i - mean R) / (std R + epsilon) over the answers to one prompt; exactly 0 where all of a group agree.

  Rewards that lie within float32's rounding of each other agree (0.1 + 0.2 and 0.3).  A NaN reward (an answer that
  could not be scored, or the filling of a smaller group) takes no part and gets advantage 0.  Standard deviations
  divide by n - 1.  Shao et al. 2024 (GRPO, arXiv 2402.03300), section 4.1.2; scale="none" is Liu et al. 2025 (Dr. GRPO,
  arXiv 2503.20783), which leaves the division out.

  Args:
    rewards: [..., group].
    scale: "group", "batch" (one deviation over all rewards), or "none".

  Raises:
    ValueError: scale is none of these, or a group has one answer.

  >>> group_relative(jnp.array([[1.0, 0.0], [1.0, 1.0]]), scale="none").tolist()
  [[0.5, -0.5], [0.0, 0.0]]
  """
  if scale not in ("group", "batch", "none"):
    raise ValueError(f"scale={scale!r}: write group, batch or none")
  rewards = _groups(rewards)
  scored = ~jnp.isnan(rewards)
  centred, deviation = _centred(rewards, scored)
  if scale == "group":
    centred = centred / (deviation + epsilon)
  elif scale == "batch":
    _, deviation = _centred(rewards, scored, axis=None)
    centred = centred / (deviation + epsilon)
  return centred


def leave_one_out(rewards: Array) -> Array:
  """R_i - mean of the other R_j; [..., group]; what agrees and what is NaN as in `group_relative`.

  Ahmadian et al. 2024 (RLOO, arXiv 2402.14740), section 3.2.

  >>> leave_one_out(jnp.array([3.0, 0.0, 0.0])).tolist()
  [3.0, -1.5, -1.5]
  """
  rewards = _groups(rewards)
  scored = ~jnp.isnan(rewards)
  count = jnp.sum(scored, axis=-1, keepdims=True)
  centred, _ = _centred(rewards, scored)
  return centred * count / jnp.maximum(count - 1, 1)


def over_mean(rewards: Array, *, epsilon: float = 1e-6) -> Array:
  """(R_i - mean R) / (mean R + epsilon), of rewards from 0 on; NaN and agreement as in `group_relative`.

  MaxRL: the gradient of log pass rate, in which a rare success counts the more (prime-rl, SkyRL).

  >>> [round(a, 3) for a in over_mean(jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()]
  [3.0, -1.0, -1.0, -1.0]
  """
  rewards = _groups(rewards)
  scored = ~jnp.isnan(rewards)
  centred, _ = _centred(rewards, scored)
  count = jnp.maximum(jnp.sum(scored, axis=-1, keepdims=True), 1)
  mean = jnp.sum(jnp.where(scored, rewards, 0.0), axis=-1, keepdims=True) / count
  return centred / (mean + epsilon)


def gae(
  rewards: ArrayLike, values: ArrayLike, mask: ArrayLike, *, gamma: float, lam: float
) -> tuple[Array, Array]:
  """(advantages, returns): A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t; returns A + V.

  [batch, time] each.  Where the mask is False (padding, or a tool's text) nothing is an action: the next action
  follows the last one, and both results are 0.  V after the last action is 0.  Schulman et al. 2016, eq. 16.
  """
  mask = jnp.asarray(mask, bool)

  def back(carry: tuple[Array, Array], at: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
    next_value, next_advantage = carry
    reward, value, is_action = at
    delta = reward + gamma * next_value - value
    advantage = delta + gamma * lam * next_advantage
    keep = lambda new, old: jnp.where(is_action, new, old)
    return (keep(value, next_value), keep(advantage, next_advantage)), keep(advantage, 0.0)

  rewards, values = jnp.asarray(rewards), jnp.asarray(values)
  time_first = lambda x: jnp.moveaxis(jnp.asarray(x), -1, 0)
  start = jnp.zeros(jnp.shape(rewards)[:-1], jnp.result_type(rewards, values))
  _, advantages = jax.lax.scan(
    back, (start, start), tuple(map(time_first, (rewards, values, mask))), reverse=True
  )
  advantages = jnp.moveaxis(advantages, 0, -1)
  return advantages, jnp.where(mask, advantages + values, 0.0)


def explained_variance(values: ArrayLike, returns: ArrayLike, mask: ArrayLike) -> float | None:
  """1 - Var(R - V) / Var(R) over all that the mask has; None where the returns agree, of which nothing is to explain.

  1 is a critic that knows the returns, 0 one that knows their mean alone, below 0 one that is worse than that.  In
  float64, of all of a batch at once: a mean of the parts' would be another number.

  >>> explained_variance([1.0, 2.0, 9.0], [1.0, 3.0, 0.0], [True, True, False])
  0.75
  """
  where = np.asarray(mask, bool)
  v, r = np.asarray(values, np.float64)[where], np.asarray(returns, np.float64)[where]
  if not len(r) or np.ptp(r) <= ROUNDING * np.abs(r).max():
    return None
  return float(1 - np.var(r - v) / np.var(r))


def whiten(values: ArrayLike, mask: ArrayLike | None = None, *, shift: bool = True) -> Array:
  """(x - mean) / sqrt(var + 1e-8) over all that the mask has, var dividing by n - 1; 0 elsewhere.

  shift=False keeps the mean.  Values that lie within float32's rounding of each other agree: x - mean is 0.  The whole
  batch at once: the result does not depend on how it is divided among devices.
  """
  mask = jnp.ones(jnp.shape(values), bool) if mask is None else jnp.asarray(mask, bool)
  values = jnp.where(mask, values, 0.0)
  centred, deviation = _centred(values, mask, axis=None)
  white = centred * jax.lax.rsqrt(deviation**2 + 1e-8)
  return white if shift else jnp.where(mask, white + jnp.mean(values, where=mask), 0.0)


def _groups(rewards: Array) -> Array:
  rewards = jnp.asarray(rewards)
  if rewards.ndim == 0 or rewards.shape[-1] < 2:
    raise ValueError(
      f"rewards of shape {rewards.shape}: the last axis is the group, and a group compares at least two answers"
    )
  return rewards


def _centred(values: Array, scored: Array, axis: int | None = -1) -> tuple[Array, Array]:
  """(x - mean, std) along axis of what is scored; exactly zero where it agrees, not a rest of rounding to be scaled."""
  count = jnp.sum(scored, axis=axis, keepdims=True)
  filled = jnp.where(scored, values, 0.0)
  mean = jnp.sum(filled, axis=axis, keepdims=True) / jnp.maximum(count, 1)
  top = jnp.max(jnp.where(scored, values, -jnp.inf), axis=axis, keepdims=True)
  bottom = jnp.min(jnp.where(scored, values, jnp.inf), axis=axis, keepdims=True)
  differ = top - bottom > ROUNDING * jnp.max(jnp.abs(filled), axis=axis, keepdims=True)
  centred = jnp.where(scored & differ, filled - mean, 0.0)
  squares = jnp.sum(centred**2, axis=axis, keepdims=True)
  return centred, jnp.sqrt(squares / jnp.maximum(count - 1, 1))
