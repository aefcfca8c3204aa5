"""Products of rows with the matrices of their groups: y[i] = x[i] @ w[g(i)], rows sorted by group.

The rows are cut into blocks of one group each, and the blocks that have rows are multiplied: what a group costs follows
its rows, for any weight, which sees a matrix of its own.  A TPU has products of its own (`core.ragged`); elsewhere
`jax.lax.ragged_dot` is a dense product of every row with every matrix, whose temporaries on a GPU are groups x rows x
columns.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from posttrain_jax.core import struct
from posttrain_jax.core.ragged import Groups
from posttrain_jax.core.ragged import groups as groups
from posttrain_jax.core.weight import PRODUCT, Adapted, AnyWeight, linear, ragged

Array = jax.Array


def product(x: Array, w: AnyWeight, of: Groups) -> Array:
  """x: [rows, in], w: [groups, in, out] of any kind -> [rows, out], in x's dtype."""
  leaves, structure = jax.tree.flatten(w)
  return checkpoint_name(_product(structure, x, leaves, of), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(structure: Any, x: Array, leaves: list[Any], of: Groups) -> Array:
  y = jax.lax.platform_dependent(
    x,
    leaves,
    of,
    tpu=functools.partial(_ragged, structure),
    default=functools.partial(_blocks, structure),
  )
  return jnp.where(jnp.arange(len(x))[:, None] < of.ends[-1], y, 0)


def _forward(structure, x, leaves, of):
  """Kept for the backward pass: x, the matrices as they are stored, and which of their arrays train."""
  values = [leaf.value for leaf in leaves]
  of = jax.tree.map(lambda leaf: leaf.value, of, is_leaf=_is_primal)
  trained = _Static(tuple(i for i, leaf in enumerate(leaves) if leaf.perturbed))
  return _product(structure, x.value, values, of), (x.value, values, of, trained)


def _is_primal(leaf: Any) -> bool:
  return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


@struct.dataclass
class _Static:
  value: Any = struct.field(pytree_node=False)


def _backward(structure, kept, g):
  x, leaves, of, trained = kept
  gradients = [None] * len(leaves)
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, gradients, None
  d_x, d_trained = jax.lax.platform_dependent(
    x,
    leaves,
    of,
    jnp.where(jnp.arange(len(x))[:, None] < of.ends[-1], g, 0),
    tpu=functools.partial(_ragged_backward, structure, trained.value),
    default=functools.partial(_blocks_backward, structure, trained.value),
  )
  for i, d in zip(trained.value, d_trained):
    gradients[i] = d.astype(leaves[i].dtype)
  return jnp.where(jnp.arange(len(x))[:, None] < of.ends[-1], d_x, 0), gradients, None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _ragged(structure: Any, x: Array, leaves: list[Any], of: Groups) -> Array:
  return ragged(x, structure.unflatten(leaves), of.sizes)


def _ragged_backward(structure, trained, x, leaves, of, g):
  def multiplied(x, values):
    changed = list(leaves)
    for k, value in zip(trained, values):
      changed[k] = value
    return _ragged(structure, x, changed, of)

  _, pull = jax.vjp(multiplied, x, [leaves[k] for k in trained])
  d_x, d_trained = pull(g)
  return d_x, [d.astype(jnp.float32) for d in d_trained]


def _blocks(structure: Any, x: Array, leaves: list[Any], of: Groups) -> Array:
  """Block by block in the rows' order: where a block runs on into the next group, the next block writes over it."""
  rows = jnp.pad(x, ((0, of.block), (0, 0)))

  def body(i, y):
    group, begin = of.at(i)
    some = jax.lax.dynamic_slice_in_dim(rows, begin, of.block)
    return jax.lax.dynamic_update_slice_in_dim(
      y, linear(some, _matrix(structure, leaves, group, i)), begin, 0
    )

  shape = jax.eval_shape(lambda: linear(rows[: of.block], _matrix(structure, leaves, 0, 0)))
  y = jnp.zeros((len(rows), shape.shape[-1]), shape.dtype)
  return jax.lax.fori_loop(0, of.first[-1], body, y)[: len(x)]


def _blocks_backward(structure, trained, x, leaves, of, g):
  """(the gradient of x, those of the trained leaves in float32)."""
  rows = jnp.pad(x, ((0, of.block), (0, 0)))
  g = jnp.pad(g, ((0, of.block), (0, 0)))

  def body(i, carry):
    d_rows, sums = carry
    group, begin = of.at(i)
    mine = of.rows(begin, group)
    some = jax.lax.dynamic_slice_in_dim(rows, begin, of.block)

    def multiplied(some, values):
      changed = list(leaves)
      for k, value in zip(trained, values):
        changed[k] = value
      matrices = [leaf if k in trained else leaf[group] for k, leaf in enumerate(changed)]
      return linear(some, _whole(structure, matrices, i))

    _, pull = jax.vjp(multiplied, some, [leaves[k][group] for k in trained])
    d_some, d_values = pull(jnp.where(mine, jax.lax.dynamic_slice_in_dim(g, begin, of.block), 0))
    sums = [s.at[group].add(d.astype(jnp.float32)) for s, d in zip(sums, d_values)]
    return jax.lax.dynamic_update_slice_in_dim(d_rows, d_some, begin, 0), sums

  sums = [jnp.zeros(leaves[k].shape, jnp.float32) for k in trained]
  d_rows, sums = jax.lax.fori_loop(0, of.first[-1], body, (jnp.zeros_like(rows), sums))
  return d_rows[: len(x)], sums


def _matrix(structure: Any, leaves: list[Any], group: Any, i: Any) -> AnyWeight:
  return _whole(structure, [leaf[group] for leaf in leaves], i)


def _whole(structure: Any, leaves: list[Any], i: Any) -> AnyWeight:
  """One group's matrix, whose dropout is drawn anew for block i."""
  return _redrawn(structure.unflatten(leaves), i)


def _redrawn(w: AnyWeight, i: Any) -> AnyWeight:
  if not isinstance(w, Adapted):
    return w
  key = None if w.key is None else jax.random.fold_in(w.key, i)
  return w.replace(base=_redrawn(w.base, i), key=key)


@jax.custom_vjp
def permuted(x: Array, order: Array, inverse: Array) -> Array:
  """x[order], whose gradient is a look-up too: inverse[order[i]] = i."""
  del inverse
  return x[order]


permuted.defvjp(
  lambda x, order, inverse: (x[order], inverse), lambda inverse, g: (g[inverse], None, None)
)
