"""`posttrain sweep`: every point of a config's sweep()."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from posttrain_jax.commands import common


def add(parser: argparse.ArgumentParser) -> None:
  common.add_config(parser)
  parser.add_argument("--workdir", metavar="DIR", help="the folder of all points, a run each")
  parser.add_argument(
    "--jobs", type=int, default=1, help="points at the same time; 0: sum up what there is"
  )
  parser.add_argument(
    "--metric",
    metavar="NAME",
    help="what the summary compares; default accuracy or loss, of online runs pass@1 or the reward",
  )
  parser.add_argument(
    "--search",
    action="store_true",
    help="points that Optuna draws from the config's search(), by --metric",
  )
  parser.add_argument("--trials", type=int, help="points of a search, over all calls; default 20")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  from posttrain_jax import settings

  if not args.workdir:
    raise settings.ConfigError("--workdir=DIR is needed: the folder of all points, a run each")
  if args.search:
    return _search(args, overrides)
  if args.trials is not None:
    raise settings.ConfigError("--trials is of a search: write --search beside it")
  from posttrain_jax.build import sweep

  return sweep.run(
    args.config, args.workdir, overrides=overrides, jobs=args.jobs, metric=args.metric
  )


def _search(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  from posttrain_jax import settings

  if not args.metric:
    raise settings.ConfigError(
      "--search needs --metric=NAME: what is searched for, as in --metric=eval_loss"
    )
  from posttrain_jax.build import search

  return search.run(
    args.config,
    args.workdir,
    trials=20 if args.trials is None else args.trials,
    metric=args.metric,
    overrides=overrides,
    jobs=args.jobs,
  )
