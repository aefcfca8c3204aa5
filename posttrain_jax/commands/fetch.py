"""`posttrain fetch`: a built-in model into the user's cache."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("name", nargs="?", default="smollm2")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  from posttrain_jax.models import fetch

  print(fetch.fetch(args.name))
  return 0
