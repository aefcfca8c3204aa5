"""`posttrain chat`: talk to a model; one prompt a line when piped."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from posttrain_jax.commands import common


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", metavar="NAME_OR_DIR", help="a model, or the folder of a run")
  parser.add_argument(
    "--adapter", metavar="DIR", help="alone, it is used on the base that it names"
  )
  common.add_use(parser)
  parser.add_argument(
    "--system",
    metavar="TEXT",
    help="the system message; default what was trained with, '' for none",
  )
  parser.add_argument("--max_new_tokens", type=int, default=256)
  parser.add_argument(
    "--temperature", type=float, default=0.0, help="0: always the likeliest token"
  )
  parser.add_argument("--top_p", type=float, default=1.0)


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """0; 1 where a prompt of a pipe could not be answered; 130 at Ctrl-C before there is a prompt to answer."""
  try:
    return _chat(args)
  except KeyboardInterrupt:
    return 130


def _chat(args: argparse.Namespace) -> int:
  common.cache_compilations()
  from posttrain_jax.build import use
  from posttrain_jax.rollout import chat
  from posttrain_jax.rollout.sampling import Sampling

  sampling = Sampling(args.temperature, top_p=args.top_p)
  used = use.load(args.model, args.adapter, base=args.base, template=args.template)
  speaker, system = use.speaker(
    used, system=args.system, sampling=sampling, max_new_tokens=args.max_new_tokens
  )
  return 1 if chat.chat(speaker, system=system) else 0
