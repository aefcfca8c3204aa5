"""NF4: the 4-bit type whose values are quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, section 3)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import struct
from posttrain_jax.quant import fourbit
from posttrain_jax.quant.fourbit import FourBit

# The quantiles of a standard normal that bitsandbytes uses (`create_normal_map(offset=0.9677083)`).
CODEBOOK = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)


@struct.dataclass
class NF4(FourBit):
  """w = scale * CODEBOOK[code], sixteen quantiles of a normal distribution; layout and verbs are `FourBit`'s."""

  CODEBOOK = CODEBOOK
  name: str = struct.field(pytree_node=False, default="nf4")


def quantize(w: Any, *, block_size: int = 64, double_quant: bool = True) -> NF4:
  """The NF4 of w: [in, out] or stacked [layers, in, out]; blocks run along `in`.

  Layers are quantised one after the other, each as a matrix of its own.  Subnormal numbers count as zero.

  Raises:
    ValueError: for a shape, block size, dtype or value that NF4 cannot hold.
  """
  return fourbit.quantize(NF4, w, block_size, double_quant)


def abstract(
  shape: tuple[int, ...],
  *,
  dtype: Any = jnp.float32,
  block_size: int = 64,
  double_quant: bool = True,
) -> NF4:
  """The NF4 of `jax.ShapeDtypeStruct`s that `quantize` would give, for programs compiled without weights."""
  return fourbit.abstract(NF4, shape, dtype, block_size, double_quant)
