"""`posttrain eval`: what a model or a run is worth."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax.commands import common
from posttrain_jax.core import progress


def add(parser: argparse.ArgumentParser) -> None:
  common.add_config(parser, required=False)
  parser.add_argument(
    "--workdir", metavar="DIR", help="a run folder: its model, adapter, settings and held-out rows"
  )
  parser.add_argument("--model", metavar="NAME_OR_DIR")
  parser.add_argument(
    "--adapter", metavar="DIR[,DIR...]", help="several answer a task together, by majority"
  )
  common.add_use(parser)
  parser.add_argument("--data", metavar="SOURCE", help=f"a built-in task, {common.SOURCE}")
  common.add_columns(parser)
  parser.add_argument("--limit", type=int, default=0, help="examples, drawn; 0 for all")
  parser.add_argument(
    "--best_of", type=int, default=0, metavar="N", help="draw N answers, keep what --reward likes"
  )
  parser.add_argument(
    "--reward", metavar="DIR", help="a reward model or its adapter: scores the answers in --data"
  )
  parser.add_argument(
    "--metric",
    metavar="NAME[,NAME...]",
    help="grade the model's answers to the rows: exact, contained, json, number, or a function of yours as"
    " FILE.py:name; default what the run's config says",
  )
  parser.add_argument(
    "--out",
    metavar="FILE.jsonl",
    help="where the rewards of --reward go, or the answers with their grades",
  )
  parser.add_argument("--seed", type=int, default=0, help="of the answers of --best_of")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Prints the results as JSON; a run's folder keeps them as `eval.json`."""
  with progress.phase("starting"):
    common.cache_compilations()
    import rich

    from posttrain_jax.build import data

  columns = common.columns(args)
  with contextlib.nullcontext() if args.config else data.told_of_columns():
    if args.best_of:
      results = _best_of(args)
    elif args.reward:
      results = _rewards(args, columns)
    else:
      results = _results(args, overrides, columns)
  rich.print_json(json.dumps(results))
  return 0


def _results(
  args: argparse.Namespace, overrides: Sequence[str], columns: Mapping[str, Any]
) -> dict[str, Any]:
  """What the objective says of held-out rows, and how good answers to them are."""
  from posttrain_jax.build import evaluation

  if args.out and Path(args.out).exists():
    raise ValueError(f"{args.out} is there already: write another --out, or remove it")
  return evaluation.evaluate(
    config=args.config,
    overrides=overrides,
    workdir=args.workdir,
    model=args.model,
    adapter=args.adapter,
    data=args.data,
    columns=columns,
    limit=args.limit,
    base=args.base,
    template=args.template,
    metric=args.metric,
    out=args.out,
  )


def _best_of(args: argparse.Namespace) -> dict[str, Any]:
  """How often the answer is right that a reward model likes best of several."""
  from posttrain_jax.build import scoring, use
  from posttrain_jax.evals import judge

  if not ((args.model or args.adapter) and args.data and args.reward):
    raise ValueError("--best_of=N takes --model, --data (a built-in task) and --reward")
  if args.columns:
    raise ValueError(
      f"--columns={args.columns[0]} names a column of rows; --best_of=N asks a built-in task"
    )
  judge.check_best_of(args.data, args.best_of, args.seed)
  liked = scoring.judge(args.reward)  # before the long part
  used = use.load(args.model, args.adapter, base=args.base, template=args.template)
  return judge.best_of(
    liked,
    use.writer(used),
    task=args.data,
    samples=args.best_of,
    limit=args.limit,
    seed=args.seed,
  )


def _rewards(args: argparse.Namespace, columns: Mapping[str, Any]) -> dict[str, Any]:
  """Writes the rewards of every row of a file, JSONL, and says how many pairs or labels they agree with.

  A row gives `reward`, `chosen` and `rejected`, `rewards` of a group's answers, or `steps`.
  """
  from posttrain_jax.build import scoring
  from posttrain_jax.core import files
  from posttrain_jax.evals import judge

  if not args.data or args.model or args.adapter or args.workdir or args.config:
    raise ValueError("--reward=DIR takes --data (a file of answers), or --best_of with --model")
  if args.out is not None and Path(args.out).exists():
    raise ValueError(f"{args.out} is there already: write another --out, or remove it")
  liked = scoring.judge(args.reward, base=args.base, template=args.template)
  lines, summary = judge.score(liked, args.data, args.limit, columns)
  text = "".join(json.dumps(line) + "\n" for line in lines)
  if args.out is None:
    print(text, end="")
    return summary
  files.write_text(Path(args.out), text)
  return {**summary, "written": args.out}
