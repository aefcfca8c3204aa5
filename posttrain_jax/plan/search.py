"""The largest batch that fits with each way to recompute, and which of them is fastest by the peaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain_jax.build import decisions
from posttrain_jax.core import sharding
from posttrain_jax.plan import estimate
from posttrain_jax.plan.topology import Target

REMATS = ("none", "dots", "names", "full")  # what recomputes least, first
MOST = 6  # batches that are compiled with each mode
CLOSER = 2  # further ones above the largest that fits, with the best mode
BEYOND = 1.1  # times the memory: a batch that needs as much by those before it is not compiled


def search(
  config: Any, chips: Target, tell: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
  """[{remat, rows, facts}] of the modes that fit, best first: the most tokens a second, then the largest batch.

  Rows are the config's unit (what the mesh and batch.accumulate divide) times a power of two, each one compiled; a mode
  that recomputes more begins where the one before it ended, as it needs less.  With the best mode the gap above its
  batch is halved twice.

  Args:
    tell: is told of each batch that is tried.

  Raises:
    ValueError: the memory of these devices is not known.
  """
  if chips.memory is None:
    raise ValueError(
      f"{chips.name}: its memory is not known, and so not what fits; give a topology"
    )
  fitting, beyond, rows = [], {}, unit(config, chips)
  for remat in REMATS:
    best, beyond[remat] = _largest(config, chips, remat, rows, tell)
    if best is not None:
      fitting.append(best)
      rows = best["rows"]
  speed = lambda one: one["facts"]["roofline"]["tokens_per_second"]
  fitting.sort(key=lambda one: (-speed(one), -one["rows"]))
  closer = lambda one: _closer(config, chips, one, beyond[one["remat"]], tell)
  return [*map(closer, fitting[:1]), *fitting[1:]]


def unit(config: Any, chips: Target) -> int:
  """The fewest rows that the mesh takes: data x fsdp x expert devices with a row each in every micro-batch."""
  shares = sharding.row_shares(
    sharding.mesh(**config.mesh.to_dict(), devices=chips.devices, slices=chips.slices)
  )
  return shares * config.batch.accumulate


def _largest(
  config: Any, chips: Target, remat: str, rows: int, tell: Callable[[str], None]
) -> tuple[dict[str, Any] | None, int]:
  """The largest batch that fits, from `rows` on, or fewer where these do not; and the next, not tried or too large."""
  tried: list[dict[str, Any]] = []
  while len(tried) < MOST and not _is_beyond(tried, rows, chips):
    one = _tried(config, chips, remat, rows, tell)
    if one["facts"]["fits"]:
      tried.append(one)
      rows *= _step(one["facts"], chips)
    elif tried or rows == unit(config, chips):
      break
    else:
      rows = unit(config, chips)
  return (tried[-1] if tried else None), rows


def _closer(
  config: Any, chips: Target, best: dict[str, Any], beyond: int, tell: Callable[[str], None]
) -> dict[str, Any]:
  """The best, or a larger batch below one that does not fit or was not tried."""
  least = unit(config, chips)
  low, high = best["rows"] // least, beyond // least
  for _ in range(CLOSER):
    if high - low < 2:
      break
    middle = (low + high) // 2
    one = _tried(config, chips, best["remat"], middle * least, tell)
    if one["facts"]["fits"]:
      best, low = one, middle
    else:
      high = middle
  return best


def _tried(
  config: Any, chips: Target, remat: str, rows: int, tell: Callable[[str], None]
) -> dict[str, Any]:
  facts = estimate.of(_with(config, remat, rows), chips, advise=False)
  tell(_said(remat, rows, facts, chips))
  return {"remat": remat, "rows": rows, "facts": facts}


def _is_beyond(tried: list[dict[str, Any]], rows: int, chips: Target) -> bool:
  """Whether the line through the peaks of the last two batches says that rows do not fit by far."""
  if len(tried) < 2:
    return False
  (few, low), (many, high) = ((one["rows"], one["facts"]["peak_gib"]) for one in tried[-2:])
  return high + (high - low) / (many - few) * (rows - many) > BEYOND * (chips.memory or 0)


def _said(remat: str, rows: int, facts: dict[str, Any], chips: Target) -> str:
  if facts["compiled"] is None:
    return f"remat {remat}, {rows} rows: the compiler refuses"
  verdict = "fits" if facts["fits"] else "does not fit"
  return (
    f"remat {remat}, {rows} rows: {facts['peak_gib']:.2f} of {chips.memory:g} GiB, {verdict}; compiled in "
    f"{facts['compiled']['compile_seconds']:.0f} s"
  )


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
