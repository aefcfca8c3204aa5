"""The largest batch that fits with each way to recompute, and which of them is fastest by the peaks."""

from __future__ import annotations

from typing import Any

from posttrain_jax.build import decisions
from posttrain_jax.core import sharding
from posttrain_jax.plan import estimate
from posttrain_jax.plan.topology import Target

REMATS = ("none", "dots", "names", "full")  # what recomputes least, first
MOST = 4096  # rows for each unit


def search(config: Any, chips: Target) -> list[dict[str, Any]]:
  """[{remat, rows, facts}] of the modes that fit, best first: the most tokens a second, then the largest batch.

  Rows are the config's unit (what the mesh and batch.accumulate divide) times a power of two, each one compiled.

  Raises:
    ValueError: the memory of these devices is not known.
  """
  if chips.memory is None:
    raise ValueError(
      f"{chips.name}: its memory is not known, and so not what fits; give a topology"
    )
  fitting = []
  for remat in REMATS:
    if (best := _largest(config, chips, remat)) is not None:
      fitting.append(best)
  speed = lambda one: one["facts"]["roofline"]["tokens_per_second"]
  return sorted(fitting, key=lambda one: (-speed(one), -one["rows"]))


def unit(config: Any, chips: Target) -> int:
  """The fewest rows that the mesh takes: data x fsdp x expert devices with a row each in every micro-batch."""
  shares = sharding.row_shares(
    sharding.mesh(**config.mesh.to_dict(), devices=chips.devices, slices=chips.slices)
  )
  return shares * config.batch.accumulate


def _largest(config: Any, chips: Target, remat: str) -> dict[str, Any] | None:
  """The largest power of two of units that fits; a second try stops at the first that does not."""
  best, rows = None, unit(config, chips)
  for _ in range(MOST.bit_length()):
    facts = estimate.of(_with(config, remat, rows), chips, advise=False)
    if not facts["fits"]:
      return best
    best = {"remat": remat, "rows": rows, "facts": facts}
    rows *= _step(facts, chips)
  return best


def _step(facts: dict[str, Any], chips: Target) -> int:
  """By how much the batch may grow at once: half of what the room that is left says, a power of two of at least 2."""
  grows = facts["by_kind_gib"]["activations"]
  left = (chips.memory or 0) - facts["peak_gib"]
  times = 1 + left / grows if grows > 0 else 2
  return max(2, 2 ** int(max(times / 2, 1)).bit_length() // 2)


def _with(config: Any, remat: str, rows: int) -> Any:
  changed = config.copy_and_resolve_references()
  with changed.unlocked():
    changed.model.remat, changed.batch.rows, changed.eval.rows = remat, rows, rows
  return changed


def written(config: Any, fitting: list[dict[str, Any]]) -> str:
  """The table, and what to write."""
  asked = f"asked: remat {decisions.remat(config)}, {config.batch.rows} rows"
  if not fitting:
    return f"{asked}; nothing fits, not one row for each device: see the changes of `posttrain plan` without --search"
  lines = [asked, f"{'remat':<8}{'rows':>8}{'peak GiB':>10}{'tokens/s at most':>18}"]
  for one in fitting:
    facts = one["facts"]
    speed = facts["roofline"]["tokens_per_second"]
    lines.append(f"{one['remat']:<8}{one['rows']:>8}{facts['peak_gib']:>10.2f}{speed:>18.0f}")
  best = fitting[0]
  return "\n".join(
    [*lines, f"--config.model.remat={best['remat']} --config.batch.rows={best['rows']}"]
  )
