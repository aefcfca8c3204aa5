"""PEFT's VERA: two vectors for each module, and the pair of projections that all share once a file."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters import vera
from posttrain_jax.adapters.codecs import codec, modules, saved
from posttrain_jax.adapters.codecs.codec import Codec, Folder, Keys, Written
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.core import tree, weight
from posttrain_jax.models.config import ModelConfig

NAMES = {
  "lambda_b": ("vera_lambda_b", "vera_lambda_b"),
  "lambda_d": ("vera_lambda_d", "vera_lambda_d"),
}
PAIR = {"a": "base_model.vera_A", "b": "base_model.vera_B"}  # stored transposed
KEYS = Keys(
  fields={
    "r": (int,),
    "target_modules": (str, list, type(None)),
    "exclude_modules": (str, list, type(None)),
    "layers_to_transform": (int, list, type(None)),
    "d_initial": (int, float),
    "projection_prng_key": (int,),
  },
  off={
    **codec.TASK,
    "bias": ("none",),
    "fan_in_fan_out": (False, True),
    "layers_pattern": (None, "", [], "layers", ["layers"]),
    "modules_to_save": (None, []),
  },
  # what a file holds is told by its tensors; vera_dropout is read under the name that it has here
  unread=(*codec.UNREAD, "init_weights", "save_projection", "vera_dropout"),
)


def write(adapter: Any, config: AdapterConfig, model_config: ModelConfig) -> Written:
  """The projections are always stored: no other library draws the same from the key."""
  adapter, whole, to_save = saved.write(adapter, config, model_config)
  pair = tree.get(adapter, vera.PATH)
  nodes = {path: node for path, node in tree.items(adapter) if path != vera.PATH}
  parts, _ = modules.collect(tree.unflatten(nodes), model_config, (vera.VeRA,), _split, _shape)
  described = dict(
    r=pair.a.shape[1],
    d_initial=config.d_initial,
    projection_prng_key=config.projection_prng_key,
    save_projection=True,
    vera_dropout=config.lora_dropout,
    bias="none",
    fan_in_fan_out=False,
    modules_to_save=to_save,
    **modules.targets(list(parts), model_config),
  )
  stored = {name: np.asarray(vars(pair)[field]).T for field, name in PAIR.items()}
  return Written(modules.tensors(parts, NAMES, model_config) | stored | whole, described)


def read(
  folder: Folder, params: Any, model_config: ModelConfig
) -> tuple[dict[str, Any], AdapterConfig]:
  del model_config
  folder, whole, named = saved.read(folder, params)
  rest = {k: array for k, array in folder.tensors.items() if k not in PAIR.values()}
  parts = modules.parse(dataclasses.replace(folder, tensors=rest), NAMES, params)
  dropout = folder.described.get("vera_dropout") or 0.0
  config = codec.config(folder, KEYS, "vera", list(parts), lora_dropout=dropout)
  config = modules.settled(folder, config, parts, params, named["modules_to_save"])
  make = lambda base, names: _node(base, names, parts, config, folder)
  nodes = modules.nodes(parts, params, make)
  nodes[vera.PATH] = _pair(folder, config, nodes, params)
  return nodes | whole, config.replace(**named)


CODEC = Codec("VERA", ("vera",), KEYS, write, read)


def _split(node: vera.VeRA) -> list[dict[str, np.ndarray]]:
  fields = {name: np.atleast_2d(vars(node)[name]) for name in NAMES}
  return [
    {name: array[i] for name, array in fields.items()} if rank else {}
    for i, rank in enumerate(np.atleast_1d(node.ranks()))
  ]


def _shape(node: vera.VeRA) -> tuple[int | None, ...]:
  return (*node.lambda_b.shape[:-1], None, node.lambda_b.shape[-1])


def _node(matrix, names, parts, config, folder) -> vera.VeRA:
  shapes = {"lambda_b": (weight.shape(matrix)[-1],), "lambda_d": (config.r,)}
  for name in names:
    modules.check_shapes(parts.get(name, {}), shapes, NAMES, name, folder)
  stacked = len(weight.shape(matrix)) == 3
  return vera.join(
    [parts.get(name) for name in names], stacked=stacked, dropout=config.lora_dropout
  )


def _pair(folder, config, nodes, params) -> vera.Projections:
  """The stored projections, which must be as large as the largest adapted matrix."""
  path = folder.tensor_file
  missing = [name for name in PAIR.values() if name not in folder.tensors]
  if missing:
    raise ValueError(
      f"{path} has no {' and no '.join(missing)}: with save_projection=false they are left to torch's random "
      "generator, which is not read here; save the adapter from peft with save_projection=True"
    )
  rows, columns = vera.sizes({name: modules.base_at(params, name) for name in nodes})
  shapes = {"a": (rows, config.r), "b": (config.r, columns)}
  arrays = {field: folder.tensors[name].T for field, name in PAIR.items()}
  for field, array in arrays.items():
    if array.shape != shapes[field]:
      raise ValueError(
        f"{path}: {PAIR[field]} has shape {array.shape[::-1]}, expected {shapes[field][::-1]}: rank {config.r} by "
        f"{folder.config_file.name}, and the largest adapted matrices"
      )
  return vera.Projections(**{field: jnp.asarray(array) for field, array in arrays.items()})
