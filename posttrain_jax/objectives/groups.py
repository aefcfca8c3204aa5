"""Groups of scored answers: policy-gradient losses whose advantages are known."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core.metrics import Mean
from posttrain_jax.losses import kl, policy
from posttrain_jax.losses.policy import PolicyStats
from posttrain_jax.losses.spans import Spans
from posttrain_jax.objectives.objective import (
  Batch,
  Context,
  Forward,
  Memory,
  Metrics,
  Scorer,
  Totals,
  following,
)
from posttrain_jax.objectives.reference import reference_logps
from posttrain_jax.objectives.rows import spans

Array = jax.Array
stop = jax.lax.stop_gradient
POLICY_LOSSES = ("reinforce", "ppo", "gspo", "rloo", "cispo", "dppo_tv", "dppo_kl")
START = 1e-3  # nats a token, of a KL: rounding gives 0.0002 in bfloat16
AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length", "sequence_sum", "prompt_mean")


@dataclasses.dataclass(frozen=True)
class Grouped(Scorer):
  """A policy-gradient loss on answers whose advantages are known (`losses.policy`, `losses.advantage`).

  Who wrote the answers is the reference (`old`="reference"), the policy as it was then, whose log-probabilities are in
  the batch (`old`="batch"), or the policy itself (`old`="policy"), so that every ratio is 1.  Where the batch says what
  the sampler's program gave (`sampling_logps`), the difference is measured, and `importance` corrects for it: the loss
  of a token is multiplied by pi_old / mu, bounded.  What a bound took out stays in the denominator.

  Where the batch has the teacher's log-probabilities (`teacher_logps`), teacher_weight * (log pi - log p) of each token
  is taken off its advantage: the reverse KL to the teacher by the policy gradient (on-policy distillation).
  """

  loss_name: str = "ppo"
  aggregation: str = "token_mean"
  epsilon: float = 0.2
  epsilon_high: float = 0.2
  dual_clip: float | None = None
  ceiling: float = 5.0  # CISPO's and DPPO's bound on the ratio
  kl_weight: float = 0.0  # of the KL to the reference
  kl_estimator: str = "k3"  # of `losses.kl`
  kl_in_reward: float = 0.0  # its weight there, which who writes the answers takes off
  teacher_weight: float = 0.0  # of the reverse KL to the teacher, in each token's advantage
  max_length: int = 512  # of constant_length
  old: str = "policy"
  temperature: float = 1.0  # that the answers were drawn at
  importance: str = "none"  # of which unit: token, sequence, geometric
  importance_high: float = 2.0
  importance_low: float = 0.0
  importance_outside: str = "truncate"  # what lies beyond a bound is moved there, or masked
  starts_there: bool = False  # the first step is taken where the policy is its reference
  trains_as_it_scores: bool = True  # without dropout, and with one attention

  def __post_init__(self) -> None:
    for field, value, known in (
      ("loss", self.loss_name, POLICY_LOSSES),
      ("aggregation", self.aggregation, AGGREGATIONS),
      ("old", self.old, ("policy", "reference", "batch")),
      ("importance", self.importance, ("none", "token", "sequence", "geometric")),
      ("importance_outside", self.importance_outside, ("truncate", "mask")),
      ("kl_estimator", self.kl_estimator, tuple(kl.ESTIMATES)),
    ):
      if value not in known:
        raise ValueError(f"{field}={value!r}: known are {', '.join(known)}")
    if self.teacher_weight and self.loss_name in ("gspo", "rloo"):
      raise ValueError(
        f"loss={self.loss_name!r} has one ratio an answer, and a teacher says something of each token: write ppo, cispo"
        " or reinforce beside a teacher (method=grpo, cispo, centred)"
      )
    if self.kl_weight and self.kl_estimator == "k1":
      raise ValueError(
        "kl_estimator='k1': its gradient in a loss is zero on average, so that it would hold nothing back; write k2"
        " (the reverse KL's gradient) or k3 (the forward KL's), or take it off the reward (online.kl_in_reward)"
      )
    if self.loss_name == "reinforce" and self.old != "policy":
      raise ValueError(
        "loss='reinforce' has no ratio to who wrote the answers and takes them for the policy's own, so that a batch is"
        " good for one update: write online.minibatches=1 and online.passes=1, or a loss with a ratio, as cispo"
      )
    if self.loss_name == "gspo" and self.aggregation in ("token_mean", "prompt_mean"):
      raise ValueError(
        f"aggregation={self.aggregation!r}: the loss of gspo is one an answer, which would count by its tokens; write"
        " sequence_mean, where every answer counts alike, or sequence_sum, where one counts by its length (LUSPO)"
      )
    if self.importance != "none" and self.importance_outside == "mask" and not self.importance_low:
      raise ValueError(
        "importance_outside='mask' with importance_low=0 masks on one side alone: write a lower bound, as 0.5 (IcePop"
        " has 0.5 and 5), or truncate"
      )

  @property
  def needs_reference(self) -> bool:
    return self.kl_weight > 0 or self.old == "reference" or self.kl_in_reward > 0

  def check_start(self, metrics: Mapping[str, float]) -> None:
    """Before the first update every ratio to who wrote the answers is 1, and there is no KL to where the run began."""
    length = max(metrics.get("completions/mean_length", 1.0), 1.0)
    apart: dict[str, tuple[str, float]] = {}
    if self.trains_as_it_scores:
      apart["kl_to_old"] = ("who wrote the answers", metrics.get("kl_to_old", 0.0))
    if self.starts_there:
      penalty = metrics.get("reward_kl_penalty", 0.0) / length
      apart["kl"] = ("the reference", metrics.get("kl", 0.0))
      apart["reward_kl_penalty"] = ("the reference", penalty)
    for name, (whom, value) in apart.items():
      if not abs(value) <= START:
        raise ValueError(
          f"before any training the policy is {value:.3g} nats a token from {whom} ({name}), where rounding explains"
          f" {START:g}: they are not of the same model, or do not compute it alike"
        )

  def totals(
    self,
    trainable: Any,
    context: Context,
    batch: Batch,
    key: Array | None,
    *,
    memory: Memory,
    training: bool,
  ) -> Totals:
    in_row = jnp.max(jnp.where(batch["present"], batch["group"] + 1, 0), axis=1)
    tokens, answers = jnp.sum(spans(batch).mask), jnp.sum(batch["present"])
    return {"tokens": tokens, "count": answers, "prompts": jnp.sum(in_row)}

  def teaches(self, batch: Batch) -> Array | None:
    """Without a KL every loss is a multiple of the advantage: answers that all agree have none, and no gradient."""
    if self.kl_weight or self.teacher_weight:
      return None
    at = spans(batch)
    return jnp.any(at.mask & (at.per_token(batch["advantage"]) != 0))

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    at = spans(batch)
    online = "sampling_logps" in batch
    how = dict(entropy=online or not training, temperature=self.temperature)
    scores = self.scores(forward, batch, at.mask, **how)
    logps = scores.logp
    ref_logps = old_logps = jax.lax.stop_gradient(logps)
    if self.kl_weight or self.old == "reference":
      ref_logps = reference_logps(self, context, batch, at.mask, temperature=self.temperature)
    if self.old == "reference":
      old_logps = ref_logps
    elif self.old == "batch":
      old_logps = jnp.where(at.mask, batch["old_logps"], 0.0)
    advantages, metrics = self._advantages(batch, old_logps, at)
    losses, stats = self._surrogate(logps, old_logps, advantages, at)
    if self.old == "batch":
      metrics["kl_to_old"] = metrics_lib.mean(stop(kl.k3(old_logps, logps, at.mask)), at.mask)
    if online:
      sampling = jnp.where(at.mask, following(batch["sampling_logps"]), 0.0)
      losses, told = self._corrected(losses, old_logps, sampling, at)
      metrics |= told
    if self.kl_weight:
      divergence = kl.ESTIMATES[self.kl_estimator](logps, ref_logps, at.mask)
      losses = losses + self.kl_weight * divergence
      metrics["kl"] = metrics_lib.mean(jax.lax.stop_gradient(divergence), at.mask)
    loss = jnp.sum(losses * self._weights(at, batch["group"], totals))
    metrics |= self._metrics(loss, stats, batch, at, totals)
    if online or not training:
      metrics["entropy"] = metrics_lib.mean(jax.lax.stop_gradient(scores.entropy), at.mask)
    return loss, metrics

  def _advantages(self, batch: Batch, old_logps: Array, at: Spans) -> tuple[Array, Metrics]:
    """(of each token: its answer's, less the weighted reverse KL to the teacher; what is told of that)."""
    advantages = _of_tokens(batch, at)
    if not self.teacher_weight:
      return advantages, {}
    drawn_with = following(batch["sampling_logps"]) if "sampling_logps" in batch else old_logps
    apart = stop(jnp.where(at.mask, drawn_with - batch["teacher_logps"], 0.0))
    told = {"teacher/reverse_kl": metrics_lib.mean(apart, at.mask)}
    return advantages - self.teacher_weight * apart, told

  def _corrected(
    self, losses: Array, old_logps: Array, sampling: Array, at: Spans
  ) -> tuple[Array, Metrics]:
    """(losses times the importance weights, how far the sampler's program and this one are apart)."""
    apart = jnp.abs(old_logps - sampling)
    metrics: Metrics = {
      "sampling/logp_difference": metrics_lib.mean(apart, at.mask),
      # NeMo-RL's token_mult_prob_error: above 1.02 and rising, weights do not reach the sampler
      "sampling/token_mult_prob_error": metrics_lib.mean(
        jnp.exp(jnp.minimum(apart, kl.LIMIT)), at.mask
      ),
      **_off_policy(old_logps, sampling, at),
    }
    if self.importance == "none":
      return losses, metrics
    weigh = functools.partial(
      policy.importance_weights, old_logps, sampling, at, level=self.importance
    )
    low, high = self.importance_low, self.importance_high
    weights = weigh(ceiling=high, floor=low, outside=self.importance_outside)
    free = weigh(ceiling=float("inf"))
    above, below = free > high, free < low
    told = {
      "is_mean": metrics_lib.mean(free, at.mask),
      "is_max": metrics_lib.largest(free, at.mask),
      "is_min": metrics_lib.least(free, at.mask),
      "is_std": metrics_lib.deviation(weights, at.mask),
      "is_eff_sample_size": metrics_lib.sample_share(weights, at.mask),
      "is_ratio_fraction_high": metrics_lib.mean(above, at.mask),
      "is_ratio_fraction_low": metrics_lib.mean(below, at.mask),
    }
    if self.importance_outside == "mask":
      told["rs_masked_fraction"] = metrics_lib.mean(above | below, at.mask)
    metrics |= {f"rollout_corr/rollout_{name}": value for name, value in told.items()}
    return losses * weights, metrics

  def _surrogate(
    self, logps: Array, old_logps: Array, advantages: Array, at: Spans
  ) -> tuple[Array, PolicyStats]:
    """The loss of each token; a ratio of whole answers is that of each of their tokens."""
    clip = dict(epsilon=self.epsilon, epsilon_high=self.epsilon_high)
    match self.loss_name:
      case "reinforce":
        return policy.reinforce(logps, advantages, at.mask)
      case "cispo":
        return policy.cispo(logps, old_logps, advantages, at.mask, ceiling=self.ceiling)
      case "dppo_tv" | "dppo_kl":
        by = self.loss_name.removeprefix("dppo_")
        return policy.dppo(
          logps, old_logps, advantages, at.mask, divergence=by, ceiling=self.ceiling, **clip
        )
      case "ppo":
        return policy.clipped_surrogate(
          logps, old_logps, advantages, at.mask, dual_clip=self.dual_clip, **clip
        )
    is_gspo = self.loss_name == "gspo"
    return policy.sequence_surrogate(logps, old_logps, advantages, at, normalise=is_gspo, **clip)

  def _weights(self, at: Spans, group: Array, totals: Totals) -> Array:
    """Per token, [rows, time]: how tokens add up to the loss of the whole optimizer batch."""
    answers = totals["count"]
    if self.loss_name == "rloo":  # one loss an answer, not one a token
      return policy.sequence_mean(at, answers=answers)
    match self.aggregation:
      case "token_mean":
        return policy.token_mean(at, tokens=totals["tokens"])
      case "sequence_mean":
        return policy.sequence_mean(at, answers=answers)
      case "prompt_mean":
        return policy.prompt_mean(at, group, prompts=totals["prompts"])
      case "constant_length":
        return policy.constant_length(at, answers=answers, length=self.max_length)
    return policy.sequence_sum(at, answers=answers)

  def _metrics(
    self, loss: Array, stats: PolicyStats, batch: Batch, at: Spans, totals: Totals
  ) -> Metrics:
    present, score = batch["present"], batch["score"]
    mean = lambda x, where=present: metrics_lib.mean(x, where)
    return {
      "loss": Mean(
        jax.lax.stop_gradient(loss) * totals["count"], jnp.sum(present).astype(jnp.float32)
      ),
      "reward": mean(jnp.nan_to_num(score), present & ~jnp.isnan(score)),
      "advantage": mean(batch["advantage"]),
      "reward_std": mean(batch["deviation"]),
      "frac_reward_zero_std": mean(batch["deviation"] == 0),
      "completions/mean_length": mean(at.lengths),
      "clip_ratio/low_mean": mean(stats.clipped_low, at.mask),
      "clip_ratio/high_mean": mean(stats.clipped_high, at.mask),
      "tokens": jnp.sum(batch["segment_ids"] > 0),
    }


def _of_tokens(batch: Batch, at: Spans) -> Array:
  """[rows, time]: of each token where a critic tells them apart, else of its answer."""
  return batch["advantages"] if "advantages" in batch else at.per_token(batch["advantage"])


def _off_policy(logps: Array, sampling: Array, at: Spans) -> Metrics:
  """How far the trainer's distribution pi is from the sampler's mu, under verl's names; rho = pi / mu.

  Perplexities are of each answer, and averaged over answers.
  """
  log_rho = jnp.where(at.mask, logps - sampling, 0.0)
  log_rho, of_answer = stop(log_rho), stop(at.per_answer(log_rho))
  bounded = lambda x: jnp.clip(x, -kl.LIMIT, kl.LIMIT)
  log_ppl = lambda x: -stop(at.per_answer(x)) / at.lengths
  ratio = log_ppl(logps) - log_ppl(sampling)
  scored = at.present & (at.per_answer(at.mask) > 0)
  token = lambda x: metrics_lib.mean(x, at.mask)
  answer = lambda x: metrics_lib.mean(x, scored)
  told = {
    "kl": token(-log_rho),
    "k3_kl": token(kl.k3(sampling, logps, at.mask)),
    "training_ppl": answer(jnp.exp(bounded(log_ppl(logps)))),
    "rollout_ppl": answer(jnp.exp(bounded(log_ppl(sampling)))),
    "log_ppl_diff": answer(ratio),
    "log_ppl_abs_diff": answer(jnp.abs(ratio)),
    "ppl_ratio": answer(jnp.exp(bounded(ratio))),
    "chi2_token": token(jnp.expm1(2 * bounded(log_rho))),
    "chi2_seq": answer(jnp.expm1(2 * bounded(of_answer))),
  }
  return {f"rollout_corr/{name}": stop(value) for name, value in told.items()}
