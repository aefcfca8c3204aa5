"""PEFT's ADALORA: three factors for each module at the rank that is left, and which ranks those are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from posttrain_jax.adapters import adalora
from posttrain_jax.adapters.codecs import codec, lora, modules, naming, saved
from posttrain_jax.adapters.codecs.codec import Codec, Folder, Keys, Written
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.core import weight, words
from posttrain_jax.models.config import ModelConfig

NAMES = {"a": ("lora_A", "lora_A"), "b": ("lora_B", "lora_B"), "e": ("lora_E", "lora_E")}
SCHEDULE = ("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
KEYS = Keys(
  fields={
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (str, list, type(None)),
    "exclude_modules": (str, list, type(None)),
    "layers_to_transform": (int, list, type(None)),
    "init_r": (int,),
    "target_r": (int,),
    "total_step": (int, type(None)),
    **dict.fromkeys(SCHEDULE, (int, float)),
  },
  off={
    **lora.KEYS.off,
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "use_dora": (False,),
    "use_rslora": (False,),
  },
  unread=(*lora.KEYS.unread, "init_lora_weights", "r", "rank_pattern"),
)


def write(adapter: Any, config: AdapterConfig, model_config: ModelConfig) -> Written:
  """Each module at the ranks that act or are kept; one that is left with none has empty factors, as in PEFT."""
  adapter, whole, to_save = saved.write(adapter, config, model_config)
  parts, nodes = modules.collect(adapter, model_config, (adalora.AdaLoRA,), _split, _shape)
  full = naming.of_model(model_config).full
  patterns = {
    f"{full(name)}.lora_E": _kept(node)[layer].tolist() for name, (node, layer) in nodes.items()
  }
  described = dict(
    init_r=config.init_r,
    target_r=config.target_r,
    lora_alpha=config.lora_alpha,
    lora_dropout=config.lora_dropout,
    # PEFT wants the end of a schedule from a finished adapter too
    total_step=config.total_step or config.tinit + config.tfinal + 1,
    **{name: vars(config)[name] for name in SCHEDULE},
    rank_pattern=None if all(map(all, patterns.values())) else patterns,
    bias="none",
    fan_in_fan_out=False,
    modules_to_save=to_save,
    **modules.targets(list(parts), model_config),
  )
  return Written(modules.tensors(parts, NAMES, model_config) | whole, described)


def read(
  folder: Folder, params: Any, model_config: ModelConfig
) -> tuple[dict[str, Any], AdapterConfig]:
  del model_config
  folder, whole, named = saved.read(folder, params)
  parts = modules.parse(folder, NAMES, params)
  config = codec.config(folder, KEYS, "adalora", list(parts))
  try:
    adalora.check(config)
  except ValueError as error:
    raise ValueError(f"{folder.config_file}: {error}") from error
  config = modules.settled(folder, config, parts, params, named["modules_to_save"])
  masks = _masks(folder, parts, config.init_r)
  make = lambda base, names: _node(base, names, parts, masks, config, folder)
  nodes = modules.nodes(parts, params, make)
  return nodes | whole, config.replace(**named)


CODEC = Codec("ADALORA", ("adalora",), KEYS, write, read)


def _kept(node: adalora.AdaLoRA) -> np.ndarray:
  """[layers, rank]: kept, or pruned and grown again since, which acts as well."""
  return np.atleast_2d((np.asarray(node.mask) > 0) | (np.asarray(node.e) != 0))


def _split(node: adalora.AdaLoRA) -> list[dict[str, np.ndarray]]:
  a, b, e = (np.asarray(x) for x in (node.a, node.b, node.e))
  if a.ndim == 2:
    a, b, e = a[None], b[None], e[None]
  return [
    dict(a=a[i][:, kept], b=b[i][kept], e=e[i][None, kept]) if there else {}
    for i, (kept, there) in enumerate(zip(_kept(node), node.adapted))
  ]


def _shape(node: adalora.AdaLoRA) -> tuple[int, ...]:
  return (*node.a.shape[:-1], node.b.shape[-1])


def _masks(folder: Folder, parts: modules.Parts, rank: int) -> dict[str, np.ndarray]:
  """{module: which of its first ranks its tensors are}; without a pattern all of them."""
  every = dict.fromkeys(parts, np.ones(rank, bool))
  said = folder.described.get("rank_pattern")
  if said is None:
    return every
  if not isinstance(said, Mapping):
    raise ValueError(
      f"{folder.config_file}: rank_pattern={words.shown(said)} is no table of modules"
    )
  for key, flags in said.items():
    name = re.sub(r"\.lora_E(\.[^.]+)?$", "", naming.bare(key))
    if not isinstance(flags, list):
      raise ValueError(
        f"{folder.config_file}: rank_pattern[{words.shown(key)}] is no list of true and false"
      )
    if key in folder.others or naming.class_name(key).partition(".lora_E")[0] in folder.others:
      continue
    flags = np.asarray(flags)
    if name not in parts:
      raise ValueError(
        f"{folder.config_file}: rank_pattern names {words.shown(key)}, which has no tensors"
      )
    if flags.dtype != bool or flags.shape != (rank,):
      raise ValueError(
        f"{folder.config_file}: rank_pattern[{words.shown(key)}] must hold true or false for each of {rank} ranks"
      )
    every[name] = flags
  return every


def _node(matrix, names, parts, masks, config, folder) -> adalora.AdaLoRA:
  rows, columns = weight.shape(matrix)[-2:]
  factors: list[tuple[np.ndarray, np.ndarray, np.ndarray] | None] = []
  for name in names:
    if name not in parts:
      factors.append(None)
      continue
    mask, tensors = masks[name], parts[name]
    left = int(mask.sum())
    shapes = {"a": (rows, left), "b": (left, columns), "e": (1, left)}
    modules.check_shapes(tensors, shapes, NAMES, name, folder)
    a, b, e = np.zeros((rows, len(mask))), np.zeros((len(mask), columns)), np.zeros(len(mask))
    a[:, mask], b[mask], e[mask] = tensors["a"], tensors["b"], tensors["e"][0]
    factors.append((a, b, e))
  none = np.zeros(config.init_r)
  kept = [masks.get(name, none) for name in names]
  return adalora.join(factors, kept, config, stacked=len(weight.shape(matrix)) == 3)
