"""PPO: a policy-gradient loss beside a critic's, which learns what the return from each token on will be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax import adapters
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core import tree, zigzag
from posttrain_jax.core.metrics import Mean
from posttrain_jax.core.weight import linear32
from posttrain_jax.losses import policy
from posttrain_jax.losses.spans import Spans
from posttrain_jax.objectives.around import Around
from posttrain_jax.objectives.objective import (
  CRITIC,
  Batch,
  Context,
  Forward,
  Memory,
  Metrics,
  Totals,
)
from posttrain_jax.objectives.rows import spans

Array = jax.Array
stop = jax.lax.stop_gradient
HEAD = "score"  # the critic's branch for it, as a reward model has one
TRUNKS = ("own", "shared")
# by which a value may be off the one that its batch was made with, over their mean size and 1: rounding
ROUNDING = {"float32": 1e-4, "bfloat16": 0.05}


@dataclasses.dataclass(frozen=True)
class ActorCritic(Around):
  """The actor's loss + weight * the mean of (V - R)^2 / 2 over the tokens of the whole optimizer batch.

  The actor, its `part`, is `Grouped`, or a sum that begins with it.

  V is the critic's value of the text before a token, R the return that was collected from there on.  `trainable` and
  the context's `fixed` have a branch `critic`: a score head, and with trunk="own" what trains on a trunk of its own, an
  adapter on the base that the policy has, or in full fine-tuning all parameters.  trunk="shared" reads the policy's
  hidden states, into which the critic's gradient flows.

  A batch has, beside what the actor reads, [rows, time] at the position before each token: `advantages`, `returns`, and
  `old_values`, those of the critic as the answers were scored.  Schulman et al. 2017, arXiv 1707.06347, eq. 9.
  """

  trunk: str = "own"
  weight: float = 0.5  # of the critic's loss
  epsilon: float | None = 0.2  # how far a value may move from the old one; None: as it will
  values_as_it_scores: bool = True  # in training without dropout, and with one attention

  def __post_init__(self) -> None:
    if self.trunk not in TRUNKS:
      raise ValueError(f"trunk={self.trunk!r}: known are {', '.join(TRUNKS)}")
    super().__post_init__()

  def after_update(self, trainable: Any, memory: Memory, totals: Totals) -> Memory:
    return self.inner.after_update(trainable, memory, totals["actor"])

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
    actor = self.inner.totals(trainable, context, batch, key, memory=memory, training=training)
    return {"actor": actor, "count": actor["count"], "tokens": jnp.sum(spans(batch).mask)}

  def forward(
    self, trainable: Any, context: Context, batch: Batch, key: Array | None, *, training: bool
  ) -> Forward:
    forward = super().forward(trainable, context, batch, key, training=training)
    critic, hidden = trainable[CRITIC], forward.hidden
    if self.trunk == "own":
      params = tree.without(critic, HEAD)
      if context.fixed is not None:
        fixed = tree.without(context.fixed[CRITIC], HEAD)
        other = None if key is None or not training else jax.random.fold_in(key, 1)
        params = adapters.bind(context.base, tree.combine(params, fixed), key=other)
      hidden = self.hidden(params, batch, training=training)
    values = linear32(hidden, critic[HEAD]["weight"])[..., 0]
    return dataclasses.replace(forward, values=zigzag.whole(values, batch["tokens"].shape[1]))

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    actor = self.inner.contribution
    loss, metrics = actor(forward, context, batch, totals["actor"], training=training)
    at = spans(batch)
    losses, is_clipped = self._value_losses(forward.values, batch, at)
    total = loss + self.weight * jnp.sum(losses) / jnp.maximum(totals["tokens"], 1)
    mean = lambda x: metrics_lib.mean(stop(x), at.mask)
    metrics |= {
      "loss/policy_avg": metrics["loss"],
      "loss/value_avg": mean(losses),
      "val/clipfrac_avg": mean(is_clipped),
      "critic/values/mean": mean(jnp.where(at.mask, forward.values, 0.0)),
      "critic/returns/mean": mean(batch["returns"]),
      "critic/moved": mean(jnp.abs(jnp.where(at.mask, forward.values - batch["old_values"], 0.0))),
    }
    # contributions are already divided by the whole batch's counts: the sum is the loss
    metrics["loss"] = Mean(stop(total) * totals["count"], metrics["loss"].count)
    return total, metrics

  def _value_losses(self, values: Array, batch: Batch, at: Spans) -> tuple[Array, Array]:
    """(loss of each token, where the bound on a value decides), [rows, time]."""
    epsilon = float("inf") if self.epsilon is None else self.epsilon
    return policy.clipped_value(
      values, batch["old_values"], batch["returns"], at.mask, epsilon=epsilon
    )

  def check_start(self, metrics: Mapping[str, float]) -> None:
    """Before the first update the critic's values are those that the batch was made with."""
    self.inner.check_start(metrics)
    moved = metrics.get("critic/moved", 0.0) / max(abs(metrics.get("critic/values/mean", 0.0)), 1.0)
    dtype = jnp.dtype(self.products or self.dtype or jnp.float32).name
    allowed = ROUNDING.get(dtype, ROUNDING["bfloat16"])
    if self.values_as_it_scores and not moved <= allowed:
      raise ValueError(
        f"before any training the critic's values are {moved:.3g} off those that its returns were made with"
        f" (critic/moved), where rounding explains {allowed:g}: the two are not computed alike"
      )
