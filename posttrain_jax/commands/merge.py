"""`posttrain merge`: several models in one, as a recipe says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from posttrain_jax.commands import common
from posttrain_jax.core import pages, progress


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--recipe",
    required=True,
    metavar="FILE",
    help="mergekit's YAML, or a config file with its fields",
  )
  parser.add_argument("--out", required=True, metavar="DIR", help="a new Hugging Face folder")
  parser.add_argument(
    "--evaluate",
    default="",
    metavar="SOURCE[,SOURCE...]",
    help="tasks and data files on which the models and the merge are scored",
  )
  parser.add_argument(
    "--workers", type=int, default=1, metavar="N", help="tensors computed at once (1)"
  )
  parser.add_argument("--limit", type=int, default=0, help="examples of each; 0 for all")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  with progress.phase("starting"):
    common.cache_compilations()
    pages.keep_freed()
    from posttrain_jax.build import merge

  out = merge.merge(
    args.recipe, args.out, workers=args.workers, evaluate=args.evaluate, limit=args.limit
  )
  print(out)
  return 0
