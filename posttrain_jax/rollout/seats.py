"""The adapters of the engine's rows, each beside the layer that it changes: put there when a row is given a request.

A stack has every adapter there is room for; what draws reads those of its rows alone, as they lie.  On a CPU a window
would spend as long on gathering them as on a token.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.adapters import stacked
from posttrain_jax.adapters.seated import Seated
from posttrain_jax.adapters.stacked import Stacked
from posttrain_jax.core import tree
from posttrain_jax.core.weight import Adapted

Array = jax.Array
Params = Any
Nodes = dict[str, Stacked]  # by path within a layer, each of all layers
Seats = tuple[dict[str, Seated], ...]  # a layer each


def nodes(params: Params) -> Nodes:
  """The stacks that are bound in the layers."""
  each = tree.items(params["layers"])
  return {path: leaf.node for path, leaf in each if stacked.is_seatable(leaf)}


def bare(params: Params) -> Params:
  """params without those stacks."""
  each = tree.items(params["layers"])
  base = lambda leaf: leaf.base if stacked.is_seatable(leaf) else leaf
  return {**params, "layers": tree.unflatten((path, base(leaf)) for path, leaf in each)}


def empty(nodes: Nodes, rows: int) -> Seats:
  """Seats that are as they come: who writes is seated first."""
  if not nodes:
    return ()
  one = jnp.zeros(rows, jnp.int32)
  each = {path: _of(node, one) for path, node in nodes.items()}
  return _apart(each)


@functools.partial(jax.jit, donate_argnames=("seats",))
def seat(seats: Seats, nodes: Nodes, index: Array, row: Array) -> Seats:
  """The row of that index with the adapter that is the parameters' of `row`."""
  put = lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one.astype(x.dtype), index, 0)
  return jax.tree.map(put, seats, _apart({path: _of(n, row[None]) for path, n in nodes.items()}))


def bound(params: Params, seats: Seats, live: Array) -> Params:
  """params, whose layers are apart, with those adapters bound; live: [rows], whose adapters matter."""
  layers = list(params["layers"])
  for at, of_layer in enumerate(seats):
    for path, node in of_layer.items():
      leaf = Adapted(tree.get(layers[at], path), node.of_live(live))
      layers[at] = tree.put(layers[at], path, leaf)
  return {**params, "layers": tuple(layers)}


def _of(node: Stacked, rows: Array) -> Seated:
  """Of all layers, for those rows of the parameters."""
  assert node.index is not None
  index = dataclasses.replace(node.index, value=node.index.value[rows])
  return dataclasses.replace(node, index=index).seated()


def _apart(each: dict[str, Seated]) -> Seats:
  count = next(iter(each.values())).a.shape[0]
  at = lambda i: {path: jax.tree.map(lambda x: x[i], node) for path, node in each.items()}
  return tuple(at(i) for i in range(count))
