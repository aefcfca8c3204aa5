"""LoRA: a low-rank update beside a frozen matrix.  Hu et al. 2021."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.dropout import dropout
from posttrain_jax.adapters.node import Change
from posttrain_jax.core import sharding, struct, weight
from posttrain_jax.core.product import exact
from posttrain_jax.core.weight import embed, linear

Array = jax.Array


@struct.dataclass
class Start:
  """The factors that a LoRA began with, where it began with a part of its base.

  The base in training is W - scale * taken, stored as bases are; the LoRA that does to W what training did is
  scale * (a b - start.a start.b).
  """

  a: Any
  b: Any
  taken: Any = None  # None: (a, b)


@struct.dataclass
class LoRA(Change):
  """x @ W + scale * (x @ a) @ b, with a: [in, rank], b: [rank, out].

  Ranks that differ by layer are stored at the largest; `mask` is 1 for the ranks in use, and a layer whose mask is all
  zero is not adapted.
  """

  a: Array
  b: Array
  scale: Array  # [], [layers] or [layers, experts]: alpha / rank (rsLoRA: alpha / sqrt(rank))
  mask: Array | None = None  # [layers, rank] or so; None: every rank is in use
  start: Start | None = None  # None: the base is as it was
  dropout: float = struct.field(pytree_node=False, default=0.0)
  TRAINED = ("a", "b")  # the optimizer sees these fields and no other

  def apply(self, x: Array, base: Any, key: Array | None = None) -> Array:
    # narrow enough to be kept for the backward pass, which would compute it again
    down = checkpoint_name(linear(dropout(x, self.dropout, key), self.a), "down")
    return linear(x, base) + linear(down * self._scales().astype(x.dtype), self.b)

  def ragged(self, x: Array, sizes: Array, base: Any, key: Array | None = None) -> Array:
    dropped = dropout(x, self.dropout, None if key is None else key[0])
    return weight.ragged(x, base, sizes) + self._change(dropped, sizes)

  def _change(self, x: Array, sizes: Array) -> Array:
    """What the experts' factors add to sorted rows."""
    down = weight.ragged(x, self.a, sizes) * of_rows(self._scales(), sizes, len(x)).astype(x.dtype)
    return weight.ragged(down, self.b, sizes)

  def rows(self, ids: Array, base: Any, key: Array | None = None) -> Array:
    """An adapted embedding; as in PEFT it has no dropout."""
    rows = embed(ids, base)
    update = linear(embed(ids, self.a) * self._scales(), self.b)
    return rows + update.astype(rows.dtype)

  def dense(self, base: Any, dtype: Any = None) -> Array:
    """W + scale a b, summed in float32 and rounded once."""
    w = weight.dense(base)
    update = exact(self.a * self._scales()[..., None, :], self.b)
    return (w.astype(jnp.float32) + update).astype(dtype or w.dtype)

  def at_start(self) -> LoRA | None:
    """What the base lacks of what it was: the LoRA of the first step; None where nothing was taken out."""
    if self.start is None:
      return None
    return LoRA(self.start.a, self.start.b, self.scale, self.mask)

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

  def split(self) -> list[tuple[np.ndarray, np.ndarray]]:
    """(a, b) of each module at its effective rank, on the host; the inverse of `join`."""
    a, b = (np.asarray(x).reshape(-1, *x.shape[-2:]) for x in (self.a, self.b))
    mask = np.ones((a.shape[0], a.shape[-1])) if self.mask is None else np.asarray(self.mask)
    used = mask.reshape(a.shape[0], -1) > 0
    return [(a[i][:, used[i]], b[i][used[i]]) for i in range(len(a))]

  def partition_specs(self, spec: PartitionSpec) -> LoRA:
    """Specs of the fields, from the base's (`sharding.factors`); the rank stays unsharded."""
    *lead, _, _ = [*[None] * (self.a.ndim - len(spec)), *spec]
    rows, columns = sharding.factors(spec)
    none = PartitionSpec()
    a, b = PartitionSpec(*lead, rows, None), PartitionSpec(*lead, None, columns)
    start = self.start and Start(a, b, self.start.taken and (a, b))
    mask = None if self.mask is None else none
    return dataclasses.replace(self, a=a, b=b, scale=none, mask=mask, start=start)

  def on_the_original(self) -> LoRA:
    """The same change as a LoRA of the base before `start` was taken out of it: twice the rank, no start."""
    if self.start is None:
      return self
    return dataclasses.replace(
      self,
      a=jnp.concatenate([self.a, self.start.a], axis=-1),
      b=jnp.concatenate([self.b, -self.start.b], axis=-2),
      mask=None if self.mask is None else jnp.concatenate([self.mask, self.mask], axis=-1),
      start=None,
    )

  def from_the_original(self) -> LoRA:
    """What `on_the_original` was called on: the first half of each module's ranks, and as its start the second.

    Of LoftQ's start it does not say what was taken out of the base.
    """
    halves = [(a, b, a.shape[1] // 2) for a, b in self.split()]
    scales = np.asarray(self.scale).reshape(-1).tolist()
    joined = lambda pairs: join(pairs, scales, self.a.shape[:-2], dropout=self.dropout)
    trained = joined([(a[:, :rank], b[:rank]) for a, b, rank in halves])
    start = joined([(a[:, rank:], -b[rank:]) for a, b, rank in halves])
    return dataclasses.replace(trained, start=Start(start.a, start.b))


def init(key: Array, base: Any, modules: Sequence[str], config: AdapterConfig) -> tuple[Any, LoRA]:
  """(base, a LoRA that changes nothing yet) for the module or the stacked modules of one weight.

  A module that the config does not target gets rank 0.  a ~ U(-1/sqrt(in), 1/sqrt(in)) or, as "gaussian",
  normal(0, 1/rank); b zero.  As "zero_a" a is zero and b ~ U(-1/sqrt(rank), 1/sqrt(rank)), what a linear layer of
  `rank` inputs starts with (Hayou et al. 2024 compare the two).  An embedding has a zero and b ~ normal(0, 1), as in
  PEFT.

  Raises:
    ValueError: a rank above the matrix.
  """
  rows, columns = weight.shape(base)[-2:]
  ranks = [rank_of(module, config, rows, columns) for module in modules]
  scales = [config.scale(module) if rank else 0.0 for module, rank in zip(modules, ranks)]
  folds = np.asarray([zlib.crc32(module.encode()) for module in modules], np.uint32)
  how = "embedding" if modules[0] == "embed_tokens" else config.init_lora_weights
  lead, dropped = weight.shape(base)[:-2], config.lora_dropout
  if len({*ranks}) > 1:
    drawn = [_drawn(key, fold[None], rows, columns, r, how) for fold, r in zip(folds, ranks)]
    return base, join([(a[0], b[0]) for a, b in drawn], scales, lead, dropout=dropped)
  # one program: module by module they are a thousand small ones, and seconds of a start
  a, b = _drawn(key, folds, rows, columns, ranks[0], how)
  node = LoRA(a, b, jnp.asarray(scales, jnp.float32), dropout=dropped)
  return base, _stack(node, lead)


def rank_of(module: str, config: AdapterConfig, rows: int, columns: int) -> int:
  """The rank that the config gives a module of [rows, columns], 0 where it does not target it.

  Raises:
    ValueError: a rank above the matrix.
  """
  rank = config.rank(module) if config.targets(module) else 0
  if rank > min(rows, columns):
    raise ValueError(
      f"rank {rank} of {module!r} is above the matrix, which is {rows} x {columns}: write at most "
      f"{min(rows, columns)}, in r or for this module in rank_pattern, or leave it out with exclude_modules"
    )
  return rank


def join(
  pairs: Sequence[tuple[Any, Any]],
  scales: Sequence[float],
  lead: tuple[int, ...],
  *,
  dropout: float = 0.0,
) -> LoRA:
  """The LoRA of one (a: [in, rank], b: [rank, out]) and scale per module; ranks may differ, 0 is not adapted.

  Factors are zero beyond their module's rank: what the mask hides neither acts nor moves.

  Args:
    lead: the axes that the modules are stacked over, (layers,) or (layers, experts); () for one module.
  """
  ranks = np.asarray([a.shape[1] for a, _ in pairs])
  largest = int(ranks.max())
  mask = (np.arange(largest) < ranks[:, None]).astype(np.float32)
  a = jnp.stack([jnp.pad(a, ((0, 0), (0, largest - a.shape[1]))) for a, _ in pairs])
  b = jnp.stack([jnp.pad(b, ((0, largest - b.shape[0]), (0, 0))) for _, b in pairs])
  uneven = None if (ranks == largest).all() else jnp.asarray(mask)
  node = LoRA(a, b, jnp.asarray(scales, jnp.float32), uneven, dropout=dropout)
  return _stack(node, lead)


def of_rows(values: Array, sizes: Array, rows: int) -> Array:
  """[rows, ...]: of each sorted row its group's value."""
  return jnp.repeat(values, sizes, axis=0, total_repeat_length=rows)


def _stack(node: LoRA, lead: tuple[int, ...]) -> LoRA:
  return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), node)


def _drawn(key, folds, rows, columns, rank, how):
  """(a, b) of several modules, stacked, each drawn from its own fold of the key."""
  keys = _folded(key, folds)
  no_a, no_b = jnp.zeros((len(folds), rows, rank)), jnp.zeros((len(folds), rank, columns))
  if how == "embedding":
    return no_a, _normal(keys, (rank, columns))
  if how == "gaussian":
    return _normal(keys, (rows, rank)) / max(rank, 1), no_b
  if how == "zero_a":
    return no_a, _uniform(keys, (rank, columns), max(rank, 1) ** -0.5)
  return _uniform(keys, (rows, rank), rows**-0.5), no_b


# apart, so that matrices of one shape share what takes a third of a second to compile; vmap would take thrice that


@jax.jit
def _folded(key, folds):
  return jax.lax.map(lambda fold: jax.random.fold_in(key, fold), folds)


@functools.partial(jax.jit, static_argnums=1)
def _normal(keys, shape):
  return jax.lax.map(lambda key: jax.random.normal(key, shape), keys)


@functools.partial(jax.jit, static_argnums=1)
def _uniform(keys, shape, bound):
  return jax.lax.map(lambda key: jax.random.uniform(key, shape, minval=-bound, maxval=bound), keys)
