"""Rows of several sources in one optimizer batch: each objective sees, and counts, its own.

A batch whose answers are partly gold (`gold`, [rows, slots], 1 where the answer is the data's and not the policy's) has
two streams.  Each part of a sum divides by what it counts among its own answers in the whole optimizer batch, so that
the share of a stream in the batch says nothing of its weight in the loss.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.objectives.around import Around
from posttrain_jax.objectives.objective import (
  Batch,
  Context,
  Forward,
  Memory,
  Metrics,
  Totals,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Written(Around):
  """Another objective, on the answers that the policy wrote alone; gold ones are not there for it."""

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
    seen = written(batch)
    return self.inner.totals(trainable, context, seen, key, memory=memory, training=training)

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    return self.inner.contribution(forward, context, written(batch), totals, training=training)


def written(batch: Batch) -> Batch:
  """The batch without its gold answers; the batch itself where it says nothing of any."""
  if "gold" not in batch:
    return batch
  own = batch["gold"] == 0
  of_token = jnp.take_along_axis(
    jnp.pad(own, ((0, 0), (0, 1)), constant_values=True), batch["answer"], axis=1
  )
  return {
    **batch,
    "loss_mask": batch["loss_mask"].astype(bool) & of_token,
    "present": batch["present"] & own,
  }
