"""A sweep of four points on a Slurm of two nodes, one of which is lost while it trains: what is lost with it?

  .venv/bin/python experiments/slurm_sweep.py

It starts the Slurm (Debian's slurm-wlm and munge) on this machine, as root, hands it `posttrain launch --sweep`, kills
a node with all that runs on it, and gives it back a minute later.  Writes experiments/results/slurm_sweep.{json,md}.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from posttrain_jax.core import files
from tests import tiny
from tests.launch import cluster

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results" / "slurm_sweep"
RATES = (3e-2, 1e-2, 3e-3, 1e-3)
EVERY = 200  # steps between checkpoints
CONFIG = """
from posttrain_jax.configs import sft

def get_config(arg=None):
  c = sft.get_config("model={folder}/model,data={folder}/rows.jsonl")
  c.steps, c.checkpoint.every, c.eval.every, c.data.eval_rows = {steps}, {every}, {every}, 8
  c.data.length, c.adapter.r = 48, 4
  return c

def sweep():
  for lr in {rates}:
    yield "", {{"optimizer.lr": lr}}
"""


def main(steps: int = 3000) -> int:
  if absent := cluster.missing():
    print(f"nothing was run: {absent}")
    return 1
  folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-sweep-"))
  tiny.tiny_model_folder(folder / "model")
  tiny.write_jsonl(folder / "rows.jsonl", tiny.rows(40))
  (folder / "grid.py").write_text(
    CONFIG.format(folder=folder, steps=steps, every=EVERY, rates=RATES)
  )
  (folder / "slurm").mkdir()
  with cluster.started(folder / "slurm", cpus=1) as slurm:
    slurm.environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    slurm.environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    rows = swept(slurm, folder)
  rows["is_equal"] = is_equal(folder, rows["killed"], slurm.environment)
  files.write_json(RESULTS.with_suffix(".json"), rows)
  files.write_text(RESULTS.with_suffix(".md"), table(rows))
  print(table(rows))
  return 0 if rows["is_equal"] else 1


COMMAND = ["launch", "--config=grid.py", "--sweep", "--workdir=runs/lr", "--to=slurm"]


def swept(slurm: cluster.Cluster, folder: pathlib.Path) -> dict:
  """What the sweep came to, with a node killed once its point has done more than two checkpoints' steps."""
  began = time.monotonic()
  said = slurm.run(sys.executable, "-m", "posttrain_jax", *COMMAND, cwd=folder)
  number = said.splitlines()[-2].removeprefix("job ")
  print(said, flush=True)
  runs = folder / "runs" / "lr"
  names = [f"optimizer.lr={rate}" for rate in RATES]
  ready = lambda: [n for n in names if 2.5 * EVERY < last_step(runs / n) < 3 * EVERY - 20]
  cluster.until(lambda: bool(ready()), 400, "a point has two checkpoints")
  killed = ready()[0]
  node = slurm.jobs()[f"{number}_{names.index(killed)}"]["NodeList"]
  slurm.kill(node)
  lost_at = time.monotonic()
  reached, saved = last_step(runs / killed), saved_step(runs / killed)
  print(f"killed {node}, where {killed} was at step {reached}", flush=True)
  task = f"{number}_{names.index(killed)}"
  cluster.until(lambda: slurm.jobs()[task].get("Restarts") == "1", 120, "Slurm requeues it")
  noticed = time.monotonic() - lost_at
  slurm.join(node)
  done = lambda: all((runs / n / "done.json").exists() for n in names)
  cluster.until(done, 460, "all points are done")
  cluster.until(lambda: (runs / "summary.csv").exists(), 90, "the summary is there")
  jobs = slurm.jobs()
  points = [
    {
      "point": n,
      "state": jobs[f"{number}_{i}"]["JobState"],
      "restarts": int(jobs[f"{number}_{i}"]["Restarts"]),
      "eval_loss": json.loads((runs / n / "done.json").read_text())["final"]["eval_loss"],
    }
    for i, n in enumerate(names)
  ]
  return {
    "command": f"posttrain {' '.join(COMMAND)}",
    "points": points,
    "killed": killed,
    "node": node,
    "reached": reached,
    "saved": saved,
    "noticed_seconds": round(noticed),
    "seconds": round(time.monotonic() - began),
    "summary": (runs / "summary.csv").read_text(),
  }


def last_step(folder: pathlib.Path) -> int:
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def saved_step(folder: pathlib.Path) -> int:
  return max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())


def is_equal(folder: pathlib.Path, killed: str, environment: dict[str, str]) -> bool:
  """Whether a run of the same point that nothing disturbed has the same adapter, byte by byte."""
  rate = killed.partition("=")[2]
  command = ["train", "--config=grid.py", f"--config.optimizer.lr={rate}", "--workdir=whole"]
  subprocess.run(
    [sys.executable, "-m", "posttrain_jax", *command],
    cwd=folder,
    env={**os.environ, **environment},
    check=True,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  read = lambda run: (run / "adapter" / "adapter_model.safetensors").read_bytes()
  return read(folder / "whole") == read(folder / "runs" / "lr" / killed)


def table(rows: dict) -> str:
  points = "\n".join(
    f"| {p['point']} | {p['state']} | {p['restarts']} | {p['eval_loss']:.4f} |"
    for p in rows["points"]
  )
  equal = "byte for byte" if rows["is_equal"] else "NOT"
  lost = rows["reached"] - rows["saved"]
  return f"""# A sweep on Slurm, with a node lost

`{rows["command"]}`
on two nodes of one machine (Slurm 22.05, SlurmdTimeout 10 s), a point a node, a checkpoint every {EVERY} steps.

While `{rows["killed"]}` was at step {rows["reached"]}, its node {rows["node"]} was killed with all that ran on it
(SIGKILL to the daemon, the step and the run). Slurm gave the node up and requeued the point after
{rows["noticed_seconds"]} s; it went on from step {rows["saved"]}, and {lost} steps were lost, of {EVERY} that may be.
All four points and the summary were there after {rows["seconds"]} s, on two cores that others used too.

The adapter of that point is {equal} the one of a run that nothing disturbed.

| point | state | restarts | eval_loss |
|---|---|---|---|
{points}

`.venv/bin/python experiments/slurm_sweep.py` makes this page.
"""


if __name__ == "__main__":
  sys.exit(main())
