"""AdaLoRA: an update in the form of a singular value decomposition, of which training keeps the best.

Zhang et al. 2023; how the rank is spent is `allocation`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.dropout import dropout
from posttrain_jax.adapters.node import Change
from posttrain_jax.core import sharding, struct, weight
from posttrain_jax.core.product import exact
from posttrain_jax.core.weight import embed, linear

Array = jax.Array
STD = 0.02  # of the factors at the start, as in PEFT and the paper's own code


@struct.dataclass
class Factors:
  """One array for each trained field of an AdaLoRA, in its shape."""

  a: Array
  b: Array
  e: Array


@struct.dataclass
class AdaLoRA(Change):
  """x @ W + scale * ((x @ a) * e) @ b, with a: [in, rank], e: [rank], b: [rank, out].

  `mask` is 1 for the ranks that are kept.  It does not act in the product: as in PEFT a rank is out when its e is set
  to 0, and until the budget is final e may grow again and win it back.
  """

  a: Array
  b: Array
  e: Array
  scale: Array  # [layers] or []: alpha / (init_r + 1e-5) however many ranks are left; 0 where not adapted
  mask: Array  # [layers, rank]
  # moving average of |parameter * gradient|; None: not in training
  importance: Factors | None = None
  uncertainty: Factors | None = None  # moving average of its distance from that
  adapted: tuple[bool, ...] = struct.field(pytree_node=False, default=(True,))  # for each layer
  dropout: float = struct.field(pytree_node=False, default=0.0)
  TRAINED = ("a", "b", "e")

  def apply(self, x: Array, base: Any, key: Array | None = None) -> Array:
    down = linear(dropout(x, self.dropout, key), self.a)
    return linear(x, base) + linear(down * self._values().astype(x.dtype), self.b)

  def rows(self, ids: Array, base: Any, key: Array | None = None) -> Array:
    rows = embed(ids, base)
    return rows + linear(embed(ids, self.a) * self._values(), self.b).astype(rows.dtype)

  def dense(self, base: Any, dtype: Any = None) -> Array:
    """W + scale a diag(e) b, summed in float32 and rounded once."""
    w = weight.dense(base)
    update = exact(self.a * self._values()[..., None, :], self.b)
    return (w.astype(jnp.float32) + update).astype(dtype or w.dtype)

  def _values(self) -> Array:
    return self.e * self.scale[..., None]

  def ranks(self) -> np.ndarray:
    """The ranks that each layer keeps, 0 where it is not adapted; of shapes alone, those at the start."""
    if isinstance(self.mask, jax.ShapeDtypeStruct):
      kept = self.mask.shape[-1] * np.asarray(self.adapted).astype(int)
      return kept.reshape(self.mask.shape[:-1])
    return np.asarray(self.mask).sum(-1).astype(int)

  def size(self) -> int:
    """Trained parameters in effect."""
    return int(self.ranks().sum()) * (self.a.shape[-2] + self.b.shape[-1] + 1)

  def partition_specs(self, spec: PartitionSpec) -> AdaLoRA:
    *lead, _, _ = [*[None] * (self.a.ndim - len(spec)), *spec]
    rows, columns = sharding.factors(spec)
    none = PartitionSpec()
    a, b = PartitionSpec(*lead, rows, None), PartitionSpec(*lead, None, columns)
    beside = lambda factors: factors and dataclasses.replace(factors, a=a, b=b, e=none)
    return dataclasses.replace(
      self,
      a=a,
      b=b,
      e=none,
      scale=none,
      mask=none,
      importance=beside(self.importance),
      uncertainty=beside(self.uncertainty),
    )


def init(
  key: Array, base: Any, modules: Sequence[str], config: AdapterConfig
) -> tuple[Any, AdaLoRA]:
  """(base, an AdaLoRA that changes nothing yet): a and b ~ normal(0, 0.02), e zero, every rank kept."""
  check(config)
  if "embed_tokens" in modules:
    raise ValueError(
      "adalora adapts linear layers, as PEFT does: leave embed_tokens out of target_modules"
    )
  *lead, rows, columns = weight.shape(base)
  rank = config.init_r
  if rank > min(rows, columns):
    raise ValueError(
      f"init_r={rank} is above the size of {modules[0]}, {rows} x {columns}: write at most {min(rows, columns)}"
    )

  def draw(module):
    first, second = jax.random.split(jax.random.fold_in(key, zlib.crc32(module.encode())))
    a = STD * jax.random.normal(first, (rows, rank))
    b = STD * jax.random.normal(second, (rank, columns))
    return a, b, jnp.zeros(rank)

  triples = [draw(module) if config.targets(module) else None for module in modules]
  kept = [np.ones(rank)] * len(modules)
  node = join(triples, kept, config, stacked=bool(lead))
  zeros = Factors(*[jnp.zeros_like(x) for x in (node.a, node.b, node.e)])
  # two arrays: a donated state must not hold one twice
  other = jax.tree.map(jnp.zeros_like, zeros)
  return base, dataclasses.replace(node, importance=zeros, uncertainty=other)


def join(
  triples: Sequence[tuple[Any, Any, Any] | None],
  kept: Sequence[Any],
  config: AdapterConfig,
  *,
  stacked: bool,
) -> AdaLoRA:
  """The AdaLoRA of one (a, b, e) and mask a module, None for one that is not adapted."""
  some = next(factors for factors in triples if factors is not None)
  zeros = [jnp.zeros_like(x) for x in some]
  a, b, e = (
    jnp.stack([jnp.asarray((factors or zeros)[i], jnp.float32) for factors in triples])
    for i in range(3)
  )
  adapted = tuple(factors is not None for factors in triples)
  mask = np.asarray(kept, np.float32) * np.asarray(adapted)[:, None]
  scale = config.lora_alpha / (config.init_r + 1e-5) * np.asarray(adapted)
  node = AdaLoRA(
    a,
    b,
    e,
    jnp.asarray(scale, jnp.float32),
    jnp.asarray(mask),
    adapted=adapted,
    dropout=config.lora_dropout,
  )
  return node if stacked else jax.tree.map(lambda leaf: leaf[0], node)


def check(config: AdapterConfig) -> None:
  """The options that stand by themselves; the schedule waits for the run's steps."""
  c = config
  if not 1 <= c.target_r <= c.init_r:
    raise ValueError(
      f"target_r={c.target_r} and init_r={c.init_r}: ranks are pruned from init_r to target_r, write "
      "1 <= target_r <= init_r"
    )
  if not c.lora_alpha > 0:
    raise ValueError(f"lora_alpha={c.lora_alpha}: adalora wants it above 0")
  for name in ("beta1", "beta2"):
    if not 0 < vars(c)[name] < 1:
      raise ValueError(f"{name}={vars(c)[name]}: write a number between 0 and 1")
  if not 0 <= c.orth_reg_weight < float("inf"):
    raise ValueError(f"orth_reg_weight={c.orth_reg_weight}: write a finite number of at least 0")
  if c.deltaT < 1 or c.tinit < 0 or c.tfinal < 0:
    raise ValueError(
      f"deltaT={c.deltaT}, tinit={c.tinit}, tfinal={c.tfinal}: deltaT is at least 1 step, the others at least 0"
    )
