"""`posttrain export`: a run's adapter, or the merged model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, metavar="DIR")
  parser.add_argument("--out", required=True, metavar="DIR")
  parser.add_argument(
    "--merge", action="store_true", help="a merged Hugging Face folder instead of the adapter"
  )
  parser.add_argument(
    "--merge_base",
    choices=("original", "dequantised"),
    default="original",
    help="what an adapter of a quantised run is merged into; the logit error of both is printed",
  )
  parser.add_argument(
    "--keep_base",
    action="store_true",
    help="two folders, base/ as it was stored in training and adapter/ for it: together what was trained, to the bit",
  )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  from posttrain_jax.build import export

  out = export.export(
    args.workdir,
    args.out,
    merge=args.merge,
    merge_base=args.merge_base,
    keep_base=args.keep_base,
  )
  print(out)
  return 0
