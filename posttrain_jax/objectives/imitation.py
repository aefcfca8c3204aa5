"""The likelihood of the better answers, beside whatever loss rows of answers have."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.losses import supervised
from posttrain_jax.objectives.objective import (
  Batch,
  Context,
  Forward,
  Memory,
  Metrics,
  Scorer,
  Totals,
)
from posttrain_jax.objectives.rows import spans

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Imitation(Scorer):
  """Token mean of -log p over the answers that are worth imitating, of the whole optimizer batch.

  Which these are the rows say: of `pairs` the chosen ones; of `labels` and `outcomes` those with label 1; of `scored`
  groups those with a positive advantage; of `prompts` the data's own (`gold`); of `steps` whole solutions without a
  wrong step.
  """

  kind: str = "pairs"

  def _mask(self, batch: Batch) -> Array:
    at = spans(batch)
    match self.kind:
      case "pairs":
        good = jnp.arange(at.present.shape[1]) % 2 == 0
      case "labels" | "outcomes":
        good = batch["label"] > 0.5
      case "scored":
        good = batch["advantage"] > 0
      case "prompts":
        good = batch["gold"] > 0
      case _:
        wrong = dataclasses.replace(at, mask=batch["steps"] == 0, answer=batch["answer"])
        good = wrong.per_answer(jnp.ones(at.mask.shape)) == 0
    good = jnp.broadcast_to(good, at.present.shape) & at.present
    return at.mask & (at.per_token(good.astype(jnp.float32)) > 0)

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
    return {"count": jnp.sum(self._mask(batch))}

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    mask = self._mask(batch)
    logps = self.scores(forward, batch, mask).logp
    loss = supervised.negative_log_likelihood(logps, mask, tokens=totals["count"])
    nll = metrics_lib.mean(jax.lax.stop_gradient(-logps), mask)
    return loss, {"loss": nll, "nll_loss": nll, "tokens": jnp.sum(batch["segment_ids"] > 0)}
