"""Attention over the devices of a mesh: each has its rows and heads, and along `context` its queries.

A device gathers the keys and values of the row for its queries, forward and again backward, so that no layer keeps
them; what gradients of them become is added up and scattered.  Its loops skip the blocks that its own rows leave out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from posttrain_jax.core import sharding

Array = jax.Array
CONTEXT = "context"


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where [batch, kv_heads, groups, time, dim] of queries and [batch, kv_heads, keys, dim] of keys lie."""

  queries: P
  keys: P

  @property
  def is_cut(self) -> bool:
    """Whether a device has a part of the queries, so that they need not be the last of the keys, nor in order."""
    return self.queries[3] == CONTEXT

  def where(self) -> tuple[P, P, P]:
    """Of the places of queries and of keys, which every device has whole, and the window."""
    return P(self.queries[0], self.queries[3]), P(self.keys[0], None), P()

  def gathered(self, *keys: Array) -> tuple[Array, ...]:
    if self.keys[2] != CONTEXT:
      return keys
    return tuple(jax.lax.all_gather(x, CONTEXT, axis=2, tiled=True) for x in keys)

  def added(self, *slopes: Array) -> tuple[Array, ...]:
    """Gradients of gathered keys, over all queries, each device's part."""
    if self.keys[2] == CONTEXT:
      scatter = functools.partial(jax.lax.psum_scatter, scatter_dimension=2, tiled=True)
      return tuple(scatter(x, CONTEXT) for x in slopes)
    return tuple(jax.lax.psum(x, CONTEXT) for x in slopes) if self.is_cut else slopes


def layout(q: Array, k: Array) -> Layout:
  """On the ambient mesh, by the axes that divide each dimension; without one nothing is cut."""
  if not sharding.active():
    return Layout(P(*[None] * 5), P(*[None] * 4))
  mesh = jax.sharding.get_abstract_mesh()
  of = lambda axes, x: sharding.fitted(sharding.logical(axes), x.shape, mesh)
  queries, keys = of("batch heads - time -", q), of("batch heads time -", k)
  return Layout(queries, keys)


def mapped(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
  """function of each device's own part; as it is without a mesh."""
  if not sharding.active():
    return function
  return sharding.by_device(function, inputs, outputs)


def repeated(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """(k, v) [batch, keys, kv_heads, dim] with each head as often as devices along `tensor` share its queries."""
  heads, kv_heads, devices = q.shape[2], k.shape[2], sharding.size("tensor")
  times = devices // math.gcd(kv_heads, devices)
  if times == 1 or (heads // kv_heads) % times:
    return k, v
  return jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2)
