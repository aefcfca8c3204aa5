"""What to change where a step does not fit, or is bound by links: fields, and what arithmetic says of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax import settings
from posttrain_jax.build import decisions
from posttrain_jax.core import tree
from posttrain_jax.plan import costs, program
from posttrain_jax.plan.arithmetic import arithmetic, tokens
from posttrain_jax.plan.chips import GIB
from posttrain_jax.plan.program import Program
from posttrain_jax.plan.topology import Target
from posttrain_jax.train import state as state_lib


def changes(config: Any, chips: Target) -> list[dict[str, Any]]:
  """[{field, saves_gib}] of single changes that a run would take, the largest saving first."""
  before = _needs(config, chips)
  tried = [(fields, _saved(config, fields, chips, before)) for fields in _candidates(config, chips)]
  worth = [(fields, size) for fields, size in tried if size is not None and size > 0.01 * before]
  worth.sort(key=lambda pair: -pair[1])
  return [
    {
      "field": _written(fields),
      "saves_gib": round(size / GIB, 2),
    }
    for fields, size in worth
  ]


def _written(fields: dict[str, Any]) -> str:
  """As they are typed."""
  return " ".join(f"--config.{name}={value}" for name, value in fields.items())


def _candidates(config: Any, chips: Target) -> list[dict[str, Any]]:
  rows, parts = config.batch.rows, config.batch.accumulate
  full = decisions.is_full(config)
  tried: list[dict[str, Any]] = []
  if decisions.remat(config) != "full":
    tried.append({"model.remat": "full"})
  if chips.platform != "cpu":
    tried.append({"model.remat": "host"})
    tried += [] if full else [{"model.offload": "layers", "model.remat": "full"}]
  tried += [{"batch.accumulate": k} for k in (2 * parts, 4 * parts, rows) if k <= rows]
  tried += [{"batch.rows": k} for k in (rows // 2, rows // 4) if k]
  tried.append({"data.length": config.data.length // 2})
  if not full and config.model.base == "dense":
    tried += [{"model.base": "nf4"}, {"model.base": "int8"}]
  if config.optimizer.offload == "none":
    tried.append({"optimizer.offload": "state"})
    tried.append({"optimizer.offload": "params", "model.remat": "full"})
  if decisions.has_reference(config) and not decisions.caches_reference(config):
    tried.append({"objective.cache_reference": True})
  if decisions.has_reference(config) and not decisions.compares_with_base(config):
    tried.append({"objective.reference_base": "nf4"})
  return tried


def _saved(config: Any, fields: dict[str, Any], chips: Target, before: int) -> int | None:
  """Bytes a device; None where the config refuses the change."""
  changed = config.copy_and_resolve_references()
  try:
    with changed.unlocked():
      for name, value in fields.items():
        section, _, field = name.rpartition(".")
        changed[section][field] = value
    return before - _needs(changed, chips)
  except (settings.ConfigError, ValueError):
    return None


def _needs(config: Any, chips: Target) -> int:
  """Bytes of a device's own memory."""
  built = program.build(config, chips)
  there = program.on_host(built)
  gradients = there["trained"]
  return sum(arithmetic(built).values()) - sum(there.values()) - gradients


def lighter(built: Program, sent: float) -> list[dict[str, Any]]:
  """[{field, sends (bytes)}], the size of mesh.expert with which a mixture's step sends the least; [] where it is that.

  Args:
    sent: bytes that a device sends in a step as it is.
  """
  if built.mesh is None or not built.model.experts:
    return []
  now = built.mesh.shape
  spread = now["fsdp"] * now["expert"]
  sizes = [
    size
    for size in range(1, spread + 1)
    if spread % size == 0 and built.model.experts % (size * now["tensor"]) == 0
  ]
  best = min(sizes, key=lambda size: _of_experts(built, now, size))
  would = sent - _of_experts(built, now, now["expert"]) + _of_experts(built, now, best)
  if best == now["expert"] or would > 0.9 * sent:
    return []
  fields = {"mesh.expert": best}
  if built.config.mesh.fsdp != -1:
    fields["mesh.fsdp"] = spread // best
  return [{"field": _written(fields), "sends": round(would)}]


def _of_experts(built: Program, mesh: Mapping[str, int], size: int) -> float:
  """Bytes that a device sends in a step because of experts that lie on so many: along fsdp weights, along expert rows.

  Every pass over the layers gathers the weights, and the gradient of what trains is scattered.  Rows are gathered and
  their sums scattered forward, again (the rows alone) and backward.
  """
  others = mesh["fsdp"] * mesh["expert"] // size * mesh["context"]
  passes = 2 + costs.compares(built)
  parts = decisions.micro_batches(built.config, state_lib.devices(built.state))
  base, trained = _bytes(built.context.base), _bytes(built.state.trainable)
  gathered = parts * passes * (base + trained) + trained
  weights = gathered / (size * mesh["tensor"]) * (1 - 1 / others)
  dtype = decisions.between(decisions.products(built.config), built.device.platform)
  row = built.model.hidden_size * jnp.dtype(dtype).itemsize
  times = built.model.num_layers * (2 * passes + 1)
  return weights + times * tokens(built) * row * (size - 1)


def _bytes(stored: Any) -> int:
  """Of the experts among these weights, on all devices together."""
  leaves = [leaf for path, leaf in tree.items(stored or {}) if "/experts/" in path]
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaves))
