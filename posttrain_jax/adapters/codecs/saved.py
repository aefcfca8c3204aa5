"""PEFT's `modules_to_save`: whole tensors beside those of any type, under the names that they have in the model.

PEFT wraps the model that a soft prompt or prefix stands before once, and one with adapted modules twice: `base_model.`
and `base_model.model.` before the name.  For a sequence classifier it adds both of the names that heads have,
`classifier` and `score`, of which a model has one.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain_jax.adapters import replaced
from posttrain_jax.adapters.bind import base as base_at
from posttrain_jax.adapters.codecs import modules, naming
from posttrain_jax.adapters.codecs.codec import Folder
from posttrain_jax.adapters.config import AdapterConfig, full_name, is_saved
from posttrain_jax.adapters.replaced import Replaced
from posttrain_jax.core import tree, weight, words
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
  params, full = decoder.abstract(model_config), naming.of_model(model_config).full
  names_at = replaced.names(params)
  tensors, names = {}, []
  for path, node in nodes.items():
    if node.value.shape != weight.shape(base_at(params, path)):
      raise ValueError(
        f"adapter at {path} is {node.value.shape}, model_config says {weight.shape(base_at(params, path))}"
      )
    leaf = path.rpartition("/")[2]
    for name, value in replaced.split(node, names_at[path]).items():
      names.append(name)
      tensors[f"{prefix}{full(name)}.{leaf}"] = _stored(name, value)
  rest = tree.unflatten((path, node) for path, node in tree.items(adapter) if path not in nodes)
  inside = bool(model_config.part_of)
  return rest, tensors, _endings(names, config, params, full, inside=inside) if nodes else None


def read(
  folder: Folder, params: Any
) -> tuple[Folder, dict[str, Replaced], dict[str, tuple[str, ...]]]:
  """(the folder without them, {path: node}, {"modules_to_save": names}) of what `modules_to_save` names.

  Raises:
    ValueError: a name that matches no module, or a tensor that is missing or of another shape.
  """
  names_at = replaced.names(params)
  endings, full = _named(folder, list(names_at)), folder.naming.full
  known = [*(full(name) for names in names_at.values() for name in names), *folder.others]
  for ending in endings:
    if not any(is_saved(name, (ending,)) for name in known):
      raise ValueError(f"{folder.config_file}: modules_to_save: {_unknown(folder, ending, known)}")
  arrays_at: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
  rest = dict(folder.tensors)
  for path, names in names_at.items():
    leaf = path.rpartition("/")[2]
    for name in names:
      if not is_saved(full(name), endings):
        continue
      array = _take(folder, rest, name, leaf)
      if array is None:
        raise ValueError(
          f"{folder.tensor_file}: modules_to_save={endings} names {name!r}, which has no {leaf}"
        )
      arrays_at[path][name] = _stored(name, array) if array.ndim == 2 else array
  nodes, ours = {}, endings
  if folder.naming.inside != naming.TEXT:  # endings of the class's names, which are not ours
    names = [name for arrays in arrays_at.values() for name in arrays]
    ours = tuple(sorted(map(full_name, names)))
  for path, arrays in arrays_at.items():
    matrix = base_at(params, path)
    _check_shapes(folder, arrays, weight.shape(matrix)[tree.leads(path) :])
    nodes[path] = replaced.join(arrays, names_at[path], matrix)
  described = {**folder.described, "modules_to_save": None}
  rest_of_it = dataclasses.replace(folder, tensors=rest, described=described)
  return rest_of_it, nodes, {"modules_to_save": ours}


def _unknown(folder: Folder, ending: str, known: Sequence[str]) -> str:
  if ending in HEADS and folder.described.get("task_type") == "SEQ_CLS":
    return (
      f"{ending!r} is the head of a reward model, and this base has none: score texts with it "
      "(posttrain eval --reward=the folder), or write both as one model first (posttrain export --merge)"
    )
  return tree.unknown(ending, known, "module")


def _take(folder: Folder, rest: dict[str, np.ndarray], name: str, leaf: str) -> np.ndarray | None:
  """A module's trained tensor, taken out of the rest with its copies.

  PEFT stores it once, and where it was told to store embeddings (save_embedding_layers, a resized vocabulary) also as
  `modules_to_save` and beside the base's own, `original_module`.
  """
  places = {
    key: match[1] or ""
    for key in rest
    if (
      match := re.fullmatch(
        rf"{re.escape(name)}\.(original_module\.|modules_to_save\.(?:[^.]+\.)?)?{leaf}",
        naming.bare(key),
      )
    )
  }
  trained = {key: rest.pop(key) for key, place in places.items() if place != "original_module."}
  for key in places.keys() - trained.keys():
    del rest[key]
  arrays = list(trained.values())
  if any(not np.array_equal(arrays[0], array) for array in arrays[1:]):
    raise ValueError(f"{folder.tensor_file}: {', '.join(trained)} differ, and are one module's")
  return arrays[0] if arrays else None


def _named(folder: Folder, paths: Sequence[str]) -> tuple[str, ...]:
  """The folder's modules_to_save; of a classifier's heads the one that there is."""
  endings = folder.described.get("modules_to_save") or ()
  if not isinstance(endings, list | tuple) or not all(isinstance(e, str) for e in endings):
    raise ValueError(
      f"{folder.config_file}: modules_to_save={words.shown(endings)} is no list of names"
    )
  is_classifier = folder.described.get("task_type") == "SEQ_CLS"
  lacks = lambda name: name in HEADS[:1] and f"{name}/weight" not in paths
  return tuple(e for e in dict.fromkeys(endings) if not (is_classifier and lacks(e)))


def _stored(name: str, value: np.ndarray) -> np.ndarray:
  """A linear layer is stored [out, in], an embedding and a vector as they are here; its own inverse."""
  return value.T if value.ndim == 2 and name != "embed_tokens" else value


def _check_shapes(
  folder: Folder, values: Mapping[str, np.ndarray], wanted: tuple[int, ...]
) -> None:
  for name, value in values.items():
    if name in ("embed_tokens", "lm_head") and value.ndim == 2 and value.shape != wanted:
      tokens, rows = (_stored(name, x).shape[0] for x in (value, np.empty(wanted, bool)))
      raise ValueError(
        f"{folder.tensor_file}: {name} has {tokens} tokens, the base {rows}: the adapter was trained with a vocabulary "
        f"of another size (resize_token_embeddings). Merge it with peft onto a base of {tokens} tokens "
        "(merge_and_unload, save_pretrained), and load the model that this writes"
      )
    if value.shape != wanted:
      raise ValueError(
        f"{folder.tensor_file}: {name!r} of modules_to_save has shape {_stored(name, value).shape}, "
        f"which does not fit this base"
      )


def _endings(
  names: Sequence[str],
  config: AdapterConfig,
  params: Any,
  full: Callable[[str], str],
  *,
  inside: bool,
) -> list[str]:
  """The user's own endings where PEFT takes them for these modules and no other; else every full name.

  In a model that also sees, an ending would name modules of the other parts too: SigLIP's post_layernorm is a norm.
  """
  known = {name for names_of_leaf in replaced.names(params).values() for name in names_of_leaf}
  matched = {name for name in known if is_saved(full(name), config.modules_to_save)}
  exact = matched == set(names) and not inside
  return list(config.modules_to_save) if exact else sorted(map(full, names))
