"""`posttrain regress`: what a fine-tune forgot; exit 1 on a drop."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from posttrain_jax.commands import common
from posttrain_jax.core import progress


def add(parser: argparse.ArgumentParser) -> None:
  side = "a model, a run's folder, MODEL+ADAPTER, an adapter's folder, or a measurement (.jsonl) that was kept"
  parser.add_argument(
    "--before",
    default="",
    metavar="SIDE",
    help=f"{side}; without it, what the run --after began with",
  )
  parser.add_argument(
    "--after",
    action="append",
    default=[],
    metavar="SIDE",
    help="the same; once more for each later stage, the last one of which is judged",
  )
  parser.add_argument(
    "--suite",
    default="core",
    metavar="NAME[,NAME...]",
    help="what is asked: core (comes with posttrain), a folder with suite.json, or FORM:FILE of gsm8k, humaneval,"
    " choice, text; default %(default)s",
  )
  parser.add_argument(
    "--out",
    default="",
    metavar="DIR",
    help="measurements, regress.json and regress.html; default regress/ in the run --after",
  )
  common.add_use(parser)
  parser.add_argument(
    "--trained",
    default="",
    metavar="SOURCE",
    help="rows of what was trained for, whose gain is told; default those that the run held out",
  )
  parser.add_argument("--limit", type=int, default=0, help="rows of each part, drawn; 0 for all")
  parser.add_argument(
    "--strict", action="store_true", help="exit 1 where a part cannot be told, too"
  )
  parser.add_argument("--seed", type=int, default=0, help="of answers that are drawn")
  parser.add_argument("--batch_size", type=int, default=16, help="answers written at once")
  parser.add_argument(
    "--unsafe_code",
    action="store_true",
    help="run programs that the model wrote where nothing isolates them",
  )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """0: nothing dropped that could be told.  1: a part dropped, or (--strict) cannot be told."""
  with progress.phase("starting"):
    common.cache_compilations()
    import rich

    from posttrain_jax.build import regress
    from posttrain_jax.evals import gate

  found = regress.run(
    regress.Wanted(
      before=args.before,
      after=args.after,
      suite=args.suite,
      out=args.out,
      template=args.template,
      base=args.base,
      limit=args.limit,
      trained=args.trained,
      seed=args.seed,
      rows=args.batch_size,
      unsafe_code=args.unsafe_code,
    )
  )
  rich.print(gate.table(found.comparison))
  for sentence in gate.sentences(found.comparison):
    print(sentence)
  if found.page is not None:
    print(f"page: {found.page}")
  undecided = args.strict and found.comparison.unknown
  return 1 if found.comparison.dropped or undecided else 0
