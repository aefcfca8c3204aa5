"""Five trainings on seven sets of accelerators: does it fit, how fast at most, what travels.  No weights, no device.

  make plans                 (goes on after the cases that are written; FRESH=1 begins anew)

The step that `posttrain train` jits is compiled by libtpu and by jax's CUDA plugin; each case is what `posttrain plan`
says of it.  Rows of 2,048 tokens, one for each device, the layers' inputs kept for the backward pass (remat full).
The figures go to experiments/results/plans.{md,json}.
"""

from __future__ import annotations

import compile_70b  # before jax: it keeps jax from looking for a device

# isort: split
import json
import sys
from pathlib import Path

import apart

from posttrain_jax import settings
from posttrain_jax.core import files
from posttrain_jax.models.shapes import SHAPES
from posttrain_jax.plan import estimate

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "plans"
# name -> (model, config with its arguments)
TRAININGS = {
  "8B LoRA": ("llama3-8b", "sft:adapter=lora"),
  "70B QLoRA": ("llama3-70b", "sft:adapter=lora,base=nf4"),
  "8B full": ("llama3-8b", "sft:adapter=none"),
  "70B DPO, QLoRA": ("llama3-70b", "preference:adapter=lora,base=nf4"),
  "30B-A3B LoRA": ("qwen3-30b-a3b", "sft:adapter=lora"),
}
# name -> (topology, devices)
PLACES = {
  "one H100": ("h100:1x1", 1),
  "one B200": ("b200:1x1", 1),
  "eight H100": ("h100:1x8", 8),
  "one v5p": ("v5p:2x2x1", 1),
  "16 v5e": ("v5e:4x4", 16),
  "64 v5p": ("v5p:4x4x4", 64),
  "256 v6e": ("v6e:16x16", 256),
}
LENGTH = 2048


def main() -> int:
  path = OUT.with_suffix(".json")
  fresh = "--fresh" in sys.argv[1:] or not path.exists()
  results = [] if fresh else json.loads(path.read_text())["results"]
  done = {(r["training"], r["place"]) for r in results}
  for place in PLACES:
    for training, (model, _) in TRAININGS.items():
      if (training, place) in done or model not in SHAPES:
        continue
      facts = apart.measured(measure, (training, place))
      print(training, place, facts.get("peak_gib"), facts.get("unfinished"), flush=True)
      results.append({"training": training, "place": place, **facts})
      write(results)
  write(results)
  return 0


def measure(training: str, place: str) -> dict:
  """What `posttrain plan` says."""
  (model, arguments), (topology, devices) = TRAININGS[training], PLACES[place]
  name, _, given = arguments.partition(":")
  fields = {
    "data.length": LENGTH,
    "batch.rows": devices,
    "eval.rows": devices,
    "model.remat": "full",
  }
  overrides = [settings.override(field, value) for field, value in fields.items()]
  config = settings.load(f"{ROOT}/configs/{name}.py:model={model},{given}", overrides)
  return estimate.figures(config, topology=topology, devices=devices)


def write(results: list[dict]) -> None:
  OUT.parent.mkdir(exist_ok=True)
  files.write_json(OUT.with_suffix(".json"), {"machine": compile_70b.machine(), "results": results})
  files.write_text(OUT.with_suffix(".md"), page(results))


def page(results: list[dict]) -> str:
  """The figures as a Markdown page, a table for each training."""
  finished = [r for r in results if "unfinished" not in r]
  compilers = ", ".join(sorted({r["compiler"] for r in finished}))
  lines = [
    "# What fits where: rows of 2,048 tokens, one for each device, remat full",
    "",
    "Written by `make plans`; compiled from shapes alone, nothing was run on an accelerator.",
    f"jax {finished[0]['jax'] if finished else ''}, {compilers}, {compile_70b.machine()}.",
    "",
    "GiB a device. Lies between: activations, gradients' sums, dequantised matrices. Sent: MB of a device in a step.",
    "Least time: the longest of products, memory and links at the vendors' peaks, which no program reaches; tokens a",
    "second are at most.",
  ]
  for training in TRAININGS:
    rows = [
      r for place in PLACES for r in results if (r["training"], r["place"]) == (training, place)
    ]
    lines += ["", f"## {training}", ""]
    if not rows:
      lines.append("Not compiled yet.")
      continue
    lines += [
      "| on | of | parameters | adapter | gradients | optimizer | lies between | peak | fits | TFLOP | sent "
      "| least time | tokens/s | processor time |",
      "|" + "---|" * 14,
      *map(row, rows),
    ]
  missing = [
    f"{training} on {place}"
    for training in TRAININGS
    for place in PLACES
    if not any(r["training"] == training and r["place"] == place for r in results)
  ]
  if missing:
    lines += ["", f"Not compiled yet: {'; '.join(missing)}."]
  return "\n".join(lines) + "\n"


def row(r: dict) -> str:
  if why := r.get("unfinished"):
    return f"| {r['place']} | | {why}" + " |" * 12
  head = f"| {r['place']} | {r['device_gib']:g} |"
  if r["compiled"] is None:
    first = r["advice"][0] if r["advice"] else None
    change = "" if first is None else f"; `{first['field']}` saves {first['saves_gib']:.1f}"
    needs = sum(r["arithmetic_gib"].values())
    return (
      f"{head} by arithmetic {needs:.1f}, the compiler refuses{change} | | | | | | no | | | | | |"
    )
  kinds, time = r["by_kind_gib"], r["roofline"]
  names = ("parameters", "adapter", "gradients", "optimizer", "activations")
  sizes = " | ".join(f"{kinds[name]:.2f}" for name in names)
  sent = sum(one["sent"] + one["network"] for one in r["collectives"]) / 1e6
  return (
    f"{head} {sizes} | {r['peak_gib']:.1f} | {'yes' if r['fits'] else 'no'} | {r['flops']['computed'] / 1e12:.0f} | "
    f"{sent:.0f} | {time['step_seconds']:.3f} s ({time['bound']}) | {time['tokens_per_second']:.0f} | "
    f"{apart.processor_time(r)} |"
  )


if __name__ == "__main__":
  sys.exit(main())
