"""PEFT's `modules_to_save`: whole tensors beside those of a LoRA, under the names that they have in the model."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain_jax.adapters import replaced
from posttrain_jax.adapters.bind import base as base_at
from posttrain_jax.adapters.codecs import modules
from posttrain_jax.adapters.codecs.codec import Folder
from posttrain_jax.adapters.config import AdapterConfig, full_name
from posttrain_jax.adapters.replaced import Replaced
from posttrain_jax.core import tree, weight
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig


def write(
  adapter: Any, config: AdapterConfig, model_config: ModelConfig
) -> tuple[Any, dict[str, np.ndarray], list[str] | None]:
  """(the adapter without them, {full name: tensor as stored}, modules_to_save as PEFT takes it)."""
  nodes = {path: node for path, node in tree.items(adapter) if isinstance(node, Replaced)}
  params = decoder.abstract(model_config)
  tensors, names = {}, []
  for path, node in nodes.items():
    if node.value.shape != weight.shape(base_at(params, path)):
      raise ValueError(
        f"adapter at {path} is {node.value.shape}, model_config says {weight.shape(base_at(params, path))}"
      )
    leaf = path.rpartition("/")[2]
    for name, value in replaced.split(node, _names(path, model_config.num_layers)).items():
      names.append(name)
      tensors[f"{modules.PREFIX}{full_name(name)}.{leaf}"] = _stored(name, value)
  rest = tree.unflatten((path, node) for path, node in tree.items(adapter) if path not in nodes)
  return rest, tensors, _endings(names, config, params) if nodes else None


def read(folder: Folder, params: Any) -> tuple[Folder, dict[str, Replaced]]:
  """(the folder without them, {path: node}) of every tensor whose module `modules_to_save` names.

  Raises:
    ValueError: a name that matches no module, or a tensor that is missing or of another shape.
  """
  endings = folder.described.get("modules_to_save") or []
  layers = weight.shape(params["layers"]["self_attn"]["q_proj"]["weight"])[0]
  found: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
  rest = dict(folder.tensors)
  paths = [*tree.flatten(params), *([] if "lm_head" in params else ["lm_head/weight"])]
  for path in paths:
    leaf = path.rpartition("/")[2]
    for name in _names(path, layers):
      if not any(full_name(name).endswith(ending) for ending in endings):
        continue
      keys = [key for key in rest if modules.bare(key) == f"{name}.{leaf}"]
      if not keys:
        raise ValueError(
          f"{folder.tensor_file}: modules_to_save={endings} names {name!r}, which has no {leaf}"
        )
      array = rest.pop(keys[0])
      found[path][name] = _stored(name, array) if array.ndim == 2 else array
  for ending in endings:
    known = [full_name(name) for path in paths for name in _names(path, layers)]
    if not any(name.endswith(ending) for name in known):
      raise ValueError(
        f"{folder.config_file}: modules_to_save: {tree.unknown(ending, known, 'module')}"
      )
  nodes = {}
  for path, values in found.items():
    matrix = base_at(params, path)
    _check_shapes(folder, values, matrix)
    nodes[path] = replaced.join(values, _names(path, layers), matrix)
  described = {**folder.described, "modules_to_save": None}
  return dataclasses.replace(folder, tensors=rest, described=described), nodes


def _names(path: str, layers: int) -> list[str]:
  return replaced.expand(path, layers)


def _stored(name: str, value: np.ndarray) -> np.ndarray:
  """A linear layer is stored [out, in], an embedding and a vector as they are here; its own inverse."""
  return value.T if value.ndim == 2 and name != "embed_tokens" else value


def _check_shapes(folder: Folder, values: Mapping[str, np.ndarray], matrix: Any) -> None:
  for name, value in values.items():
    shape = weight.shape(matrix)
    wanted = shape[1:] if name.startswith("layers.") else shape
    if value.shape != wanted:
      raise ValueError(
        f"{folder.tensor_file}: {name!r} of modules_to_save has shape {_stored(name, value).shape}, "
        f"which does not fit this base"
      )


def _endings(names: Sequence[str], config: AdapterConfig, params: Any) -> list[str]:
  """The user's own endings where PEFT takes them for these modules and no other; else every full name."""
  layers = weight.shape(params["layers"]["self_attn"]["q_proj"]["weight"])[0]
  paths = dict.fromkeys([*tree.flatten(params), "lm_head/weight"])
  known = {name for path in paths for name in _names(path, layers)}
  matched = {
    name for name in known if any(full_name(name).endswith(e) for e in config.modules_to_save)
  }
  return list(config.modules_to_save) if matched == set(names) else sorted(map(full_name, names))
