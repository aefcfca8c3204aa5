"""Where an optimizer's state lies on the mesh: beside the parameters that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from posttrain_jax.core import memory, sharding
from posttrain_jax.optim import offload, paths


def shardings(state: Any, params: Any, replicated: jax.sharding.Sharding) -> Any:
  """The sharding of each array of state; shapes will do.

  The state of a parameter is known by its path, which ends in the parameter's, or goes on inside the node that stands
  there.  An axis as long as the parameter's own is laid out as that; a node may say otherwise by `partition_specs`.
  Counts are replicated.  What is offloaded lies so in the host's memory.
  """
  found, _ = jax.tree_util.tree_flatten_with_path(params)
  owners = {paths.names(path): leaf for path, leaf in found}
  is_node = lambda x: hasattr(x, "partition_specs")

  def one(path, node):
    owner = _owner(paths.names(path), owners)
    if owner is None or not isinstance(owner.sharding, NamedSharding):
      return jax.tree.map(lambda _: replicated, node)
    mesh, spec = owner.sharding.mesh, owner.sharding.spec
    if is_node(node):
      specs = node.partition_specs(spec)
      return jax.tree.map(lambda x, spec: sharding.named(mesh, spec, x.shape), node, specs)
    return sharding.named(mesh, along(spec, owner.shape, node.shape), node.shape)

  placed = jax.tree_util.tree_map_with_path(one, state, is_leaf=is_node)
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
