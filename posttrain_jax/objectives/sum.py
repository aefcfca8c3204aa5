"""Several objectives on the same rows, added up with weights over one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core.metrics import Mean
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
class Sum(Scorer):
  """sum_i weight_i loss_i, each part the mean over what it counts in the whole optimizer batch.

  A metric that several parts have is the first one's; `loss` is the sum's, and `loss/NAME` each part's.
  """

  parts: tuple[tuple[str, Scorer, float], ...] = ()  # (name, objective, weight)

  @property
  def needs_reference(self) -> bool:
    return any(part.needs_reference for _, part, _ in self.parts)

  def start(self, trainable: Any) -> Memory:
    memory = {name: part.start(trainable) for name, part, _ in self.parts}
    return memory if any(held is not None for held in memory.values()) else None

  def context(self, context: Context, memory: Memory) -> Context:
    for name, part, _ in self.parts:
      context = part.context(context, memory and memory[name])
    return context

  def after_update(self, trainable: Any, memory: Memory, totals: Totals) -> Memory:
    if memory is None:
      return None
    return {
      name: part.after_update(trainable, memory[name], totals[name]) for name, part, _ in self.parts
    }

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
    totals: Totals = {
      name: part.totals(
        trainable, context, batch, key, memory=memory and memory[name], training=training
      )
      for name, part, _ in self.parts
    }
    first, _, _ = self.parts[0]
    return {**totals, "count": totals[first]["count"]}

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    contributions = [
      part.contribution(forward, context, batch, totals[name], training=training)
      for name, part, _ in self.parts
    ]
    metrics: Metrics = {}
    for (name, _, _), (_, theirs) in zip(self.parts, contributions):
      metrics = {**theirs, **metrics, f"loss/{name}": theirs["loss"]}
    losses = [weight * loss for (_, _, weight), (loss, _) in zip(self.parts, contributions)]
    total = sum(losses, start=jnp.zeros(()))
    # contributions are already divided by the whole batch's counts: the sum is the loss
    count = contributions[0][1]["loss"].count
    metrics["loss"] = Mean(jax.lax.stop_gradient(total) * totals["count"], count)
    return total, metrics

  def check_start(self, metrics: Mapping[str, float]) -> None:
    self.parts[0][1].check_start(metrics)
