"""Arrays in the host's memory beside those on the device, and work on them one layer at a time.

JAX types a traced array by its memory space, and refuses arithmetic across spaces: what is on the host is fetched by
name.  The types come from `NamedSharding`s; a `SingleDeviceSharding` on the host is not seen by `jit.lower`, hence
`host`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
KIND = "pinned_host"


def on_host(x: Any) -> bool:
  return jax.typeof(x).memory_space == HOST


def any_on_host(tree: Any) -> bool:
  return any(map(on_host, jax.tree.leaves(tree)))


def fetch(tree: Any) -> Any:
  """tree with its arrays on the device; gradients of what was on the host go back to the host."""
  return jax.tree.map(lambda x: jax.device_put(x, DEVICE) if on_host(x) else x, tree)


def host(sharding: jax.sharding.Sharding) -> NamedSharding:
  """The same layout in the host's pinned memory.

  Raises:
    ValueError: for devices whose host memory XLA does not reach.
  """
  device = next(iter(sharding.device_set))
  kinds = {m.kind for m in device.addressable_memories()}
  if (
    kinds and KIND not in kinds
  ):  # a GPU that is not here names none, and `jit` then leaves its arrays where they are
    raise ValueError(
      f"offload: {device.device_kind} knows the memories {', '.join(sorted(kinds))}, and not {KIND}; "
      f"write offload=none"
    )
  if isinstance(sharding, NamedSharding):
    return sharding.with_memory_kind(KIND)
  mesh = jax.sharding.Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, PartitionSpec(), memory_kind=KIND)


def over_layers(
  f: Callable[[Any, Any, Any], tuple[Any, Any]], changed: Any, read: Any, carried: Any
) -> tuple[Any, Any]:
  """(changed, carried) after f(layer of changed, layer of read, carried) -> the same two, for every layer in turn.

  The leaves of changed and read are stacks [layers, ...]; f sees one layer of each, [1, ...], on the device, and what
  it returns is written to where the stack is, in place.  A loop that carries the stack writes into its buffer; a scan
  would make a second one.
  """
  (count,) = {x.shape[0] for x in jax.tree.leaves((changed, read))}

  def body(i, state):
    changed, carried = state
    layer = lambda tree: fetch(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), tree))
    new, carried = f(layer(changed), layer(read), carried)
    put = lambda stack, x: jax.lax.dynamic_update_slice_in_dim(stack, back(x, stack), i, 0)
    return jax.tree.map(put, changed, new), carried

  return jax.lax.fori_loop(0, count, body, (changed, carried))


def back(x: Any, like: Any) -> Any:
  """x in the memory that `like` is in."""
  return jax.device_put(x, HOST) if on_host(like) else x
