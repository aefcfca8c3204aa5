"""`posttrain export`: a run's adapter, or the merged model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from posttrain_jax.core import progress


def add(parser: argparse.ArgumentParser) -> None:
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--workdir", metavar="DIR", help="a run's folder")
  what.add_argument(
    "--model", metavar="NAME_OR_DIR", help="a model as it is, with --gguf: the base of an adapter"
  )
  parser.add_argument(
    "--out", required=True, metavar="DIR", help="a new folder; FILE.gguf with --gguf"
  )
  parser.add_argument(
    "--merge", action="store_true", help="a merged Hugging Face folder instead of the adapter"
  )
  parser.add_argument(
    "--merge_base",
    choices=("original", "dequantised"),
    default="original",
    help="what an adapter of a quantised run is merged into; the logit error of both is printed",
  )
  parser.add_argument(
    "--keep_base",
    action="store_true",
    help="two folders, base/ as it was stored in training and adapter/ for it: together what was trained, to the bit",
  )
  parser.add_argument(
    "--push",
    metavar="ORG/NAME",
    help="send the result to the Hugging Face hub, too; a new repository is private",
  )
  parser.add_argument(
    "--gguf",
    choices=("f16", "q8_0", "q4_0"),
    help="one file for llama.cpp and Ollama instead of a folder: the adapter in f16, or with --merge the whole model",
  )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  with progress.phase("starting"):
    from posttrain_jax.build import push

  if args.model is not None and args.gguf is None:
    raise ValueError(
      f"--model={args.model} is a folder already; --model goes with --gguf, and --workdir names a run"
    )
  if args.push is not None:
    push.check(args.push)
  with progress.phase("merging" if args.merge else "writing"):
    out = _exported(args)
  print(out)
  if args.push is not None:
    print(push.push(out, args.push))
  return 0


def _exported(args: argparse.Namespace) -> Path:
  from posttrain_jax.build import export, gguf, model_card

  if args.model is not None:
    return gguf.of_model(args.model, args.out, kind=args.gguf, base=args.model)
  options = dict(merge=args.merge, merge_base=args.merge_base)
  if args.gguf is not None:
    if args.keep_base:
      raise ValueError("--keep_base writes two folders; leave --gguf out, or --keep_base")
    return gguf.export(args.workdir, args.out, kind=args.gguf, **options)
  name = args.push or model_card.HERE
  return export.export(args.workdir, args.out, name=name, keep_base=args.keep_base, **options)
