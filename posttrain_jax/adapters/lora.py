"""LoRA: a low-rank update beside a frozen matrix.  Hu et al. 2021."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.core import weight
from posttrain_jax.core.weight import embed, linear

Array = jax.Array


@struct.dataclass
class LoRA:
  """x @ W + scale * (x @ a) @ b, with a: [in, rank], b: [rank, out].

  Ranks that differ by layer are stored at the largest; `mask` is 1 for the ranks in use, and a layer whose mask is all
  zero is not adapted.
  """

  a: Array
  b: Array
  scale: Array  # [layers] or []: alpha / rank (rsLoRA: alpha / sqrt(rank))
  mask: Array | None = None  # [layers, rank]; None: every rank is in use
  dropout: float = struct.field(pytree_node=False, default=0.0)
  TRAINED = ("a", "b")  # the optimizer sees these fields and no other

  def apply(self, x: Array, base: Any, key: Array | None = None) -> Array:
    down = linear(_dropout(x, self.dropout, key), self.a)
    return linear(x, base) + linear(down * self._scales().astype(x.dtype), self.b)

  def rows(self, ids: Array, base: Any, key: Array | None = None) -> Array:
    """An adapted embedding; as in PEFT it has no dropout."""
    rows = embed(ids, base)
    update = linear(embed(ids, self.a) * self._scales(), self.b)
    return rows + update.astype(rows.dtype)

  def dense(self, base: Any, dtype: Any = None) -> Array:
    """W + scale a b, summed in float32 and rounded once."""
    w = weight.dense(base)
    update = (
      (self.a * self._scales()[..., None, :]) @ self.b
      if self.a.ndim == 3
      else (self.a * self._scales()) @ self.b
    )
    return (w.astype(jnp.float32) + update).astype(dtype or w.dtype)

  def _scales(self) -> Array:
    """[..., rank] or a scalar to multiply x @ a with."""
    if self.mask is None:
      return self.scale[..., None]
    return self.scale[..., None] * self.mask

  def ranks(self) -> np.ndarray:
    """The effective rank of each layer, 0 where a layer is not adapted; [] for what is not stacked."""
    if self.mask is None:
      return np.full(self.a.shape[:-2], self.a.shape[-1])
    return np.asarray(self.mask).sum(-1).astype(int)

  def size(self) -> int:
    """Trained parameters in effect."""
    return int(self.ranks().sum()) * (self.a.shape[-2] + self.b.shape[-1])

  def partition_specs(self, spec: PartitionSpec) -> LoRA:
    """Specs of the fields, from the base's: its axes are inherited, the rank stays unsharded."""
    *lead, rows, columns = [*[None] * (self.a.ndim - len(spec)), *spec]
    none = PartitionSpec()
    return self.replace(
      a=PartitionSpec(*lead, rows, None),
      b=PartitionSpec(*lead, None, columns),
      scale=none,
      mask=None if self.mask is None else none,
    )


def init(key: Array, base: Any, modules: Sequence[str], config: AdapterConfig) -> tuple[Any, LoRA]:
  """(base, a LoRA that changes nothing yet) for the module or the stacked modules of one weight.

  A module that the config does not target gets rank 0.  a ~ U(-1/sqrt(in), 1/sqrt(in)) or, as "gaussian",
  normal(0, 1/rank); b zero.  An embedding has a zero and b ~ normal(0, 1), as in PEFT.
  """
  stacked = len(weight.shape(base)) == 3
  rows, columns = weight.shape(base)[-2:]
  ranks = np.asarray([config.rank(m) if config.targets(m) else 0 for m in modules])
  scales = np.asarray([config.scale(m) for m in modules], np.float32)
  largest = int(ranks.max())
  mask = (np.arange(largest) < ranks[:, None]).astype(np.float32)
  draws = []
  for module, rank in zip(modules, ranks):
    own = jax.random.fold_in(key, zlib.crc32(module.encode()))
    draws.append(_draw(own, module, rows, columns, int(rank), largest, config.init_lora_weights))
  a, b = (jnp.stack(part) for part in zip(*draws))
  uneven = None if (ranks == largest).all() else jnp.asarray(mask)
  node = LoRA(a, b, jnp.asarray(scales), uneven, dropout=config.lora_dropout)
  return base, node if stacked else jax.tree.map(lambda leaf: leaf[0], node)


def _draw(key, module, rows, columns, rank, largest, how):
  """(a, b) of one module at its own rank, zero beyond: what the mask hides neither acts nor moves."""
  if module == "embed_tokens":
    a = jnp.zeros((rows, rank))
    b = jax.random.normal(key, (rank, columns))
  elif how == "gaussian":
    a, b = jax.random.normal(key, (rows, rank)) / max(rank, 1), jnp.zeros((rank, columns))
  else:
    bound = rows**-0.5
    a, b = (
      jax.random.uniform(key, (rows, rank), minval=-bound, maxval=bound),
      jnp.zeros((rank, columns)),
    )
  return jnp.pad(a, ((0, 0), (0, largest - rank))), jnp.pad(b, ((0, largest - rank), (0, 0)))


def _dropout(x, rate, key):
  if key is None or rate == 0.0:
    return x
  return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(
    x.dtype
  )
