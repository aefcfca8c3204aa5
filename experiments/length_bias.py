"""A preference for the right query in which the right one is longer by accident: who learns the length?

  .venv/bin/python experiments/length_bias.py [--workdir=runs/length_bias] [--report]

The pairs of experiments/beta_rank.py (a right query over SmolLM2-135M-Instruct's own wrong one), with a comment after
the right query in 4 of 5 of them, which changes nothing in what it returns.  DPO, DPO with log-ratios per token, and
SimPO learn from them.  Held-out pairs have the comment behind the right query, behind the wrong one, and behind none:
who has learned what is right orders all three alike.  Results: experiments/results/length_bias.{md,json,png}.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import beta_rank
from matplotlib.figure import Figure

from posttrain_jax.core import files
from posttrain_jax.evals import figures
from posttrain_jax.runs import record as runs

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "length_bias"
CONFIG = ROOT / "configs" / "preference.py"
COMMENT = (
  " -- This query answers the question and returns all that was asked for, and nothing more."
)
HELD_OUT, BIASED = 28, 0.8
# beta of what is per token is that of sums, times the tokens of an answer, near 25
METHODS = {
  "DPO": ("dpo", {"objective.beta": 0.1}),
  "DPO, per token": ("dpo_norm", {"objective.beta": 2.5}),
  "SimPO": ("simpo", {"objective.beta": 2.5, "objective.gamma_beta_ratio": 0.55}),
}
FIELDS = {
  "steps": 24,
  "batch.rows": 4,
  "data.length": 512,
  "data.eval_rows": 0,
  "eval.every": 12,
  "checkpoint.every": 24,
  "checkpoint.keep": 1,
  "optimizer.lr": 1e-4,
}
SETS = {
  "right": "comment behind the right query",
  "none": "behind none",
  "wrong": "behind the wrong query",
}


def with_comment(row: dict, where: str | None) -> dict:
  side = {"right": "chosen", "wrong": "rejected"}.get(where or "")
  if side is None:
    return row
  text = row[side][0]["content"].rstrip().rstrip(";") + COMMENT
  return {**row, side: [{"role": "assistant", "content": text}]}


def write_data(workdir: Path) -> None:
  pairs = workdir / "pairs.jsonl"
  if not pairs.exists():
    options = ("--limit=128", "--samples=1", "--temperature=0.7", f"--out={pairs}")
    beta_rank.posttrain("pairs", "--model=smollm2", *options)
  rows = [json.loads(line) for line in pairs.read_text().splitlines()]
  drawn = random.Random(0)
  train = [
    with_comment(row, "right" if drawn.random() < BIASED else None) for row in rows[:-HELD_OUT]
  ]
  lines = lambda some: "".join(json.dumps(row) + "\n" for row in some)
  files.write_text(workdir / "train.jsonl", lines(train))
  for name in SETS:
    some = [with_comment(row, name) for row in rows[-HELD_OUT:]]
    files.write_text(workdir / f"held-out-{name}.jsonl", lines(some))


def train(workdir: Path, name: str) -> Path:
  loss, own = METHODS[name]
  folder = workdir / loss
  if not (folder / runs.DONE).exists():
    fields = FIELDS | own | {"data.eval": workdir / "held-out-none.jsonl"}
    beta_rank.posttrain(
      "train",
      f"--config={CONFIG}:loss={loss},data={workdir / 'train.jsonl'}",
      f"--workdir={folder}",
      *(f"--config.{field}={value}" for field, value in fields.items()),
    )
  return folder


def diagnosis(folder: Path, workdir: Path, kind: str, model: str = "") -> dict[str, Any]:
  """Of held-out pairs of a kind, by the run's policy or by the model named."""
  data = f"--data={workdir / f'held-out-{kind}.jsonl'}"
  named = [f"--model={model}"] if model else []
  beta_rank.posttrain("eval", f"--workdir={folder}", data, *named)
  return files.read_json(folder / "eval.json")["diagnosis"]


def own_margin(name: str, told: dict[str, Any]) -> float:
  """The margin that the method's loss compares: per token where that is what it does."""
  if METHODS[name][0] == "dpo_norm":
    return METHODS[name][1]["objective.beta"] * told["drift"]["margin_per_token"]
  return told["margin"]["mean"]


def measured(workdir: Path, name: str) -> dict[str, Any] | None:
  folder = workdir / METHODS[name][0]
  if not (folder / runs.DONE).exists():
    return None
  path = folder / "measured.json"
  if not path.exists():
    found: dict[str, Any] = {"method": name, **beta_rank.measured(folder)}
    for kind in SETS:
      told = diagnosis(folder, workdir, kind)
      found[kind] = {key: told[key] for key in ("accuracy", "length_correlation")}
      found[kind]["margin"] = own_margin(name, told)
      if METHODS[name][0] == "simpo":  # no reference: what the base has by itself is not learned
        found[kind]["margin"] -= own_margin(name, diagnosis(folder, workdir, kind, "smollm2"))
    files.write_json(path, found)
  return files.read_json(path)


def comment_share(result: dict[str, Any]) -> float:
  """What a comment adds to the margin of its side, over the margin that the queries alone have: 0 is blind to it."""
  added = (result["right"]["margin"] - result["wrong"]["margin"]) / 2
  return added / result["none"]["margin"]


def report(results: list[dict[str, Any]]) -> None:
  lines = [
    "# Right answers that are longer by accident",
    "",
    f"Written by `experiments/length_bias.py`: {FIELDS['steps']} steps, one seed; {HELD_OUT} held-out pairs in three"
    f" forms; {beta_rank.ASKED} questions answered at temperature 1, in at most {beta_rank.LONGEST} tokens. In training"
    f" {BIASED:.0%} of the right queries had a comment behind them, of the wrong ones none.",
    "",
    "| method | "
    + " | ".join(f"margin: {title}" for title in SETS.values())
    + " | what the comment adds, over the margin without | pairs ordered right | tokens an own answer |",
    "|---" * 7 + "|",
  ]
  for r in results:
    margins = " | ".join(f"{r[kind]['margin']:.2f}" for kind in SETS)
    right = ", ".join(f"{r[kind]['accuracy']:.2f}" for kind in SETS)
    lines.append(
      f"| {r['method']} | {margins} | {comment_share(r):.2f} | {right} | {r['length']:.1f} |"
    )
  lines += [
    "",
    "Margins are those that each loss compares (per token in the last two); SimPO has no reference, so "
    "those of the base are taken off. A method that had learned the query alone would have the same "
    "margin in all three forms. The comment is part of what was preferred, so none can be blind to it; "
    "the question is how much of the margin it makes. Playbooks say that DPO's implicit "
    "reward, a sum over tokens, makes length a hidden axis, and that means per token control it.",
  ]
  OUT.parent.mkdir(exist_ok=True)
  files.write_json(OUT.with_suffix(".json"), {"results": results})
  files.write_text(OUT.with_suffix(".md"), "\n".join(lines) + "\n")
  figures.save_png(figure(results), OUT.with_suffix(".png"))


def figure(results: list[dict[str, Any]]) -> Figure:
  with figures.style():
    drawing = Figure(figsize=(8, 3), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for i, r in enumerate(results):
      places = [j + 0.25 * i for j in range(len(SETS))]
      relative = [r[kind]["margin"] / r["none"]["margin"] for kind in SETS]
      left.bar(places, relative, width=0.22, label=r["method"])
    left.axhline(1, color="#999999", linewidth=0.8)
    left.set_xticks([j + 0.25 for j in range(len(SETS))], list(SETS))
    left.set(title="margin over that without a comment, by where it is")
    right.bar([r["method"] for r in results], [r["length"] for r in results], width=0.5)
    right.set(title="tokens an own answer")
    if results:
      left.legend(fontsize=7)
  return drawing


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, default=Path("runs/length_bias"))
  parser.add_argument("--report", action="store_true", help="of what is finished; trains nothing")
  args = parser.parse_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  if not args.report:
    write_data(args.workdir)
    for name in METHODS:
      train(args.workdir, name)
      report([found for each in METHODS if (found := measured(args.workdir, each))])
  report([found for name in METHODS if (found := measured(args.workdir, name))])
  return 0


if __name__ == "__main__":
  sys.exit(main())
