"""Pairs: a chosen answer over a rejected one (and, for TPO, a gold one), by the losses of `losses.preference`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core import struct, zigzag
from posttrain_jax.core.metrics import Mean
from posttrain_jax.core.product import precision
from posttrain_jax.core.weight import linear32
from posttrain_jax.losses import logprob, preference, supervised
from posttrain_jax.losses.spans import Spans
from posttrain_jax.objectives.objective import (
  Batch,
  Context,
  Forward,
  Memory,
  Metrics,
  Totals,
  following,
)
from posttrain_jax.objectives.reference import Compared, reference, reference_logps
from posttrain_jax.objectives.rows import spans

Array = jax.Array
stop = jax.lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class Loss:
  """How a loss of `losses.preference` is called: what it reads and which options it has."""

  function: Callable[..., Any]
  options: tuple[str, ...] = ("beta",)
  means: bool = False  # log-probabilities per token in place of sums
  reference: bool = True  # log-ratios to it, or log-probabilities
  # reads r_w and r_l through their difference alone: other divergences apply
  differences: bool = False


LOSSES: Mapping[str, Loss] = {
  "dpo": Loss(preference.dpo, ("beta", "label_smoothing"), differences=True),
  "dpo_norm": Loss(preference.dpo, ("beta", "label_smoothing"), means=True, differences=True),
  "robust": Loss(preference.robust, ("beta", "label_smoothing"), differences=True),
  "ipo": Loss(preference.ipo, means=True, differences=True),
  "hinge": Loss(preference.hinge, differences=True),
  "exo": Loss(preference.exo, ("beta", "label_smoothing"), differences=True),
  "discopop": Loss(preference.discopop, differences=True),
  "nca": Loss(preference.nca),
  "bco": Loss(preference.bco),
  "apo_zero": Loss(preference.apo_zero),
  "apo_down": Loss(preference.apo_down),
  "sppo": Loss(preference.sppo),
  "cpo": Loss(preference.cpo, ("beta", "label_smoothing"), reference=False),
  "simpo": Loss(preference.simpo, ("beta", "gamma_beta_ratio"), means=True, reference=False),
  "orpo": Loss(preference.orpo, means=True, reference=False),
  "tpo": Loss(preference.tpo, ("beta", "gamma_beta_ratio"), reference=False),
  "tpo_norm": Loss(preference.tpo, ("beta", "gamma_beta_ratio"), means=True, reference=False),
}
# what compares an optimizer batch's sorted differences, and what is a mean over tokens of answers and not over pairs
SORTED = ("aot", "aot_unpaired")
NLL = ("sft", "sft_with_prompt", "gold")
DIVERGENCES: Mapping[str, Callable[..., Array]] = {
  "reverse_kl": preference.reverse_kl,
  "forward_kl": preference.forward_kl,
  "jensen_shannon": preference.jensen_shannon,
  "alpha_divergence": preference.alpha_divergence,
}
KNOWN = (*LOSSES, *SORTED, *NLL)


@struct.dataclass
class Shift:
  """BCO's running mean of rewards over all pairs seen, with how many values it is of."""

  mean: Array
  count: Array


@struct.dataclass
class Pairs:
  """What is known of a batch's pairs: [rows, pairs] each, `logps` and the like [rows, time], `logits` [rows, slots]."""

  chosen: Array  # log-probabilities of answers
  rejected: Array
  ref_chosen: Array
  ref_rejected: Array
  present: Array
  weight: Array
  lengths: tuple[Array, Array]
  logps: Array
  entropy: Array
  correct: Array
  kl: Array | None  # to the reference, over the vocabulary
  logits: Array | None  # their mean

  @property
  def log_ratios(self) -> tuple[Array, Array]:
    """log pi - log pi_ref of the chosen and of the rejected answers."""
    return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected


@dataclasses.dataclass(frozen=True)
class Preference(Compared):
  """A weighted sum of losses of `losses.preference`, each the mean over the pairs of the whole optimizer batch.

  `sft` is the negative log-likelihood of chosen answers, the mean over their tokens; `sft_with_prompt` that of whole
  chosen sequences (ORPO's in TRL); `gold` that of third answers (TPO).  Metrics carry TRL's names.
  """

  losses: tuple[tuple[str, float], ...] = (("dpo", 1.0),)
  label_smoothing: float = 0.0
  gamma_beta_ratio: float = 0.0
  divergence: str = "reverse_kl"
  divergence_alpha: float = 0.5
  ld_alpha: float = 1.0  # weight of tokens past the length that both answers reach
  weighting: bool = False  # WPO: pairs count by how likely the policy is to write them
  running_shift: bool = False  # BCO's
  answers: int = 2  # in an example: chosen, rejected, and a gold one

  def __post_init__(self) -> None:
    unknown = [name for name in self.names if name not in KNOWN]
    if unknown:
      raise ValueError(f"losses has {unknown[0]!r}: known are {', '.join(KNOWN)}")
    if not any(weight for _, weight in self.losses):
      raise ValueError("losses is empty, or all its weights are 0")
    if self.divergence not in DIVERGENCES:
      raise ValueError(f"divergence={self.divergence!r}: known are {', '.join(DIVERGENCES)}")
    takes_any = lambda name: name in NLL or (name in LOSSES and LOSSES[name].differences)
    refused = [name for name in self.names if not takes_any(name)]
    if self.divergence != "reverse_kl" and refused:
      raise ValueError(
        f"divergence={self.divergence}: {refused[0]} reads more than the difference of log-ratios;"
        " write reverse_kl"
      )
    if self.running_shift and "bco" not in self.names:
      raise ValueError("running_shift is BCO's: add bco to the losses")
    if "gold" in self.names and self.answers < 3:
      raise ValueError("the loss 'gold' reads a third answer: rows need a 'reference' column")

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(name for name, _ in self.losses)

  @property
  def needs_reference(self) -> bool:
    return any(name in SORTED or (name in LOSSES and LOSSES[name].reference) for name in self.names)

  def start(self, trainable: Any) -> Memory:
    memory = super().start(trainable) or {}
    if self.running_shift:
      memory["shift"] = Shift(jnp.zeros(()), jnp.zeros(()))
    return memory or None

  def after_update(self, trainable: Any, memory: Memory, totals: Totals) -> Memory:
    memory = super().after_update(trainable, memory, totals)
    return {**memory, "shift": totals["shift"]} if self.running_shift else memory

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
    at = spans(batch)
    totals: Totals = {"count": jnp.sum(batch["present"][:, :: self.answers])}
    for name in self.names:
      if name in NLL:
        totals[name] = jnp.sum(self._nll_mask(name, batch, at))
    if self.running_shift or any(name in SORTED for name in self.names):
      forward = self.forward(trainable, context, batch, key, training=training)
      pairs = stop(self.pairs(forward, context, batch, at, training=training))
      totals |= self._of_the_whole(pairs, memory, training)
    return totals

  def _of_the_whole(self, pairs: Pairs, memory: Memory, training: bool) -> Totals:
    """What ranking and the running shift take from all pairs of the optimizer batch; absent ones are +inf."""
    whole = {name: self._ranked(name, pairs) for name in self.names if name in SORTED}
    totals: Totals = {
      name: tuple(jnp.where(pairs.present, values, jnp.inf) for values in sides)
      for name, sides in whole.items()
    }
    if self.running_shift:
      shift = memory["shift"]
      if training:
        rewards = self.beta * jnp.stack(pairs.log_ratios)
        present = jnp.stack([pairs.present] * 2)
        shift = Shift(*preference.running_mean(shift.mean, shift.count, rewards, present))
      totals["shift"] = shift
    return totals

  def _ranked(self, name: str, pairs: Pairs) -> tuple[Array, Array]:
    """The two values of each pair that a loss of SORTED compares by their ranks."""
    if name == "aot":
      return pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return pairs.log_ratios

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    at = spans(batch)
    pairs = self.pairs(forward, context, batch, at, training=training)
    metrics: Metrics = {}
    total = jnp.zeros(())
    for name, scale in self.losses:
      if name in NLL:
        mask = self._nll_mask(name, batch, at)
        value = supervised.negative_log_likelihood(pairs.logps, mask, tokens=totals[name])
        shown = "nll_loss" if name != "gold" else "nll_loss/gold"
        metrics[shown] = metrics_lib.mean(stop(-pairs.logps), mask)
      else:
        value = self._mean(self._loss_of(name, pairs, totals), pairs, totals)
      total = total + scale * value
    # a mean over pairs whose contributions are already divided: the sum is the loss
    count = jnp.sum(pairs.present).astype(jnp.float32)
    metrics["loss"] = Mean(stop(total) * totals["count"], count)
    return total, metrics | self._metrics(pairs, batch, at, training)

  def _mean(self, losses: Array, pairs: Pairs, totals: Totals) -> Array:
    """The part of these pairs in the weighted mean over all of the optimizer batch."""
    weight = pairs.present * pairs.weight / jnp.maximum(totals["count"], 1)
    return jnp.sum(weight * jnp.where(pairs.present, losses, 0.0))

  def _loss_of(self, name: str, pairs: Pairs, totals: Totals) -> Array:
    """The loss of each pair, [rows, pairs]."""
    if name in SORTED:
      function = preference.aot if name == "aot" else preference.aot_unpaired
      return function(
        *self._ranked(name, pairs),
        beta=self.beta,
        label_smoothing=self.label_smoothing,
        among=totals[name],
      )[0]
    loss = LOSSES[name]
    values = (pairs.chosen, pairs.rejected)
    if loss.reference:
      values = tuple(self._score(log_ratio) for log_ratio in pairs.log_ratios)
    if loss.means:
      values = (values[0] / pairs.lengths[0], values[1] / pairs.lengths[1])
    every = {
      "beta": self.beta,
      "label_smoothing": self.label_smoothing,
      "gamma_beta_ratio": self.gamma_beta_ratio,
    }
    options = {option: every[option] for option in loss.options}
    if name == "bco" and self.running_shift:
      options["shift"] = totals["shift"].mean
    return loss.function(*values, **options)[0]

  def _score(self, log_ratio: Array) -> Array:
    options = {"alpha": self.divergence_alpha} if self.divergence == "alpha_divergence" else {}
    return DIVERGENCES[self.divergence](log_ratio, **options)

  def compare(self, trainable: Any, context: Context, batch: Batch) -> dict[str, Array]:
    """What each pair says, [rows, pairs]: implicit rewards, log-ratios to the reference (drifts), lengths, presence."""
    forward = self.forward(trainable, context, batch, None, training=False)
    pairs = self.pairs(forward, context, batch, spans(batch), training=False)
    chosen, rejected = self._rewards(pairs)
    compared = {
      "present": pairs.present,
      "chosen_length": pairs.lengths[0],
      "rejected_length": pairs.lengths[1],
      "chosen": chosen,
      "rejected": rejected,
    }
    if self.needs_reference:
      compared["chosen_drift"], compared["rejected_drift"] = pairs.log_ratios
    return compared

  def _rewards(self, pairs: Pairs) -> tuple[Array, Array]:
    """beta r, or beta log pi where there is no reference, per token where the loss has means."""
    if self.needs_reference:
      chosen, rejected = pairs.log_ratios
      return self.beta * chosen, self.beta * rejected
    means = any(name in LOSSES and LOSSES[name].means for name in self.names)
    by = pairs.lengths if means else (1.0, 1.0)
    return self.beta * pairs.chosen / by[0], self.beta * pairs.rejected / by[1]

  def pairs(
    self, forward: Forward, context: Context, batch: Batch, at: Spans, *, training: bool
  ) -> Pairs:
    """Log-probabilities of the answers of each pair under policy and reference, and what else losses read of them."""
    mask = at.mask
    if "sft_with_prompt" in self.names:
      mask = mask | self._nll_mask("sft_with_prompt", batch, at)
    scores = self.scores(forward, batch, mask, entropy=not training, collision=self.weighting)
    sums = self._sums(scores.logp, at)
    ref_sums, divergence = jnp.zeros_like(sums), None
    if self.needs_reference:
      ref_logps, divergence = self._reference(forward, context, batch, at.mask, training)
      ref_sums = self._sums(ref_logps, at)
    side = lambda x, i: x[:, i :: self.answers]
    weight = (
      side(batch["weight"], 0) if "weight" in batch else jnp.ones_like(sums[:, :: self.answers])
    )
    if self.weighting:
      aligned = at.per_answer(scores.logp - scores.log_collision) / at.lengths
      weight = weight * preference.wpo_weight(side(aligned, 0), side(aligned, 1))
    return Pairs(
      chosen=side(sums, 0),
      rejected=side(sums, 1),
      ref_chosen=side(ref_sums, 0),
      ref_rejected=side(ref_sums, 1),
      present=side(batch["present"], 0),
      weight=weight,
      lengths=(side(at.lengths, 0), side(at.lengths, 1)),
      logps=scores.logp,
      entropy=scores.entropy,
      correct=scores.correct,
      kl=divergence,
      logits=None if training else self._mean_logits(forward, at),
    )

  def _reference(
    self, forward: Forward, context: Context, batch: Batch, mask: Array, training: bool
  ) -> tuple[Array, Array | None]:
    """(log-probabilities, KL of the policy's next-token distributions to the reference's or None), [rows, time].

    The KL is for evaluation, where the reference is at hand: its logits are needed, and a cache holds none.
    """
    if training or not self.at_hand(context):
      return reference_logps(self, context, batch, mask), None
    params = reference(context)
    theirs = Forward(params, self.hidden(params, batch))
    if "ref_logps" in batch:
      ref_logps = reference_logps(self, context, batch, mask)
    else:
      ref_logps = self.scores(theirs, batch, mask).logp
    divergence = logprob.kl_divergence(
      forward.hidden,
      self.head(forward),
      theirs.hidden,
      self.head(theirs),
      mask=zigzag.cut(mask),
      softcap=self.model.final_softcap,
    )
    return ref_logps, zigzag.whole(divergence, mask.shape[1])

  def _mean_logits(self, forward: Forward, at: Spans) -> Array | None:
    """[rows, slots]: over the vocabulary and an answer's scored tokens, which a linear head gives of their mean."""
    if self.model.final_softcap is not None:
      return None
    where = jax.nn.one_hot(at.answer, at.present.shape[1], dtype=forward.hidden.dtype)
    where = where * at.mask[..., None] / at.lengths[:, None, :]
    means = jnp.einsum(
      "rts,rte->rse", zigzag.cut(where), forward.hidden, precision=precision(where, forward.hidden)
    )
    return jnp.mean(linear32(means, self.head(forward)), axis=-1)

  def _sums(self, logps: Array, at: Spans) -> Array:
    total, lengths = at.per_answer(logps), at.lengths
    if self.ld_alpha == 1:
      return total
    shorter = jnp.minimum(lengths[:, 0 :: self.answers], lengths[:, 1 :: self.answers])
    limit = at.per_token(jnp.repeat(shorter, self.answers, axis=1))
    before = jnp.cumsum(lengths * at.present, axis=1) - lengths * at.present
    place = jnp.cumsum(at.mask, axis=1) - at.per_token(before)
    head = at.per_answer(jnp.where(place <= limit, logps, 0.0))
    return preference.length_desensitised(total, head, alpha=self.ld_alpha)

  def _nll_mask(self, name: str, batch: Batch, at: Spans) -> Array:
    side = at.answer % self.answers
    is_answer = at.answer < batch["present"].shape[1]
    if name == "gold":
      return at.mask & is_answer & (side == 2)
    if name == "sft":
      return at.mask & is_answer & (side == 0)
    inside = (following(batch["segment_ids"]) > 0) & (following(batch["positions"]) > 0)
    return (inside & ((is_answer & (side == 0)) | ~is_answer)).at[:, -1].set(False)

  def _metrics(self, pairs: Pairs, batch: Batch, at: Spans, training: bool) -> Metrics:
    pairs = stop(pairs)
    present = pairs.present
    chosen, rejected = self._rewards(pairs)
    mean = lambda x, where=present: metrics_lib.mean(x, where)
    correct = (chosen > rejected).astype(jnp.float32)
    longer = pairs.lengths[0] > pairs.lengths[1]
    shorter = pairs.lengths[0] < pairs.lengths[1]
    metrics = {
      "rewards/chosen": mean(chosen),
      "rewards/rejected": mean(rejected),
      "rewards/margins": mean(chosen - rejected),
      "rewards/margins_histogram": metrics_lib.histogram(chosen - rejected, present),
      "rewards/accuracies": mean(correct),
      "rewards/accuracies/chosen_longer": mean(correct, present & longer),
      "rewards/accuracies/chosen_shorter": mean(correct, present & shorter),
      "logps/chosen": mean(pairs.chosen),
      "logps/rejected": mean(pairs.rejected),
      "lengths/chosen": mean(pairs.lengths[0]),
      "lengths/rejected": mean(pairs.lengths[1]),
      "mean_token_accuracy": metrics_lib.mean(pairs.correct, self._nll_mask("sft", batch, at)),
      "tokens": jnp.sum(batch["segment_ids"] > 0),
    }
    if self.needs_reference:
      log_ratios = pairs.log_ratios
      metrics["logps/chosen_drift"] = mean(log_ratios[0])
      metrics["logps/rejected_drift"] = mean(log_ratios[1])
    if pairs.kl is not None:
      metrics["kl"] = metrics_lib.mean(pairs.kl, at.mask)
    if pairs.logits is not None:
      metrics["logits/chosen"] = mean(pairs.logits[:, 0 :: self.answers])
      metrics["logits/rejected"] = mean(pairs.logits[:, 1 :: self.answers])
    if "orpo" in self.names:
      odds = preference.log_odds_ratio(
        pairs.chosen / pairs.lengths[0], pairs.rejected / pairs.lengths[1]
      )
      metrics["log_odds_chosen"] = mean(odds)
      metrics["log_odds_ratio"] = mean(jax.nn.log_sigmoid(odds))
    if not training:
      metrics["entropy"] = metrics_lib.mean(pairs.entropy, at.mask)
    return metrics
