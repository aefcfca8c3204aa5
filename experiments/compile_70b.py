"""Llama-3-70B on an NF4 base, LoRA on every linear module: the train step compiled for TPUs that are not here.

  make compile-70b

No weights, no TPU: the step that `posttrain train` jits is lowered from shapes and compiled by libtpu.  Peak memory a
chip and seconds to compile go to experiments/results/compile_70b.{md,json}.
"""

from __future__ import annotations

import os

# libtpu only compiles here; with it installed JAX would look for a TPU
os.environ["JAX_PLATFORMS"] = "cpu"

import gc
import platform
import subprocess
import sys
from pathlib import Path

from posttrain_jax import settings
from posttrain_jax.core import files
from posttrain_jax.plan import estimate, report

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "compile_70b"
CONFIG = f"{ROOT}/configs/sft.py:model=llama3-70b,base=nf4,adapter=lora"
OVERRIDES = ("adapter.r=16", "data.length=2048", "optimizer.name=adamw")
# (topology, chips, rows in a batch, remat)
CASES = (
  ("v5p:2x2x1", 1, 1, "full"),
  ("v5p:2x2x1", 1, 1, "names"),
  ("v5e:4x4", 16, 16, "full"),
)


def main() -> int:
  results = []
  for topology, chips, rows, remat in CASES:
    overrides = [*OVERRIDES, f"batch.rows={rows}", f"model.remat={remat}"]
    config = settings.load(CONFIG, [f"--config.{o}" for o in overrides])
    results.append(estimate.figures(config, topology=topology, devices=chips))
    print(report.written(results[-1]), end="\n\n", flush=True)
    gc.collect()
    OUT.parent.mkdir(exist_ok=True)
    files.write_json(OUT.with_suffix(".json"), {"machine": machine(), "results": results})
    files.write_text(OUT.with_suffix(".md"), table(results))
  return 0


def table(results: list[dict]) -> str:
  """The figures as a Markdown page."""
  first = results[0]
  lines = [
    "# Llama-3-70B, NF4 base, LoRA rank 16 on all linear modules, AdamW: one step of 2,048 tokens a chip",
    "",
    "Written by `make compile-70b`; compiled from shapes alone, nothing was run on a TPU.",
    f"jax {first['jax']}, {first['compiler']}, {machine()}.",
    "",
    "GiB a chip; peak = arguments + temporaries + outputs - aliased.",
    "",
    "| chips | rows | remat | arguments | temporaries | outputs - aliased | peak | of | compiled in |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for r in results:
    where = f"| {r['devices']} of {r['target']} | {r['rows']} | {r['remat']} |"
    if (c := r["compiled"]) is None:
      lines.append(
        f"{where} does not fit: {r['out_of_memory'].splitlines()[0]} | | | | {r['device_gib']:g} | |"
      )
      continue
    lines.append(
      f"{where} {c['arguments_gib']:.2f} | {c['temporaries_gib']:.2f} | "
      f"{c['outputs_gib'] - c['aliased_gib']:.2f} | {c['peak_gib']:.2f} | {r['device_gib']:g} | "
      f"{c['compile_seconds']:.0f} s |"
    )
  lines += ["", "By arithmetic, GiB a chip:", ""]
  names = list(first["arithmetic_gib"])
  lines += [f"| chips | remat | {' | '.join(names)} | sum |", "|" + "---|" * (len(names) + 3)]
  for r in results:
    sizes = [r["arithmetic_gib"][name] for name in names]
    cells = " | ".join(f"{size:.2f}" for size in [*sizes, sum(sizes)])
    lines.append(f"| {r['devices']} of {r['target']} | {r['remat']} | {cells} |")
  return "\n".join(lines) + "\n"


def machine() -> str:
  commit = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  return (
    f"{os.cpu_count()} cores, Python {platform.python_version()}, commit {commit.stdout.strip()}"
  )


if __name__ == "__main__":
  sys.exit(main())
