"""config.model: the base on its devices, and what belongs to it."""

from __future__ import annotations

import dataclasses
import functools
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from posttrain_jax.adapters import layout, over
from posttrain_jax.build import adapter, decisions, start, use
from posttrain_jax.build import earlier_adapter as earlier_lib
from posttrain_jax.build.earlier_adapter import Earlier
from posttrain_jax.data import chat
from posttrain_jax.models import decoder, fetch, hf, rotary
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class Model:
  """A base on its devices, and what belongs to it."""

  folder: Path
  params: Any  # with the frozen adapters bound that the run stands on
  config: ModelConfig
  tokenizer: Any
  template: Any  # None for a base model that has no chat template
  dtype: Any  # of what lies between products
  started: start.Start | None = None  # where the adapter starts with a part of the base
  earlier: Earlier | None = None  # the adapter that the run starts from
  bare: Any = None  # the params without any adapter; None: params are
  speech: Path | None = None  # the folder of the tokenizer; None: the base's
  products: Any = None  # their dtype, and a frozen base's; None: dtype

  @property
  def plain(self) -> Any:
    """The base alone, under whatever is bound to it."""
    return self.params if self.bare is None else self.bare

  @property
  def ends(self) -> tuple[int, ...]:
    """Every id that ends a turn or a text."""
    return use.ends(self.config, self.tokenizer, self.template, self.folder)


def load(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh | None = None,
  products: Any = None,
) -> Model:
  """The base of config.model: read and quantised matrix by matrix, placed on its devices leaf by leaf.

  products: their dtype; None: as the config says.
  """
  folder = fetch.resolve(config.model.name)
  products = products or decisions.products(config)
  place = functools.partial(layout.place, mesh=mesh, on_host=decisions.base_on_host(config))
  adapter_config = adapter.described(config)
  starting = None if adapter_config is None else adapter_config.starting
  started = None
  if starting is not None:
    key = jax.random.key(config.seed)
    started = start.plan(key, starting, hf.read_config(folder), config.model.base)
  speech = use.tokenizer_folder(folder, earlier_lib.home(config))
  # reading a tokenizer is importing transformers: a second
  with futures.ThreadPoolExecutor(1) as beside:
    reading = beside.submit(chat.load_tokenizer, speech)
    params, model_config = _read(config, folder, products, place, started)
    tokenizer = reading.result()
  if decisions.has_score(config):
    params, model_config = _with_score(config, params, model_config, mesh)
  earlier = earlier_lib.read(config, params, model_config, mesh)
  template = use.of(tokenizer, config.model.template)
  levels = () if earlier is None else earlier.under
  lengths = [adapter_config.context_length] if adapter_config is not None else []
  lengths += [below.context_length for _, below in levels]
  model_config = rotary.stretched(model_config, max(lengths, default=0))
  return Model(
    folder,
    over.bound(params, levels),
    model_config,
    tokenizer,
    template,
    decisions.between(products),
    started,
    earlier,
    params,
    speech,
    products,
  )


def _read(config, folder, products, place, started):
  """(params, config) of the base, as the run stores it."""
  # what the optimizer updates is float32; a frozen base is stored as it is multiplied
  return hf.load(
    folder,
    dtype=jnp.float32 if decisions.is_full(config) else products,
    storage=config.model.base if started is None else "dense",
    place=place if started is None else started.begin(place),
  )


def _with_score(config, params, model_config, mesh):
  """A language model gets a new score head; a reward model keeps its own, which has one score."""
  writes = decisions.writes(config)
  if not model_config.scores:
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    params, model_config = decoder.scored(key, params, model_config, writes=writes)
    placed_head = layout.place("score/weight", params["score"]["weight"], mesh=mesh)
    return {**params, "score": {"weight": placed_head}}, model_config
  if model_config.scores != 1:
    raise ConfigError(
      f"{config.model.name} has {model_config.scores} scores a token; a reward is one number"
    )
  if writes and not (model_config.tied or model_config.writes):
    raise ConfigError(
      f"{config.model.name} is a reward model without a head to write with, which objective.sft_weight and losses of"
      " log-probabilities read; write --config.objective.sft_weight=0.0, or start from the language model"
    )
  return params, model_config
