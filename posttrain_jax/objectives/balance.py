"""How evenly a mixture's experts are loaded, as a part of the loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core.metrics import Mean
from posttrain_jax.losses import balance
from posttrain_jax.objectives.objective import (
  Batch,
  Context,
  Forward,
  Memory,
  Metrics,
  Scorer,
  Totals,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Balance(Scorer):
  """`balance.load_balance` of each micro-batch by itself, weighted by its tokens.

  It is no sum over tokens: as in transformers every micro-batch is to be even, which is a little more than that the
  batch is.
  """

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
    return {"count": jnp.sum(batch["segment_ids"] != 0)}

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    load = forward.load
    loss = balance.load_balance(load.chosen, load.probability, load.tokens)
    here = jnp.sum(batch["segment_ids"] != 0)
    mean = Mean(jax.lax.stop_gradient(loss) * here, here)
    return loss * here / jnp.maximum(totals["count"], 1), {"loss": mean}
