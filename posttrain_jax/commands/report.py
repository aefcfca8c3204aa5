"""`posttrain report`: the page of a run, or of several on each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "runs", nargs="+", metavar="RUN", help="a run's folder, or a sweep's: all of its points"
  )
  parser.add_argument(
    "--out",
    metavar="FILE.html",
    help="a page of all runs: curves on each other, settings that differ, answers side by side; without it, the run's"
    " own report.html is written anew",
  )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  from posttrain_jax.evals import compare, report

  runs = compare.read(args.runs)
  if args.out is None and len(runs) > 1:
    raise ValueError(f"{len(runs)} runs are compared on one page: write --out=compare.html")
  page = report.write(runs[0].folder) if args.out is None else compare.write(runs, args.out)
  print(f"report: {page}")
  return 0
