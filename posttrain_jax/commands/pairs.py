"""`posttrain pairs`: preference pairs out of a model's own right and wrong answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from posttrain_jax.commands import sample

PAIRS = "pairs"  # the rule of `evals.keeping`
TASK = "sql"


def add(parser: argparse.ArgumentParser) -> None:
  sample.add_answers(parser, samples=4, limit=256, temperature=0.8, task=TASK)


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """`posttrain sample --keep=pairs`, with fewer answers to fewer prompts unless it is told otherwise."""
  args.task = args.task or ("" if args.data else TASK)
  return sample.write(args, PAIRS)
