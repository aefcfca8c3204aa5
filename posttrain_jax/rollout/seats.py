"""The adapters of the engine's rows, each beside the layer that it changes: put there when a row is given a request.

A stack has every adapter there is room for; what draws reads those of its rows alone, as they lie.  On a CPU a window
would spend as long on gathering them as on a token.

A stack has the rank of its largest adapter.  Ranks beyond NARROW lie apart and are read where a row under way has such
an adapter, so that one of rank 64 costs nothing while it is not asked for.
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
NARROW = 8


def nodes(params: Params) -> Nodes:
  """The stacks that are bound in the layers."""
  each = tree.items(params["layers"])
  return {path: leaf.node for path, leaf in each if stacked.is_seatable(leaf)}


def bare(params: Params) -> Params:
  """params without those stacks."""
  each = tree.items(params["layers"])
  base = lambda leaf: leaf.base if stacked.is_seatable(leaf) else leaf
  return {**params, "layers": tree.unflatten((path, base(leaf)) for path, leaf in each)}


def empty(nodes: Nodes, rows: int, narrow: int = NARROW) -> Seats:
  """Seats that are as they come: who writes is seated first.

  Args:
    narrow: ranks that do not lie apart.
  """
  if not nodes:
    return ()
  one = jnp.zeros(rows, jnp.int32)
  return _apart({path: _of(node, one, narrow) for path, node in nodes.items()})


@functools.partial(jax.jit, donate_argnames=("seats",))
def seat(seats: Seats, nodes: Nodes, index: Array, row: Array) -> Seats:
  """The row of that index with the adapter that is the parameters' of `row`."""
  put = lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one.astype(x.dtype), index, 0)
  narrow = {path: seated.a.shape[-2] for path, seated in seats[0].items()}
  each = {path: _of(node, row[None], narrow[path]) for path, node in nodes.items()}
  return jax.tree.map(put, seats, _apart(each))


def bound(params: Params, seats: Seats, live: Array) -> Params:
  """params, whose layers are apart, with those adapters bound; live: [rows], whose adapters matter."""
  if not seats:
    return params
  layers = list(params["layers"])
  for at, of_layer in enumerate(seats):
    for path, seated in of_layer.items():
      leaf = Adapted(tree.get(layers[at], path), seated.of_live(live))
      layers[at] = tree.put(layers[at], path, leaf)
  return {**params, "layers": tuple(layers)}


def _of(node: Stacked, rows: Array, narrow: int) -> Seated:
  """Of all layers, for those rows of the parameters."""
  assert node.index is not None
  index = dataclasses.replace(node.index, value=node.index.value[rows])
  return dataclasses.replace(node, index=index).seated().parted(narrow)


def _apart(each: dict[str, Seated]) -> Seats:
  count = next(iter(each.values())).a.shape[0]
  at = lambda i: jax.tree.map(lambda x: x[i], each)
  return tuple(at(i) for i in range(count))
