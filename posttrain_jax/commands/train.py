"""`posttrain train`: train as a config file says."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Generator, Sequence

import ml_collections

from posttrain_jax import settings
from posttrain_jax.commands import common
from posttrain_jax.core import progress
from posttrain_jax.core.started import Started


def add(parser: argparse.ArgumentParser) -> None:
  common.add_config(parser)
  parser.add_argument(
    "--workdir", metavar="DIR", help="the folder that becomes the run; again: continue it"
  )
  parser.add_argument("--dry_run", action="store_true", help="say what would run, and stop")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  started = Started()
  # what is misspelt is said before what takes seconds to import
  if not args.workdir and not args.dry_run:
    raise settings.ConfigError("--workdir=DIR is needed: the folder that becomes the run")
  config = settings.load(args.config, overrides)
  settings.fields.check(settings.plain(config), settings.given(overrides))
  with _said("starting"):
    from posttrain_jax.train import signals

  with signals.exiting():  # from here on: several processes wait for each other to join
    return _run(args, config, settings.given(overrides), started)


@contextlib.contextmanager
def _said(doing: str) -> Generator[None]:
  """A phase, told by the first process of several."""
  is_first = os.environ.get("POSTTRAIN_PROCESS_ID", "0") == "0"
  told = contextlib.nullcontext() if is_first else progress.muted()
  with told, progress.phase(doing, stream=sys.stdout):
    yield


def _run(
  args: argparse.Namespace,
  config: ml_collections.ConfigDict,
  given: Sequence[str],
  started: Started,
) -> int:
  from posttrain_jax.core import distributed, watch

  distributed.initialize()
  common.cache_compilations()
  with watch.kept():
    with _said("loading the trainer"):
      from posttrain_jax.build import run as runs

    started.ends("imports")
    return runs.train(
      config, args.workdir or "", dry_run=args.dry_run, given=given, started=started
    )
