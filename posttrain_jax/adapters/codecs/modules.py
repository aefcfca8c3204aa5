"""Types with tensors for each adapted module: names, collecting, parsing, targets.

A module's tensors are `{field: array}` under the names of the node's fields, matrices [in, out] as everywhere here; the
file holds each transposed, under a name that differs between a linear layer and an embedding.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from posttrain_jax.adapters.bind import base as base_at
from posttrain_jax.adapters.bind import modules as modules_of
from posttrain_jax.adapters.codecs import naming
from posttrain_jax.adapters.codecs.codec import Folder
from posttrain_jax.adapters.config import AdapterConfig, fits, full_name, is_saved
from posttrain_jax.core import memory, tree, weight
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig

# field -> what a linear layer and an embedding call its tensor
Names = Mapping[str, tuple[str, str]]
Parts = dict[str, dict[str, np.ndarray]]  # module -> field -> array
PREFIX = "base_model.model."


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def collect(
  adapter: Any,
  model_config: ModelConfig,
  kinds: tuple[type, ...],
  split: Callable[[Any], Sequence[dict[str, np.ndarray]]],
  shape: Callable[[Any], tuple[int | None, ...]],
) -> tuple[Parts, dict[str, tuple[Any, int]]]:
  """({module: its tensors}, {module: (its node, its place in it)}) of every module that is adapted.

  Args:
    kinds: the types of node that can be written.
    split: node -> the tensors of each of its modules, {} for one that is not adapted.
    shape: node -> the shape of the base that it fits, [layers, [experts,]] in, out; None where the node does not say.
  """
  params = decoder.abstract(model_config)
  names_at = modules_of(params)
  parts: Parts = {}
  nodes: dict[str, tuple[Any, int]] = {}
  for path, node in tree.items(adapter):
    if not isinstance(node, kinds):
      written = " or ".join(kind.__name__ for kind in kinds)
      raise ValueError(
        f"{path}: PEFT's format is written for {written}, found {type(node).__name__}"
      )
    if path not in names_at:
      raise ValueError(f"adapter: {tree.unknown(path, names_at, 'matrix of the model')}")
    base_shape, node_shape = weight.shape(base_at(params, path)), tuple(shape(node))
    if len(node_shape) != len(base_shape) or any(
      f not in (None, w) for f, w in zip(node_shape, base_shape)
    ):
      raise ValueError(
        f"adapter at {path} fits a base of {node_shape}, model_config says {base_shape}"
      )
    for place, (name, tensors) in enumerate(zip(names_at[path], split(memory.fetch(node)))):
      if tensors:
        parts[name], nodes[name] = tensors, (node, place)
  if not parts:
    raise ValueError("the adapter has rank 0 everywhere: there is nothing to write")
  return parts, nodes


def tensors(parts: Parts, names: Names, model_config: ModelConfig) -> dict[str, np.ndarray]:
  """{full name: array as stored}."""
  full = naming.of_model(model_config).full
  return {
    f"{PREFIX}{full(module)}.{names[field][module == 'embed_tokens']}": array.T
    for module, fields in parts.items()
    for field, array in fields.items()
  }


def targets(adapted: Sequence[str], model_config: ModelConfig) -> dict[str, Any]:
  """target_modules, and layers where it takes them, that make PEFT adapt these modules and no other."""
  known = all_names(decoder.abstract(model_config))
  full = naming.of_model(model_config).full
  kind = lambda name: _short(full(name))
  kinds = {kind(name) for name in adapted}
  everywhere = dict(layers_to_transform=None, layers_pattern=None)
  if model_config.part_of:  # an ending would name modules of the other parts too
    return dict(everywhere, target_modules=[full(name) for name in adapted])
  if {name for name in known if kind(name) in kinds} == set(adapted):
    return dict(everywhere, target_modules=sorted(kinds))
  layered = [name for name in adapted if name.startswith("layers.")]
  layers = sorted({int(name.split(".")[1]) for name in layered})
  apart = [full(name) for name in adapted if name not in layered]
  kinds = {kind(name) for name in layered}
  of_kinds = [n for n in known if kind(n) in kinds and n.startswith("layers.")]
  if set(layered) == {name for name in of_kinds if int(name.split(".")[1]) in layers}:
    targets = sorted(kinds) + apart  # to PEFT a full name counts in spite of layers_to_transform
    return dict(layers_to_transform=layers, layers_pattern="layers", target_modules=targets)
  return dict(everywhere, target_modules=[full(name) for name in adapted])


def _short(name: str) -> str:
  return name.rpartition(".")[2]


def anchored(called: str) -> str:
  """A pattern that is this full name and no other."""
  return f"^{re.escape(called)}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def all_names(params: Any) -> list[str]:
  """Every module that could be adapted."""
  return [name for names in modules_of(params).values() for name in names]


def parse(folder: Folder, names: Names, params: Any) -> Parts:
  """The tensors of each module; a matrix of the base that PEFT stored along is checked and left out.

  Raises:
    ValueError: a tensor of an unknown name or module, two of one name, or another base's matrix.
  """
  known, path = all_names(params), folder.tensor_file
  parts: Parts = collections.defaultdict(dict)
  for key, array in folder.tensors.items():
    name, field = _parse(key, known, names, path)
    if field == "base":
      _check_stored_base(name, array, params, path)
    elif field in parts[name]:
      raise ValueError(f"{path}: two tensors {names[field][0]} for the module {name!r}")
    else:
      parts[name][field] = array.T
  return parts


def nodes(parts: Parts, params: Any, make: Callable[[Any, Sequence[str]], Any]) -> dict[str, Any]:
  """{path: make(base, names of its modules)} of every path with a module among the parts."""
  return {
    path: make(base_at(params, path), names)
    for path, names in modules_of(params).items()
    if any(name in parts for name in names)
  }


def settled(
  folder: Folder, config: AdapterConfig, parts: Parts, params: Any, saved: Sequence[str] = ()
) -> AdapterConfig:
  """The folder's config under our own names, checked: it targets what the tensors adapt, and no pattern is idle.

  Args:
    config: under the names of the class that was trained.
    saved: endings of `modules_to_save`, which PEFT leaves out of the targets.

  Raises:
    ValueError: config and tensors adapt different modules, or a key of a pattern is no module's name.
  """
  full, known = folder.naming.full, all_names(params)
  called = [*map(full, known), *folder.others]
  for option in ("rank_pattern", "alpha_pattern"):
    for pattern in vars(config)[option]:
      if not any(fits(pattern, name) for name in called):
        raise ValueError(
          f"{folder.config_file}: {option}: {tree.unknown(pattern, called, 'module')}"
        )
  targeted = {
    name for name in known if config.targets(name, full(name)) and not is_saved(full(name), saved)
  }
  _check_targets(folder, targeted, parts)
  ranks = {name: config.rank(name, full(name)) for name in parts}
  alphas = {name: config.alpha(name, full(name)) for name in parts}
  if all(
    config.targets(name) == (name in parts)
    and (
      name not in parts or (config.rank(name), config.alpha(name)) == (ranks[name], alphas[name])
    )
    for name in known
  ):
    return config
  ours = lambda table, usual: {
    anchored(full_name(name)): value for name, value in table.items() if value != usual
  }
  return config.replace(
    target_modules=tuple(map(full_name, parts)),
    exclude_modules=(),
    layers_to_transform=None,
    rank_pattern=ours(ranks, config.r) if config.rank_pattern else {},
    alpha_pattern=ours(alphas, config.lora_alpha) if config.alpha_pattern else {},
  )


def _check_targets(folder: Folder, targeted: set[str], parts: Parts) -> None:
  config_file, tensor_file = folder.config_file.name, folder.tensor_file.name
  for missing, holds, lacks in (
    (targeted - set(parts), config_file, tensor_file),
    (set(parts) - targeted, tensor_file, config_file),
  ):
    if missing:
      names = ", ".join(sorted(missing)[:5])
      raise ValueError(
        f"{folder.path}: {holds} adapts {len(missing)} modules that {lacks} does not: {names}"
      )


def _parse(key: str, known: Sequence[str], names: Names, path: Path) -> tuple[str, str]:
  """(module, field of the node) of a tensor's name; field "base" for a matrix of the base that PEFT stored along."""
  module = naming.bare(key)
  for field, pair in names.items():
    for is_embedding, tensor in enumerate(pair):
      match = re.fullmatch(rf"(.+)\.{_named(tensor)}", module)
      if match and is_embedding == (match[1] == "embed_tokens"):
        if match[1] not in known:
          raise ValueError(f"{path}: tensor {key!r}: {tree.unknown(match[1], known, 'module')}")
        return match[1], field
  stored = re.fullmatch(r"(embed_tokens|lm_head)\.(base_layer\.|original_module\.)?weight", module)
  if stored:
    return stored[1], "base"
  expected = ", ".join(dict.fromkeys(name for pair in names.values() for name in pair))
  raise ValueError(f"{path}: unknown tensor {key!r}; an adapted module has {expected}")


def _named(tensor: str) -> str:
  """A tensor's name with or without that of its adapter, which a bare state dict still has: lora_A.default.weight."""
  word, dot, end = tensor.partition(".")
  name = r"(?:\.(?!bias$)[^.]+)?"
  return rf"{word}{name}\.{end}" if dot else rf"{word}{name}(?:\.weight)?"


def _check_stored_base(name: str, array: np.ndarray, params: Any, path: Path) -> None:
  """PEFT stores the embedding and the head beside an adapter of the embedding: they must be the base's own."""
  matrix = base_at(params, f"{name}/weight")
  shape = weight.shape(matrix)[::-1] if name == "lm_head" else weight.shape(matrix)
  if array.shape != shape:
    raise ValueError(
      f"{path} holds a resized {name} of {array.shape}, the base has {shape}; "
      "merge the adapter with peft and load the merged model"
    )
  if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(matrix)):
    return  # asked for shapes alone
  expected = np.asarray(weight.dense(weight.unadapted(matrix)), np.float32)
  expected = expected.T if name == "lm_head" else expected
  # Rounding to bfloat16 moves a matrix by 0.2 % of its norm, 4 bits by 10 %; another model's is further away.
  limit = 0.01 if tree.nbytes(matrix) > tree.size(matrix) else 0.15
  distance = np.linalg.norm(array - expected) / max(np.linalg.norm(expected), 1e-30)
  if not distance < limit:
    raise ValueError(
      f"{path} holds a {name} of its own that differs from the base's by {distance:.1%} of its norm: "
      "the adapter belongs to another base, or was saved with trained embeddings"
    )


def check_shapes(
  tensors: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[int, ...]],
  names: Names,
  module: str,
  folder: Folder,
) -> None:
  """An adapted module has all its tensors, in these shapes; one without any is not adapted.

  Raises:
    ValueError: names the tensor and its module.
  """
  for field, shape in shapes.items() if tensors else ():
    tensor = names[field][module == "embed_tokens"]
    if field not in tensors:
      raise ValueError(f"{folder.tensor_file}: the module {module!r} has no {tensor}")
    if tensors[field].shape != shape:
      raise ValueError(
        f"{folder.tensor_file}: {tensor} of {module!r} has shape {tensors[field].shape[::-1]}, expected "
        f"{shape[::-1]} by {folder.config_file.name} and the base"
      )
