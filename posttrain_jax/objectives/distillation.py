"""Distillation: a student moves towards what a teacher says of the same tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core import zigzag
from posttrain_jax.losses import distillation
from posttrain_jax.losses.distillation import Compared, Likeliest, Whole
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
FORWARD = distillation.Loss("forward_kl")


@dataclasses.dataclass(frozen=True)
class Distilled(Scorer):
  """Token mean of a divergence from the teacher (`losses.distillation`) over the trained tokens of the whole batch.

  Rows are any that have trained tokens: texts, or answers, whoever wrote them.  The teacher is `context.teacher`, read
  by `teacher`; or its most likely tokens are in the batch (`teacher_ids`, `teacher_logps`), computed once.
  """

  divergence: distillation.Loss = FORWARD
  temperature: float = 1.0  # of both models' softmax
  teacher: Scorer | None = None  # how the teacher reads a batch; None where batches have it
  vocab: int | None = None  # the tokens that both know; None: all

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
    return {"count": jnp.sum(targets(batch)[1].astype(jnp.float32))}

  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    _, mask = targets(batch)
    told = self._compared(forward, context, batch, mask)
    loss = jnp.sum(told.divergence) / jnp.maximum(totals["count"], 1)
    mean = lambda x: metrics_lib.mean(jax.lax.stop_gradient(x), mask)
    metrics: Metrics = {
      "loss": mean(told.divergence),
      "teacher/agreement": mean(told.agrees),
      "nll_loss": mean(told.nll),
      "mean_token_accuracy": mean(told.correct),
      "tokens": jnp.sum(batch["segment_ids"] > 0),
    }
    if "teacher_ids" in batch:
      theirs = -jnp.expm1(following(batch["teacher_logps"])[..., -1])
      metrics |= {"teacher/mass": mean(theirs), "teacher/student_mass": mean(told.mass)}
    return loss, metrics

  def _compared(self, forward: Forward, context: Context, batch: Batch, mask: Array) -> Compared:
    """[rows, time], of the token after each position."""
    labels, _ = targets(batch)
    cut = lambda name: zigzag.cut(following(batch[name]))
    teacher: Whole | Likeliest
    if "teacher_ids" in batch:
      teacher, head, softcap = Likeliest(cut("teacher_ids"), cut("teacher_logps")), None, None
    else:
      if self.teacher is None or context.teacher is None:
        raise ValueError("there is no teacher: neither in the batch nor beside the student")
      params = jax.lax.stop_gradient(context.teacher)
      theirs = Forward(params, self.teacher.hidden(params, batch))
      teacher, head = Whole(theirs.hidden), self.teacher.head(theirs)
      softcap = self.teacher.model.final_softcap
    told = distillation.compared(
      forward.hidden,
      self.head(forward),
      teacher,
      head,
      zigzag.cut(labels),
      mask=zigzag.cut(mask),
      options=distillation.Options(
        self.divergence, self.model.final_softcap, softcap, self.temperature, self.vocab
      ),
    )
    return jax.tree.map(lambda x: zigzag.whole(x, mask.shape[1]), told)


def teacher_logps(
  reader: Scorer, params: Any, batch: Batch, mask: Array, *, temperature: float = 1.0
) -> Array:
  """[rows, time] log-probabilities under the teacher of the tokens after each position; 0 where the mask is False."""
  params = jax.lax.stop_gradient(params)
  forward = Forward(params, reader.hidden(params, batch))
  return jax.lax.stop_gradient(reader.scores(forward, batch, mask, temperature=temperature).logp)
