"""Rows cut over the `context` axis of the ambient mesh, so that every device has as much to attend to.

Of 2 c pieces of a row device i of c has the pieces i and 2 c - 1 - i: an early one, whose queries see little, and a
late one.  What a token sees follows from its position and segment, so that attention, and whatever looks at one token
at a time, is the same in any order.  What reads neighbours (the next token, sums along an answer) is of rows in their
own order: they are `cut` for the network and made `whole` behind it.  Without that axis both do nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import sharding

Array = jax.Array


def cut(x: Array) -> Array:
  """[rows, time, ...] in zigzag order, with zeros behind a row that does not make 2 c even pieces."""
  shares = sharding.size("context")
  if shares == 1:
    return x
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % (2 * shares)), *[(0, 0)] * (x.ndim - 2)])
  size = x.shape[1] // (2 * shares)

  def local(x):  # of whole rows: left to itself the compiler exchanged every piece by itself
    device = jax.lax.axis_index("context")
    piece = lambda i: jax.lax.dynamic_slice_in_dim(x, i * size, size, 1)
    return jnp.concatenate([piece(device), piece(2 * shares - 1 - device)], axis=1)

  behind, mesh = " -" * (x.ndim - 2), jax.sharding.get_abstract_mesh()
  spec = lambda axes: sharding.fitted(sharding.logical(axes + behind), x.shape, mesh)
  return jax.shard_map(local, in_specs=spec("batch -"), out_specs=spec("batch time"))(x)


def whole(x: Array, time: int) -> Array:
  """[rows, time, ...] of what `cut` gave: in its own order, on every device, without the zeros."""
  shares = sharding.size("context")
  if shares == 1:
    return x
  x = sharding.constrain(x, "batch" + " -" * (x.ndim - 1))
  return in_order(x, 1)[:, :time]


def in_order(x: Array, axis: int) -> Array:
  """x, which a device has whole, with what `cut` put along an axis in a row's own order."""
  shares = sharding.size("context")
  pieces = jnp.split(x, 2 * shares, axis=axis)
  return jnp.concatenate([pieces[i] for i in np.argsort(order(shares))], axis=axis)


def numbers(time: int) -> Array:
  """[time]: where in its row each of a device's tokens stands; inside a `shard_map` over context."""
  device, last = jax.lax.axis_index("context"), 2 * sharding.size("context") - 1
  inside = jnp.arange(time // 2)
  return jnp.concatenate([device * (time // 2) + inside, (last - device) * (time // 2) + inside])


def order(shares: int) -> np.ndarray:
  """[2 c]: the pieces of a row as the devices have them, two each.

  >>> order(3).tolist()
  [0, 5, 1, 4, 2, 3]
  """
  return np.stack([np.arange(shares), 2 * shares - 1 - np.arange(shares)], axis=1).ravel()


def parts(x: Array) -> Array:
  """[rows, time, ...] -> [c * rows, time / c, ...]: each device's part of a row as a row, nothing moved."""
  shares = _divided(x.shape[1])
  x = x.reshape(x.shape[0], shares, -1, *x.shape[2:]).swapaxes(0, 1)
  return x.reshape(-1, *x.shape[2:])


def joined(x: Array, time: int) -> Array:
  """[rows, time, ...] of what `parts` gave."""
  shares = _divided(time)
  return x.reshape(shares, -1, *x.shape[1:]).swapaxes(0, 1).reshape(-1, time, *x.shape[2:])


def _divided(time: int) -> int:
  shares = sharding.size("context")
  return 1 if time % shares else shares
