"""`posttrain chat`: talk to a model; one prompt a line when piped."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from posttrain_jax.commands import common


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", required=True, metavar="NAME_OR_DIR")
  parser.add_argument("--adapter", metavar="DIR")
  parser.add_argument("--system", metavar="TEXT", help="the system message")
  parser.add_argument(
    "--template", metavar="NAME", help="a chat template; default the adapter's or tokenizer's own"
  )
  parser.add_argument("--max_new_tokens", type=int, default=256)
  parser.add_argument(
    "--temperature", type=float, default=0.0, help="0: always the likeliest token"
  )
  parser.add_argument("--top_p", type=float, default=1.0)


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  common.cache_compilations()
  from posttrain_jax.rollout import chat

  chat.chat(
    args.model,
    args.adapter,
    system=args.system,
    template=args.template,
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    top_p=args.top_p,
  )
  return 0
