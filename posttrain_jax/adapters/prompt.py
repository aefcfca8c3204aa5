"""Prompt tuning: embeddings of no token that stand before every text.  Lester et al. 2021."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.node import Standing
from posttrain_jax.core import struct, weight
from posttrain_jax.models import attention, before
from posttrain_jax.models.config import ModelConfig

Array = jax.Array


@struct.dataclass
class SoftPrompt(Standing):
  """embeddings: [slots, embed], put before the tokens' own as they are: no family scales it."""

  embeddings: Array
  TRAINED = ("embeddings",)

  def segments(self, batch: int) -> Array:
    """[batch, slots]: every document sees it."""
    return jnp.full((batch, self.embeddings.shape[0]), attention.EVERYONE, jnp.int32)

  def read(self, batch: int) -> Array:
    """[batch, slots, embed]."""
    return jnp.broadcast_to(self.embeddings, (batch, *self.embeddings.shape))

  @property
  def slots(self) -> int:
    return self.embeddings.shape[0]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.embeddings.shape

  def size(self) -> int:
    return self.embeddings.size

  def partition_specs(self, spec: PartitionSpec) -> SoftPrompt:
    return dataclasses.replace(self, embeddings=spec)


def init(
  key: Array,
  params: Any,
  config: AdapterConfig,
  *,
  text_tokens: Sequence[int] | None = None,
  model: ModelConfig | None = None,
) -> dict[str, SoftPrompt]:
  """{path: prompt} of num_virtual_tokens embeddings, float32.

  RANDOM: normal(0, 1).  SAMPLE_VOCAB: those of tokens drawn alike from the vocabulary.  TEXT: those of a text's tokens,
  over again until there are enough.

  Args:
    text_tokens: the tokens of config.prompt_tuning_init_text by the model's own tokenizer, for TEXT.
    model: for SAMPLE_VOCAB and TEXT in a family that scales its embeddings (Gemma).
  """
  slots, table = config.num_virtual_tokens, params["embed_tokens"]["weight"]
  how = config.prompt_tuning_init
  if (how == "TEXT") != (text_tokens is not None):
    raise ValueError(
      "prompt_tuning_init='TEXT' needs text_tokens: the ids of prompt_tuning_init_text by the model's tokenizer"
      if how == "TEXT"
      else f"text_tokens are for prompt_tuning_init='TEXT', found {how!r}"
    )
  if how == "RANDOM":
    embeddings = jax.random.normal(key, (slots, weight.shape(table)[1]))
  elif how == "SAMPLE_VOCAB":
    ids = jax.random.randint(key, (slots,), 0, weight.shape(table)[0])
    embeddings = _embedded(ids, params, model)
  else:
    ids = np.asarray(text_tokens, np.int32)
    if not ids.size:
      raise ValueError("prompt_tuning_init_text has no token")
    embeddings = _embedded(np.resize(ids, slots), params, model)
  return {before.PROMPT: SoftPrompt(embeddings)}


def _embedded(ids, params, model):
  """The embeddings of tokens as the first layer reads them."""
  if model is None and "pre_feedforward_layernorm" in params["layers"]:
    raise ValueError(
      "Gemma scales its embeddings, and the parameters alone do not say by how much: give adapters.init model=config"
    )
  scale = model.hidden_size**0.5 if model is not None and model.scale_embeddings else 1.0
  return (
    weight.embed(jnp.asarray(ids), params["embed_tokens"]["weight"]).astype(jnp.float32) * scale
  )
