"""`posttrain pairs`: preference pairs out of a model's own right and wrong answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from posttrain_jax.commands import common
from posttrain_jax.core import progress


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", metavar="NAME_OR_DIR", help="a model, or the folder of a run")
  parser.add_argument("--adapter", metavar="DIR")
  common.add_use(parser)
  parser.add_argument("--task", default="sql", help="a built-in task; its training questions")
  parser.add_argument("--out", required=True, metavar="FILE.jsonl")
  parser.add_argument("--limit", type=int, default=256, help="questions; 0 for all")
  parser.add_argument("--samples", type=int, default=4, help="answers to each")
  parser.add_argument("--temperature", type=float, default=0.8)
  parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Writes preference pairs, JSONL, out of the model's own answers to a task's training questions.

  Raises:
    ConfigError: the file is there already, or every answer was right.
  """
  with progress.phase("starting"):
    common.cache_compilations()
    from posttrain_jax.build import use
    from posttrain_jax.core import files
    from posttrain_jax.evals import pairs
    from posttrain_jax.settings import ConfigError

  path = Path(args.out)
  if path.exists():
    raise ConfigError(f"{path} is there already: write another --out, or remove it")
  used = use.load(args.model, args.adapter, base=args.base, template=args.template)
  with progress.counter("answering") as count:
    drawn = pairs.make(
      used.written,
      used.config,
      used.tokenizer,
      task=args.task,
      limit=args.limit or None,
      samples=args.samples,
      temperature=args.temperature,
      seed=args.seed,
      template=used.template,
      dtype=used.dtype,
      progress=count,
    )
  if not drawn.rows:
    raise ConfigError(
      f"all {args.samples} answers to each of {drawn.questions} questions were right: there is no pair; raise"
      " --temperature or --samples"
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in drawn.rows))
  print(f"{drawn}; written: {path}")
  return 0
