"""Preference losses on log-probabilities: arrays in, (loss, stats) out, one value per pair.

Arguments are log-probabilities of whole completions given their prompts, in nats: sums over the completion's tokens
(end of turn included), or means per token where a docstring says so.  Notation: r = log pi(y|x) - log pi_ref(y|x),
w the chosen and l the rejected completion, d = r_w - r_l, sigma the logistic function.

beta weighs the KL to the reference: a higher beta stays closer to it.  Rafailov et al. 2023 (DPO), eq. 3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core import struct

Array = jax.Array
Number = Array | float
log_sigmoid = jax.nn.log_sigmoid


@struct.dataclass
class PreferenceStats:
  """Implicit rewards of the two completions: beta r, or what a loss without a reference has in its place."""

  chosen: Number
  rejected: Number

  @property
  def margin(self) -> Number:
    return self.chosen - self.rejected

  @property
  def correct(self) -> Array | bool:
    """True where the chosen completion has the higher reward; a tie is not correct."""
    return self.chosen > self.rejected


def _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
  """(r_w, r_l, stats)."""
  chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
  return chosen, rejected, PreferenceStats(chosen=beta * chosen, rejected=beta * rejected)


# --- DPO and its relatives -------------------------------------------------------------------------------------------


def dpo(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> tuple[Array, PreferenceStats]:
  """-(1 - e) log sigma(beta d) - e log sigma(-beta d).

  Rafailov et al. 2023, eq. 7; with e = label_smoothing > 0 the conservative form, for labels that are wrong with
  probability e (Mitchell 2023).

  >>> loss, stats = dpo(-3.0, -4.0, -3.0, -4.0, beta=0.1)
  >>> round(float(loss), 6), float(stats.margin)
  (0.693147, 0.0)
  """
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  scaled = beta * (chosen - rejected)
  loss = -(1 - label_smoothing) * log_sigmoid(scaled) - label_smoothing * log_sigmoid(-scaled)
  return loss, stats


def robust(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
  label_smoothing: float,
) -> tuple[Array, PreferenceStats]:
  """(-(1 - e) log sigma(beta d) + e log sigma(-beta d)) / (1 - 2e): unbiased under labels flipped with probability e.

  Chowdhury et al. 2024 (arXiv 2403.00409), eq. 12.

  Raises:
    ValueError: label_smoothing is not in [0, 0.5).
  """
  e = label_smoothing
  if not 0 <= e < 0.5:
    raise ValueError(f"label_smoothing={e}: a share of flipped labels is at least 0 and below 0.5")
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  scaled = beta * (chosen - rejected)
  return (-(1 - e) * log_sigmoid(scaled) + e * log_sigmoid(-scaled)) / (1 - 2 * e), stats


def ipo(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
) -> tuple[Array, PreferenceStats]:
  """(d - 1 / (2 beta))^2, arguments being means per token.

  Azar et al. 2023, eq. 17, with the authors' length-averaged log-ratios.
  """
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  return (chosen - rejected - 1 / (2 * beta)) ** 2, stats


def hinge(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
) -> tuple[Array, PreferenceStats]:
  """max(0, 1 - beta d).  Zhao et al. 2023 (SLiC), eq. 1, on log-ratios as in Liu et al. 2023 (RSO), eq. 6."""
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  return jax.nn.relu(1 - beta * (chosen - rejected)), stats


def exo(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
  label_smoothing: float,
) -> tuple[Array, PreferenceStats]:
  """KL(q || p), q = sigma(beta d) of the policy and p = 1 - e of the labels: the reverse of DPO's direction.

  Ji et al. 2024 (EXO, arXiv 2402.00856), eq. 16.

  Raises:
    ValueError: label_smoothing is not in (0, 1): the divergence from a certain label is infinite.
  """
  e = label_smoothing
  if not 0 < e < 1:
    raise ValueError(f"label_smoothing={e}: EXO needs one above 0 and below 1; its paper has 0.001")
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  scaled = beta * (chosen - rejected)
  q, log_q, log_rest = jax.nn.sigmoid(scaled), log_sigmoid(scaled), log_sigmoid(-scaled)
  loss = q * (log_q - jnp.log(1 - e)) + (1 - q) * (log_rest - jnp.log(e))
  return loss, stats


def nca(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
) -> tuple[Array, PreferenceStats]:
  """-log sigma(beta r_w) - (log sigma(-beta r_w) + log sigma(-beta r_l)) / 2.

  Chen et al. 2024 (noise-contrastive alignment, arXiv 2402.05369), eq. 11 for pairs.
  """
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  contrast = log_sigmoid(-beta * chosen) + log_sigmoid(-beta * rejected)
  return -log_sigmoid(beta * chosen) - 0.5 * contrast, stats


def bco(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
  shift: Number = 0.0,
) -> tuple[Array, PreferenceStats]:
  """-log sigma(beta r_w - shift) - log sigma(-(beta r_l - shift)): a classifier with the reward as its logit.

  Jung et al. 2024 (BCO, arXiv 2404.04656), eq. 6; shift is the running mean of the rewards seen in training, detached.
  TRL's `bco_pair` is the shift 0.
  """
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  return -log_sigmoid(beta * chosen - shift) - log_sigmoid(-(beta * rejected - shift)), stats


def apo_zero(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
) -> tuple[Array, PreferenceStats]:
  """1 - sigma(beta r_w) + sigma(beta r_l): for chosen answers better than the model's own.

  D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266), eq. 7.
  """
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  return 1 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected), stats


def apo_down(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
) -> tuple[Array, PreferenceStats]:
  """sigma(beta r_w) + 1 - sigma(beta d): for chosen answers worse than the model's own.

  D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266), eq. 8.
  """
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  return jax.nn.sigmoid(beta * chosen) + 1 - jax.nn.sigmoid(beta * (chosen - rejected)), stats


def sppo(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
) -> tuple[Array, PreferenceStats]:
  """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2.

  Wu et al. 2024 (self-play preference optimisation, arXiv 2405.00675), eq. 4.7 with hard labels.
  """
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, stats


def discopop(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
  temperature: float = 0.05,
) -> tuple[Array, PreferenceStats]:
  """(1 - s) (-log sigma(z)) + s exp(-z), z = beta d, s = sigma(z / temperature).

  Lu et al. 2024 (DiscoPOP, arXiv 2406.08414), section 5: the log-ratio modulated loss, temperature 0.05.
  """
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  z = beta * (chosen - rejected)
  share = jax.nn.sigmoid(z / temperature)
  return -(1 - share) * log_sigmoid(z) + share * jnp.exp(-z), stats


def aot(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> tuple[Array, PreferenceStats]:
  """`dpo` on sorted differences: the i-th smallest log pi_w - log pi_l against the i-th smallest of the reference.

  The arguments are one batch, [pairs]: what is compared depends on all of it.  Loss i is that of the pair with the i-th
  smallest difference.  Melnyk et al. 2024 (AOT, arXiv 2406.05882), algorithm 1, paired.
  """
  _, _, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  d = jnp.sort(policy_chosen - policy_rejected) - jnp.sort(ref_chosen - ref_rejected)
  return dpo(d, 0.0, 0.0, 0.0, beta=beta, label_smoothing=label_smoothing)[0], stats


def aot_unpaired(
  policy_chosen: Number,
  policy_rejected: Number,
  ref_chosen: Number,
  ref_rejected: Number,
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> tuple[Array, PreferenceStats]:
  """`dpo` on the i-th smallest r_w against the i-th smallest r_l of a batch, whichever pairs they come from.

  Melnyk et al. 2024 (AOT, arXiv 2406.05882), algorithm 1, unpaired.
  """
  chosen, rejected, stats = _ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
  d = jnp.sort(chosen) - jnp.sort(rejected)
  return dpo(d, 0.0, 0.0, 0.0, beta=beta, label_smoothing=label_smoothing)[0], stats


# --- divergences other than the reverse KL ---------------------------------------------------------------------------
# g(r) takes the place of r in the losses of d: f'(u) at u = exp(r), up to a constant.  Wang et al. 2023 (f-DPO,
# arXiv 2309.16240), table 1.


def reverse_kl(ratio: Array) -> Array:
  """g(r) = r: DPO itself."""
  return ratio


def forward_kl(ratio: Array) -> Array:
  """g(r) = 1 - exp(-r).

  The exponent stops at 80, before float32 overflows.
  """
  return 1 - jnp.exp(jnp.minimum(-ratio, 80.0))


def jensen_shannon(ratio: Array) -> Array:
  """g(r) = log 2 + log sigma(r)."""
  return jnp.log(2.0) + log_sigmoid(ratio)


def alpha_divergence(ratio: Array, *, alpha: float) -> Array:
  """g(r) = (exp((alpha - 1) r) - 1) / (alpha - 1); alpha 1 is the reverse KL.

  The exponent stops at 80, before float32 overflows.
  """
  if alpha == 1:
    return ratio
  return jnp.expm1(jnp.minimum((alpha - 1) * ratio, 80.0)) / (alpha - 1)


# --- pieces of log-probabilities -------------------------------------------------------------------------------------


def length_desensitised(total: Array, head: Array, *, alpha: float) -> Array:
  """head + alpha (total - head): tokens past the length that both answers reach count alpha.

  total: sum of log-probabilities over the whole answer; head: over its first min(|y_w|, |y_l|) tokens.  For policy and
  reference alike.  Liu et al. 2024 (LD-DPO, arXiv 2409.06411), eq. 10.
  """
  return head + alpha * (total - head)


# --- without a reference ---------------------------------------------------------------------------------------------


def cpo(
  policy_chosen: Number, policy_rejected: Number, *, beta: float, label_smoothing: float = 0.0
) -> tuple[Array, PreferenceStats]:
  """`dpo` under a uniform reference: -log sigma(beta (log pi_w - log pi_l)).

  The objective adds the negative log-likelihood of the chosen answers.  Xu et al. 2024 (CPO, arXiv 2401.08417), eq. 5.
  """
  return dpo(policy_chosen, policy_rejected, 0.0, 0.0, beta=beta, label_smoothing=label_smoothing)


def simpo(
  policy_chosen: Number, policy_rejected: Number, *, beta: float, gamma_beta_ratio: float
) -> tuple[Array, PreferenceStats]:
  """-log sigma(beta (mean log pi_w - mean log pi_l) - gamma), gamma = gamma_beta_ratio * beta.

  Arguments are means per token.  Meng et al. 2024 (SimPO, arXiv 2405.14734), eq. 6; the paper tunes beta in 2 to 10 and
  the ratio in 0.3 to 1.6.  TRL's `simpo_gamma` is gamma itself.
  """
  stats = PreferenceStats(chosen=beta * policy_chosen, rejected=beta * policy_rejected)
  return -log_sigmoid(stats.margin - gamma_beta_ratio * beta), stats


def orpo(
  policy_chosen: Number, policy_rejected: Number, *, beta: float
) -> tuple[Array, PreferenceStats]:
  """-beta log sigma(log odds(y_w) - log odds(y_l)), odds(p) = p / (1 - p) of the mean probability per token.

  Arguments are means per token.  The objective adds the negative log-likelihood of the chosen sequence.  beta is the
  paper's lambda.  Hong et al. 2024 (ORPO, arXiv 2403.07691), eq. 6 and 7.
  """
  log_odds = log_odds_ratio(policy_chosen, policy_rejected)
  stats = PreferenceStats(chosen=beta * policy_chosen, rejected=beta * policy_rejected)
  return -beta * log_sigmoid(log_odds), stats


def log_odds_ratio(chosen: Number, rejected: Number) -> Array:
  """log (odds(exp chosen) / odds(exp rejected)), finite up to probability 1 - 1e-7."""
  return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x):
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
  policy_chosen: Number, policy_rejected: Number, *, beta: float, gamma_beta_ratio: float = 0.0
) -> tuple[Array, PreferenceStats]:
  """-log sigma(beta (log pi_w - log pi_l) - gamma), the pair's part of triple preference optimisation.

  The objective adds the negative log-likelihood of a third, gold answer.  With sums it is TPO, with means and a margin
  its length-controlled form TPO-L.  Saeidi et al. 2024 (arXiv 2405.16681), eq. 6 and 9.
  """
  return simpo(policy_chosen, policy_rejected, beta=beta, gamma_beta_ratio=gamma_beta_ratio)


# --- labels instead of pairs -----------------------------------------------------------------------------------------


@struct.dataclass
class LabelStats:
  """Per completion: its implicit reward beta r, and whether it is labelled desirable."""

  reward: Array
  desirable: Array


def kto(
  policy: Array,
  ref: Array,
  desirable: Array,
  kl: Number,
  *,
  beta: float,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> tuple[Array, LabelStats]:
  """w_d (1 - sigma(beta (r - kl))) where desirable, w_u (1 - sigma(beta (kl - r))) where not; one value a completion.

  kl: the estimate of KL(pi || pi_ref) from prompts with answers of other prompts (`mismatched_kl`), not differentiated.
  Ethayarajh et al. 2024 (KTO, arXiv 2402.01306), eq. 8; the paper keeps w_d n_d / (w_u n_u) between 1 and 4/3.
  """
  ratio = policy - ref
  desirable = jnp.asarray(desirable, bool)
  kl = jax.lax.stop_gradient(kl)
  gain = 1 - jax.nn.sigmoid(beta * (ratio - kl))
  pain = 1 - jax.nn.sigmoid(beta * (kl - ratio))
  loss = jnp.where(desirable, desirable_weight * gain, undesirable_weight * pain)
  return loss, LabelStats(reward=beta * ratio, desirable=desirable)


def mismatched_kl(policy: Array, ref: Array, mask: Array | None = None) -> Array:
  """max(0, mean(log pi(y'|x) - log pi_ref(y'|x))), y' answers of other prompts; a scalar, not differentiated.

  Ethayarajh et al. 2024 (KTO), section 4.1.
  """
  mask = jnp.ones_like(policy) if mask is None else mask.astype(policy.dtype)
  mean = jnp.sum((policy - ref) * mask) / jnp.maximum(jnp.sum(mask), 1)
  return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def apo_zero_unpaired(
  policy: Array, ref: Array, desirable: Array, *, beta: float
) -> tuple[Array, LabelStats]:
  """1 - sigma(beta r) where desirable, sigma(beta r) where not: `apo_zero` from labels, KTO without its KL."""
  return kto(policy, ref, desirable, 0.0, beta=beta)
