"""What a step sends as devices are added, and where it stops being bound by products: 8 to 4,096 TPUs, on paper.

  make scaling               (goes on after the cases that are written; FRESH=1 begins anew)

No weights, no TPU: the step that `posttrain train` jits is compiled by libtpu for slices of v5p, a row of 2,048 tokens
a device, and its collectives are read from the program.  Weights are spread over `fsdp`, up to 64 devices or all of
them, and the rest of the devices are along `data`.  Figures go to experiments/results/scaling.{md,json,png}.
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
from posttrain_jax.plan import estimate

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "scaling"
TRAININGS = {
  "8B LoRA": "sft:model=llama3-8b,adapter=lora",
  "70B QLoRA": "sft:model=llama3-70b,adapter=lora,base=nf4",
}
SLICES = {8: "v5p:2x2x2", 64: "v5p:4x4x4", 512: "v5p:8x8x8", 4096: "v5p:16x16x16"}
GROUP = 64  # devices that share the weights, where not all do
LENGTH = 2048
# (training, devices, devices along fsdp)
CASES = [
  *((training, n, min(n, GROUP)) for training in TRAININGS for n in SLICES),
  *(("8B LoRA", n, n) for n in SLICES if n > GROUP),
]


def main() -> int:
  path = OUT.with_suffix(".json")
  fresh = "--fresh" in sys.argv[1:] or not path.exists()
  results = [] if fresh else json.loads(path.read_text())["results"]
  done = {(r["training"], r["devices"], r["fsdp"]) for r in results}
  for case in CASES:
    if case not in done:
      training, devices, fsdp = case
      facts = apart.measured(measure, case)
      print(
        *case, facts.get("peak_gib"), facts.get("roofline"), facts.get("unfinished"), flush=True
      )
      results.append({**facts, "training": training, "devices": devices, "fsdp": fsdp})
      write(results)
  write(results)
  return 0


def measure(training: str, devices: int, fsdp: int) -> dict:
  """What `posttrain plan` says."""
  name, _, given = TRAININGS[training].partition(":")
  fields = {
    "data.length": LENGTH,
    "batch.rows": devices,
    "eval.rows": devices,
    "model.remat": "full",
    "mesh.fsdp": fsdp,
    "mesh.data": devices // fsdp,
  }
  overrides = [settings.override(field, value) for field, value in fields.items()]
  config = settings.load(f"{ROOT}/configs/{name}.py:{given}", overrides)
  return estimate.figures(config, topology=SLICES[devices])


def break_even(r: dict) -> float:
  """Tokens a device at which products take as long as links: what is sent does not depend on their number.

  Exact where weights and gradients alone travel, as with fsdp and data.
  """
  seconds = r["roofline"]["seconds"]
  return LENGTH * seconds["links"] / seconds["products"]


def along(r: dict, axis: str) -> tuple[int, int]:
  """(collectives, bytes a device) of a step along an axis, alone or with others."""
  some = [one for one in r["collectives"] if axis in one["axis"].split("+")]
  return sum(one["count"] for one in some), sum(one["sent"] + one["network"] for one in some)


def write(results: list[dict]) -> None:
  OUT.parent.mkdir(exist_ok=True)
  files.write_json(OUT.with_suffix(".json"), {"machine": compile_70b.machine(), "results": results})
  files.write_text(OUT.with_suffix(".md"), page(results))
  figure([r for r in results if r.get("compiled")])


def page(results: list[dict]) -> str:
  """The figures as a Markdown page, a table for each training."""
  lines = [
    "# What a step sends on 8 to 4,096 TPUs v5p: a row of 2,048 tokens a device, remat full",
    "",
    "Written by `make scaling`; compiled from shapes alone, nothing was run on a TPU.",
    ", ".join([*_compilers(results), compile_70b.machine()]) + ".",
    "",
    "MB: what a device sends in a step. Products, links: seconds at the vendor's peaks, which no program reaches.",
    "Even at: the tokens a device, in one forward pass of an optimizer batch, at which both take as long; with more of",
    "them the step is bound by products, with fewer by links. Latency is not counted; the number of collectives",
    "says where it tells.",
  ]
  for training in TRAININGS:
    rows = [r for r in results if r["training"] == training]
    if not rows:
      continue
    lines += [
      "",
      f"## {training}",
      "",
      "| devices | data x fsdp | peak GiB | along fsdp: collectives | MB | along data: collectives | MB | products "
      "| links | even at | processor time |",
      "|" + "---|" * 11,
      *map(row, sorted(rows, key=lambda r: (r["devices"], r["fsdp"]))),
    ]
  missing = [
    f"{training} on {n} (fsdp {fsdp})"
    for training, n, fsdp in CASES
    if not any((r["training"], r["devices"], r["fsdp"]) == (training, n, fsdp) for r in results)
  ]
  if missing:
    lines += ["", f"Not compiled yet: {'; '.join(missing)}."]
  return "\n".join(lines) + "\n"


def _compilers(results: list[dict]) -> list[str]:
  return sorted({f"jax {r['jax']}, {r['compiler']}" for r in results if "jax" in r})


def row(r: dict) -> str:
  head = f"| {r['devices']:,} | {r['devices'] // r['fsdp']} x {r['fsdp']} |"
  if r.get("compiled") is None:
    return f"{head} {r.get('unfinished', 'the compiler refuses')} |" + " |" * 8
  seconds = r["roofline"]["seconds"]
  sent = " | ".join(f"{n} | {size / 1e6:,.1f}" for n, size in (along(r, "fsdp"), along(r, "data")))
  return (
    f"{head} {r['peak_gib']:.2f} | {sent} | {seconds['products']:.4f} s | {seconds['links']:.4f} s | "
    f"{break_even(r):,.0f} tokens | {apart.processor_time(r)} |"
  )


def figure(results: list[dict]) -> None:
  """Left: bytes a device by axis. Right: how long links and products take as one batch is spread over more devices."""
  if not results:
    return
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  drawing, (bytes_at, times_at) = pyplot.subplots(1, 2, figsize=(11, 4.2))
  for color, training in zip(("tab:blue", "tab:orange"), TRAININGS):
    rows = sorted(
      (r for r in results if r["training"] == training and r["fsdp"] <= GROUP),
      key=lambda r: r["devices"],
    )
    if not rows:
      continue
    devices = [r["devices"] for r in rows]
    for style, axis in (("-o", "fsdp"), ("--s", "data")):
      sizes = [along(r, axis)[1] / 1e6 or None for r in rows]
      bytes_at.plot(devices, sizes, style, color=color, label=f"{training}, along {axis}")
    # one batch of 2 million tokens: tokens a device fall as devices are added, what is sent does not
    batch = 2**21
    products = [r["roofline"]["seconds"]["products"] * batch / r["devices"] / LENGTH for r in rows]
    links = [r["roofline"]["seconds"]["links"] for r in rows]
    times_at.plot(devices, products, "-o", color=color, label=f"{training}, products")
    times_at.plot(devices, links, ":^", color=color, label=f"{training}, links")
  for axes, title, unit in (
    (bytes_at, "sent by a device in a step", "MB"),
    (times_at, "a batch of 2,097,152 tokens, in one pass", "seconds at the peaks"),
  ):
    axes.set(xscale="log", yscale="log", xlabel="TPUs v5p", ylabel=unit, title=title)
    axes.set_xticks([*SLICES], [f"{n:,}" for n in SLICES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  drawing.tight_layout()
  drawing.savefig(OUT.with_suffix(".png"), dpi=120)
  pyplot.close(drawing)


if __name__ == "__main__":
  sys.exit(main())
