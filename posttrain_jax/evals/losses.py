"""What a model loses on held-out rows: the mean negative log-likelihood of their trained tokens."""

from __future__ import annotations

from typing import Any

import jax

from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.data import chat, loader, schema
from posttrain_jax.evals import tasks
from posttrain_jax.models import before
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.objectives import Context, Sft, evaluation, measured

ROWS = 8  # examples in a batch


def losses(
  params: Any,
  config: ModelConfig,
  tokenizer: Any,
  template: Any,
  source: str,
  *,
  columns: dict[str, str | list[str]] | None = None,
  limit: int = 0,
) -> dict[str, float]:
  """Loss and token accuracy over the source's evaluation rows."""
  split = "eval" if source in tasks.TASKS else "train"
  rows = schema.read(source, split=split, columns=columns, chat=template is not None)
  examples = chat.encode_all(
    list(rows)[: limit or None],
    tokenizer,
    template,
    max_length=config.max_length - before.slots(params),
  ).examples
  channels = loader.channel_names(examples)
  batches = loader.eval_batches(
    examples,
    batch_size=ROWS,
    length=max(map(len, examples)),
    packing=False,
    channels=channels,
  )
  measure = jax.jit(evaluation(Sft(config, channels=channels)))
  metrics = measured(measure, batches, params, Context())
  return {"examples": len(examples), **metrics_lib.read(metrics)}


def scores(
  params: Any,
  config: ModelConfig,
  tokenizer: Any,
  template: Any,
  source: str,
  limit: int,
) -> dict[str, float]:
  """{measure: value}: of a built-in task the share answered right, of any data the loss."""
  lost = losses(params, config, tokenizer, template, source, limit=limit)
  if source not in tasks.TASKS:
    return {"loss": lost["loss"]}
  answered = tasks.evaluate(
    params, config, tokenizer, task=source, split="test", limit=limit or None, template=template
  )
  return {"accuracy": answered.accuracy, "loss": lost["loss"]}
