"""The `posttrain` command: a verb, and what it takes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from posttrain_jax.commands import (
  chat,
  eval,
  export,
  fetch,
  merge,
  pairs,
  plan,
  report,
  sweep,
  train,
)

EXAMPLES = """\
  posttrain fetch smollm2
  posttrain train --config=configs/sft.py:model=smollm2,data=sql,adapter=lora --workdir=runs/sft
  posttrain train --config=configs/sft.py --config.optimizer.lr=1e-4 --workdir=runs/lr --dry_run
  posttrain chat --model=smollm2 --adapter=runs/sft/adapter
  posttrain report runs/sft --out=compare.html
  posttrain export --workdir=runs/sft --out=merged --merge
"""
# Each has `add(parser)` and `run(args, overrides) -> exit code`, and imports jax in `run` alone: jax.distributed must
# be set up before JAX counts its devices, and `--help` should not take seconds.
COMMANDS: Mapping[str, ModuleType] = {
  "fetch": fetch,
  "train": train,
  "eval": eval,
  "pairs": pairs,
  "chat": chat,
  "export": export,
  "merge": merge,
  "sweep": sweep,
  "plan": plan,
  "report": report,
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.  0: done; 75: preempted, safe to run again; 1 or 2: the user's mistake or a failure."""
  argv = list(sys.argv[1:] if argv is None else argv)
  overrides = [arg for arg in argv if arg.startswith("--config.")]
  args = _parser().parse_args([arg for arg in argv if arg not in overrides])
  if overrides and "config" not in args:
    print(f"posttrain {args.command}: takes no {overrides[0]}", file=sys.stderr)
    return 2
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  logging.getLogger("posttrain_jax").setLevel(logging.INFO)
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that PyTorch is not there
  try:
    return COMMANDS[args.command].run(args, overrides)
  except (ValueError, OSError, KeyError, RuntimeError) as error:
    if os.environ.get("POSTTRAIN_TRACEBACK"):
      raise
    print(f"posttrain {args.command}: {_message(error)}", file=sys.stderr)
    return 1


def _message(error: BaseException) -> str:
  text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
  known = isinstance(error, ValueError | OSError | KeyError)
  return (
    text
    if known and text
    else f"{type(error).__name__}: {text} (POSTTRAIN_TRACEBACK=1 shows where)"
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="posttrain",
    description=__doc__,
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for name, module in COMMANDS.items():
    summary = (module.__doc__ or "").partition(": ")[2].strip().rstrip(".")
    module.add(verbs.add_parser(name, help=summary, allow_abbrev=False))
  return parser


if __name__ == "__main__":
  sys.exit(main())
