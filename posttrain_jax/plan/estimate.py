"""The memory that a config's train step needs, by arithmetic and as compiled; does it fit?"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from posttrain_jax.build import checks, decisions, online
from posttrain_jax.plan import advice, collectives, costs, program, writing
from posttrain_jax.plan.arithmetic import arithmetic
from posttrain_jax.plan.chips import GIB
from posttrain_jax.plan.program import Program
from posttrain_jax.plan.topology import Target, target


def figures(
  config: Any, *, topology: str | None = None, devices: int | None = None, slices: int = 1
) -> dict[str, Any]:
  """Everything that `report` prints, for JSON; sizes in GiB a device."""
  return of(config, target(topology, devices, slices))


def of(config: Any, chips: Target, *, advise: bool = True) -> dict[str, Any]:
  """`figures` for a target.

  advise: with what would make smaller what does not fit.
  """
  built = program.build(config, chips)
  facts: dict[str, Any] = {
    "model": config.model.name,
    "base": config.model.base,
    "adapter": config.adapter.method,
    "remat": built.config.model.remat,
    "epochs": decisions.epochs(config),
    "rows": config.batch.rows,
    "length": config.data.length,
    "target": chips.name,
    "devices": len(chips.devices),
    "slices": chips.slices,
    "hosts": hosts(chips.devices),
    "device_gib": chips.memory,
    "compiler": chips.compiler,
    "jax": jax.__version__,
    "arithmetic_gib": {name: size / GIB for name, size in arithmetic(built).items()},
    "flops": costs.flops(built),
    "trained": costs.numbers(built.state.trainable),
    "refused": (checks.alone(config) or None) if hosts(chips.devices) > 1 else None,
  }
  try:
    compiled = program.compile(built)
    if online.is_online(config) and not config.online.engine:  # which a server has
      facts["writing"] = writing.figures(built)
  except program.OutOfMemory as problem:
    needs = {"compiled": None, "out_of_memory": str(problem), "fits": False}
    return {**facts, **needs, "advice": advice.changes(config, chips) if advise else []}
  sent = collectives.read(compiled.executable.as_text(), built.mesh, chips.slice_of)
  facts["by_kind_gib"] = {name: size / GIB for name, size in by_kind(built, compiled).items()}
  facts["collectives"] = [dataclasses.asdict(one) for one in sent]
  facts["network_bytes"] = sum(one.network for one in sent)
  facts["roofline"] = None
  facts["lighter"] = []
  if chips.chip is not None:
    facts["roofline"] = costs.roofline(built, chips.chip, compiled, sent)
    if facts["roofline"]["bound"] == "links":
      facts["lighter"] = advice.lighter(built, sum(one.sent for one in sent))
  # between updates what trains stays where it is, and the engine comes beside it
  peaks = [compiled.peak / GIB]
  if writes := facts.get("writing"):
    beside = max(one["peak_gib"] for one in writes["programs"].values())
    peaks.append(beside + compiled.arguments / GIB)
  fits = None if chips.memory is None else max(peaks) <= chips.memory
  facts["advice"] = advice.changes(config, chips) if advise and fits is False else []
  return {**facts, "compiled": compiled.figures(), "peak_gib": round(max(peaks), 3), "fits": fits}


def by_kind(built: Program, compiled: program.Compiled) -> dict[str, int]:
  """{kind: bytes in a device's memory}, which add up to the peak; `host`: beside them, in its host's."""
  size, there = program.bytes_a_device, program.on_host(built)
  state, context = built.state, built.context
  trained = size(state.trainable) - there["trained"]
  full = decisions.is_full(built.config)
  sizes = {
    "parameters": size((context.base, context.reference)) - there["base"] + trained * full,
    "adapter": size(state.carried) + trained * (not full),
    "optimizer": size(state.optimizer) - there["optimizer"],
    "gradients": min(trained, compiled.temporaries),
  }
  sizes["activations"] = compiled.temporaries - sizes["gradients"]
  return {**sizes, "other": compiled.peak - sum(sizes.values()), "host": compiled.host}


def hosts(devices: Any) -> int:
  """How many processes `posttrain train` has there."""
  return len({device.process_index for device in devices})
