"""What trains whole beside an adapter: embeddings, norms, a head, a bias.  PEFT's `modules_to_save`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.config import AdapterConfig, full_name, is_saved
from posttrain_jax.adapters.node import Change
from posttrain_jax.core import struct, tree, weight
from posttrain_jax.core.weight import embed, linear

Array = jax.Array


@struct.dataclass
class Replaced(Change):
  """x @ value in the place of x @ W, or value as a vector in the place of another; the base is not read.

  A head tied to a replaced embedding keeps to the base, as in PEFT: train `lm_head` too where it should follow.
  """

  value: Array  # as the base: [layers, in, out], [in, out], [layers, size], [size] or [layers, experts, in, out]
  mask: Array | None = (
    None  # [layers] or [layers, experts], 1 where a module is replaced; None: everywhere
  )
  TRAINED = ("value",)

  def apply(self, x: Array, base: Any, key: Array | None = None) -> Array:
    value = self._of(base)
    is_rounded = weight.multiplied(x.dtype, base.dtype) != x.dtype
    return linear(x, weight.Bfloat16(value) if is_rounded else value)

  def ragged(self, x: Array, sizes: Array, base: Any, key: Array | None = None) -> Array:
    return weight.ragged(x, self._of(base).astype(base.dtype), sizes)

  def rows(self, ids: Array, base: Any, key: Array | None = None) -> Array:
    # in the base's dtype, which sets that of the computation
    return embed(ids, self._of(base)).astype(base.dtype)

  def dense(self, base: Any, dtype: Any = None) -> Array:
    return self._of(base).astype(dtype or weight.dense(base).dtype)

  def _of(self, base):
    if self.mask is None:
      return self.value
    mask = self.mask.reshape(self.mask.shape + (1,) * (self.value.ndim - self.mask.ndim))
    return jnp.where(mask > 0, self.value, weight.dense(base, self.value.dtype))

  def ranks(self) -> np.ndarray:
    """1 where the value stands in for the base, 0 where it does not."""
    lead = self.value.shape[: self.value.ndim - 1]
    return np.ones(lead[:1], int) if self.mask is None else np.asarray(self.mask).astype(int)

  def size(self) -> int:
    if self.mask is None:
      return self.value.size
    return int(np.asarray(self.mask).sum()) * (self.value.size // self.mask.size)

  def partition_specs(self, spec: PartitionSpec) -> Replaced:
    mask = None if self.mask is None else PartitionSpec()
    return dataclasses.replace(self, value=spec, mask=mask)


def init(
  params: Any, base_at: Any, config: AdapterConfig, adapted: Mapping[str, Any]
) -> dict[str, Replaced]:
  """{path: Replaced}, equal to the base in float32, of every leaf whose module's name ends as config says.

  An ending is one of characters, as in PEFT: `norm` means every norm, and `mlp` all that lies in an MLP.

  Args:
    base_at: path -> the leaf there; a tied head is the view of the embedding.
    adapted: what the adapter's own nodes stand at, by path.

  Raises:
    ValueError: a name that no module ends with, or a module that the adapter targets too.
  """
  nodes = {}
  for path, (names, flags) in _named(params, config).items():
    if path in adapted:
      raise ValueError(
        f"modules_to_save: {names[int(flags.argmax())]!r} is a target of the adapter as well; "
        "name it in exclude_modules, or leave it out"
      )
    value = jnp.array(weight.dense(base_at(path), jnp.float32), copy=True)
    mask = flags.reshape(value.shape[: tree.leads(path)])
    nodes[path] = Replaced(value, None if flags.all() else jnp.asarray(mask))
  return nodes


def paths(params: Any, config: AdapterConfig) -> list[str]:
  """The paths of what `init` makes; params may be shapes."""
  return list(_named(params, config))


def _named(params: Any, config: AdapterConfig) -> dict[str, tuple[list[str], np.ndarray]]:
  """path -> (its modules' names, 1 for each that config.modules_to_save names), of every leaf with one."""
  if not config.modules_to_save:
    return {}
  names_at = names(params)
  wanted = lambda name, endings: is_saved(full_name(name), endings)
  known = [name for names in names_at.values() for name in names]
  for ending in config.modules_to_save:
    if not any(wanted(name, (ending,)) for name in known):
      raise ValueError(f"modules_to_save: {tree.unknown(ending, known, 'module')}")
  ones = lambda names: [wanted(name, config.modules_to_save) for name in names]
  flags = {path: (names, np.asarray(ones(names), np.float32)) for path, names in names_at.items()}
  return {path: pair for path, pair in flags.items() if pair[1].any()}


def names(params: Any) -> dict[str, list[str]]:
  """path -> the names of its modules, of every leaf, a weight or a bias; the tied head among them."""
  shapes = {path: weight.shape(leaf) for path, leaf in tree.items(params)}
  paths = dict.fromkeys([*shapes, "lm_head/weight"])
  return {path: tree.expand(path.removesuffix("/bias"), shapes.get(path, ())) for path in paths}


def split(node: Replaced, names: Sequence[str]) -> dict[str, np.ndarray]:
  """{module: its value} of every module that is replaced, as stored here."""
  value = np.asarray(node.value)
  if len(names) == 1 and not names[0].startswith("layers."):
    return {names[0]: value}
  lead = 1 if len(names) == len(value) else 2
  value = value.reshape(-1, *value.shape[lead:])
  used = np.ones(len(names)) if node.mask is None else np.asarray(node.mask).reshape(-1)
  return {name: value[i] for i, name in enumerate(names) if used[i] > 0}


def join(values: Mapping[str, Any], names: Sequence[str], base: Any) -> Replaced:
  """The Replaced of one leaf's modules; absent ones keep to the base."""
  if len(names) == 1 and not names[0].startswith("layers."):
    return Replaced(jnp.asarray(values[names[0]], jnp.float32))
  whole = weight.dense(base, jnp.float32)
  lead = whole.shape[: 1 if len(names) == len(whole) else 2]
  flat = whole.reshape(-1, *whole.shape[len(lead) :])
  value = jnp.stack([jnp.asarray(values.get(n, flat[i])) for i, n in enumerate(names)])
  mask = np.asarray([name in values for name in names], np.float32).reshape(lead)
  return dataclasses.replace(
    Replaced(value.astype(jnp.float32).reshape(whole.shape)),
    mask=None if mask.all() else jnp.asarray(mask),
  )
