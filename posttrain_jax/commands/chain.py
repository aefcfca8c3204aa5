"""`posttrain chain`: stages that start from one another, in one folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from posttrain_jax import settings
from posttrain_jax.commands import export, pairs, sample, student
from posttrain_jax.core import progress

VERBS = {"sample": sample, "pairs": pairs, "student": student, "export": export}


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE[:argument=value,...]",
    help="a file with stages(arg), as configs/chain.py describes; chain is the one that comes with posttrain",
  )
  parser.add_argument(
    "--workdir", metavar="DIR", help="the folder of all stages; again: what is not finished goes on"
  )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Runs the stages that are not finished.

  Raises:
    ConfigError: as `build.chain.run`.
  """
  if not args.workdir:
    raise settings.ConfigError("--workdir=DIR is needed: the folder of all stages")
  if overrides:
    raise settings.ConfigError(
      f"{overrides[0]}: a chain has a config a stage; write it among the fields of one in the chain's file"
    )
  with progress.phase("starting"):
    from posttrain_jax.build import chain

  def check(stage: chain.Stage) -> None:
    if stage.verb in VERBS:
      parser = _Parser(prog=f"stage {stage.name!r}: posttrain {stage.verb}", add_help=False)
      VERBS[stage.verb].add(parser)
      _check_repeated(parser, stage.line[1:])

  return chain.run(args.config, args.workdir, check=check, say=lambda text: print(text, flush=True))


def _check_repeated(parser: argparse.ArgumentParser, line: Sequence[str]) -> None:
  """Raises ConfigError for a line that its command would refuse, or of which it would read a part."""
  parsed = vars(parser.parse_args(line))
  names = [flag.removeprefix("--").partition("=")[0] for flag in line]
  for name in names:
    if names.count(name) > 1 and not isinstance(parsed[name], list):
      parser.error(f"{name} is a list and takes one value; write a text")


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise settings.ConfigError(f"{self.prog}: {message}")
