"""Parameters by their place in the tree: `layers/self_attn/q_proj/weight`, and the field of a node that lies there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.tree_util import DictKey, GetAttrKey


def module(path: tuple[Any, ...]) -> str:
  """The path of the dicts alone: where a node lies, whichever of its fields is meant."""
  return "/".join(str(key.key) for key in path if isinstance(key, DictKey))


def field(path: tuple[Any, ...]) -> str:
  """The field of the node at `module(path)`; "" for a plain array."""
  return ".".join(key.name for key in path if isinstance(key, GetAttrKey))


def stacked(path: tuple[Any, ...]) -> bool:
  """Whether the first axis counts layers."""
  return isinstance(path[0], DictKey) and path[0].key == "layers"


def names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Every key of the path as a word."""
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def unzip(f: Callable[..., tuple], width: int, tree: Any, *rest: Any) -> tuple[Any, ...]:
  """f, which returns `width` values, over the leaves of tree: as many trees; `rest` may have nodes for leaves."""
  leaves, structure = jax.tree.flatten(tree)
  results = [f(*xs) for xs in zip(leaves, *map(structure.flatten_up_to, rest))]
  return tuple(structure.unflatten([result[i] for result in results]) for i in range(width))


def unzip_with_path(f: Callable[..., tuple], width: int, tree: Any, *rest: Any) -> tuple[Any, ...]:
  """`unzip` of f(path, leaf, ...)."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  at = structure.unflatten([path for path, _ in leaves])
  return unzip(lambda leaf, path, *others: f(path, leaf, *others), width, tree, at, *rest)


def is_embedding(path: str, axes: Mapping[str, str]) -> bool:
  """Whether rows are looked up in the parameter at path: its axes begin with `vocab`."""
  return axes.get(path, "").startswith("vocab")
