"""`posttrain student`: a model of some of another's layers, to be distilled into."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from posttrain_jax import settings
from posttrain_jax.core import progress


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--model", required=True, metavar="NAME_OR_DIR", help="a model, or the folder of a run"
  )
  parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
  parser.add_argument(
    "--layers", type=int, default=0, metavar="N", help="so many, evenly spread, first and last too"
  )
  parser.add_argument("--keep", default="", metavar="I,J,...", help="these layers, counted from 0")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  try:
    kept = [int(part) for part in args.keep.split(",") if part]
  except ValueError:
    raise settings.ConfigError(
      f"--keep={args.keep}: write numbers of layers with commas between, as 0,2,4"
    ) from None
  with progress.phase("starting"):
    from posttrain_jax.build import student

  print(f"{student.write(args.model, args.out, count=args.layers, kept=kept)}\nwritten: {args.out}")
  return 0
