"""Preference losses: arrays in, (loss, stats) out, one value per pair, or per answer where it has a label.

Notation: r = log pi(y|x) - log pi_ref(y|x), the log-ratio of an answer, in nats: a sum over its tokens (end of turn
included), or a mean per token where a docstring says so; w the chosen and l the rejected answer, d = r_w - r_l, sigma
the logistic function.  `chosen` and `rejected` are r_w and r_l; in losses without a reference the log-probabilities
themselves, in the place of r.

beta weighs the KL to the reference: a higher beta stays closer to it.  Rafailov et al. 2023 (DPO), eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from posttrain_jax.core import struct

Array = jax.Array
Number = Array | float
log_sigmoid = jax.nn.log_sigmoid


@struct.dataclass
class PreferenceStats:
  """Implicit rewards of the two answers: beta r, or what a loss without a reference has in its place."""

  chosen: Number
  rejected: Number

  @property
  def margin(self) -> Number:
    return self.chosen - self.rejected

  @property
  def correct(self) -> Array | bool:
    """True where the chosen answer has the higher reward; a tie is not correct."""
    return self.chosen > self.rejected


def _stats(chosen: Number, rejected: Number, beta: float) -> PreferenceStats:
  return PreferenceStats(chosen=beta * chosen, rejected=beta * rejected)


# --- DPO and its relatives -------------------------------------------------------------------------------------------


def dpo(
  chosen: Number, rejected: Number, *, beta: float, label_smoothing: float = 0.0
) -> tuple[Array, PreferenceStats]:
  """-(1 - e) log sigma(beta d) - e log sigma(-beta d).

  Rafailov et al. 2023, eq. 7; with e = label_smoothing > 0 the conservative form, for labels that are wrong with
  probability e (Mitchell 2023).

  >>> loss, stats = dpo(0.0, 0.0, beta=0.1)
  >>> round(float(loss), 6), float(stats.margin)
  (0.693147, 0.0)
  """
  scaled = beta * (chosen - rejected)
  loss = -(1 - label_smoothing) * log_sigmoid(scaled) - label_smoothing * log_sigmoid(-scaled)
  return loss, _stats(chosen, rejected, beta)


def robust(
  chosen: Number, rejected: Number, *, beta: float, label_smoothing: float
) -> tuple[Array, PreferenceStats]:
  """(-(1 - e) log sigma(beta d) + e log sigma(-beta d)) / (1 - 2e): unbiased under labels flipped with probability e.

  Chowdhury et al. 2024 (arXiv 2403.00409), eq. 12.

  Raises:
    ValueError: label_smoothing is not in [0, 0.5).
  """
  e = label_smoothing
  if not 0 <= e < 0.5:
    raise ValueError(f"label_smoothing={e}: a share of flipped labels is at least 0 and below 0.5")
  scaled = beta * (chosen - rejected)
  loss = (-(1 - e) * log_sigmoid(scaled) + e * log_sigmoid(-scaled)) / (1 - 2 * e)
  return loss, _stats(chosen, rejected, beta)


def ipo(chosen: Number, rejected: Number, *, beta: float) -> tuple[Array, PreferenceStats]:
  """(d - 1 / (2 beta))^2, the log-ratios being means per token.

  Azar et al. 2023, eq. 17, with the authors' length-averaged log-ratios.
  """
  return jnp.square(chosen - rejected - 1 / (2 * beta)), _stats(chosen, rejected, beta)


def hinge(chosen: Number, rejected: Number, *, beta: float) -> tuple[Array, PreferenceStats]:
  """max(0, 1 - beta d).  Zhao et al. 2023 (SLiC), eq. 1, on log-ratios as in Liu et al. 2023 (RSO), eq. 6."""
  return jax.nn.relu(1 - beta * (chosen - rejected)), _stats(chosen, rejected, beta)


def exo(
  chosen: Number, rejected: Number, *, beta: float, label_smoothing: float
) -> tuple[Array, PreferenceStats]:
  """KL(q || p), q = sigma(beta d) of the policy and p = 1 - e of the labels: the reverse of DPO's direction.

  Ji et al. 2024 (EXO, arXiv 2402.00856), eq. 16.

  Raises:
    ValueError: label_smoothing is not in (0, 1): the divergence from a certain label is infinite.
  """
  e = label_smoothing
  if not 0 < e < 1:
    raise ValueError(f"label_smoothing={e}: EXO needs one above 0 and below 1; its paper has 0.001")
  scaled = beta * (chosen - rejected)
  q, log_q, log_rest = jax.nn.sigmoid(scaled), log_sigmoid(scaled), log_sigmoid(-scaled)
  loss = q * (log_q - jnp.log(1 - e)) + (1 - q) * (log_rest - jnp.log(e))
  return loss, _stats(chosen, rejected, beta)


def nca(chosen: Number, rejected: Number, *, beta: float) -> tuple[Array, PreferenceStats]:
  """-log sigma(beta r_w) - (log sigma(-beta r_w) + log sigma(-beta r_l)) / 2.

  Chen et al. 2024 (noise-contrastive alignment, arXiv 2402.05369), eq. 11 for pairs.
  """
  contrast = log_sigmoid(-beta * chosen) + log_sigmoid(-beta * rejected)
  return -log_sigmoid(beta * chosen) - 0.5 * contrast, _stats(chosen, rejected, beta)


def bco(
  chosen: Number, rejected: Number, *, beta: float, shift: Number = 0.0
) -> tuple[Array, PreferenceStats]:
  """-log sigma(beta r_w - shift) - log sigma(-(beta r_l - shift)): a classifier with the reward as its logit.

  Jung et al. 2024 (BCO, arXiv 2404.04656), eq. 6; shift is the running mean of the rewards seen in training, detached.
  TRL's `bco_pair` is the shift 0.
  """
  loss = -log_sigmoid(beta * chosen - shift) - log_sigmoid(-(beta * rejected - shift))
  return loss, _stats(chosen, rejected, beta)


def apo_zero(chosen: Number, rejected: Number, *, beta: float) -> tuple[Array, PreferenceStats]:
  """1 - sigma(beta r_w) + sigma(beta r_l): for chosen answers better than the model's own.

  D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266), eq. 7.
  """
  loss = 1 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)
  return loss, _stats(chosen, rejected, beta)


def apo_down(chosen: Number, rejected: Number, *, beta: float) -> tuple[Array, PreferenceStats]:
  """sigma(beta r_w) + 1 - sigma(beta d): for chosen answers worse than the model's own.

  D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266), eq. 8.
  """
  loss = jax.nn.sigmoid(beta * chosen) + 1 - jax.nn.sigmoid(beta * (chosen - rejected))
  return loss, _stats(chosen, rejected, beta)


def sppo(chosen: Number, rejected: Number, *, beta: float) -> tuple[Array, PreferenceStats]:
  """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2.

  Wu et al. 2024 (self-play preference optimisation, arXiv 2405.00675), eq. 4.7 with hard labels.
  """
  loss = jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)
  return loss, _stats(chosen, rejected, beta)


def discopop(
  chosen: Number, rejected: Number, *, beta: float, temperature: float = 0.05
) -> tuple[Array, PreferenceStats]:
  """(1 - s) (-log sigma(z)) + s exp(-z), z = beta d, s = sigma(z / temperature).

  Lu et al. 2024 (DiscoPOP, arXiv 2406.08414), section 5: the log-ratio modulated loss, temperature 0.05.
  """
  z = beta * (chosen - rejected)
  share = jax.nn.sigmoid(z / temperature)
  return -(1 - share) * log_sigmoid(z) + share * jnp.exp(-z), _stats(chosen, rejected, beta)


def aot(
  margin: Array,
  ref_margin: Array,
  *,
  beta: float,
  label_smoothing: float = 0.0,
  among: tuple[Array, Array] | None = None,
) -> tuple[Array, PreferenceStats]:
  """`dpo` of margin - ref_margin, each margin of the policy against the reference's margin of the same rank.

  A margin is log pi_w - log pi_l of a pair.  Summed over a batch this is dpo of sort(margin) - sort(ref_margin), whose
  i-th value and gradient belong to the pair with the i-th smallest margin.  Stats are of each pair's own two margins,
  times beta.  Melnyk et al. 2024 (AOT, arXiv 2406.05882), algorithm 1, paired.

  Args:
    margin, ref_margin: of one shape; ref_margin is not differentiated.
    among: the margins and the reference's of the WHOLE optimizer batch, of which the arguments may be a part, in any
      shape and order, +inf in both where there is no pair; not differentiated.  None: the arguments are the whole
      batch.  A margin is looked up there by its value, the nearest; equal ones share the mean over their ranks.

  >>> loss, _ = aot(jnp.array([3.0, 1.0]), jnp.array([1.0, 3.0]), beta=0.1)
  >>> loss.round(4).tolist()
  [0.6930999755859375, 0.6930999755859375]
  """
  whole, ref_whole = (margin, ref_margin) if among is None else among
  loss = lambda d: dpo(d, 0.0, beta=beta, label_smoothing=label_smoothing)[0]
  return _by_rank(loss, margin, whole, ref_whole), _stats(margin, ref_margin, beta)


def aot_unpaired(
  chosen: Array,
  rejected: Array,
  *,
  beta: float,
  label_smoothing: float = 0.0,
  among: tuple[Array, Array] | None = None,
) -> tuple[Array, PreferenceStats]:
  """`dpo` of each r_w against the r_l of the same rank in the batch, whichever pairs they come from.

  Summed over a batch this is dpo of sort(r_w) - sort(r_l).  The value of loss i is that of chosen answer i against its
  opposite; its gradient is that of chosen and of rejected answer i, the opposite of each held fixed.  Melnyk et al.
  2024 (AOT, arXiv 2406.05882), algorithm 1, unpaired.

  Args:
    among: r_w and r_l of the whole optimizer batch, as `aot`'s.
  """
  chosen_whole, rejected_whole = (chosen, rejected) if among is None else among
  loss = lambda d: dpo(d, 0.0, beta=beta, label_smoothing=label_smoothing)[0]
  of_chosen = _by_rank(loss, chosen, chosen_whole, rejected_whole)
  of_rejected = _by_rank(lambda d: loss(-d), rejected, rejected_whole, chosen_whole)
  # the value once, the gradient of both
  values = of_chosen + of_rejected - jax.lax.stop_gradient(of_rejected)
  return values, _stats(chosen, rejected, beta)


def _by_rank(loss: Callable[[Array], Array], values: Array, whole: Array, others: Array) -> Array:
  """loss(value - other), where `other` has the rank among `others` that the value has in `whole`.

  It is the mean over several ranks where the value ties.  The nearest in `whole` is taken for the value, which may
  differ by a rounding from what another program computed.
  """
  whole, others = (jnp.sort(jax.lax.stop_gradient(x).ravel()) for x in (whole, others))
  distance = jnp.abs(whole - jax.lax.stop_gradient(values)[..., None])
  nearest = whole[jnp.argmin(distance, axis=-1)]
  ranks = (whole == nearest[..., None]) & jnp.isfinite(others)
  differences = jnp.where(ranks, values[..., None] - others, 0.0)
  # a sum, as the mean of nothing is NaN: in a batch without a pair
  total = jnp.sum(jnp.where(ranks, loss(differences), 0.0), axis=-1)
  return total / jnp.maximum(jnp.sum(ranks, axis=-1), 1)


# --- divergences other than the reverse KL ---------------------------------------------------------------------------
# g(r) takes the place of r in the losses of d: f'(u) at u = exp(r), up to a constant.  Wang et al. 2023 (f-DPO,
# arXiv 2309.16240), table 1.


def reverse_kl(log_ratio: Array) -> Array:
  """g(r) = r: DPO itself."""
  return log_ratio


def forward_kl(log_ratio: Array) -> Array:
  """g(r) = 1 - exp(-r).

  The exponent stops at 80, before float32 overflows.
  """
  return 1 - jnp.exp(jnp.minimum(-log_ratio, 80.0))


def jensen_shannon(log_ratio: Array) -> Array:
  """g(r) = log 2 + log sigma(r)."""
  return jnp.log(2.0) + log_sigmoid(log_ratio)


def alpha_divergence(log_ratio: Array, *, alpha: float) -> Array:
  """g(r) = (exp((alpha - 1) r) - 1) / (alpha - 1); alpha 1 is the reverse KL.

  The exponent stops at 80, before float32 overflows.
  """
  if alpha == 1:
    return log_ratio
  return jnp.expm1(jnp.minimum((alpha - 1) * log_ratio, 80.0)) / (alpha - 1)


# --- pieces of log-probabilities -------------------------------------------------------------------------------------


def wpo_weight(chosen: Array, rejected: Array) -> Array:
  """exp(chosen + rejected), not differentiated: what a pair counts by how likely the policy is to write it.

  Arguments are means per token of log pi(y_t) - log sum_v pi(v)^2.  Zhou et al. 2024 (WPO, arXiv 2406.11827),
  with their sampled alignment.
  """
  return jax.lax.stop_gradient(jnp.exp(chosen + rejected))


def running_mean(mean: Number, count: Number, values: Array, present: Array) -> tuple[Array, Array]:
  """(mean, count) of all values seen, those of `values` that are present added: BCO's shift.

  Jung et al. 2024 (BCO, arXiv 2404.04656): the reward shift.
  """
  added = jnp.sum(present)
  total = mean * count + jnp.sum(jnp.where(present, values, 0.0))
  return total / jnp.maximum(count + added, 1), count + added


def length_desensitised(total: Array, head: Array, *, alpha: float) -> Array:
  """head + alpha (total - head): tokens past the length that both answers reach count alpha.

  total: sum of log-probabilities over the whole answer; head: over its first min(|y_w|, |y_l|) tokens.  For policy and
  reference alike.  Liu et al. 2024 (LD-DPO, arXiv 2409.06411), eq. 10.
  """
  return head + alpha * (total - head)


# --- without a reference ---------------------------------------------------------------------------------------------


def cpo(
  chosen: Number, rejected: Number, *, beta: float, label_smoothing: float = 0.0
) -> tuple[Array, PreferenceStats]:
  """`dpo` under a uniform reference: -log sigma(beta (log pi_w - log pi_l)).

  The objective adds the negative log-likelihood of the chosen answers.  Xu et al. 2024 (CPO, arXiv 2401.08417), eq. 5.
  """
  return dpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def simpo(
  chosen: Number, rejected: Number, *, beta: float, gamma_beta_ratio: float
) -> tuple[Array, PreferenceStats]:
  """-log sigma(beta (mean log pi_w - mean log pi_l) - gamma), gamma = gamma_beta_ratio * beta.

  Arguments are means per token.  Meng et al. 2024 (SimPO, arXiv 2405.14734), eq. 6; the paper tunes beta in 2 to 10 and
  the ratio in 0.3 to 1.6.  TRL's `simpo_gamma` is gamma itself.
  """
  stats = _stats(chosen, rejected, beta)
  return -log_sigmoid(stats.margin - gamma_beta_ratio * beta), stats


def orpo(chosen: Number, rejected: Number, *, beta: float) -> tuple[Array, PreferenceStats]:
  """-beta log sigma(log odds(y_w) - log odds(y_l)), odds(p) = p / (1 - p) of the mean probability per token.

  Arguments are means per token.  The objective adds the negative log-likelihood of the chosen sequence.  beta is the
  paper's lambda.  Hong et al. 2024 (ORPO, arXiv 2403.07691), eq. 6 and 7.
  """
  log_odds = log_odds_ratio(chosen, rejected)
  return -beta * log_sigmoid(log_odds), _stats(chosen, rejected, beta)


def log_odds_ratio(chosen: Number, rejected: Number) -> Array:
  """log (odds(exp chosen) / odds(exp rejected)), finite up to probability 1 - 1e-7."""
  return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: Number) -> Array:
  """log(1 - exp(x)) for x < 0, exact at both ends; x is kept 1e-7 away from 0."""
  x = jnp.minimum(x, -1e-7)
  near = x > -0.6931472
  # both branches are computed: each on values where its slope is finite
  return jnp.where(
    near,
    jnp.log(-jnp.expm1(jnp.where(near, x, -0.5))),
    jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
  )


def tpo(
  chosen: Number, rejected: Number, *, beta: float, gamma_beta_ratio: float = 0.0
) -> tuple[Array, PreferenceStats]:
  """-log sigma(beta (log pi_w - log pi_l) - gamma), the pair's part of triple preference optimisation.

  The objective adds the negative log-likelihood of a third, gold answer.  With sums it is TPO, with means and a margin
  its length-controlled form TPO-L.  Saeidi et al. 2024 (arXiv 2405.16681), eq. 6 and 9.
  """
  return simpo(chosen, rejected, beta=beta, gamma_beta_ratio=gamma_beta_ratio)


# --- labels instead of pairs -----------------------------------------------------------------------------------------


def kto(
  log_ratio: Array,
  desirable: Array,
  kl: Number,
  *,
  beta: float,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> tuple[Array, Array]:
  """w_d (1 - sigma(beta (r - kl))) where desirable, w_u (1 - sigma(beta (kl - r))) where not; stats: beta r.

  kl: the estimate of KL(pi || pi_ref) from prompts with answers of other prompts (`mismatched_kl`), not differentiated.
  Ethayarajh et al. 2024 (KTO, arXiv 2402.01306), eq. 8; the paper keeps w_d n_d / (w_u n_u) between 1 and 4/3.
  """
  kl = jax.lax.stop_gradient(kl)
  gain = 1 - jax.nn.sigmoid(beta * (log_ratio - kl))
  pain = 1 - jax.nn.sigmoid(beta * (kl - log_ratio))
  loss = jnp.where(desirable, desirable_weight * gain, undesirable_weight * pain)
  return loss, beta * log_ratio


def mismatched_kl(log_ratio: Array, mask: Array | None = None) -> Array:
  """max(0, mean(log pi(y'|x) - log pi_ref(y'|x))), y' answers of other prompts; a scalar, not differentiated.

  The mean is over what the mask has, and 0 where that is nothing.  Ethayarajh et al. 2024 (KTO), section 4.1.
  """
  mask = jnp.ones(jnp.shape(log_ratio), bool) if mask is None else jnp.asarray(mask, bool)
  mean = jnp.sum(jnp.where(mask, log_ratio, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
  return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def apo_zero_unpaired(
  log_ratio: Array,
  desirable: Array,
  *,
  beta: float,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> tuple[Array, Array]:
  """w_d (1 - sigma(beta r)) where desirable, w_u sigma(beta r) where not: `apo_zero` of labels, KTO without its KL."""
  weights = dict(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
  return kto(log_ratio, desirable, 0.0, beta=beta, **weights)
