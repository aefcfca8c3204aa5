"""(IA)3: a trained vector that scales a module's outputs, or the inputs of a feedforward module.  Liu et al. 2022."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.node import Change
from posttrain_jax.core import struct, tree, weight
from posttrain_jax.core.weight import embed, linear

Array = jax.Array


@struct.dataclass
class IA3(Change):
  """(x @ W + bias) * gain with gain: [out]; feedforward: (x * gain) @ W + bias with gain: [in]."""

  gain: Array  # [layers, out or in], or without layers
  mask: Array | None = None  # [layers], 1 where a layer is adapted; None: everywhere
  feedforward: bool = struct.field(pytree_node=False, default=False)
  TRAINED = ("gain",)

  def apply(self, x: Array, base: Any, key: Array | None = None) -> Array:
    del key
    gain = self._gain()
    if self.feedforward:
      return linear((x * gain).astype(x.dtype), base)
    return (linear(x, base) * gain).astype(x.dtype)

  def rows(self, ids: Array, base: Any, key: Array | None = None) -> Array:
    del key
    rows, gain = embed(ids, base), self._gain()
    return (rows * (gain[ids][..., None] if self.feedforward else gain)).astype(rows.dtype)

  def dense(self, base: Any, dtype: Any = None) -> Array:
    """W with its columns (feedforward: its rows) scaled, in float32, rounded once."""
    w, gain = weight.dense(base), self._gain()
    gain = gain[..., :, None] if self.feedforward else gain[..., None, :]
    return (w.astype(jnp.float32) * gain).astype(dtype or w.dtype)

  def beside(self, path: str, params: Any) -> dict[str, Array]:
    """What else binding changes: a bias is an output too, and is scaled with them."""
    module = path.removesuffix("/weight")
    siblings = tree.get(params, module) if path in tree.flatten(params) else {}
    if self.feedforward or "bias" not in siblings:
      return {}
    bias = siblings["bias"]
    return {f"{module}/bias": (bias * self._gain()).astype(bias.dtype)}

  def _gain(self) -> Array:
    return self.gain if self.mask is None else jnp.where(self.mask[..., None] > 0, self.gain, 1.0)

  def adapted(self) -> np.ndarray:
    """True for each layer that is adapted; [] for what is not stacked."""
    return np.ones(self.gain.shape[:-1], bool) if self.mask is None else np.asarray(self.mask) > 0

  def size(self) -> int:
    """Trained parameters in effect."""
    return int(self.adapted().sum()) * self.gain.shape[-1]

  def partition_specs(self, spec: PartitionSpec) -> IA3:
    *lead, rows, columns = [*[None] * (self.gain.ndim + 1 - len(spec)), *spec]
    return dataclasses.replace(
      self,
      gain=PartitionSpec(*lead, rows if self.feedforward else columns),
      mask=None if self.mask is None else PartitionSpec(),
    )


def init(key: Array, base: Any, modules: Sequence[str], config: AdapterConfig) -> tuple[Any, IA3]:
  """(base, an (IA)3 that changes nothing yet): gain = 1."""
  del key
  if "embed_tokens" in modules:
    raise ValueError(
      "ia3 adapts linear layers, as PEFT does: leave embed_tokens out of target_modules"
    )
  targeted = [module for module in modules if config.targets(module)]
  feedforward = is_feedforward(targeted, config)
  *lead, rows, columns = weight.shape(base)
  gain = jnp.ones(rows if feedforward else columns)
  gains = [gain if module in targeted else None for module in modules]
  return base, join(gains, stacked=bool(lead), feedforward=feedforward)


def join(gains: Sequence[Any], *, stacked: bool, feedforward: bool) -> IA3:
  """The (IA)3 of one gain a module, None for one that is not adapted."""
  ones = jnp.ones_like(next(gain for gain in gains if gain is not None))
  filled = jnp.stack([jnp.asarray(ones if g is None else g, jnp.float32) for g in gains])
  adapted = [gain is not None for gain in gains]
  mask = None if all(adapted) else jnp.asarray(adapted, jnp.float32)
  node = IA3(filled, mask, feedforward)
  return node if stacked else jax.tree.map(lambda leaf: leaf[0], node)


def is_feedforward(targeted: Sequence[str], config: AdapterConfig) -> bool:
  """Whether `feedforward_modules` picks these modules of one matrix; it must pick all of its layers or none."""
  picker = config.replace(
    target_modules=config.feedforward_modules, exclude_modules=(), layers_to_transform=None
  )
  picked = [module for module in targeted if picker.targets(module)]
  if picked and len(picked) < len(targeted):
    left = next(module for module in targeted if module not in picked)
    raise ValueError(
      f"feedforward_modules={config.feedforward_modules!r} picks {picked[0]} and not {left}: the layers of one "
      "matrix are scaled at the same side; name the module without its layer"
    )
  return bool(picked)


def check(names: Sequence[str], config: AdapterConfig) -> None:
  """Every name of `feedforward_modules` is one of the adapted modules, given away from its default."""
  if config.feedforward_modules == AdapterConfig.feedforward_modules:
    return
  wanted = config.feedforward_modules
  for name in wanted if isinstance(wanted, tuple) else (wanted,):
    alone = config.replace(
      target_modules=(name,) if isinstance(wanted, tuple) else name, exclude_modules=()
    )
    if name and not any(alone.targets(module) for module in names):
      raise ValueError(f"feedforward_modules: {tree.unknown(name, names, 'adapted module')}")
