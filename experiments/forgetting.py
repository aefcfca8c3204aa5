"""What does a narrow fine-tune forget, and what keeps it: replay, a low rank, a way back to the base, beta?

  POSTTRAIN_DATA=FOLDER .venv/bin/python experiments/forgetting.py [--workdir=runs/forgetting] [--only=NAME] [--report]

SmolLM2-135M-Instruct learns text-to-SQL alone (SFT), or preferences (DPO).  Playbooks say that aligned models lose 10
to 20 % on reasoning, that 5 to 10 % of replay prevents it, that a lower rank forgets less, and that interpolation with
the base (lambda 0.7, or 0.5) recovers ability.  Each arm is trained with three seeds and compared with the base by
`posttrain regress`: the gain on held-out SQL in bits per byte, beside bits per byte of general text and items of the
suite `core` that became wrong.  Of its parts `facts` is what a narrow run forgets; others rise, such as
`format/length`, since what is learned is short.  FOLDER/demo_pairs/ has `alpaca_en_demo.json` (replay) and
`dpo_en_demo.json` (pairs), both of hiyouga/LLaMA-Factory, Apache-2.0.  What is finished is not done again; the tables
are written anew after each arm.  Results: experiments/results/forgetting.{md,json,png}.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from posttrain_jax.core import files
from posttrain_jax.evals import figures
from posttrain_jax.evals.verdicts import RESULTS, Comparison
from posttrain_jax.runs import record as runs

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "forgetting"
BASE, TRAINED, SEEDS = "smollm2", "sql", (0, 1, 2)
STEPS, ROWS = 40, 2
LR = {"lora": 1e-3, "none": 1e-4}  # of SFT, by adapter
# at 5e-5, on the 31 pairs that fit into 512 tokens, nothing moved at any beta (one seed)
DPO_LR = 5e-4
TEXTS = ("text/general", "text/code", "text/maths", "text/chat")


@dataclasses.dataclass(frozen=True)
class Arm:
  """fields: of the config.  of: the arm whose model stands `share` of the way from the base, and trains nothing."""

  name: str
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  method: str = "sft"
  adapter: str = "lora"
  of: str = ""
  share: float = 1.0


ARMS = (
  Arm("SFT, rank 16"),
  Arm("SFT, rank 16, 5 % replay", {"data.replay_fraction": 0.05}),
  Arm("SFT, rank 16, 10 % replay", {"data.replay_fraction": 0.1}),
  Arm("SFT, rank 4", {"adapter.r": 4}),
  Arm("SFT, rank 64", {"adapter.r": 64}),
  Arm("SFT, full", adapter="none"),
  Arm("full, 0.7 of the way", of="SFT, full", share=0.7),
  Arm("full, 0.5 of the way", of="SFT, full", share=0.5),
  Arm("DPO, beta 0.03", {"objective.beta": 0.03}, method="preference"),
  Arm("DPO, beta 0.1", {"objective.beta": 0.1}, method="preference"),
  Arm("DPO, beta 0.5", {"objective.beta": 0.5}, method="preference"),
)


def posttrain(*arguments: str, codes: Sequence[int] = (0,)) -> None:
  done = subprocess.run([sys.executable, "-m", "posttrain_jax", *arguments], check=False)
  if done.returncode not in codes:
    raise SystemExit(
      f"posttrain {arguments[0]} ended with {done.returncode}; run this script again"
    )


def folder_of(workdir: Path, arm: Arm, seed: int) -> Path:
  name = "".join(letter if letter.isalnum() else "-" for letter in arm.name)
  return workdir / f"{name}-seed{seed}"


def data(name: str) -> Path:
  folder = os.environ.get("POSTTRAIN_DATA")
  if folder is None:
    raise SystemExit(
      "POSTTRAIN_DATA is not set: name the folder with demo_pairs/ (see the head of this script)"
    )
  return Path(folder) / "demo_pairs" / name


def train(workdir: Path, arm: Arm, seed: int, steps: int, rows: int) -> None:
  folder = folder_of(workdir, arm, seed)
  if arm.of:
    return interpolate(workdir, arm, seed)
  source = TRAINED if arm.method == "sft" else data("dpo_en_demo.json")
  fields = {
    "seed": seed,
    "steps": steps,
    "batch.rows": rows,
    "data.length": 512,
    "data.eval_rows": 32,
    "eval.every": 0,
    "checkpoint.keep": 1,
    "optimizer.lr": LR[arm.adapter] if arm.method == "sft" else DPO_LR,
    **arm.fields,
  }
  if "data.replay_fraction" in arm.fields:
    fields |= {"data.replay": data("alpaca_en_demo.json")}
  if arm.method == "preference":  # both answers are in a row
    fields |= {"data.length": 1024, "steps": steps // 2}
  if arm.method == "preference" or "data.replay" in fields:
    fields |= {"data.on_error": "skip"}  # rows that are longer: 2 % of the replay's
  posttrain(
    "train",
    f"--config={arm.method}:model={BASE},data={source},adapter={arm.adapter}",
    f"--workdir={folder}",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  )


def interpolate(workdir: Path, arm: Arm, seed: int) -> None:
  """share * tuned + (1 - share) * base, by mergekit's recipe of a linear merge."""
  (tuned,) = [other for other in ARMS if other.name == arm.of]
  folder = folder_of(workdir, arm, seed)
  if folder.exists():
    return
  recipe = folder.with_suffix(".yaml")
  model = folder_of(workdir, tuned, seed) / "model"
  files.write_text(
    recipe,
    "merge_method: linear\ndtype: float32\nmodels:\n"
    f"  - model: {model.absolute()}\n    parameters: {{weight: {arm.share}}}\n"
    f"  - model: {BASE}\n    parameters: {{weight: {1 - arm.share}}}\n",
  )
  posttrain("merge", f"--recipe={recipe}", f"--out={folder}")


def compared(workdir: Path, arm: Arm, seed: int, limit: int) -> None:
  """The arm beside the base, which is measured once."""
  out, before = workdir / "gate" / folder_of(workdir, arm, seed).name, workdir / "base.jsonl"
  if (out / RESULTS).exists():
    return
  side = str(before) if before.exists() else BASE
  posttrain(
    "regress",
    f"--before={side}",
    f"--after={folder_of(workdir, arm, seed)}",
    "--suite=core",
    f"--trained={TRAINED}",
    f"--limit={limit}",
    f"--out={out}",
    codes=(0, 1),  # 1: something dropped
  )
  if not before.exists():
    (out / "before.jsonl").rename(before)


def measured(workdir: Path, arm: Arm, seed: int) -> dict[str, Any] | None:
  path = workdir / "gate" / folder_of(workdir, arm, seed).name / RESULTS
  if not path.exists():
    return None
  found = Comparison.from_json(files.read_json(path))
  by_part = {one.part: one for one in found.verdicts}
  gain = [one for one in found.verdicts if one.trained and one.difference is not None]
  change = lambda one: one.difference.mean if one.difference is not None else 0.0
  folder = folder_of(workdir, arm, seed)
  done = runs.read(folder).done if (folder / runs.DONE).exists() else None
  return {
    "arm": arm.name,
    "seed": seed,
    "gain": statistics.mean(map(change, gain)),
    "text": statistics.mean(change(by_part[name]) for name in TEXTS),
    "change": -100 * (found.tax or 0.0),
    "facts": 100 * change(by_part["facts"]),
    "lost": sum(len(one.lost) for one in found.verdicts),
    "gained": sum(len(one.gained) for one in found.verdicts),
    "dropped": found.dropped,
    "pairs": ((done or {}).get("final") or {}).get("eval_rewards/accuracies"),
  }


def spread(values: Sequence[float], form: str) -> str:
  mean = format(statistics.mean(values), form)
  return mean + (f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else "")


def report(results: Sequence[Mapping[str, Any]], limit: int, steps: int, rows: int) -> None:
  lines = [
    "# What a narrow fine-tune forgets",
    "",
    f"Written by `experiments/forgetting.py`: {steps} steps of {rows} rows of 512 tokens, in DPO half as many of 1,024;"
    f" learning rates {LR['lora']:g} (SFT of an adapter), {LR['none']:g} (full) and {DPO_LR:g} (DPO); the suite `core`,"
    f" at most {limit} items of a part. Differences are to the base on the same items, above 0 is better; ± is the"
    " standard deviation of seeds.",
    "",
    "| arm | seeds | gain on SQL, bits per byte | general text, bits per byte | all scores, points | facts, points |"
    " right to wrong | wrong to right | pairs ordered right | dropped |",
    "|---" * 10 + "|",
  ]
  for arm in ARMS:
    mine = [r for r in results if r["arm"] == arm.name]
    if not mine:
      continue
    each = lambda name, mine=mine: [r[name] for r in mine]
    pairs = [value for value in each("pairs") if value is not None]
    dropped = sorted({part for parts in each("dropped") for part in parts})
    lines.append(
      f"| {arm.name} | {len(mine)} | {spread(each('gain'), '+.3f')} | {spread(each('text'), '+.4f')} |"
      f" {spread(each('change'), '+.1f')} | {spread(each('facts'), '+.0f')} | {spread(each('lost'), '.1f')} |"
      f" {spread(each('gained'), '.1f')} |"
      f" {spread(pairs, '.2f') if pairs else '–'} | {', '.join(dropped) or '–'} |"
    )
  OUT.parent.mkdir(exist_ok=True)
  files.write_json(OUT.with_suffix(".json"), {"limit": limit, "results": list(results)})
  files.write_text(OUT.with_suffix(".md"), "\n".join(lines) + "\n")
  figures.save_png(figure(results), OUT.with_suffix(".png"))


def figure(results: Sequence[Mapping[str, Any]]) -> Figure:
  with figures.style():
    drawing = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for arm in ARMS:
      mine = [r for r in results if r["arm"] == arm.name]
      if mine:
        gain = [r["gain"] for r in mine]
        left.plot(gain, [r["text"] for r in mine], "o", label=arm.name, markersize=5)
        right.plot(gain, [r["facts"] for r in mine], "o", markersize=5)
    for axes, title in (
      (left, "general text, bits per byte"),
      (right, "facts that are known, points"),
    ):
      axes.axhline(0, color="#999999", linewidth=0.8)
      axes.set(xlabel="gain on SQL, bits per byte", title=f"change of {title}")
    if results:
      drawing.legend(loc="outside right center", fontsize=7)
  return drawing


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, default=Path("runs/forgetting"))
  parser.add_argument("--only", default="", metavar="NAME", help="arms whose names hold this")
  parser.add_argument(
    "--seeds",
    default=",".join(map(str, SEEDS)),
    help="to be trained; the report has all that there is",
  )
  parser.add_argument("--limit", type=int, default=12, help="items of each part of the suite")
  parser.add_argument("--steps", type=int, default=STEPS, help="of training")
  parser.add_argument("--rows", type=int, default=ROWS, help="of a batch, of 512 tokens each")
  parser.add_argument("--report", action="store_true", help="of what is finished; trains nothing")
  args = parser.parse_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  every = [(arm, seed) for seed in SEEDS for arm in ARMS]
  told = lambda: [m for arm, seed in every if (m := measured(args.workdir, arm, seed)) is not None]
  seeds = set(map(int, args.seeds.split(",")))
  for arm, seed in every:
    if not args.report and args.only in arm.name and seed in seeds:
      train(args.workdir, arm, seed, args.steps, args.rows)
      compared(args.workdir, arm, seed, args.limit)
      report(told(), args.limit, args.steps, args.rows)
  report(told(), args.limit, args.steps, args.rows)
  return 0


if __name__ == "__main__":
  sys.exit(main())
