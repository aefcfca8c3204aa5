"""`posttrain chat`: talk to a model; one prompt a line when piped."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any

from posttrain_jax.commands import common
from posttrain_jax.core import ending, progress


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", metavar="NAME_OR_DIR", help="a model, or the folder of a run")
  parser.add_argument("--workdir", metavar="DIR", help="the folder of a run: what it has trained")
  parser.add_argument(
    "--adapter", metavar="DIR", help="alone, it is used on the base that it names"
  )
  common.add_use(parser)
  parser.add_argument(
    "--system",
    metavar="TEXT",
    help="the system message; default what was trained with, '' for none",
  )
  parser.add_argument("--max_new_tokens", type=int, default=256, help="of an answer")
  common.add_drawing(parser, temperature=0.0)
  common.add_storage(parser)


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """0; 1 where a prompt of a pipe could not be answered."""
  if args.workdir and (args.model or args.adapter):
    raise ValueError("--workdir names a run with its model and adapter: leave the others out")
  if sys.stdin.isatty():
    _converse(args)
    return 0
  with progress.muted():  # a pipe is read by programs
    speaker, system = _speaker(args)
  from posttrain_jax.rollout.speaker import answer_lines

  return 1 if answer_lines(speaker, system=system) else 0


def _converse(args: argparse.Namespace) -> None:
  speaker, system = _speaker(args)
  from posttrain_jax.models import fetch
  from posttrain_jax.rollout import conversation, terminal

  history = terminal.history(fetch.cache())
  kept = "" if history is None else str(history)
  with ending.handling(signal.default_int_handler, signal.SIGINT):  # each one ends an answer
    talk = conversation.Conversation(speaker, system, history=kept)
    talk.run(terminal.asker(history))


def _speaker(args: argparse.Namespace) -> tuple[Any, str | None]:
  """(what answers, the system message)"""
  with progress.phase("starting"):
    common.cache_compilations()
    from posttrain_jax.build import use
    from posttrain_jax.runs import manner

  if args.workdir and not manner.is_run(args.workdir):
    raise ValueError(f"{args.workdir} is no run's folder; --model names a model's")
  drawing = common.drawing(args)
  model = args.workdir or args.model
  used = use.load(model, args.adapter, base=args.base, template=args.template)
  return use.speaker(
    used,
    system=args.system,
    **drawing,
    max_new_tokens=args.max_new_tokens,
    storage=args.storage,
  )
