"""What is a look at the database worth?  Questions about tables that nobody has described, in one turn and in two.

  .venv/bin/python experiments/two_turns.py        [--seeds=2] [--seconds=360] [--report]

Every question has a database of its own, a table that may be called `staff`, `employee`, `worker` or `crew`, with
columns that may be called `pay`, `salary`, `wage` or `income`, and so on; the prompt names none of them.

  one   answers at once, and has to guess what things are called
  two   has the built-in environment `sql`: it may call `tables()` and `query(sql)` before it answers

Both arms are asked the same questions.  SmolLM2-135M-Instruct, LoRA rank 16, is fine-tuned on as many of them
(conversations with one call of `tables()` where there are tools), and then learns by GRPO from whether its query
returns what the expected one does, for as many seconds of CPU, counted as in `rl_learning.py`.  Held-out questions are
of other databases, whose names are other choices of the same words; none has question and answer of one that was
trained on.  They are answered greedily before GRPO and after it.
A finished arm and seed is skipped.  Results: experiments/results/two_turns-PROCESSOR.json as they come, and .md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bench
import limits
import rl_learning

from posttrain_jax.core import files
from posttrain_jax.environments.host import Source, describe
from posttrain_jax.environments.sql import Database
from posttrain_jax.rewards import sql
from posttrain_jax.runs import record

RESULTS = bench.beside("two_turns", limits.processor())
SYSTEM = "Answer with a query in SQLite."
ARMS = {"one": "", "two": "sql"}  # the environment of each
TRAIN, MOST = 400, 1000  # questions; steps that no arm comes to
METRIC = f"{Path(__file__).name}:right"
SHARED = ("model.template=chatml", "eval.every=0")
RL = (
  "optimizer.schedule=constant",
  "optimizer.warmup=0.004",
  "online.rows=32",
  "checkpoint.every=2",
  "checkpoint.keep=1000",
  f"eval.metric={__file__}:right",
)

# --- questions -------------------------------------------------------------------------------------------------------

# What a table and its columns may be called, what stands in them, and what is asked of {who}, {where} and {much}.
SUBJECTS: Sequence[Mapping[str, Any]] = (
  {
    "table": "staff employee worker crew",
    "columns": ("name person full_name who", "city town location place", "pay salary wage income"),
    "who": "Ada Bela Carl Dora Emil Fay Gus Hana Ivo Jane Kim Lea",
    "where": "Oslo Rome Lima Cairo Paris",
    "much": (20, 90),
    "asked": (
      "Where does {who} work?",
      "What does {who} earn?",
      "How many people work in {where}?",
      "Who earns the most?",
      "Who earns more than {much}?",
    ),
  },
  {
    "table": "book novel volume library",
    "columns": (
      "title book_name label heading",
      "author writer written_by creator",
      "pages length page_count size",
    ),
    "who": "Dawn Embers Harvest Islands Mirrors Night Orchard River Salt Thunder Winter Yarrow",
    "where": "Brandt Costa Okoye Silva Weiss",
    "much": (90, 900),
    "asked": (
      "Who wrote {who}?",
      "How many pages has {who}?",
      "How many books did {where} write?",
      "Which book is the longest?",
      "Which books have more than {much} pages?",
    ),
  },
  {
    "table": "ship vessel boat fleet",
    "columns": (
      "ship_name called name vessel_name",
      "port harbour home berth",
      "weight tons mass tonnage",
    ),
    "who": "Albatross Comet Dolphin Heron Kestrel Meteor Neptune Osprey Pelican Swift Triton Zephyr",
    "where": "Bergen Genoa Hull Kiel Porto",
    "much": (10, 80),
    "asked": (
      "Where is {who} at home?",
      "How heavy is {who}?",
      "How many ships are at home in {where}?",
      "Which ship is the heaviest?",
      "Which ships weigh more than {much} tons?",
    ),
  },
)
QUERIES = (
  "SELECT {b} FROM {t} WHERE {a} = '{who}'",
  "SELECT {c} FROM {t} WHERE {a} = '{who}'",
  "SELECT COUNT(*) FROM {t} WHERE {b} = '{where}'",
  "SELECT {a} FROM {t} ORDER BY {c} DESC LIMIT 1",
  "SELECT {a} FROM {t} WHERE {c} > {much}",
)
ROWS = 8  # of a table


def drawn(split: str, count: int, other_than: Sequence[Any] = ()) -> list[dict[str, Any]]:
  """Questions, each with the script that makes its database; none is asked and answered as one of the others.

  >>> one = drawn("held_out", 1)[0]
  >>> sql.sql("", one["gold"], one).value
  1.0
  """
  key = lambda question: (question["prompt"][-1]["content"], question["gold"])
  known = {*map(key, other_than)}
  every = (_question(random.Random(f"{split} {i}")) for i in itertools.count())
  return [*itertools.islice((one for one in every if key(one) not in known), count)]


def _question(draw: random.Random) -> dict[str, Any]:
  subject, kind = draw.choice(SUBJECTS), draw.randrange(len(QUERIES))
  one_of = lambda words: draw.choice(words.split())
  table, (a, b, c) = one_of(subject["table"]), map(one_of, subject["columns"])
  numbers = draw.sample(range(*subject["much"]), ROWS)  # no two alike, so that one is the most
  places = [one_of(subject["where"]) for _ in numbers]
  facts = [*zip(draw.sample(subject["who"].split(), ROWS), places, numbers, strict=True)]
  who, where, _ = draw.choice(facts)
  said = {"who": who, "where": where, "much": sorted(numbers)[ROWS // 2]}
  names = dict(zip((a, b, c), ("TEXT", "TEXT", "INTEGER")))
  columns = ", ".join(f"{name} {names[name]}" for name in draw.sample([*names], len(names)))
  values = ", ".join(str(fact) for fact in facts)
  return {
    "prompt": [
      {"role": "system", "content": SYSTEM},
      {"role": "user", "content": subject["asked"][kind].format(**said)},
    ],
    "gold": QUERIES[kind].format(t=table, a=a, b=b, c=c, **said),
    "schema": f"CREATE TABLE {table} ({columns}); INSERT INTO {table} ({a}, {b}, {c}) VALUES {values};",
  }


def shown(question: Mapping[str, Any], tools: Sequence[Any]) -> dict[str, Any]:
  """A question with its answer as fine-tuning reads it; where there are tools, one of them is called before."""
  answer = {"role": "assistant", "content": question["gold"]}
  if not tools:
    return {"messages": [*question["prompt"], answer]}
  database = Database()
  database.reset(**question)
  call = {"type": "function", "function": {"name": "tables", "arguments": {}}}
  looks = [
    {"role": "assistant", "content": "", "tool_calls": [call]},
    {"role": "tool", "name": "tables", "content": database.tables()},
  ]
  return {"messages": [*question["prompt"], *looks, answer], "tools": tools}


def right(answer: str, row: Mapping[str, Any]) -> float:
  """The metric: whether the answer's query returns what the row's `gold` does."""
  return sql.sql("", answer, row).value or 0.0


# --- arms ------------------------------------------------------------------------------------------------------------


def write_rows(out: Path, asked: int) -> None:
  """The files of questions, and those of the conversations that each arm begins with."""
  train = drawn("train", TRAIN)
  rows = {"train": train, "held_out": drawn("held_out", asked, train)}
  for arm, environment in ARMS.items():
    tools = [dict(one) for one in describe(Source(environment)).schemas] if environment else []
    rows[f"shown-{arm}"] = [shown(question, tools) for question in train]
  for name, some in rows.items():
    files.write_text(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in some))


def start_command(args: argparse.Namespace, arm: str, seed: int, workdir: Path) -> list[str]:
  more = ["data.length=416", "data.packing=False", "data.eval_rows=0", "batch.rows=4"]
  more += [f"steps={args.start}", f"optimizer.lr={rl_learning.START_LR}", "optimizer.warmup=0.1"]
  source = f"sft:data={args.out / f'shown-{arm}.jsonl'}"
  return rl_learning.train(source, workdir, [*SHARED, *more, f"seed={seed}"])


def rl_command(
  args: argparse.Namespace, arm: str, seed: int, adapter: Path, workdir: Path
) -> list[str]:
  config = f"rl:method=grpo,data={args.out / 'train.jsonl'},reward=sql,environment={ARMS[arm]}"
  more = [f"model.adapter={adapter}", f"steps={MOST}", f"optimizer.lr={args.lr}", f"seed={seed}"]
  more += [f"eval.task={args.out / 'held_out.jsonl'}", f"eval.task_limit={args.asked}"]
  # what stands behind the prompt: of one turn a query, of two the call and what it gave beside it
  room = ["online.max_new_tokens=128", "online.tool_tokens=64", "data.length=2304"]
  alone = ["online.max_new_tokens=48", "data.length=576"]
  more += room if ARMS[arm] else alone
  return rl_learning.train(config, workdir, [*SHARED, *RL, *more])


def result(args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
  folder = args.out / f"{arm}-{seed}"
  for old in args.out.glob(f"{folder.name}*"):  # of a run that was killed
    shutil.rmtree(old) if old.is_dir() else old.unlink()
  log, start = folder.with_name(f"{folder.name}.log"), folder.with_name(f"{folder.name}-start")
  before, spent, unseen = (rl_learning.Spent() for _ in range(3))
  rl_learning.run(start_command(args, arm, seed, start), log, math.inf, before, start)
  command = [*rl_command(args, arm, seed, start / "adapter", folder), "--config.eval.before=False"]
  # what GRPO starts from, by a run of one step beside it, whose time is nobody's
  first = folder.with_name(f"{folder.name}-first")
  looked = [*rl_command(args, arm, seed, start / "adapter", first), "--config.steps=1"]
  rl_learning.run(looked, log, math.inf, unseen, first)
  rl_learning.run(command, log, args.seconds, spent, folder)
  last = rl_learning.checkpoints(folder)[-1]
  end = rl_learning.score(command, folder, last, f"eval_score/{METRIC}")
  run, started = record.read(folder), record.read(first).before
  assert started is not None
  for old in args.out.glob(f"{folder.name}*/**/checkpoints"):  # 60 MB each
    shutil.rmtree(old)
  found = {
    "arm": arm,
    "seed": seed,
    "asked": args.asked,
    "seconds": args.seconds,
    "examples": 4 * args.start,
    "start_cpu_seconds": round(before.cpu, 1),
    "cpu_seconds": round(spent.cpu, 1),
    "steps": last,
    "start": started.correct / started.total,
    "end": end,
    "rewards": [round(value, 4) for value in run.series("reward")[1]],
  }
  turns = run.series("turns/mean")[1]
  return found | ({"turns": [round(value, 3) for value in turns]} if turns else {})


# --- results ---------------------------------------------------------------------------------------------------------


def report(found: Mapping[str, Any]) -> str:
  """A line an arm and seed."""
  lines = ["# One turn and two, on databases that nobody has described", ""]
  lines += ["Written by `experiments/two_turns.py`, whose docstring says what the arms are.", ""]
  lines += [f"Share of held-out questions that are answered right.  {found['hardware']}.", ""]
  lines += [
    "| turns | seed | questions | examples | before GRPO | after | steps | CPU seconds | of the start | turns made |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for one in sorted(found["runs"], key=lambda one: (one["arm"], one["seed"])):
    turns = statistics.fmean(one["turns"][-5:]) if "turns" in one else 1
    cells = [one["arm"], one["seed"], one["asked"], one["examples"]]
    cells += [f"{one['start']:.3f}", f"{one['end']:.3f}", one["steps"]]
    cells += [f"{one['cpu_seconds']:.0f}", f"{one['start_cpu_seconds']:.0f}", f"{turns:.2f}"]
    lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join([*lines, ""])


def known() -> dict[str, Any]:
  return files.read_json(RESULTS) if RESULTS.exists() else {"runs": []}


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--arms", default=",".join(ARMS))
  parser.add_argument("--seeds", type=int, default=2)
  parser.add_argument("--seconds", type=float, default=360.0, help="of CPU, of GRPO")
  parser.add_argument("--start", type=int, default=24, help="steps of fine-tuning, four rows each")
  parser.add_argument("--lr", type=float, default=2e-4, help="of GRPO")
  parser.add_argument("--asked", type=int, default=100, help="held-out questions")
  parser.add_argument("--out", type=Path, default=Path("runs/two_turns"))
  parser.add_argument("--report", action="store_true", help="of what is finished; trains nothing")
  args = parser.parse_args()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it started ends with it
  if args.report:
    print(report(known()))
    return 0
  args.out = args.out.absolute()
  args.out.mkdir(parents=True, exist_ok=True)
  write_rows(args.out, args.asked)
  found = known()
  key = lambda one: (one["arm"], one["seed"], one["seconds"])
  for seed, arm in itertools.product(range(args.seeds), args.arms.split(",")):
    if (arm, seed, args.seconds) not in map(key, found["runs"]):
      one = result(args, arm, seed)
      found["runs"] = [r for r in found["runs"] if key(r) != key(one)] + [one]
      found["hardware"] = f"{os.cpu_count()} cores, {limits.processor()}"
      found["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
      files.write_json(RESULTS, found)
      files.write_text(RESULTS.with_suffix(".md"), report(found))
      print(one, flush=True)
  print(report(found))
  return 0


if __name__ == "__main__":
  sys.exit(main())
