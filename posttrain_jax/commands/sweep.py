"""`posttrain sweep`: every point of a config's sweep()."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from posttrain_jax.commands import common


def add(parser: argparse.ArgumentParser) -> None:
  common.add_config(parser)
  parser.add_argument("--workdir", metavar="DIR", help="the folder of all points, a run each")
  parser.add_argument("--jobs", type=int, default=1, help="points at the same time")
  parser.add_argument(
    "--metric",
    metavar="NAME",
    help="what the summary compares; default accuracy or loss, of online runs pass@1 or the reward",
  )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  from posttrain_jax import settings

  if not args.workdir:
    raise settings.ConfigError("--workdir=DIR is needed: the folder of all points, a run each")
  from posttrain_jax.build import sweep

  return sweep.run(
    args.config, args.workdir, overrides=overrides, jobs=args.jobs, metric=args.metric
  )
