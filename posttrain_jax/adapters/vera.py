"""VeRA: one frozen random pair of factors for all modules, and vectors that are trained.  Kopiczko et al. 2023.

The pair is drawn from `projection_prng_key` by jax's generator: the distribution is PEFT's, the numbers are not, so
files hold the pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.dropout import dropout
from posttrain_jax.adapters.node import Change, Common
from posttrain_jax.core import struct, weight
from posttrain_jax.core.product import exact
from posttrain_jax.core.weight import Shared, embed, linear

Array = jax.Array
PATH = "shared/vera"  # of the pair in the adapter's tree


@struct.dataclass
class Projections(Common):
  """a: [in, rank] and b: [rank, out] of the largest inputs and outputs; a module reads the corner that is its size.

  They stand once in the adapter's tree: memory and checkpoint hold one pair, which `bind` lends to every node.
  """

  a: Array
  b: Array
  TRAINED = ()

  def size(self) -> int:
    """None of it is trained."""
    return 0

  def partition_specs(self, spec: PartitionSpec) -> Projections:
    """Specs that leave both whole on every device: 59 MB for 70B at rank 256, and each module reads another corner."""
    del spec
    return dataclasses.replace(self, a=PartitionSpec(), b=PartitionSpec())


@struct.dataclass
class VeRA(Change):
  """x @ W + lambda_b * ((lambda_d * (x @ A)) @ B), with A: [in, rank], B: [rank, out] from the shared pair."""

  lambda_b: Array  # [layers, out] or [out]
  lambda_d: Array  # [layers, rank] or [rank]
  mask: Array | None = None  # [layers], 1 where a layer is adapted; None: everywhere
  pair: Shared | None = None  # Projections, while bound
  dropout: float = struct.field(pytree_node=False, default=0.0)
  TRAINED = ("lambda_b", "lambda_d")

  def completed(self, adapter: Any) -> VeRA:
    """The node with what stands elsewhere in the adapter's tree."""
    return dataclasses.replace(self, pair=Shared(adapter["shared"]["vera"]))

  def apply(self, x: Array, base: Any, key: Array | None = None) -> Array:
    a, b = self._corners(x.shape[-1])
    down = linear(dropout(x, self.dropout, key), a) * self.lambda_d.astype(x.dtype)
    return linear(x, base) + linear(down, b) * self._gain().astype(x.dtype)

  def rows(self, ids: Array, base: Any, key: Array | None = None) -> Array:
    rows = embed(ids, base)
    a, b = self._corners(weight.shape(base)[-2])
    update = linear(embed(ids, a) * self.lambda_d, b) * self._gain()
    return rows + update.astype(rows.dtype)

  def dense(self, base: Any, dtype: Any = None) -> Array:
    """W + A diag(lambda_d) B diag(lambda_b), summed in float32 and rounded once."""
    w = weight.dense(base)
    a, b = self._corners(w.shape[-2])
    update = exact(a * self.lambda_d[..., None, :], b) * self._gain()[..., None, :]
    return (w.astype(jnp.float32) + update).astype(dtype or w.dtype)

  def _corners(self, rows: int) -> tuple[Array, Array]:
    if self.pair is None:
      raise ValueError("a VeRA node computes with the pair that its tree shares: bind the tree")
    return self.pair.value.a[:rows], self.pair.value.b[:, : self.lambda_b.shape[-1]]

  def _gain(self) -> Array:
    return self.lambda_b if self.mask is None else self.lambda_b * self.mask[..., None]

  def ranks(self) -> np.ndarray:
    """The rank of each layer, 0 where a layer is not adapted; [] for what is not stacked."""
    rank = self.lambda_d.shape[-1]
    if self.mask is None:
      return np.full(self.lambda_d.shape[:-1], rank)
    return rank * np.asarray(self.mask).astype(int)

  def size(self) -> int:
    """Trained parameters in effect."""
    adapted = int(np.count_nonzero(self.ranks()))
    return adapted * (self.lambda_b.shape[-1] + self.lambda_d.shape[-1])

  def partition_specs(self, spec: PartitionSpec) -> VeRA:
    *lead, columns = [*[None] * (self.lambda_b.ndim + 1 - len(spec)), *spec]
    none = PartitionSpec()
    return dataclasses.replace(
      self,
      lambda_b=PartitionSpec(*lead[:-1], columns),
      lambda_d=none,
      mask=None if self.mask is None else none,
      pair=None if self.pair is None else Shared(self.pair.value.partition_specs(spec)),
    )


def init(key: Array, base: Any, modules: Sequence[str], config: AdapterConfig) -> tuple[Any, VeRA]:
  """(base, a VeRA that changes nothing yet): lambda_d = d_initial, lambda_b = 0."""
  del key
  if "embed_tokens" in modules:
    raise ValueError(
      "vera adapts linear layers, as PEFT does: leave embed_tokens out of target_modules"
    )
  lead, columns = weight.shape(base)[:-2], weight.shape(base)[-1]
  return base, join(
    [
      {"lambda_b": jnp.zeros(columns), "lambda_d": jnp.full(config.r, config.d_initial)}
      if config.targets(module)
      else None
      for module in modules
    ],
    stacked=bool(lead),
    dropout=config.lora_dropout,
  )


def join(
  per_module: Sequence[Mapping[str, Any] | None], *, stacked: bool, dropout: float = 0.0
) -> VeRA:
  """The VeRA of one {lambda_b, lambda_d} a module, None for one that is not adapted."""
  some = next(vectors for vectors in per_module if vectors is not None)
  zeros = {name: jnp.zeros_like(vector) for name, vector in some.items()}
  stack = lambda name: jnp.stack(
    [jnp.asarray((vectors or zeros)[name], jnp.float32) for vectors in per_module]
  )
  adapted = [vectors is not None for vectors in per_module]
  mask = None if all(adapted) else jnp.asarray(adapted, jnp.float32)
  node = VeRA(stack("lambda_b"), stack("lambda_d"), mask, dropout=dropout)
  return node if stacked else jax.tree.map(lambda leaf: leaf[0], node)


def shared(
  params: Mapping[str, Any], nodes: Mapping[str, VeRA], config: AdapterConfig
) -> dict[str, Projections]:
  """{PATH: the pair} for the adapted weights: a ~ U(+-sqrt(6 / in)), b ~ U(+-sqrt(6 / rank)), in the largest input.

  Args:
    params: path -> the weight that the node at the same path of `nodes` changes.
  """
  rows, columns = sizes({path: params[path] for path in nodes})
  first, second = jax.random.split(jax.random.key(config.projection_prng_key))
  draw = lambda key, fan_in, shape: jax.random.uniform(
    key, shape, minval=-((6 / fan_in) ** 0.5), maxval=(6 / fan_in) ** 0.5
  )
  a, b = draw(first, rows, (rows, config.r)), draw(second, config.r, (config.r, columns))
  return {PATH: Projections(a, b)}


def sizes(weights: Mapping[str, Any]) -> tuple[int, int]:
  """(in, out) of the pair: the largest of each among the adapted weights."""
  rows, columns = zip(*[weight.shape(w)[-2:] for w in weights.values()])
  return max(rows), max(columns)
