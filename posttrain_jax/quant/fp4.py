"""FP4: the 4-bit type of bitsandbytes with a sign, two bits of exponent and one of mantissa."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import struct
from posttrain_jax.quant import fourbit
from posttrain_jax.quant.fourbit import FourBit

# By bit pattern, 12 being the largest.  Only zero has two codes, 0 and 8: bitsandbytes' CPU kernel gives what lies
# just below zero the first and just above it the second (its CUDA kernel the other way round); both are read as 0.
_POSITIVE = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
CODEBOOK = np.concatenate([_POSITIVE, np.float32(0) - _POSITIVE])


@struct.dataclass
class FP4(FourBit):
  """w = scale * CODEBOOK[code] with +-(0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1); layout and verbs are `FourBit`'s."""

  CODEBOOK = CODEBOOK
  name: str = struct.field(pytree_node=False, default="fp4")


def quantize(w: Any, *, block_size: int = 64, double_quant: bool = True) -> FP4:
  """The FP4 of w: [in, out] or stacked [layers, in, out]; blocks run along `in`.

  Layers are quantised one after the other, each as a matrix of its own.  Subnormal numbers count as zero.

  Raises:
    ValueError: for a shape, block size, dtype or value that FP4 cannot hold.
  """
  return fourbit.quantize(FP4, w, block_size, double_quant)


def abstract(
  shape: tuple[int, ...],
  *,
  dtype: Any = jnp.float32,
  block_size: int = 64,
  double_quant: bool = True,
) -> FP4:
  """The FP4 of `jax.ShapeDtypeStruct`s that `quantize` would give, for programs compiled without weights."""
  return fourbit.abstract(FP4, shape, dtype, block_size, double_quant)
