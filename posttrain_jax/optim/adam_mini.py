"""Adam-mini: one second moment a block of parameters (Zhang et al. 2024, arXiv 2406.16793)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.optim import adam8bit, paths

Array = jax.Array
# The axis of a matrix whose entries are its blocks, where it is not the last: a token's row of an embedding.
ROWS = ("vocab",)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Which entries of one parameter share a second moment.

  means: the axes that are averaged over; size: entries of the last axis in a block (a head), 1 for none.
  """

  means: tuple[int, ...]
  size: int = 1

  def mean(self, x: Array) -> Array:
    """x: [...] -> one mean a block, the averaged axes of size 1."""
    if self.size > 1:
      x = jnp.mean(x.reshape(*x.shape[:-1], -1, self.size), axis=-1)
    return jnp.mean(x, axis=self.means, keepdims=True) if self.means else x

  def spread(self, v: Array) -> Array:
    """One value a block -> what broadcasts with the parameter."""
    return v if self.size == 1 else jnp.repeat(v, self.size, axis=-1)


def blocks(axes: str | None, shape: tuple[int, ...], *, stacked: bool, head_dim: int) -> Blocks:
  """The blocks that a parameter's axis names declare.

  A last axis `heads` (queries, keys): one block a head of head_dim.  Other matrices: one an output, which is the last
  axis, or `vocab` where it comes first.  A lone axis `norm`: the whole tensor.  Other vectors (biases): one a number,
  which is Adam.  Without names (an adapter's factors): an output each, and vectors as biases.

  The authors' code decides by substrings of names: an unknown name becomes a single block, its heads have
  hidden * hidden / num_heads numbers, which needs head_dim * num_heads = hidden, and versions since 1.1.1 keep all of
  v for embedding and head.
  """
  names = axes.split()[stacked:] if axes else []
  matrix_axes = range(int(stacked), len(shape))
  if len(matrix_axes) < 2:
    return Blocks(tuple(matrix_axes) if names == ["norm"] else ())
  if names and names[-1] == "heads":
    if shape[-1] % head_dim:
      raise ValueError(f"adam_mini: {shape[-1]} outputs are no whole number of heads of {head_dim}")
    return Blocks(tuple(matrix_axes[:-1]), head_dim)
  output = matrix_axes[0] if names and names[0] in ROWS else matrix_axes[-1]
  return Blocks(tuple(axis for axis in matrix_axes if axis != output))


class State(NamedTuple):
  count: Array
  mu: Any
  nu: Any  # of each parameter one number a block


def scale_by_adam_mini(
  *, axes: Mapping[str, str], head_dim: int, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  """m^ / (sqrt(v^) + eps), v the moving average of a block's mean squared gradient.

  Args:
    axes: path of a parameter -> its axis names, `layers embed heads`.
    head_dim: entries of a `heads` axis that make one head.
  """

  def blocks_of(path, p):
    plain = not paths.field(path)
    named = axes.get(paths.module(path)) if plain else None
    if plain and named is None:
      raise ValueError(f"adam_mini: the axes of {paths.module(path)} are not declared")
    return blocks(named, p.shape, stacked=paths.stacked(path), head_dim=head_dim)

  def init(params):
    zeros = lambda p: jnp.zeros(p.shape, jnp.float32)
    least = lambda path, p: zeros(jax.eval_shape(blocks_of(path, p).mean, p))
    return State(
      jnp.zeros((), jnp.int32),
      jax.tree.map(zeros, params),
      jax.tree_util.tree_map_with_path(least, params),
    )

  def update(updates, state, params=None):
    count = state.count + 1

    def one(path, g, m, v):
      g, block = g.astype(jnp.float32), blocks_of(path, g)
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * block.mean(g * g)
      h = block.spread(jnp.sqrt(v / adam8bit.left(b2, count)) + eps)
      return m / (adam8bit.left(b1, count) * h), m, v

    steps, mu, nu = paths.unzip_with_path(one, 3, updates, state.mu, state.nu)
    return steps, State(count, mu, nu)

  return optax.GradientTransformation(init, update)
