"""`posttrain pairs`: preference pairs out of a model's own right and wrong answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from posttrain_jax.commands import common
from posttrain_jax.core import progress


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", metavar="NAME_OR_DIR", help="a model, or the folder of a run")
  parser.add_argument("--adapter", metavar="DIR")
  common.add_use(parser)
  parser.add_argument(
    "--task", default="sql", help="a built-in task, for its training questions; default sql"
  )
  parser.add_argument(
    "--data", metavar="SOURCE", help=f"rows to ask instead, with --metric: {common.SOURCE}"
  )
  common.add_columns(parser)
  parser.add_argument(
    "--metric",
    metavar="NAME",
    help="what tells right answers to --data from wrong ones: exact, contained, json, number, or a function of yours as"
    " FILE.py:name",
  )
  parser.add_argument("--out", required=True, metavar="FILE.jsonl")
  parser.add_argument("--limit", type=int, default=256, help="questions; 0 for all")
  parser.add_argument("--samples", type=int, default=4, help="answers to each")
  parser.add_argument("--temperature", type=float, default=0.8)
  parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Writes preference pairs, JSONL, out of the model's own answers to a task's training questions, or to own rows.

  Raises:
    ConfigError: the file is there already, every answer was right, or one of --data and --metric is missing.
  """
  with progress.phase("starting"):
    common.cache_compilations()
    from posttrain_jax.build import data, evaluation, use
    from posttrain_jax.core import files
    from posttrain_jax.evals import pairs, tasks
    from posttrain_jax.evals.samples import Plan
    from posttrain_jax.rollout.sampling import Sampling
    from posttrain_jax.settings import ConfigError

  path = Path(args.out)
  if path.exists():
    raise ConfigError(f"{path} is there already: write another --out, or remove it")
  if bool(args.data) != bool(args.metric):
    raise ConfigError(
      "own rows need both --data=SOURCE and --metric (exact, contained, json, number, FILE.py:name), which tells right"
      " answers from wrong ones"
    )
  columns = common.columns(args)
  sampling = Sampling(temperature=args.temperature)
  Plan(args.samples, 1, sampling, args.seed)  # before the long part
  used = use.load(args.model, args.adapter, base=args.base, template=args.template)
  with data.told_of_columns():
    task = (
      evaluation.graded(used, args.data, args.metric, args.limit, columns)
      if args.data
      else tasks.known(args.task)
    )
  plan = Plan(args.samples, task.max_new_tokens, sampling, args.seed)
  with progress.counter("answering") as count:
    drawn = pairs.make(
      use.writer(used),
      task,
      plan,
      limit=args.limit or None,
      progress=count,
    )
  if not drawn.rows:
    raise ConfigError(
      f"none of {drawn.questions} questions gave a pair: {drawn.all_right} had no wrong answer among {args.samples},"
      f" {drawn.no_better} no better one; raise --temperature or --samples"
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in drawn.rows))
  print(f"{drawn}; written: {path}")
  return 0
