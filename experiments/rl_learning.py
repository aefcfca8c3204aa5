"""What learning from verifiers gains over fine-tuning for as long: arms by seeds, from one start, each with equal time.

  .venv/bin/python experiments/rl_learning.py --task=sql        (or reverse) [--seeds=3] [--seconds=1500] [--report]

SmolLM2-135M-Instruct, LoRA rank 16.  `sql` is the built-in task; in `reverse` the words of a line are said backwards, a
task so short that a trainer which does not learn it is broken.  A short fine-tuning run is the start of every arm:

  grpo         GRPO
  ppo          PPO, as many answers a batch but to four times the prompts, with a critic of its own
  ppo-shared   PPO, to twice the prompts, its critic a head on the policy
  dapo         DAPO, groups that agree replaced
  dapo-static  DAPO without that
  rft          two rounds of: the model's own right answers (`posttrain sample`), and fine-tuning on them
  sft          fine-tuning for longer on the expected answers

An arm ends when its processes have spent the seconds of CPU that it is given, which counts all they do: starting,
compiling, writing, scoring, updating, saving.  Held-out questions are answered greedily afterwards, by other processes
whose time is not counted, at the end and at some steps before it.  Arms differ in their learning rates (ARMS), and
those of PPO in how many prompts and answers a batch has (OWN).
A finished arm and seed is skipped, one that was killed begins anew.
Results: experiments/results/rl_learning-PROCESSOR.json as they come, and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench
import limits

from posttrain_jax.core import ending, files
from posttrain_jax.runs import record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = bench.beside(
  "rl_learning", limits.processor()
)  # equal seconds are equal on one machine alone
MANY = 400  # steps: none comes so far; the rate rises over the first eight
START_LR = 2e-3
# Learning rates, constant behind eight steps; all else of a method is its config's, or OWN's.  At 5e-4 from the first
# step on, sixteen steps of GRPO took the start from 0.460 to 0.305.
ARMS = {
  "grpo": 2e-4,
  "ppo": 2e-4,
  "ppo-shared": 2e-4,
  "dapo": 2e-4,
  "dapo-static": 2e-4,
  "rft": 5e-4,
  "sft": 5e-4,
}
# a critic learns of prompts: more of them, each with fewer answers; one update a batch, as GRPO
OWN = {
  "ppo": (
    "batch.rows=16",
    "online.samples=2",
    "online.passes=1",
    "critic.lr=1e-3",
    "data.length=256",
  ),
  "ppo-shared": (
    "batch.rows=8",
    "online.samples=4",
    "online.passes=1",
    "critic.trunk=shared",
    "critic.lr=1e-3",
    "data.length=384",
  ),
  "dapo-static": ("online.dynamic=False",),
}
SFT = ("data.length=256", "data.eval_rows=0", "batch.rows=4")
ROUNDS, ASKED, ANSWERS = 2, 48, 8  # of rft: prompts of a round, answers to each
PLAIN = (
  "grpo",
  "ppo",
  "ppo-shared",
  "dapo-static",
)  # a batch of these is so many answers, all of them
WRITTEN, SPAN = 32, 8  # answers of a batch; batches whose rewards are told together
TICK = os.sysconf("SC_CLK_TCK")

# --- the second task -------------------------------------------------------------------------------------------------

WORDS = (  # noqa: SIM905
  "apple bird blue boat book bread bridge brown chair city cloud coat cold corn dance door dream dust "
  "earth eye farm field fire fish flag floor fog fork frost garden gate glass gold grass green hand hat "
  "hill home horse house ice iron king lake lamp leaf light line lion milk moon mouse night north oak "
  "paper peak pear plant rain red ring river road rock roof rope rose salt sand school sea ship shoe "
  "silver sky snow song south spoon spring star stone storm street sugar sun table tent tiger tower "
  "tree valley wall water west wheel white wind window winter wolf wood yellow"
).split(" ")


def reversals(split: str, count: int) -> list[dict[str, str]]:
  """Lines of four to seven words, and the same backwards; no line is in two splits, since each draws from its own seed
  and there are more than ten thousand million lines."""
  drawn = random.Random(f"reverse {split}")
  lines = [drawn.sample(WORDS, drawn.randint(4, 7)) for _ in range(count)]
  return [
    {"prompt": f"Say backwards: {' '.join(line)}", "completion": " ".join(reversed(line))}
    for line in lines
  ]


@dataclasses.dataclass(frozen=True)
class Task:
  """Where questions come from, what is held out, what scores answers, and how the start is trained."""

  name: str
  train: str  # a built-in task's name, or a file
  held_out: str
  reward: str
  metric: str  # of done.json
  start_steps: int
  rl: tuple[
    str, ...
  ]  # room for the answers of a group: data.length is what rows are padded to parts of
  fields: tuple[str, ...] = ()


def task(name: str, out: Path) -> Task:
  if name == "sql":
    rl = ("data.length=576", "online.max_new_tokens=48")
    return Task("sql", "sql", "sql", "sql", "eval_score/sql", 32, rl)
  paths = {split: out / f"{split}.jsonl" for split in ("train", "held_out")}
  for split, count in (("train", 800), ("held_out", 200)):
    text = "".join(json.dumps(row) + "\n" for row in reversals(split, count))
    files.write_text(paths[split], text)
  # scored by the share of letters in common, in order; right where it is the line
  return Task(
    "reverse",
    str(paths["train"]),
    str(paths["held_out"]),
    "fuzzy",
    "eval_score/exact",
    12,
    ("data.length=384", "online.max_new_tokens=32"),
    ("eval.metric=exact",),
  )


# --- commands and their time -----------------------------------------------------------------------------------------


def train(config: str, workdir: Path, fields: Sequence[str]) -> list[str]:
  command = [sys.executable, "-m", "posttrain_jax", "train", f"--config={config}"]
  return [*command, f"--workdir={workdir}", *(f"--config.{field}" for field in fields)]


def spent(session: int) -> float:
  """Seconds of CPU of all processes of a session, and of those that they have waited for."""
  total = 0
  for path in Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = path.read_text().rpartition(")")[2].split()
    except OSError:  # it has ended since
      continue
    if int(fields[3]) == session:
      total += sum(map(int, fields[11:15]))
  return total / TICK


@dataclasses.dataclass
class Spent:
  """What an arm has spent, and when its checkpoints stood."""

  cpu: float = 0.0
  wall: float = 0.0
  steps: dict[int, float] = dataclasses.field(default_factory=dict)  # checkpoint -> seconds of CPU


def run(command: list[str], log: Path, until: float, so_far: Spent, folder: Path) -> None:
  """Runs a command, which is asked to stop when the arm has spent `until` seconds of CPU in all.

  Raises:
    RuntimeError: it failed.
  """
  began, before = time.monotonic(), so_far.cpu
  with log.open("a") as said:
    child = subprocess.Popen(
      command, stdout=said, stderr=said, start_new_session=True, cwd=ROOT, env=environment()
    )
    is_asked = False
    try:
      while child.poll() is None:
        so_far.cpu = max(so_far.cpu, before + spent(child.pid))
        for step in checkpoints(folder):
          so_far.steps.setdefault(step, so_far.cpu)
        if so_far.cpu >= until and not is_asked:
          child.terminate()
          is_asked = True
        time.sleep(0.2)
    finally:  # this program may be ended itself
      child.kill()
      child.wait()
  so_far.wall += time.monotonic() - began
  if child.returncode not in (0, ending.PREEMPTED):
    raise RuntimeError(f"{' '.join(command)}: code {child.returncode}; see {log}")


def environment() -> dict[str, str]:
  return {**os.environ, "PYTHONPATH": str(ROOT)}


def checkpoints(folder: Path) -> list[int]:
  return sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())


def score(command: list[str], folder: Path, step: int, metric: str) -> float:
  """What the checkpoint of a step is worth: the run's copy, told that it has no more steps than that one."""
  point = folder.with_name(f"{folder.name}-{step}")
  if not (point / record.DONE).exists():
    shutil.rmtree(point, ignore_errors=True)
    (point / "checkpoints").mkdir(parents=True)
    shutil.copytree(folder / "checkpoints" / str(step), point / "checkpoints" / str(step))
    shutil.copy(folder / record.CONFIG, point / record.CONFIG)
    (point / "completions").mkdir()  # a checkpoint may stand between two updates of a batch
    for batch in (folder / "completions").glob("batches_*"):
      shutil.copy(batch, point / "completions")
    lines = (folder / record.METRICS).read_text().splitlines(keepends=True)
    until = [line for line in lines if json.loads(line)["step"] <= step]
    files.write_text(point / record.METRICS, "".join(until))
    ended = [f"--workdir={point}" if c.startswith("--workdir") else c for c in command]
    ended = [f"--config.steps={step}" if c.startswith("--config.steps") else c for c in ended]
    with (folder.with_name(f"{folder.name}.log")).open("a") as said:
      subprocess.run(ended, check=True, stdout=said, stderr=said, cwd=ROOT, env=environment())
  shutil.rmtree(point / "checkpoints", ignore_errors=True)  # 60 MB
  return float(files.read_json(point / record.DONE)["final"][metric])


# --- arms ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
  """What all arms of a task share."""

  task: Task
  out: Path
  seconds: float
  points: int  # of a curve, within the run
  asked: int  # held-out questions
  every: int  # steps from one checkpoint to the next
  storage: str  # of what writes

  @property
  def start(self) -> Path:
    return self.out / "start"

  def fields(self, lr: float, *more: str) -> list[str]:
    task = self.task
    held_out = [f"eval.task={task.held_out}", f"eval.task_limit={self.asked}", "eval.before=False"]
    saved = [f"checkpoint.every={self.every}", "checkpoint.keep=1000"]
    shared = ["eval.every=0", f"optimizer.lr={lr}"]
    return [*held_out, *saved, *shared, *task.fields, *more]

  def onwards(self, folder: Path) -> list[str]:
    constant = ["optimizer.schedule=constant", "optimizer.warmup=0.02"]
    return [f"model.adapter={folder}", f"steps={MANY}", *constant]

  def start_command(self) -> list[str]:
    more = [*SFT, f"steps={self.task.start_steps}", "optimizer.warmup=0.1"]
    return train(f"sft:data={self.task.train}", self.start, self.fields(START_LR, *more))

  def rl_command(self, arm: str, seed: int, workdir: Path) -> list[str]:
    method, task = arm.partition("-")[0], self.task
    config = f"rl:method={method},data={task.train},reward={task.reward},storage={self.storage}"
    more = [*task.rl, "online.rows=32", f"seed={seed}", *OWN.get(arm, ())]
    more += self.onwards(self.start)
    return train(config, workdir, self.fields(ARMS[arm], *more))

  def sft_command(self, arm: str, data: str, seed: int, adapter: Path, workdir: Path) -> list[str]:
    more = [*SFT, f"seed={seed}", *self.onwards(adapter)]
    return train(f"sft:data={data}", workdir, self.fields(ARMS[arm], *more))

  def sample_command(self, seed: int, adapter: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "posttrain_jax", "sample", "--model=smollm2"]
    built_in = self.task.train == self.task.name
    source = f"--task={self.task.train}" if built_in else f"--data={self.task.train}"
    # a task's training questions have a verifier of their own; those of a file are told theirs
    scored = [] if built_in else [f"--reward={self.task.reward}"]
    how = [f"--n={ANSWERS}", "--per_prompt=4", f"--limit={ASKED}", f"--seed={seed}"]
    return [*command, f"--adapter={adapter}", source, *scored, *how, f"--out={out}"]


def once(plan: Plan, command: list[str], folder: Path) -> tuple[Spent, list[list[float]], int]:
  """An arm that is one run: what it spent, [seconds, score] of some of its steps, and how many they were."""
  so_far = Spent()
  run(command, folder.with_name(f"{folder.name}.log"), plan.seconds, so_far, folder)
  every = checkpoints(folder)
  if not every:
    raise RuntimeError(f"{folder}: {plan.seconds:g} s were too few for a step")
  last = len(every) - 1
  chosen = sorted({round(last * i / (plan.points + 1)) for i in range(1, plan.points + 1)} | {last})
  curve = [
    [so_far.steps.get(every[i], so_far.cpu), score(command, folder, every[i], plan.task.metric)]
    for i in chosen
  ]
  return so_far, curve, every[-1]


def rounds(plan: Plan, seed: int, folder: Path) -> tuple[Spent, list[list[float]], int]:
  """Rejection sampling: a round's answers are of the model that the round before gave."""
  so_far, curve, adapter, steps = Spent(), [], plan.start / "adapter", 0
  folder.mkdir(parents=True, exist_ok=True)
  log = folder.with_name(f"{folder.name}.log")
  for number in range(1, ROUNDS + 1):
    until = plan.seconds * number / ROUNDS
    data, here = folder / f"own-{number}.jsonl", folder / f"round-{number}"
    run(plan.sample_command(10 * seed + number, adapter, data), log, math.inf, so_far, here)
    if so_far.cpu >= until:
      raise RuntimeError(f"{folder}: sampling took {so_far.cpu:.0f} s of {until:g}; ask for less")
    command = plan.sft_command("rft", str(data), seed, adapter, here)
    run(command, log, until, so_far, here)
    last = checkpoints(here)[-1]
    curve.append([so_far.cpu, score(command, here, last, plan.task.metric)])
    adapter, steps = here.with_name(f"{here.name}-{last}") / "adapter", steps + last
  return so_far, curve, steps


def result(plan: Plan, arm: str, seed: int) -> dict[str, Any]:
  folder = plan.out / f"{arm}-{seed}"
  for old in plan.out.glob(f"{folder.name}*"):  # of a run that was killed
    shutil.rmtree(old) if old.is_dir() else old.unlink()
  load, rewards = os.getloadavg()[0], []
  if arm == "rft":
    so_far, curve, steps = rounds(plan, seed, folder)
  else:
    source = plan.task.train
    command = (
      plan.sft_command("sft", source, seed, plan.start, folder)
      if arm == "sft"
      else plan.rl_command(arm, seed, folder)
    )
    so_far, curve, steps = once(plan, command, folder)
    rewards = record.read(folder).series("reward")[1]
  for old in plan.out.glob(f"{folder.name}*/**/checkpoints"):  # 60 MB each
    shutil.rmtree(old)
  return dict(
    task=plan.task.name,
    arm=arm,
    seed=seed,
    lr=ARMS[arm],
    asked=plan.asked,
    seconds=plan.seconds,
    cpu_seconds=round(so_far.cpu, 1),
    wall_seconds=round(so_far.wall, 1),
    load=[round(load, 2), round(os.getloadavg()[0], 2)],
    steps=steps,
    end=curve[-1][1],
    curve=[[round(seconds, 1), value] for seconds, value in curve],
    rewards=[round(value, 4) for value in rewards],
  )


# --- results ---------------------------------------------------------------------------------------------------------


def known() -> dict[str, Any]:
  return files.read_json(RESULTS) if RESULTS.exists() else {"starts": [], "runs": []}


def write(found: dict[str, Any]) -> None:
  found["hardware"] = f"{os.cpu_count()} cores, {limits.processor()}"
  found["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
  files.write_json(RESULTS, found)
  files.write_text(RESULTS.with_suffix(".md"), report(found))


def report(found: dict[str, Any]) -> str:
  """A table a task: a line an arm, over its seeds."""
  lines = ["# Learning from verifiers beside fine-tuning for as long", ""]
  lines += ["Written by `experiments/rl_learning.py`, whose docstring says what the arms are.", ""]
  for start in found["starts"]:
    some = [r for r in found["runs"] if r["task"] == start["task"]]
    lines += [
      f"## {start['task']}",
      "",
      f"{start['asked']} held-out questions, greedily; the start (fine-tuning, {start['steps']} steps at {START_LR:g})"
      f" has {start['score']:.3f}. {found.get('hardware', '')}.",
      "",
      "| arm | learning rate | seeds | start | end (mean) | end (each) | steps | CPU seconds | wall seconds |",
      "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
      if rows := sorted((r for r in some if r["arm"] == arm), key=lambda r: r["seed"]):
        lines.append(line(arm, start["score"], rows))
    lines.append("")
    lines += equal_answers(some)
    lines += ["Curves, held-out score after so many seconds of CPU:", ""]
    lines += [f"- {r['arm']}, seed {r['seed']}: {curve(start['score'], r)}" for r in some]
    lines.append("")
  return "\n".join(lines)


def equal_answers(runs: Sequence[dict[str, Any]]) -> list[str]:
  """What the policy's own answers were worth, of which arms wrote equally many; every batch of these asks new prompts.

  >>> equal_answers([{"arm": "grpo", "rewards": [0.25] * 4 + [0.75] * 12}])[-2]
  '| grpo | 1 | 0.500 | 0.750 |'
  """
  lengths = [len(r["rewards"]) // SPAN for r in runs if r["arm"] in PLAIN]
  if not any(lengths):
    return []
  ends = [SPAN * WRITTEN * (i + 1) for i in range(max(lengths))]
  heads = [f"{end - SPAN * WRITTEN + 1} to {end}" for end in ends]
  lines = [
    "Mean reward of an arm's answers, drawn at temperature 1 to training prompts that it had not seen, over the seeds"
    f" that wrote so many. Rejection sampling writes {ROUNDS * ASKED * ANSWERS} in all.",
    "",
    f"| arm | seeds | {' | '.join(heads)} |",
    f"|---|---|{'---|' * len(heads)}",
  ]
  for arm in PLAIN:
    each = [r["rewards"] for r in runs if r["arm"] == arm]
    spans = [
      [statistics.fmean(one[i : i + SPAN]) for one in each if len(one) >= i + SPAN]
      for i in range(0, SPAN * len(heads), SPAN)
    ]
    cells = [f"{statistics.fmean(span):.3f}" if span else "" for span in spans]
    if each:
      lines.append(f"| {arm} | {len(each)} | {' | '.join(cells)} |")
  return [*lines, ""]


def line(arm: str, start: float, rows: list[dict[str, Any]]) -> str:
  each = lambda name, shown="{}": ", ".join(shown.format(r[name]) for r in rows)
  mean = statistics.fmean(r["end"] for r in rows)
  cells = [arm, f"{ARMS[arm]:g}", str(len(rows)), f"{start:.3f}", f"{mean:.3f}"]
  cells += [each("end", "{:.3f}"), each("steps")]
  return (
    f"| {' | '.join([*cells, each('cpu_seconds', '{:.0f}'), each('wall_seconds', '{:.0f}')])} |"
  )


def curve(start: float, row: dict[str, Any]) -> str:
  points = [[0.0, start], *row["curve"]]
  return ", ".join(f"{value:.3f} ({seconds:.0f} s)" for seconds, value in points)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--task", choices=("sql", "reverse"), default="sql")
  parser.add_argument("--arms", default=",".join(ARMS))
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--seconds", type=float, default=1500.0, help="of CPU, an arm and seed")
  parser.add_argument("--points", type=int, default=2, help="of a curve, before its end")
  parser.add_argument("--asked", type=int, default=200, help="held-out questions")
  parser.add_argument("--every", type=int, default=4, help="steps from checkpoint to checkpoint")
  parser.add_argument(
    "--storage", default="auto", help="of what writes; int8 is faster where products are in float32"
  )
  parser.add_argument("--out", type=Path, default=Path("runs/rl_learning"))
  parser.add_argument("--report", action="store_true", help="of what is finished; trains nothing")
  args = parser.parse_args()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it started ends with it
  if args.report:
    print(report(known()))
    return 0
  out = args.out.absolute() / args.task
  out.mkdir(parents=True, exist_ok=True)
  plan = Plan(
    task(args.task, out), out, args.seconds, args.points, args.asked, args.every, args.storage
  )
  if not (plan.start / record.DONE).exists():
    subprocess.run(plan.start_command(), check=True, cwd=ROOT, env=environment())
  found = known()
  began = files.read_json(plan.start / record.DONE)["final"][plan.task.metric]
  found["starts"] = [s for s in found["starts"] if s["task"] != args.task]
  found["starts"].append(
    dict(task=args.task, steps=plan.task.start_steps, asked=args.asked, score=began)
  )
  write(found)
  key = lambda r: (r["task"], r["arm"], r["seed"])
  for seed, arm in itertools.product(range(args.seeds), args.arms.split(",")):
    known_ones = [r for r in found["runs"] if r["seconds"] == args.seconds]
    if (args.task, arm, seed) not in map(key, known_ones):
      one = result(plan, arm, seed)
      found = known()  # another of this program may have ended an arm meanwhile
      found["runs"] = [r for r in found["runs"] if key(r) != key(one)] + [one]
      write(found)
      print(one, flush=True)
  print(report(known()))
  return 0


if __name__ == "__main__":
  sys.exit(main())
