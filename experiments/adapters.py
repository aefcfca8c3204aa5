"""Where the delta lives, side by side: every adapter, 4-bit base and optimizer on two real tasks, equal steps.

  POSTTRAIN_DATA=... .venv/bin/python experiments/adapters.py [--workdir=runs/adapters] [--only=NAME,...] [--report]

SmolLM2-135M-Instruct learns text to SQL (held-out loss, and questions answered right) and GSM8K (held-out loss;
`POSTTRAIN_DATA` names the folder that holds gsm8k/, and without it that half is left out and said so).  A point is a
run folder: finished ones are skipped, a killed one goes on, and every finished point renews
experiments/results/adapters.{md,json,png}.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from posttrain_jax import adapters, settings
from posttrain_jax.core import files, tree
from posttrain_jax.evals import figures
from posttrain_jax.plan import arithmetic, program, topology
from posttrain_jax.runs import record as runs

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "adapters"
STEPS, QUESTIONS, HELD_OUT = 24, 48, 48
RANK = 8
FIELDS = {
  "steps": STEPS,
  "optimizer.warmup": 0.1,
  "eval.every": 6,
  "data.eval_rows": HELD_OUT,
  "checkpoint.every": 12,
  "checkpoint.keep": 1,
}
# 1,024 tokens a step on either task
SQL = {
  "batch.rows": 4,
  "data.length": 256,
  "eval.task": "sql",
  "eval.task_limit": QUESTIONS,
  "eval.before": False,  # SmolLM2 answers none of them
}
GSM8K = {
  "batch.rows": 2,
  "data.length": 512,
  "data.limit": 400,
  "data.truncate": "drop",  # 1 in 500 is longer
  "data.columns.prompt": "question",
  "data.columns.completion": "answer",
}


@dataclasses.dataclass(frozen=True)
class Method:
  """One row: the arguments of configs/sft.py, and the fields that differ."""

  name: str
  arguments: str
  fields: dict[str, Any]
  seeds: int = 1


def low_rank(lr: float = 2e-3, **more: Any) -> dict[str, Any]:
  dotted = {name.replace("__", "."): value for name, value in more.items()}
  return {"adapter.r": RANK, "adapter.lora_alpha": 2.0 * RANK, "optimizer.lr": lr, **dotted}


def full(name: str, lr: float, **more: Any) -> Method:
  options = {f"optimizer.{option}": value for option, value in more.items()}
  return Method(
    f"full, {name}", "adapter=none", {"optimizer.name": name, "optimizer.lr": lr, **options}
  )


# Learning rates were set once, for the kind of parameter, and not searched for each method.
METHODS = (
  Method("LoRA", "adapter=lora", low_rank(), seeds=3),
  Method("DoRA", "adapter=dora", low_rank(), seeds=3),
  Method("PiSSA", "adapter=pissa", low_rank(lr=3e-4), seeds=3),
  Method("QLoRA", "adapter=lora,base=nf4", low_rank(), seeds=3),
  Method("full, adamw", "adapter=none", {"optimizer.lr": 2e-4}, seeds=3),
  Method("rsLoRA", "adapter=lora", low_rank(lr=2e-3 / RANK**0.5, adapter__use_rslora=True)),
  Method("LoRA+", "adapter=lora", low_rank(lr=5e-4, optimizer__loraplus_lr_ratio=16.0)),
  Method("OLoRA", "adapter=olora", low_rank(lr=3e-4)),
  Method("VeRA", "adapter=vera", {"optimizer.lr": 2e-2}),
  Method(
    "AdaLoRA",
    "adapter=adalora",
    {
      "adapter.init_r": 12,
      "adapter.target_r": RANK,
      "adapter.lora_alpha": 24.0,
      "optimizer.lr": 4e-3,
    }
    | {"adapter.tinit": 4, "adapter.tfinal": 8},
  ),
  Method("(IA)3", "adapter=ia3", {"optimizer.lr": 2e-2}),
  Method("QDoRA", "adapter=dora,base=nf4", low_rank()),
  Method("QPiSSA", "adapter=pissa,base=nf4", low_rank(lr=3e-4)),
  Method(
    "LoftQ",
    "adapter=loftq,base=nf4",
    low_rank(adapter__loftq_iter=2, adapter__lora_alpha=float(RANK)),
  ),
  Method(
    "prompt tuning",
    "adapter=prompt",
    {"optimizer.lr": 3e-2, "adapter.prompt_tuning_init": "SAMPLE_VOCAB"},
  ),
  Method("prefix tuning", "adapter=prefix", {"optimizer.lr": 3e-2}),
  full("adafactor", 2e-4),
  full("galore", 1e-3),
  full("galore8bit", 1e-3),
  full("adam_mini", 2e-4),
  full("adamw8bit", 2e-4),
)


@dataclasses.dataclass(frozen=True)
class Point:
  task: str
  method: Method
  seed: int

  @property
  def folder(self) -> str:
    plain = "".join(c if c.isalnum() else "-" for c in self.method.name.lower())
    return f"{self.task}/{plain}-{self.seed}"

  def command(self) -> tuple[str, list[str]]:
    """(config, overrides) as `posttrain train` takes them."""
    data, own = ("sql", SQL) if self.task == "sql" else (f"{gsm8k()}/train.jsonl", GSM8K)
    fields = {**FIELDS, **own, **self.method.fields, "seed": self.seed}
    if self.task == "gsm8k":
      fields["data.eval"] = f"{gsm8k()}/test.jsonl"
    config = f"{ROOT}/configs/sft.py:data={data},{self.method.arguments}"
    return config, [settings.override(name, value) for name, value in fields.items()]


def gsm8k() -> Path | None:
  folder = os.environ.get("POSTTRAIN_DATA")
  return Path(folder) / "gsm8k" if folder else None


def points(only: Sequence[str] = ()) -> list[Point]:
  """Every method once before any is repeated, so that what there is after an hour can be compared."""
  known = [method.name for method in METHODS]
  if unknown := set(only) - set(known):
    raise SystemExit(f"--only={','.join(unknown)}: known are {', '.join(known)}")
  return [
    Point(task, method, seed)
    for seed in range(max(method.seeds for method in METHODS))
    for task in (("sql", "gsm8k") if gsm8k() else ("sql",))
    for method in METHODS
    if seed < method.seeds and (not only or method.name in only)
  ]


def train(point: Point, workdir: Path) -> bool:
  """Whether the point is finished, after `posttrain train` in a process of its own."""
  folder = workdir / point.folder
  if (folder / runs.DONE).exists():
    return True
  config, overrides = point.command()
  command = [sys.executable, "-m", "posttrain_jax", "train", f"--config={config}", *overrides]
  log = folder.with_suffix(".log")
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open("w") as out:
    code = subprocess.run([*command, f"--workdir={folder}"], stdout=out, stderr=out).returncode
  if code:
    print(f"  {point.folder} ended with {code}: {log.read_text().strip().splitlines()[-1:]}")
  return code == 0


LIMITS = f"""## What this can show and cannot

{STEPS} steps are the beginning of a run: who falls fastest, what a step costs, and that every method learns.  They do
not show where a method ends; methods that start from zero singular values (AdaLoRA) or from random prompts (prefix
tuning) have barely begun.  Learning rates were set once for each kind of parameter and not searched: 2e-3 for LoRA's
relatives, 3e-4 where factors start large (PiSSA at 2e-3 rose from 2.4 to 7.7 in two steps), 2e-4 for full fine-tuning;
a difference between methods of different rates is also one of rates.  {QUESTIONS} questions leave an answer rate
uncertain by about 7 of {QUESTIONS} either way.  One model of 135M parameters, where rank {RANK} is a larger share of
the width than in a model of 8B."""


# --- the report ------------------------------------------------------------------------------------------------------


def measured(point: Point, workdir: Path) -> dict[str, Any] | None:
  """What a finished point showed; None where it is not finished."""
  folder = workdir / point.folder
  if not (folder / runs.DONE).exists():
    return None
  found = runs.read(folder)
  built = program.build(settings.load(*point.command()), topology.target(count=1))
  sizes = arithmetic.arithmetic(built)
  return {
    "task": point.task,
    "method": point.method.name,
    "seed": point.seed,
    "trained": trained(built),
    "megabytes": {name: round(sizes[name] / 1e6, 2) for name in ("base", "trained", "optimizer")},
    "eval_loss": dict(zip(*found.series("eval_loss"))),
    "train_loss": found.series("loss")[1],
    "correct": None if found.after is None else found.after.correct,
    "tokens_per_second": statistics.median(found.series("tokens_per_second")[1]),
    "seconds": (found.done or {})["seconds"],
  }


def trained(built: program.Program) -> int:
  """Parameters that train, as `posttrain train` prints them."""
  state = built.state
  if state.carried is None:
    return tree.size(state.trainable)
  return adapters.count(tree.combine(state.trainable, state.carried))


def table(results: Sequence[dict[str, Any]], task: str) -> list[str]:
  """One row a method: means over seeds, with the spread where there are several."""
  answers = task == "sql"
  columns = ["method", "seeds", "trained", "MB: base, trained, optimizer", "eval loss"]
  columns += [f"right of {QUESTIONS}"] * answers + ["tokens/s"]
  lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
  for method in METHODS:
    rows = [r for r in results if (r["task"], r["method"]) == (task, method.name)]
    if not rows:
      continue
    first, megabytes = rows[0], rows[0]["megabytes"]
    cells = [
      method.name,
      str(len(rows)),
      f"{first['trained']:,}",
      f"{megabytes['base']:,.0f}, {megabytes['trained']:,.1f}, {megabytes['optimizer']:,.1f}",
      spread([last(r["eval_loss"]) for r in rows], ".3f"),
    ]
    if answers:
      cells.append(spread([r["correct"] for r in rows], ".0f"))
    cells.append(f"{statistics.median(r['tokens_per_second'] for r in rows):.0f}")
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def last(curve: dict[Any, float]) -> float:
  return curve[max(curve, key=int)]


def spread(values: Sequence[float], form: str) -> str:
  """The mean, and from least to greatest where there are several."""
  mean = format(statistics.mean(values), form)
  if len(values) == 1:
    return mean
  return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def value(curve: dict[Any, float], step: int) -> float:
  return curve[step] if step in curve else curve[str(step)]  # a JSON file has the steps as text


def steps_to(curve: dict[Any, float], loss: float) -> float:
  """The first step at which the curve is at or below loss, on straight lines between evaluations; inf if never."""
  points = sorted((int(step), at) for step, at in curve.items())
  for (s0, l0), (s1, l1) in itertools.pairwise(points):
    if l0 <= loss:
      return float(s0)
    if l1 <= loss:
      return s0 + (l0 - loss) / (l0 - l1) * (s1 - s0)
  return math.inf


def claims(results: Sequence[dict[str, Any]], task: str) -> list[str]:
  """What playbooks say of these methods, beside what was found; one figure a seed."""
  curves = {(r["method"], r["seed"]): r["eval_loss"] for r in results if r["task"] == task}
  seeds = lambda *names: [s for s in range(3) if all((name, s) in curves for name in names)]
  final = lambda name, seed: last(curves[name, seed])
  each = lambda values, form: ", ".join(format(v, form) for v in values) or "not run"

  def speed(name: str) -> str:
    """Steps that LoRA needs to its own loss at half time, over the steps that the other needs to it."""
    half = STEPS // 2
    found = []
    for seed in seeds("LoRA", name):
      target = value(curves["LoRA", seed], half)
      found.append(half / steps_to(curves[name, seed], target))
    return each(found, ".2f")

  gaps = {s: final("LoRA", s) - final("full, adamw", s) for s in seeds("LoRA", "full, adamw")}

  def closed(name: str) -> str:
    """Share of the gap in final loss between LoRA and full fine-tuning, where there is one on every seed."""
    shares = [
      (final("LoRA", s) - final(name, s)) / gap for s, gap in gaps.items() if (name, s) in curves
    ]
    none = f"no gap to close ({each(list(gaps.values()), '+.3f')})"
    return each(shares, "+.2f") if min(gaps.values(), default=1.0) > 0 else none

  def lower(name: str, than: str) -> str:
    return each([final(than, s) - final(name, s) for s in seeds(name, than)], "+.3f")

  rows = [
    (
      "PiSSA converges 2 to 3 times faster than LoRA",
      "speed to LoRA's loss at half time",
      speed("PiSSA"),
    ),
    ("(OLoRA, the same question)", "speed to LoRA's loss at half time", speed("OLoRA")),
    (
      "DoRA closes 90 to 95 % of LoRA's gap to full",
      "share of the gap closed",
      closed("DoRA"),
    ),
    ("LoRA+ is a cheap win", "share of the gap closed", closed("LoRA+")),
    ("QDoRA often beats full fine-tuning", "loss below full's", lower("QDoRA", "full, adamw")),
    ("LoftQ improves QLoRA", "loss below QLoRA's", lower("LoftQ", "QLoRA")),
    ("QPiSSA improves QLoRA", "loss below QLoRA's", lower("QPiSSA", "QLoRA")),
    ("VeRA serves many tiny adapters", "loss below LoRA's", lower("VeRA", "LoRA")),
    ("AdaLoRA spends rank where it helps", "loss below LoRA's", lower("AdaLoRA", "LoRA")),
    (
      "GaLore approaches full fine-tuning",
      "loss below full's",
      lower("full, galore", "full, adamw"),
    ),
    ("8-bit Adam is Adam", "loss below full's", lower("full, adamw8bit", "full, adamw")),
  ]
  lines = ["| claim | measured | found, a figure a seed |", "|---|---|---|"]
  return lines + [f"| {' | '.join(row)} |" for row in rows]


def figure(results: Sequence[dict[str, Any]]) -> Figure:
  """Held-out loss over steps: low-rank methods, 4-bit bases and others, full fine-tuning; one row a task."""
  tasks = sorted({r["task"] for r in results}, reverse=True)
  groups = {
    "low rank": ("LoRA", "DoRA", "PiSSA", "rsLoRA", "LoRA+", "OLoRA", "AdaLoRA"),
    "4-bit base, fewer parameters": (
      *("QLoRA", "QDoRA", "QPiSSA", "LoftQ", "VeRA", "(IA)3", "prompt tuning", "prefix tuning"),
    ),
    "full": tuple(m.name for m in METHODS if m.name.startswith("full")),
  }
  with figures.style():
    drawing = Figure(figsize=(11, 3.6 * len(tasks)), layout="constrained")
    axes = drawing.subplots(len(tasks), len(groups), squeeze=False, sharey="row")
    for row, task in zip(axes, tasks):
      for axis, (title, names) in zip(row, groups.items()):
        for name in names:
          curves = [r["eval_loss"] for r in results if (r["task"], r["method"]) == (task, name)]
          if curves:
            steps = sorted(map(int, curves[0]))
            means = [statistics.mean(value(c, s) for c in curves) for s in steps]
            axis.plot(steps, means, label=name)
        axis.set(title=f"{task}: {title}", xlabel="step", yscale="log")
        if axis.lines:
          axis.legend(fontsize=7)
      row[0].set_ylabel("held-out loss")
  return drawing


def progress(results: Sequence[dict[str, Any]]) -> str:
  """How many of a task's points are finished, task by task, whichever data sets this machine has."""
  planned = sum(method.seeds for method in METHODS)
  done = collections.Counter(result["task"] for result in results)
  return ", ".join(f"{done[task]} of {planned} points of {task}" for task in sorted(done))


def report(results: Sequence[dict[str, Any]]) -> None:
  """experiments/results/adapters.{json,md,png}."""
  machine = f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}, float32"
  lines = [
    f"# SmolLM2-135M-Instruct, {STEPS} steps of 1,024 tokens, rank {RANK} where there is a rank",
    "",
    f"Written by `experiments/adapters.py`: {progress(results)}; {machine}.",
  ]
  for task in ("sql", "gsm8k"):
    if any(r["task"] == task for r in results):
      lines += ["", f"## {task}", "", *table(results, task), "", *claims(results, task)]
  lines += ["", *LIMITS.splitlines()]
  OUT.parent.mkdir(exist_ok=True)
  files.write_json(OUT.with_suffix(".json"), {"machine": machine, "results": list(results)})
  files.write_text(OUT.with_suffix(".md"), "\n".join(lines) + "\n")
  figures.save_png(figure(results), OUT.with_suffix(".png"))


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, default=Path("runs/adapters"))
  parser.add_argument("--only", default="", help="methods, separated by commas; default all")
  parser.add_argument("--report", action="store_true", help="of what is finished; trains nothing")
  args = parser.parse_args()
  if not gsm8k():
    print("POSTTRAIN_DATA is not set: GSM8K is left out")
  failed, results = 0, []
  for point in points([name for name in args.only.split(",") if name]):
    if not args.report:
      print(point.folder, flush=True)
      failed += not train(point, args.workdir)
    if found := measured(point, args.workdir):
      results.append(found)
      report(results)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
