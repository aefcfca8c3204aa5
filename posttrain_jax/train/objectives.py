"""Objectives join model, data and loss, and add up exactly.

`totals` is what the whole optimizer batch decides; `loss` is the contribution of one micro-batch.  Contributions sum,
so one batch of 8, eight micro-batches of 1 and eight devices give the same gradient, unequal lengths included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from posttrain_jax import adapters
from posttrain_jax.core import struct, tree
from posttrain_jax.losses import logprob, supervised
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.train import metrics as metrics_lib
from posttrain_jax.train.metrics import Mean

Array = jax.Array
Batch = Mapping[str, Array]  # tokens, loss_mask, segment_ids, positions, channel: [rows, time]


@struct.dataclass
class Frozen:
  """What a step reads and never changes: the base, and the part of the adapter that does not train."""

  params: Any = None  # None in full fine-tuning: the parameters are the trainable tree
  adapter: Any = None
  reference: Any = None  # parameters of a reference policy; None: the base without its adapter
  memory: Any = None  # what the objective carries from step to step


class Objective(Protocol):
  """What the step needs to know of a method."""

  def start(self, trainable: Any) -> Any:
    """What the objective carries from step to step, at the start; None for nothing.  Buffers of its own."""

  def totals(
    self, trainable: Any, frozen: Frozen, batch: Batch, key: Array | None
  ) -> dict[str, Any]:
    """What the WHOLE optimizer batch decides: counts, and whatever else contributions are divided by.

    An objective that carries something returns it anew as "memory"; in evaluation (key None) it is left as it was.
    """

  def loss(
    self, trainable: Any, frozen: Frozen, batch: Batch, totals: dict[str, Array], key: Array | None
  ) -> tuple[Array, dict[str, Mean]]:
    """(contribution to the loss, metrics) of one micro-batch; both sum over micro-batches.

    key: of the randomness of training (dropout); None in evaluation, and nowhere else.
    """

  def check_start(self, metrics: Mapping[str, float]) -> None:
    """Raises ValueError where the first step's metrics, of the parameters before it, are not what they must be."""


def policy(trainable: Any, frozen: Frozen, key: Array | None = None) -> Any:
  """The parameters that are being trained, bound: the base with the adapter, or the trainable tree itself."""
  if frozen.adapter is None:
    return trainable
  return adapters.bind(frozen.params, tree.combine(trainable, frozen.adapter), key=key)


def reference(trainable: Any, frozen: Frozen) -> Any:
  """The parameters of the reference policy, never differentiated: given ones, or the base without its adapter.

  Where the adapter began with a part of the base, that part is the base's again.

  Raises:
    ValueError: full fine-tuning without a reference: its base is what changes.
  """
  given = frozen.reference
  if given is None and frozen.params is None:
    raise ValueError("full fine-tuning changes its base: give it a reference, or cache its scores")
  if given is None:
    given = adapters.original(frozen.params, frozen.adapter or {})
  return jax.lax.stop_gradient(given)


@dataclasses.dataclass(frozen=True)
class Scorer:
  """How a batch becomes scores of its tokens, for every objective alike."""

  model: ModelConfig
  dtype: Any = None  # of the computation; None: the embedding's
  remat: str = "none"
  attention_group: int = 0  # of shifted attention, in training only; 0: full attention

  @property
  def needs_reference(self) -> bool:
    return False

  def start(self, trainable: Any) -> Any:
    del trainable

  def check_start(self, metrics: Mapping[str, float]) -> None:
    del metrics

  def hidden(self, params: Any, batch: Batch, key: Array | None) -> Array:
    return decoder.hidden(
      params,
      batch["tokens"],
      self.model,
      positions=batch["positions"],
      segment_ids=batch["segment_ids"],
      prefix_ids=batch.get("prefix_ids"),
      dtype=self.dtype,
      remat=self.remat,
      attention_group=0 if key is None else self.attention_group,
    )

  def scores(
    self,
    params: Any,
    batch: Batch,
    mask: Array,
    key: Array | None,
    *,
    hidden: Array | None = None,
    **options: Any,
  ) -> logprob.Scores:
    """Of the token after each position, where the mask says so; [rows, time].  hidden: where it is known already."""
    labels, _ = targets(batch)
    return logprob.score(
      self.hidden(params, batch, key) if hidden is None else hidden,
      decoder.head(params),
      labels,
      mask=mask,
      softcap=self.model.final_softcap,
      **options,
    )


@dataclasses.dataclass(frozen=True)
class Sft(Scorer):
  """Token mean of -log p over the trained tokens of the whole optimizer batch.

  Continued pretraining is the same with every token trained.  Metrics carry TRL's names, and `loss/<channel>` for each
  task type, `loss/special` for end-of-turn and other special tokens; `entropy` in evaluation only, where one more pass
  over the logits does not cost a fifth of the step.
  """

  channels: tuple[str, ...] = ()  # names of the batch's channel indices
  special_tokens: tuple[int, ...] = ()

  def totals(self, trainable, frozen, batch, key):
    del trainable, frozen, key
    return {"tokens": jnp.sum(batch["loss_mask"].astype(jnp.float32))}

  def loss(self, trainable, frozen, batch, totals, key):
    params = policy(trainable, frozen, key)
    labels, mask = targets(batch)
    scores = self.scores(params, batch, mask, key, entropy=key is None)
    nll, _ = supervised.negative_log_likelihood(scores.logp)
    loss = jnp.sum(nll * mask) / jnp.maximum(totals["tokens"], 1.0)
    return loss, self._metrics(jax.lax.stop_gradient(nll), scores, labels, mask, batch, key)

  def _metrics(self, nll, scores, labels, mask, batch, key):
    metrics = {
      "loss": metrics_lib.mean(nll, mask),
      "mean_token_accuracy": metrics_lib.mean(scores.correct, mask),
      "tokens": jnp.sum(batch["segment_ids"] > 0),  # a plain array is a sum
    }
    if key is None:
      metrics["entropy"] = metrics_lib.mean(scores.entropy, mask)
    if self.special_tokens:
      special = jnp.isin(labels, jnp.asarray(self.special_tokens))
      metrics["loss/special"] = metrics_lib.mean(nll, mask & special)
    channel = jnp.roll(batch["channel"], -1, axis=1)
    for i, name in enumerate(self.channels):
      metrics[f"loss/{name}"] = metrics_lib.mean(nll, mask & (channel == i))
    return metrics


def targets(batch: Batch) -> tuple[Array, Array]:
  """(labels, mask): the token after each position, and whether it is one to be learned.

  `loss_mask` marks trained tokens where they stand; the hidden state one position earlier predicts them.
  """
  labels = jnp.roll(batch["tokens"], -1, axis=1)
  mask = jnp.roll(batch["loss_mask"].astype(bool), -1, axis=1).at[:, -1].set(False)
  return labels, mask
