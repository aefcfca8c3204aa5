"""PEFT's `modules_to_save`: whole tensors beside those of any type, under the names that they have in the model.

PEFT wraps the model that a soft prompt or prefix stands before once, and one with adapted modules twice: `base_model.`
and `base_model.model.` before the name.  For a sequence classifier it adds both of the names that heads have,
`classifier` and `score`, of which a model has one.
"""

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

HEADS = ("classifier", "score")


def write(
  adapter: Any, config: AdapterConfig, model_config: ModelConfig, *, prefix: str = modules.PREFIX
) -> tuple[Any, dict[str, np.ndarray], list[str] | None]:
  """(the adapter without them, {full name: tensor as stored}, modules_to_save as PEFT takes it).

  Args:
    prefix: what PEFT's name of a tensor has before that of its module.
  """
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
      tensors[f"{prefix}{full_name(name)}.{leaf}"] = _stored(name, value)
  rest = tree.unflatten((path, node) for path, node in tree.items(adapter) if path not in nodes)
  return rest, tensors, _endings(names, config, params) if nodes else None


def read(
  folder: Folder, params: Any
) -> tuple[Folder, dict[str, Replaced], dict[str, tuple[str, ...]]]:
  """(the folder without them, {path: node}, {"modules_to_save": names}) of what `modules_to_save` names.

  Raises:
    ValueError: a name that matches no module, or a tensor that is missing or of another shape.
  """
  paths = [*tree.flatten(params), *([] if "lm_head" in params else ["lm_head/weight"])]
  endings = _named(folder, paths)
  layers = weight.shape(params["layers"]["self_attn"]["q_proj"]["weight"])[0]
  arrays_at: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
  rest = dict(folder.tensors)
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
      arrays_at[path][name] = _stored(name, array) if array.ndim == 2 else array
  for ending in endings:
    known = [full_name(name) for path in paths for name in _names(path, layers)]
    if not any(name.endswith(ending) for name in known):
      raise ValueError(
        f"{folder.config_file}: modules_to_save: {tree.unknown(ending, known, 'module')}"
      )
  nodes = {}
  for path, arrays in arrays_at.items():
    matrix = base_at(params, path)
    _check_shapes(folder, arrays, matrix)
    nodes[path] = replaced.join(arrays, _names(path, layers), matrix)
  described = {**folder.described, "modules_to_save": None}
  rest_of_it = dataclasses.replace(folder, tensors=rest, described=described)
  return rest_of_it, nodes, {"modules_to_save": endings}


def _named(folder: Folder, paths: Sequence[str]) -> tuple[str, ...]:
  """The folder's modules_to_save; of a classifier's heads the one that there is."""
  endings = folder.described.get("modules_to_save") or ()
  if not isinstance(endings, list | tuple) or not all(isinstance(e, str) for e in endings):
    raise ValueError(f"{folder.config_file}: modules_to_save={endings!r} is no list of names")
  is_classifier = folder.described.get("task_type") == "SEQ_CLS"
  lacks = lambda name: name in HEADS[:1] and f"{name}/weight" not in paths
  return tuple(e for e in dict.fromkeys(endings) if not (is_classifier and lacks(e)))


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
