"""Reward models: Bradley-Terry on pairs, labelled outcomes, labelled steps of a process."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core import zigzag
from posttrain_jax.losses import reward
from posttrain_jax.losses.spans import Spans
from posttrain_jax.models import decoder
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

Array = jax.Array
KINDS = ("pairs", "outcomes", "steps")


@dataclasses.dataclass(frozen=True)
class Reward(Scorer):
  """A scalar a token, read where an answer ends (pairs: Bradley-Terry; outcomes) or where a step does (process).

  Each loss is the mean over the pairs, answers or steps of the whole optimizer batch.
  """

  kind: str = "pairs"  # pairs, outcomes, steps
  centering: float = 0.0  # weight of (r_w + r_l)^2
  # in an example of pairs: chosen, rejected, and perhaps a gold one, which is not compared
  answers: int = 2

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise ValueError(f"kind={self.kind!r}: a reward model learns from pairs, outcomes or steps")

  def rewards(self, params: Any, batch: Batch) -> Array:
    """The reward of each answer, [rows, slots], read at its last token."""
    return self._of_answers(Forward(params, self.hidden(params, batch)), batch)

  def of_tokens(self, params: Any, batch: Batch) -> Array:
    """The reward of the text up to each token, [rows, time]; where a step ends, the step's."""
    return _of_tokens(Forward(params, self.hidden(params, batch)), batch)

  def _of_answers(self, forward: Forward, batch: Batch) -> Array:
    answer = jnp.where(batch["loss_mask"], batch["answer"], -1)
    is_last = (answer >= 0) & (following(answer).at[:, -1].set(-1) != answer)
    at = Spans(is_last, batch["answer"], batch["present"])
    return at.per_answer(_of_tokens(forward, batch))

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
    if self.kind == "steps":
      return {"count": jnp.sum(~jnp.isnan(batch["steps"]))}
    stride = self.answers if self.kind == "pairs" else 1
    return {"count": jnp.sum(batch["present"][:, ::stride])}

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    if self.kind == "pairs":
      losses, present, metrics = self._paired(self._of_answers(forward, batch), batch)
    elif self.kind == "outcomes":
      present = batch["present"]
      losses, metrics = _judged(self._of_answers(forward, batch), batch["label"], present)
    else:
      present = ~jnp.isnan(batch["steps"])
      labels = jnp.where(present, batch["steps"], 0.0)
      losses, metrics = _judged(_of_tokens(forward, batch), labels, present)
    loss = jnp.sum(jnp.where(present, losses, 0.0)) / jnp.maximum(totals["count"], 1)
    metrics["loss"] = metrics_lib.mean(jax.lax.stop_gradient(losses), present)
    metrics["tokens"] = jnp.sum(batch["segment_ids"] > 0)
    return loss, metrics

  def _paired(self, rewards: Array, batch: Batch) -> tuple[Array, Array, Metrics]:
    chosen, rejected = rewards[:, :: self.answers], rewards[:, 1 :: self.answers]
    margin = batch["margin"][:, :: self.answers] if "margin" in batch else 0.0
    losses, stats = reward.bradley_terry(chosen, rejected, margin=margin, centering=self.centering)
    present = batch["present"][:, :: self.answers]
    mean = lambda x: metrics_lib.mean(jax.lax.stop_gradient(x), present)
    metrics = {
      "accuracy": mean(stats.correct),
      "margin": mean(stats.margin),
      "rewards/margins": mean(stats.margin),
      "mean_reward": mean((chosen + rejected) / 2),
      "rewards/chosen": mean(chosen),
      "rewards/rejected": mean(rejected),
    }
    return losses, present, metrics


def _of_tokens(forward: Forward, batch: Batch) -> Array:
  rewards = decoder.scores(forward.params, forward.hidden)[..., 0]
  return zigzag.whole(rewards, batch["tokens"].shape[1])


def _judged(rewards: Array, labels: Array, present: Array) -> tuple[Array, Metrics]:
  losses, correct = reward.binary_cross_entropy(rewards, labels)
  mean = lambda x: metrics_lib.mean(jax.lax.stop_gradient(x), present)
  return losses, {"accuracy": mean(correct), "mean_reward": mean(rewards)}
