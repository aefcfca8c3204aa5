r"""A student with half the layers, recovered in several ways: what is it worth to see a teacher's probabilities?

  posttrain chain --config=experiments/half_layers.py --workdir=runs/half_layers

The teacher is the quickstart's (SmolLM2-135M, text to SQL), the student 15 of its 30 layers, which answer nothing yet.
Each arm trains all of the student for as many updates of as many rows:

  gold        fine-tuning on the data's answers
  traces      fine-tuning on the teacher's answers that a verifier finds right
  off_policy  the teacher's probabilities on the data's answers (forward KL)
  on_policy   half of the rows are the student's own answers (GKD, generalised JSD)

A student that answers nothing has nothing to learn from in its own answers, so the two that matter go on from `traces`
for `more` updates, at a lower rate (`more_lr`): at 5e-4 a step spoils what the student writes next, and it then learns
from that:

  more_traces     as before
  more_on_policy  half of the rows are the student's own answers (GKD, forward KL)

`:seed=1` is another seed of all that is trained, `:arms=onwards` leaves out the arms that begin from nothing, but for
`traces`.  `runs/half_layers/report.html` has the held-out accuracy of each;

  .venv/bin/python experiments/half_layers.py runs/half_layers runs/half_layers_1

writes what the stages of these chains (or single runs) came to into experiments/results/half_layers-PROCESSOR.json and
.md.
"""

import argparse
import sys
from pathlib import Path

from posttrain_jax.configs import common


def stages(arg=None):
  arg = common.parse(
    arg,
    model="smollm2",
    steps=150,
    more=100,
    more_lr=1e-4,
    questions=200,
    layers=15,
    seed=0,
    arms="all",
  )
  everything = common.chosen("arms", arg.arms, ("all", "onwards")) == "all"
  asked = {
    "seed": arg.seed,
    "eval.task": "sql",
    "eval.task_limit": arg.questions,
    "eval.before": False,
  }
  trained = {**asked, "steps": arg.steps, "batch.rows": 8, "optimizer.lr": 5e-4, "eval.every": 0}
  rows = {**trained, "data.length": 256, "data.packing": False}
  student = "model={student},adapter=none"
  yield {
    "name": "teacher",
    "train": f"sft:model={arg.model},data=sql",
    "fields": {
      **asked,
      "steps": 64,
      "batch.rows": 4,
      "data.length": 256,
      "optimizer.lr": 2e-3,
      "eval.before": True,
    },
  }
  yield {"name": "student", "student": {"model": "{teacher}", "layers": arg.layers}}
  yield {"name": "right", "sample": {"model": "{teacher}", "task": "sql", "n": 2, "limit": 600}}
  if everything:
    yield {"name": "gold", "train": f"sft:{student},data=sql", "fields": rows}
  yield {"name": "traces", "train": f"sft:{student},data={{right}}", "fields": rows}
  if everything:
    taught = f"{student},teacher={{teacher}},data=sql"
    yield {"name": "off_policy", "train": f"distil:{taught}", "fields": rows}
    yield {
      "name": "on_policy",
      "train": f"distil:{taught},on_policy=0.5,loss=jsd",
      "fields": {**trained, "online.max_new_tokens": 48},
    }
  onwards = {"steps": arg.more, "seed": arg.seed + 1, "optimizer.lr": arg.more_lr}
  begun = "model={traces}/model,adapter=none"
  yield {
    "name": "more_traces",
    "train": f"sft:{begun},data={{right}}",
    "fields": {**rows, **onwards},
  }
  yield {
    "name": "more_on_policy",
    "train": f"distil:{begun},teacher={{teacher}},data=sql,on_policy=0.5,loss=forward_kl",
    "fields": {**trained, **onwards, "online.max_new_tokens": 48},
  }


def main() -> int:
  import bench
  import limits

  from posttrain_jax.core import files
  from posttrain_jax.evals import chain_page
  from posttrain_jax.runs import record

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folders", type=Path, nargs="+", help="of chains, or of single runs")
  rows = []
  for folder in parser.parse_args().folders:
    chain = (folder / chain_page.STATE).exists()
    names = (
      [one["name"] for one in chain_page.read(folder) if one["verb"] == "train"] if chain else ["."]
    )
    for name in names:
      run = record.read(folder / name)
      if run.after is None:
        continue
      rows.append(
        {
          "stage": name if chain else folder.name,
          "seed": run.field("seed"),
          "updates": run.steps,
          "rows": run.field("batch.rows"),
          "lr": run.field("optimizer.lr"),
          "right": run.after.correct,
          "of": run.after.total,
        }
      )
  out = bench.beside("half_layers", limits.processor())
  files.write_json(out, {"hardware": limits.processor(), "stages": rows})
  lines = ["# A student with half the layers, recovered in several ways", ""]
  lines += ["Written by `experiments/half_layers.py`, whose docstring says what the arms are.", ""]
  lines += ["| stage | seed | updates | rows of each | learning rate | right |", "|---" * 6 + "|"]
  lines += [
    f"| {row['stage']} | {row['seed']} | {row['updates']} | {row['rows']} | {row['lr']:g} |"
    f" {row['right'] / row['of']:.3f} of {row['of']} |"
    for row in rows
  ]
  files.write_text(out.with_suffix(".md"), "\n".join([*lines, ""]))
  print("\n".join(lines))
  return 0


if __name__ == "__main__":
  sys.exit(main())
