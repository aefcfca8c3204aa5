"""Where an optimizer's state lies on the mesh: beside the parameters that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from posttrain_jax.core import memory, sharding
from posttrain_jax.core.leaf import Leaf
from posttrain_jax.optim import offload, paths


def shardings(state: Any, params: Any, replicated: jax.sharding.Sharding) -> Any:
  """The sharding of each array of state; shapes will do.

  The state of a parameter is known by its path, which ends in the parameter's (that of an adapter's factor in the
  field of its node), or goes on inside the leaf that stands there.  An axis as long as the parameter's own is laid out
  as that; a `Leaf` that stands for a whole parameter says how by `partition_specs`.  Counts are replicated.  What is
  offloaded lies so in the host's memory.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  owners = {paths.names(path): leaf for path, leaf in leaves}

  def one(path, leaf):
    owner = _owner(paths.names(path), owners)
    if owner is None and isinstance(leaf, Leaf):  # an adapter's node: each field is a parameter
      inner = lambda further, x: one((*path, *further), x)
      return jax.tree_util.tree_map_with_path(
        inner, leaf, is_leaf=lambda x: isinstance(x, Leaf) and x is not leaf
      )
    if owner is None or not isinstance(owner.sharding, NamedSharding):
      return jax.tree.map(lambda _: replicated, leaf)
    mesh, spec = owner.sharding.mesh, owner.sharding.spec
    if isinstance(leaf, Leaf):
      lay = lambda x, spec: sharding.named(mesh, spec, x.shape)
      return jax.tree.map(lay, leaf, leaf.partition_specs(spec))
    return sharding.named(mesh, along(spec, owner.shape, leaf.shape), leaf.shape)

  placed = jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda x: isinstance(x, Leaf))
  return _hosted(placed, state)


def _hosted(placed, state):
  is_offloaded = lambda x: isinstance(x, offload.State)
  move = lambda where, x: memory.host(where) if x.ndim else where
  return jax.tree.map(
    lambda where, x: jax.tree.map(move, where, x) if is_offloaded(x) else where,
    placed,
    state,
    is_leaf=is_offloaded,
  )


def along(spec: PartitionSpec, owner: Sequence[int], shape: Sequence[int]) -> PartitionSpec:
  """The axes of `spec`, of a parameter shaped `owner`, for a state of `shape` that shares some of its dimensions.

  With as many axes, each is compared with its own; with fewer (a factored moment), each with the next that is as long.
  """
  axes = [*spec, *[None] * (len(owner) - len(spec))]
  if len(shape) == len(owner):
    return PartitionSpec(*[a if n == m else None for a, n, m in zip(axes, owner, shape)])
  left = list(zip(owner, axes))
  entries = []
  for size in shape:
    at = next((i for i, (n, _) in enumerate(left) if n == size), None)
    entries.append(None if at is None else left[at][1])
    left = left if at is None else left[at + 1 :]
  return PartitionSpec(*entries)


def _owner(path, owners):
  """The parameter whose path is the longest run of names within `path`."""
  for length in range(len(path), 0, -1):
    for start in range(len(path) - length + 1):
      if (leaf := owners.get(path[start : start + length])) is not None:
        return leaf
  return None
