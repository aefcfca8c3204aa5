"""Full fine-tuning of the embedded model with every optimizer: state bytes, peak bytes, loss after equal steps, time.

  make optimizers            (or: python experiments/optimizers.py --steps=10 --only=adamw,galore)

The SQL task, 2 rows of 256 tokens a step, the same rows for all.  Each optimizer runs in a process of its own, so that
its peak is its own, and its line goes to experiments/results/optimizers.{md,json}; what is there already for the same
steps is not run again.  Ten steps show what a step costs and that the loss falls, and not which optimizer is better:
learning rates are usual ones, not tuned.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "optimizers"
# name: (learning rate, other fields of config.optimizer)
OPTIMIZERS: dict[str, tuple[float, dict]] = {
  "adamw": (2e-5, {}),
  "adamw-host-state": (2e-5, dict(name="adamw", offload="state")),
  "adamw-host-params": (2e-5, dict(name="adamw", offload="params")),
  "adamw8bit": (2e-5, {}),
  "adamw8bit-all": (2e-5, dict(name="adamw8bit", embeddings_in_float32=False)),
  "adam_mini": (2e-5, {}),
  "galore": (1e-4, dict(rank=64, update_gap=5)),
  "galore8bit": (1e-4, dict(rank=64, update_gap=5)),
  "adafactor": (2e-5, {}),
  "lion": (4e-6, {}),
  "sgd": (1e-2, {}),
}


def one(name: str, steps: int) -> dict:
  """Trains with one optimizer, in this process."""
  import jax
  import numpy as np

  from posttrain_jax import settings
  from posttrain_jax.build import run
  from posttrain_jax.core import metrics as metrics_lib
  from posttrain_jax.core import tree

  lr, options = OPTIMIZERS[name]
  fields = dict(name=name, lr=lr, schedule="constant", warmup=0.0) | options
  overrides = [f"--config.optimizer.{field}={value}" for field, value in fields.items()]
  overrides += [f"--config.{x}" for x in (f"steps={steps}", "batch.rows=2", "data.length=256")]
  config = settings.load(f"{ROOT}/configs/sft.py:model=smollm2,data=sql,adapter=none", overrides)
  pieces = run.build(config, None)
  update, batches, context = pieces.step, pieces.batches, pieces.trees.context
  state = pieces.first_state()
  sizes = dict(trained_bytes=tree.nbytes(state.trainable), state_bytes=tree.nbytes(state.optimizer))
  losses, seconds = [], []
  for _ in range(steps):
    began = time.perf_counter()
    state, metrics = update(state, context, batches.batch(state))
    losses.append(metrics_lib.read(metrics)["loss"])
    seconds.append(time.perf_counter() - began)
  jax.block_until_ready(state)
  return dict(
    steps=steps,
    lr=lr,
    **sizes,
    peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    losses=[round(loss, 4) for loss in losses],
    first_seconds=round(seconds[0], 2),
    step_seconds=round(float(np.median(seconds[1:] or seconds)), 2),
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--only", default="", help="names, by commas; all by default")
  parser.add_argument("--out", type=Path, default=OUT)
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    print(json.dumps(one(args.worker, args.steps)), file=_answer, flush=True)
    return 0
  chosen = [name for name in OPTIMIZERS if not args.only or name in args.only.split(",")]
  if not chosen:
    parser.error(f"--only={args.only}: known are {', '.join(OPTIMIZERS)}")
  path = args.out.with_suffix(".json")
  record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"results": {}}
  for name in chosen:
    done = record["results"].get(name)
    if done and done["steps"] == args.steps:
      continue
    record["results"][name] = apart(name, args.steps)
    record["machine"] = machine()
    print(name, record["results"][name], flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(table(record))
  return 0


def apart(name: str, steps: int) -> dict:
  command = [sys.executable, __file__, f"--worker={name}", f"--steps={steps}"]
  environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
  return json.loads(done.stdout)


def table(record: dict) -> str:
  """The figures as a Markdown page."""
  lines = [
    "# Full fine-tuning of SmolLM2-135M in float32, one optimizer after the other",
    "",
    f"Written by `make optimizers`; {record['machine']}.  Text-to-SQL, 2 rows of 256 tokens a step, the same for all.",
    "Few steps and rates that nobody tuned: what a step costs, and that the loss falls; not which optimizer is better.",
    "Peak: of the whole process with its compilation; on a CPU what is offloaded counts too, all being host memory.",
    "",
    "| optimizer | rate | state, MB | bytes a parameter | peak, MB | first loss | last loss | steps | s a step |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, r in record["results"].items():
    each = 4 * r["state_bytes"] / r["trained_bytes"]
    lines.append(
      f"| {name} | {r['lr']:g} | {r['state_bytes'] / 1e6:.0f} | {each:.2f} | {r['peak_bytes'] / 1e6:,.0f} | "
      f"{r['losses'][0]:.3f} | {r['losses'][-1]:.3f} | {r['steps']} | {r['step_seconds']:.2f} |"
    )
  return "\n".join(lines) + "\n"


def machine() -> str:
  return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


if __name__ == "__main__":
  # a worker's standard output is its answer alone
  _answer = os.fdopen(os.dup(1), "w")
  if any(arg.startswith("--worker") for arg in sys.argv):
    os.dup2(2, 1)
  sys.exit(main())
