"""Full fine-tuning of Llama-3-8B with optimizer state, then parameters too, in host memory: bytes on a TPU chip.

  make offload               (a second run with --resume goes on after the cases that are written)

The step that `posttrain train` jits is lowered from shapes and compiled by libtpu, for one chip and for four; what it
keeps on a chip and on its host goes to experiments/results/offload.{md,json}.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path

import compile_70b  # before jax: it keeps jax from looking for a TPU
import jax

from posttrain_jax import settings
from posttrain_jax.core import files
from posttrain_jax.plan import program
from posttrain_jax.plan.chips import GIB
from posttrain_jax.plan.topology import target

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "offload"
CONFIG = f"{ROOT}/configs/sft.py:model=llama3-8b,adapter=none"
ONE, FOUR = ("v5p:2x2x1", 1), ("v5p:2x2x1", 4)
# ((topology, chips), optimizer, offload)
CASES = (
  (ONE, "adamw", "none"),
  (ONE, "adamw", "state"),
  (ONE, "adamw", "params"),
  (FOUR, "adamw", "none"),
  (FOUR, "adamw", "state"),
  (FOUR, "adamw", "params"),
  (FOUR, "adamw8bit", "none"),
)


def main() -> int:
  path, results, before = OUT.with_suffix(".json"), [], []
  if "--resume" in sys.argv[1:] and path.exists():
    before = json.loads(path.read_text())["results"]
  for (topology, chips), optimizer, mode in CASES:
    key = dict(chips=f"{chips} of {topology}", optimizer=optimizer, offload=mode)
    done = [r for r in before if key.items() <= r.items()]
    results.append(done[0] if done else measure(topology, chips, optimizer, mode))
    print(results[-1], flush=True)
    gc.collect()
    OUT.parent.mkdir(exist_ok=True)
    files.write_json(path, {"machine": compile_70b.machine(), "results": results})
    files.write_text(OUT.with_suffix(".md"), table(results))
  return 0


def measure(topology: str, chips: int, optimizer: str, mode: str) -> dict:
  """GiB a chip, on the chip and on its host; a row a chip."""
  overrides = dict(name=optimizer, offload=mode)
  fields = [f"optimizer.{name}={value}" for name, value in overrides.items()]
  fields += [f"batch.rows={chips}", "data.length=2048", "model.remat=full"]
  config = settings.load(CONFIG, [f"--config.{field}" for field in fields])
  where = target(topology, chips)
  found = dict(
    chips=f"{chips} of {topology}", device_gib=where.memory, optimizer=optimizer, offload=mode
  )
  found |= dict(jax=jax.__version__, compiler=where.compiler)
  try:
    compiled = program.compile(program.build(config, where))
  except program.OutOfMemory as problem:
    return {**found, "needs": str(problem).splitlines()[0]}
  memory = compiled.executable.memory_analysis()
  host = (
    memory.host_argument_size_in_bytes
    + memory.host_temp_size_in_bytes
    + memory.host_output_size_in_bytes
    - memory.host_alias_size_in_bytes
  )
  return {**found, **compiled.figures(), "host_gib": round(host / GIB, 3)}


def table(results: list[dict]) -> str:
  first = results[0]
  lines = [
    "# Llama-3-8B, full fine-tuning in float32, 2,048 tokens a chip: what stays on the chip",
    "",
    "Written by `make offload`; compiled from shapes alone, nothing was run on a TPU.",
    f"jax {first['jax']}, {first['compiler']}, {compile_70b.machine()}.",
    "",
    "GiB a chip; peak = arguments + temporaries + outputs - aliased; remat full.",
    "",
    "| chips | optimizer | offload | arguments | temporaries | peak | on the host |",
    "|---|---|---|---|---|---|---|",
  ]
  for r in results:
    where = f"| {r['chips']} | {r['optimizer']} | {r['offload']} |"
    if "needs" in r:
      needs = re.search(r"required for HLO temporaries \(([\d.]+)G\)", r["needs"])
      size = needs[1] if needs else r["needs"]
      lines.append(f"{where} | | {size}: does not fit into {r['device_gib']:g} | |")
      continue
    lines.append(
      f"{where} {r['arguments_gib']:.2f} | {r['temporaries_gib']:.2f} | {r['peak_gib']:.2f} | "
      f"{r['host_gib']:.2f} |"
    )
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  sys.exit(main())
