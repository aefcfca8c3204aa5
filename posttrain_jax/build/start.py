"""A base that gives its adapter a start (PiSSA, OLoRA, LoftQ): read, started from, stored and placed leaf by leaf.

The original is in memory one leaf at a time, dense; what is quantised is the rest of it, never a matrix that was
quantised before.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax import quant
from posttrain_jax.adapters import AdapterConfig, inits
from posttrain_jax.adapters.bind import base as base_at
from posttrain_jax.adapters.bind import targeted
from posttrain_jax.core import weight
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig

Place = Callable[[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class Error:
  """||W - what stands for it||, Frobenius, over ||W|| of a leaf [layers, in, out]."""

  stored: float  # W kept as the base is
  started: float  # base and adapter together, at the start


@dataclasses.dataclass(frozen=True)
class Start:
  """What the adapter of a run starts with; filled as the base is read."""

  config: AdapterConfig
  names: Mapping[str, list[str]]  # path -> modules, of every leaf that is started from
  storage: str
  key: Any
  nodes: dict[str, Any] = dataclasses.field(default_factory=dict)
  errors: dict[str, Error] = dataclasses.field(default_factory=dict)

  def begin(self, place: Place) -> Place:
    """What `hf.load` calls with each dense leaf."""

    def started(path: str, leaf: Any) -> Any:
      if path not in self.names:
        return place(path, self._stored(path, leaf))
      keep = store(self.storage)(path)
      base, node = inits.init(self.key, leaf, self.names[path], self.config, keep)
      self.nodes[path] = node
      self.errors[path] = error = _error(leaf, base, node, keep)
      # a dense rest and what was taken out are the original but for the rounding of the rest
      if keep is None and not error.started <= (1e-5 if leaf.dtype == np.float32 else 1e-2):
        raise ValueError(
          f"{path}: base and adapter at the start differ from the original by {error.started:.1e} of its norm"
        )
      return place(path, base)

    return started

  def resume(self, nodes: Mapping[str, Any], place: Place) -> Place:
    """The same for the base that these nodes, of a checkpoint, were made beside."""

    def rebuilt(path: str, leaf: Any) -> Any:
      if path not in self.names:
        return place(path, self._stored(path, leaf))
      return place(path, inits.rebuild(leaf, nodes[path], store(self.storage)(path)))

    return rebuilt

  def agrees(self, nodes: Mapping[str, Any]) -> bool:
    """True where these nodes began with the very factors that this start found."""
    pairs = [(node.start, nodes[path].start) for path, node in self.nodes.items()]
    same = lambda one, other: np.array_equal(np.asarray(one), np.asarray(other))
    return all(jax.tree.all(jax.tree.map(same, *pair)) for pair in pairs)

  def _stored(self, path, leaf):
    is_kept = self.storage == "dense" or not quant.is_linear(path, leaf)
    return leaf if is_kept else quant.quantize(path, leaf, self.storage)

  def describe(self) -> str:
    """A line for each leaf: what storing it as it is loses, and what base and adapter lose at the start."""
    how = self.config.init_lora_weights
    if self.storage == "dense":
      worst = max(error.started for error in self.errors.values())
      return f"base and {how} together are the original within {worst:.1e} of each matrix's norm"
    lines = [
      f"  {path}: {error.stored:.5f} -> {error.started:.5f}" for path, error in self.errors.items()
    ]
    if how == "loftq" and any(np.any(np.asarray(n.scale) > 1) for n in self.nodes.values()):
      lines.append(
        "  (lora_alpha is above r: LoftQ's factors act by that much more; lora_alpha = r is exact)"
      )
    return "\n".join(
      [f"||W - W at the start|| / ||W||, base={self.storage} alone -> with {how}:"] + lines
    )


def plan(key: Any, config: AdapterConfig, model: ModelConfig, storage: str) -> Start:
  """The Start of a run, checked before anything is read.

  Raises:
    ValueError: a target that matches nothing, or a matrix that cannot give a start of that rank.
  """
  params = decoder.abstract(model)
  names = targeted(params, config)
  config = config.for_layers(model.num_layers)
  for path, modules in names.items():
    inits.check_start(base_at(params, path), modules, config, store(storage)(path))
  return Start(config, names, storage, key)


def store(storage: str) -> Callable[[str], Callable[[Any], Any] | None]:
  """path -> how one layer's matrix of the base is kept there: a function, or None where it stays dense."""

  def at(path: str) -> Callable[[Any], Any] | None:
    if storage == "dense" or not path.startswith("layers/"):
      return None
    return functools.partial(quant.quantize, path, storage=storage)

  return at


def _error(leaf, base, node, keep) -> Error:
  whole = stored = started = 0.0
  for at in np.ndindex(leaf.shape[:-2]):
    one = lambda w, at=at: weight.layer(w, at) if at else w
    w, kept = jnp.asarray(one(leaf), jnp.float32), 0.0
    whole += float(_square(w))
    if keep is not None:
      kept = float(_square(w - weight.dense(keep(jnp.asarray(one(leaf))), jnp.float32)))
    stored += kept
    started += float(_square(w - one(node).dense(one(base), jnp.float32)))
  norm = max(whole, 1e-30)
  return Error(math.sqrt(stored / norm), math.sqrt(started / norm))


@jax.jit
def _square(x):
  return jnp.sum(jnp.square(x))
