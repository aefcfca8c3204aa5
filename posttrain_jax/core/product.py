"""The matrix product of every model, and its gradients: what is rounded, and what is not."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from posttrain_jax.core import sharding

Array = jax.Array
BITS = jnp.uint16  # of numbers in bfloat16
PRODUCT = "product"


def precision(*operands: Any) -> jax.lax.Precision | None:
  """HIGHEST where all are float32: left to themselves a GPU rounds those to TF32, and a TPU to bfloat16."""
  is_float32 = all(x.dtype == jnp.float32 for x in operands)
  return jax.lax.Precision.HIGHEST if is_float32 else None


def exact(x: Array, w: Array) -> Array:
  """x @ w, of float32 as a CPU computes it."""
  return jnp.matmul(x, w, precision=precision(x, w))


def product(x: Array, w: Array, contract: int, dtype: Any = None, operands: Any = None) -> Array:
  """x @ w (contract=0) or x @ w.T (contract=1), in dtype; None for x's.

  A float32 x is rounded to bfloat16 where w is bfloat16; sums and results are float32, and gradients too, whose
  cotangents are rounded before their products.  So a CPU computes in bfloat16: its matrices are bfloat16 and what lies
  between products is float32, since XLA:CPU has no other arithmetic.  1024 x 576 x 1536 on a core with AMX takes 2.6 ms
  so, 12 in float32, and 40 where the result is bfloat16.

  The gradient of a float32 w is float32 of a 16-bit x too: rounded, devices would add up what is rounded, of which 64
  lose a hundredth.  XLA scatters it then on GPUs too, where it would send a rounded one whole: the bytes are the same
  there, and twice as many on TPUs.

  Without a mesh x is flattened to two dimensions: on XLA:CPU the gradient of a low-rank factor from a three-dimensional
  operand measured 9x slower.  On a mesh it must not be, where time sharding would add an all-gather.

  A policy of what is kept for the backward pass sees no product within a derivative of its own: it is named PRODUCT.

  Args:
    w: a matrix, or the bits of one in bfloat16.
    operands: what x and w are rounded to where x is float32; None: `multiplied`.
  """
  lead = x.shape[:-1]
  if x.ndim > 2 and not sharding.active():
    x = x.reshape(-1, x.shape[-1])
  if x.dtype == jnp.float32:
    y = _product32(x, w, multiplied(x.dtype, _held(w)) if operands is None else operands, contract)
    y = checkpoint_name(y, PRODUCT)
  elif dtype is None and w.dtype == jnp.float32 and x.dtype.itemsize == 2:
    y = checkpoint_name(_product16(x, w, contract), PRODUCT)
  else:
    y = _dot(x, operand(w, x.dtype), contract, dtype)
  return y.reshape(*lead, y.shape[-1])


def multiplied(x: Any, w: Any) -> Any:
  """What a product of dtypes x and w is computed in: bfloat16 where x is float32 and w bfloat16, else x's."""
  return w if x == jnp.float32 and w == jnp.bfloat16 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product32(x: Array, w: Array, dtype: Any, contract: int) -> Array:
  """float32 x @ w or x @ w.T, of operands in dtype.  For the backward pass w is kept as it came, bits as bits."""
  return _dot(x.astype(dtype), operand(w, dtype), contract, jnp.float32)


def _product32_forward(
  x: Any, w: Any, dtype: Any, contract: int
) -> tuple[Array, tuple[Array | None, Array]]:
  """x is kept for the gradient of w alone: of a frozen w none exists, however it is traced."""
  y = _product32(x.value, w.value, dtype, contract)
  return y, (x.value if w.perturbed else None, w.value)


def _product32_backward(
  dtype: Any, contract: int, kept: tuple[Array | None, Array], g: Any
) -> tuple[Array | None, Array | None]:
  x, w = kept
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None
  g = g.astype(dtype)
  d_x = _dot(g, operand(w, dtype), 1 - contract, jnp.float32)
  if x is None:
    return d_x, None
  x = x.astype(dtype)
  one, other = (x, g) if contract == 0 else (g, x)
  if other.shape[-1] < one.shape[-1]:
    # The gradient of a narrow factor, [in, rank], is computed transposed: six times as fast on XLA:CPU, which would
    # turn it back without the barrier.
    d_w = jax.lax.optimization_barrier(_over_rows(other, one)).T
  else:
    d_w = _over_rows(one, other)
  return d_x, d_w.astype(w.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product16(x: Array, w: Array, contract: int) -> Array:
  """x @ w or x @ w.T of a 16-bit x and a float32 w, in x's dtype; the gradient of w is float32."""
  return _dot(x, w.astype(x.dtype), contract, None)


def _product16_forward(x: Any, w: Any, contract: int) -> tuple[Array, tuple[Array | None, Array]]:
  y = _product16(x.value, w.value, contract)
  return y, (x.value if w.perturbed else None, w.value)


def _product16_backward(
  contract: int, kept: tuple[Array | None, Array], g: Any
) -> tuple[Array | None, Array | None]:
  x, w = kept
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None
  d_x = _dot(g, w.astype(g.dtype), 1 - contract, None)
  if x is None:
    return d_x, None
  one, other = (x, g) if contract == 0 else (g, x)
  return d_x, _sum(one, other)


_product16.defvjp(_product16_forward, _product16_backward, symbolic_zeros=True)


def _over_rows(x: Array, g: Array) -> Array:
  """float32 sum over rows of x[row, i] g[row, o].

  XLA:CPU would multiply x as it lies, [1024, 576] by [1024, 1536] in 11 ms of bfloat16 and 10 of float32, and takes
  back a transpose that it is told.  As pairs of numbers in an integer x.T lies as it is written: 3.5 ms.
  """
  if x.dtype != jnp.bfloat16 or x.ndim != 2 or len(x) % 2 or jax.default_backend() != "cpu":
    return _sum(x, g)
  cast, (count, columns) = jax.lax.bitcast_convert_type, x.shape
  pairs = cast(cast(x, BITS).T.reshape(columns, count // 2, 2), jnp.uint32)
  turned = jax.lax.optimization_barrier(pairs)
  turned = cast(cast(turned, BITS).reshape(columns, count), jnp.bfloat16)
  return _dot(turned, g, 0, jnp.float32)


def _sum(x: Array, g: Array) -> Array:
  rows = tuple(range(x.ndim - 1))
  return jax.lax.dot_general(
    x, g, ((rows, rows), ((), ())), precision(x, g), preferred_element_type=jnp.float32
  )


_product32.defvjp(_product32_forward, _product32_backward, symbolic_zeros=True)


def _held(w: Array) -> Any:
  """The dtype of the numbers that w holds."""
  return jnp.bfloat16 if w.dtype == BITS else w.dtype


def operand(w: Array, dtype: Any) -> Array:
  """The numbers that w holds, or its bits, in dtype."""
  return (jax.lax.bitcast_convert_type(w, jnp.bfloat16) if w.dtype == BITS else w).astype(dtype)


def _dot(x: Array, w: Array, contract: int, dtype: Any) -> Array:
  """One row is two: XLA:CPU has no bfloat16 product of one, and sixty of 576 x 1536 took 66 ms for 9."""
  alone = x.dtype == jnp.bfloat16 and x.size == x.shape[-1] and jax.default_backend() == "cpu"
  rows = jnp.concatenate([x, x], axis=-2) if alone and x.ndim > 1 else x
  dimensions = (((x.ndim - 1,), (contract,)), ((), ()))
  y = jax.lax.dot_general(rows, w, dimensions, precision(x, w), preferred_element_type=dtype)
  return y if rows is x else y[..., :1, :]
