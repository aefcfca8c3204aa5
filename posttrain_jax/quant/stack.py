"""Stacks of quantised matrices: [layers, in, out] and [layers, experts, in, out], one matrix at a time, of any type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = jax.Array
# [..., in, out] -> (weight, largest absolute value)
Quantizer = Callable[[Array], tuple[Any, Array]]

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
LARGEST = np.float32(2.0**126)  # the reciprocal of a larger scale is subnormal, which XLA flushes


class Damaged(ValueError):
  """Numbers that no model computes with, however they are stored."""


class Unlike(ValueError):
  """Layers that cannot be stacked."""


def quantize(name: str, w: Any, one: Quantizer) -> Any:
  """`one` of w, [in, out] or a stack of such; a stack on the host goes to the device layer by layer.

  Raises:
    Damaged: a value is not finite, or too large.
  """
  if isinstance(w, np.ndarray) and w.ndim > 2:
    matrices = w.reshape(-1, *w.shape[-2:])
    stacked = fill((quantize(name, matrix, one) for matrix in matrices), w.shape[:-2])
    return jax.tree.map(jnp.asarray, stacked)
  q, top = one(jnp.asarray(w))
  if not isinstance(top, Tracer) and not float(top) < LARGEST:
    raise Damaged(
      f"cannot quantise {tuple(w.shape)} to {name}: its largest absolute value is {float(top)}, "
      f"expected one below {LARGEST:.3g}; look for NaN or infinity in the checkpoint, or fetch it again: "
      "left dense its products are not finite either"
    )
  return q


def largest(x: Array) -> Array:
  """The largest absolute value of x, NaN if any is: XLA:CPU's own maximum drops a NaN among numbers."""
  return jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, jnp.max(jnp.abs(x)).astype(jnp.float32))


def over(one: Callable[[Array], tuple[Any, Array]], w: Array) -> tuple[Any, Array]:
  """`one` of each matrix of a stack, in turn, and the largest of their values."""
  q, tops = jax.lax.map(one, w)
  return q, largest(tops)


def fill(matrices: Iterable[Any], lead: Sequence[int]) -> Any:
  """The [*lead, ...] weight of matrices that are made one after the other, in host memory that is taken once.

  Raises:
    Unlike: the matrices are not stored alike.
  """
  stacked = structure = None
  for i, matrix in enumerate(matrices):
    if stacked is None:
      structure = jax.tree.structure(matrix)
      stacked = jax.tree.map(lambda x: np.empty((math.prod(lead), *x.shape), x.dtype), matrix)
    if (form := jax.tree.structure(matrix)) != structure:
      raise Unlike(f"matrix {i} is stored as {form}, matrix 0 as {structure}")
    jax.tree.map(lambda whole, x, i=i: _set(whole, i, x), stacked, matrix)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), stacked)


def _set(whole: np.ndarray, i: int, x: Any) -> None:
  if whole.shape[1:] != x.shape or whole.dtype != x.dtype:
    raise Unlike(
      f"matrix {i} holds {x.dtype} {tuple(x.shape)}, matrix 0 {whole.dtype} {whole.shape[1:]}"
    )
  whole[i] = x


def check(name: str, shape: tuple[int, ...], dtype: Any) -> None:
  """Raises ValueError for what is no matrix, or no stack of them, of floating-point numbers."""
  if len(shape) not in (2, 3, 4):
    raise ValueError(
      f"cannot quantise shape {tuple(shape)} to {name}; expected [in, out], or stacked [layers, in, out] or "
      "[layers, experts, in, out]"
    )
  if jnp.dtype(dtype) not in DTYPES:
    raise ValueError(
      f"cannot quantise {jnp.dtype(dtype)} values to {name}; cast to float32, bfloat16 or float16 first"
    )
