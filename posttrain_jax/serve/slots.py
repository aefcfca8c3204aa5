"""Adapters on the device: a stack with room for so many, in which one is replaced in place while others are in use."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters import layout, stacked
from posttrain_jax.adapters.stacked import Room
from posttrain_jax.core import tree, weight
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout.engine import Ready

LAYERS = "layers/"


class Slots:
  """The base with a stack of adapters bound: row i of the parameters has the adapter in slot i, the last row none.

  Where the engine has two forms of the parameters they are bound in that which reads: what draws has them by row
  (`rollout.seats`).
  """

  def __init__(
    self,
    base: Ready,
    room: Room,
    config: ModelConfig,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
  ) -> None:
    """Slots that hold none.

    Args:
      dtype: of the factors.
    """
    self.base, self.room, self.config = base, room, config
    self.none = room.adapters  # the row of the base
    nodes = stacked.empty(base.stacked, room, config.hidden_size, dtype)
    if mesh is not None:
      nodes = tree.flatten(layout.laid_out(tree.unflatten(nodes), mesh))
    self._nodes = nodes
    self._put = _jitted(stacked.put, nodes, mesh)
    self._index = weight.Rows(jnp.arange(room.adapters + 1, dtype=jnp.int32))
    self.ready = self._bound()

  @property
  def slot_bytes(self) -> int:
    """Of one adapter on the device."""
    return sum(x.nbytes for x in jax.tree.leaves(self._nodes)) // (self.room.adapters + 1)

  def entry(self, adapter: Any, params: Any) -> dict[str, Any]:
    """The adapter on the host as `put` takes it.

    Raises:
      ValueError: it is of a kind that rows do not mix, or there is no room for it.
    """
    return stacked.entry(adapter, params, self.room, self._nodes)

  def put(self, slot: int, entry: dict[str, Any]) -> Ready:
    """The parameters with that adapter in a slot that no row under way has; those before are gone."""
    self._nodes = self._put(self._nodes, np.int32(slot), jax.device_put(entry))
    self.ready = self._bound()
    return self.ready

  def programs(self) -> int:
    """How many were compiled to put adapters in."""
    return self._put._cache_size()

  def _bound(self) -> Ready:
    with_index = lambda node: dataclasses.replace(node, index=self._index)
    whole = _bind(self.base.stacked, {p: with_index(node) for p, node in self._nodes.items()})
    is_one = self.base.layers_apart is self.base.stacked
    return Ready(whole, whole if is_one else self.base.layers_apart)


def paths(params: Any, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
  """The matrices of the layers that adapters may change: every one, or those with one of these names."""
  every = [
    path
    for path, _ in tree.items(params)
    if path.startswith(LAYERS) and tree.turned(path) and not path.startswith(tree.EXPERTS)
    if path != tree.ROUTER
  ]
  if names is None:
    return tuple(every)
  known = {path.split("/")[-2]: path for path in every}
  if unknown := [name for name in names if name not in known]:
    raise ValueError(tree.unknown(unknown[0], known, "module that adapters may change"))
  return tuple(known[name] for name in known if name in names)


def _bind(params: Any, nodes: dict[str, Any]) -> Any:
  for path, node in nodes.items():
    stands = path.endswith(("prompt/embeddings", "self_attn/prefix"))
    leaf = node if stands else Adapted(tree.get(params, path), node)
    params = tree.put(params, path, leaf)
  return params


def _jitted(put: Any, nodes: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """In place; on a mesh the stack lies afterwards as it lay."""
  if mesh is None:
    return jax.jit(put, donate_argnums=0)
  where = jax.tree.map(lambda x: x.sharding, nodes)
  return jax.jit(put, donate_argnums=0, out_shardings=where)
