"""What to change where a step does not fit: fields, and what arithmetic says that each saves."""

from __future__ import annotations

from typing import Any

from posttrain_jax import settings
from posttrain_jax.build import decisions
from posttrain_jax.plan import program
from posttrain_jax.plan.arithmetic import arithmetic
from posttrain_jax.plan.chips import GIB
from posttrain_jax.plan.topology import Target


def changes(config: Any, chips: Target) -> list[dict[str, Any]]:
  """[{field, saves_gib}] of single changes that a run would take, the largest saving first."""
  before = _needs(config, chips)
  tried = [(fields, _saved(config, fields, chips, before)) for fields in _candidates(config, chips)]
  worth = [(fields, size) for fields, size in tried if size is not None and size > 0.01 * before]
  worth.sort(key=lambda pair: -pair[1])
  return [
    {
      "field": " ".join(f"--config.{name}={value}" for name, value in fields.items()),
      "saves_gib": round(size / GIB, 2),
    }
    for fields, size in worth
  ]


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
