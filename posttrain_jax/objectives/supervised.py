"""Supervised fine-tuning and continued pretraining."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.losses import logprob, supervised
from posttrain_jax.objectives.objective import (
  Batch,
  Context,
  Forward,
  Memory,
  Metrics,
  Scorer,
  Totals,
  following,
  targets,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sft(Scorer):
  """Token mean of -log p over the trained tokens of the whole optimizer batch.

  Continued pretraining is the same with every token trained.  Metrics carry TRL's names, and `loss/<channel>` for each
  task type, `loss/special` for special tokens, `loss/special/<kind>` for each kind of `markers`; `entropy` in
  evaluation only, where one more pass over the logits does not cost a fifth of the step.
  """

  channels: tuple[str, ...] = ()  # names of the batch's channel indices
  special_tokens: tuple[int, ...] = ()
  markers: tuple[
    tuple[str, tuple[int, ...]], ...
  ] = ()  # (kind, its tokens): end of turn, tool, think

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
    return {"count": jnp.sum(batch["loss_mask"].astype(jnp.float32))}

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    labels, mask = targets(batch)
    scores = self.scores(forward, batch, mask, entropy=not training)
    loss = supervised.negative_log_likelihood(scores.logp, mask, tokens=totals["count"])
    return loss, self._metrics(scores, labels, mask, batch, training)

  def _metrics(
    self, scores: logprob.Scores, labels: Array, mask: Array, batch: Batch, training: bool
  ) -> Metrics:
    nll = jax.lax.stop_gradient(-scores.logp)
    metrics: Metrics = {
      "loss": metrics_lib.mean(nll, mask),
      "mean_token_accuracy": metrics_lib.mean(scores.correct, mask),
      "tokens": jnp.sum(batch["segment_ids"] > 0),  # a plain array is a sum
    }
    if not training:
      metrics["entropy"] = metrics_lib.mean(scores.entropy, mask)
    if self.special_tokens:
      special = jnp.isin(labels, jnp.asarray(self.special_tokens))
      metrics["loss/special"] = metrics_lib.mean(nll, mask & special)
    for kind, tokens in self.markers:
      among = jnp.isin(labels, jnp.asarray(tokens))
      metrics[f"loss/special/{kind}"] = metrics_lib.mean(nll, mask & among)
    channel = following(batch["channel"])
    for i, name in enumerate(self.channels):
      metrics[f"loss/{name}"] = metrics_lib.mean(nll, mask & (channel == i))
    return metrics
