"""Labelled answers: KTO, and APO-zero without its estimate of the KL."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core.metrics import Difference, Mean
from posttrain_jax.losses import preference
from posttrain_jax.losses.spans import Spans
from posttrain_jax.objectives.objective import Batch, Context, Forward, Memory, Metrics, Totals
from posttrain_jax.objectives.reference import Compared, reference_logps
from posttrain_jax.objectives.rows import spans

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Labelled(Compared):
  """KTO: labelled answers, and the KL estimated from each prompt with another prompt's answer.

  The estimate is that of the whole optimizer batch.  Which answer stands behind which prompt is fixed with the
  data, so neither order nor division changes it.  estimate_kl=False is APO-zero on labels.
  """

  desirable_weight: float = 1.0
  undesirable_weight: float = 1.0
  estimate_kl: bool = True

  @property
  def needs_reference(self) -> bool:
    return True

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
    totals = {"count": jnp.sum(batch["present"])}
    if self.estimate_kl:
      companion = batch["companion"]
      at = spans(companion)
      # without dropout: what is estimated is the policy's KL, not that of a thinned one
      forward = self.forward(trainable, context, companion, None, training=False)
      logps, ref_logps = self._sums(forward, context, companion, at)
      totals["kl"] = preference.mismatched_kl(logps - ref_logps, at.present)
    return totals

  def _sums(
    self, forward: Forward, context: Context, batch: Batch, at: Spans
  ) -> tuple[Array, Array]:
    """(log-probabilities of answers, those under the reference), [rows, slots] each."""
    logps = self.scores(forward, batch, at.mask).logp
    ref_logps = reference_logps(self, context, batch, at.mask)
    return at.per_answer(logps), at.per_answer(ref_logps)

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    at, present = spans(batch), batch["present"]
    logps, ref_logps = self._sums(forward, context, batch, at)
    desirable = batch["label"] > 0.5
    how = dict(
      beta=self.beta,
      desirable_weight=self.desirable_weight,
      undesirable_weight=self.undesirable_weight,
    )
    log_ratio = logps - ref_logps
    if self.estimate_kl:
      losses, reward = preference.kto(log_ratio, desirable, totals["kl"], **how)
    else:
      losses, reward = preference.apo_zero_unpaired(log_ratio, desirable, **how)
    loss = jnp.sum(jnp.where(present, losses, 0.0)) / jnp.maximum(totals["count"], 1)
    mean = lambda x, where=present: metrics_lib.mean(jax.lax.stop_gradient(x), where)
    chosen, rejected = present & desirable, present & ~desirable
    rewards = mean(reward, chosen), mean(reward, rejected)
    metrics = {
      "loss": mean(losses),
      "rewards/chosen": rewards[0],
      "rewards/rejected": rewards[1],
      # labels have no pairs: the difference of two means, as TRL
      "rewards/margins": Difference(*rewards),
      "logps/chosen": mean(logps, chosen),
      "logps/rejected": mean(logps, rejected),
      "lengths/chosen": mean(at.lengths, chosen),
      "lengths/rejected": mean(at.lengths, rejected),
      "tokens": jnp.sum(batch["segment_ids"] > 0),
    }
    if self.estimate_kl:
      count = jnp.sum(present).astype(jnp.float32)
      metrics["kl"] = Mean(totals["kl"] * count, count)
    return loss, metrics
