"""config.model: the base on its devices, and what belongs to it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from posttrain_jax.adapters import layout
from posttrain_jax.build import adapter, decisions, start
from posttrain_jax.data import chat
from posttrain_jax.models import decoder, fetch, hf, rotary
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class Model:
  """A base on its devices, and what belongs to it."""

  folder: Path
  params: Any
  config: ModelConfig
  tokenizer: Any
  template: Any  # None for a base model that has no chat template
  dtype: Any  # of the computation
  started: start.Start | None = None  # where the adapter starts with a part of the base


def load(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None) -> Model:
  """The base of config.model: read and quantised matrix by matrix, placed on its devices leaf by leaf."""
  folder = fetch.resolve(config.model.name)
  dtype = decisions.compute_dtype(config)
  trained = decisions.is_full(config)
  on_host = config.optimizer.offload == "params"
  place = functools.partial(layout.place, mesh=mesh, on_host=on_host)
  adapter_config = adapter.described(config)
  starting = None if adapter_config is None else adapter_config.starting
  started = None
  if starting is not None:
    key = jax.random.key(config.seed)
    started = start.plan(key, starting, hf.read_config(folder), config.model.base)
  # what the optimizer updates is float32; a frozen base is stored as it is computed with
  params, model_config = hf.load(
    folder,
    dtype=jnp.float32 if trained else dtype,
    storage=config.model.base if started is None else "dense",
    place=place if started is None else started.begin(place),
  )
  if decisions.has_score(config):
    params, model_config = _with_score(config, params, model_config, mesh)
  tokenizer = chat.load_tokenizer(folder)
  if len(tokenizer) > model_config.vocab_size:
    raise ConfigError(
      f"the tokenizer of {folder} has {len(tokenizer)} tokens, the model's embedding {model_config.vocab_size} rows"
    )
  template = template_of(tokenizer, config.model.template)
  if adapter_config is not None:
    model_config = rotary.stretched(model_config, adapter_config.context_length)
  return Model(folder, params, model_config, tokenizer, template, dtype, started)


def template_of(tokenizer: Any, name: str) -> Any:
  """The chat template of that name, or with "tokenizer" the tokenizer's own; None where it has none."""
  if name != "tokenizer":
    return chat.template(tokenizer, name)
  return chat.template(tokenizer) if tokenizer.chat_template else None


def _with_score(config, params, model_config, mesh):
  """A language model gets a new score head, beside its own where a loss reads that; a reward model keeps its score."""
  reads_head = decisions.reads_head(config)
  if not model_config.scores:
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    scored, model_config = decoder.scored(key, params, model_config)
    scored["score"] = {"weight": layout.place("score/weight", scored["score"]["weight"], mesh=mesh)}
    if reads_head and "lm_head" in params:
      scored["lm_head"] = params["lm_head"]
    return scored, model_config
  if reads_head and not model_config.tied:
    raise ConfigError(
      f"{config.model.name} is a reward model, which has no head that writes: train it with the reward's loss alone"
    )
  if model_config.scores != 1:
    raise ConfigError(
      f"{config.model.name} has {model_config.scores} scores a token; a reward is one number"
    )
  return params, model_config
