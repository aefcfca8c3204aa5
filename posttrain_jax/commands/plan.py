"""`posttrain plan`: will it fit: compile without weights or device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from posttrain_jax.commands import common
from posttrain_jax.core import progress


def add(parser: argparse.ArgumentParser) -> None:
  common.add_config(parser)
  parser.add_argument(
    "--topology",
    metavar="NAME",
    help="TPUs such as v5p:2x2x1, hosts x GPUs such as h100:1x8, or cpu:8; default this machine",
  )
  parser.add_argument("--devices", type=int, help="how many of its devices; default all")
  parser.add_argument(
    "--slices", type=int, default=1, help="as many such topologies, joined by a network"
  )
  parser.add_argument(
    "--search", action="store_true", help="the largest batch that fits with each model.remat"
  )
  parser.add_argument("--json", metavar="FILE", help="write the figures there too")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """0: it fits, or nothing is known of the device's memory.  1: it does not."""
  from posttrain_jax import settings
  from posttrain_jax.build import earlier_adapter
  from posttrain_jax.core import files

  with progress.phase("starting"):
    from posttrain_jax.plan import estimate, program, report

  if args.json is not None:
    files.check_writable(args.json)  # now, and not after minutes of compiling
  config, given = settings.load(args.config, overrides), settings.given(overrides)
  settings.fields.check(settings.plain(config), given)
  config, notes = earlier_adapter.settled(config, given, shape=program.shape)
  for note in notes:
    print(note)
  if args.search:
    return _search(config, args)
  with progress.phase("compiling"):
    figures = estimate.figures(
      config, topology=args.topology, devices=args.devices, slices=args.slices
    )
  print(report.written(figures))
  if args.json is not None:
    files.write_json(args.json, figures)
  return 1 if figures["fits"] is False else 0


def _search(config, args: argparse.Namespace) -> int:
  """0: something fits."""
  from posttrain_jax.core import files
  from posttrain_jax.plan import search
  from posttrain_jax.plan.topology import target

  tell = lambda line: print(line, file=sys.stderr, flush=True)
  with progress.phase("compiling"):
    tried = search.search(config, target(args.topology, args.devices, args.slices), tell)
  print(search.written(config, tried))
  if args.json is not None:
    files.write_json(args.json, tried)
  return 0 if tried else 1
