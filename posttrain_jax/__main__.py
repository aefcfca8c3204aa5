"""The `posttrain` command: train, eval, pairs, chat, export, merge, sweep, plan, fetch."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

EXAMPLES = """\
  posttrain fetch smollm2
  posttrain train --config=configs/sft.py:model=smollm2,data=sql,adapter=lora --workdir=runs/sft
  posttrain train --config=configs/sft.py --config.optimizer.lr=1e-4 --workdir=runs/lr --dry_run
  posttrain chat --model=smollm2 --adapter=runs/sft/adapter
  posttrain export --workdir=runs/sft --out=merged --merge
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.  0: done; 75: preempted, safe to run again; 1 or 2: the user's mistake or a failure."""
  argv = list(sys.argv[1:] if argv is None else argv)
  overrides = [arg for arg in argv if arg.startswith("--config.")]
  args = _parser().parse_args([arg for arg in argv if arg not in overrides])
  if overrides and not hasattr(args, "config"):
    print(f"posttrain {args.command}: takes no {overrides[0]}", file=sys.stderr)
    return 2
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  logging.getLogger("posttrain_jax").setLevel(logging.INFO)
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that PyTorch is not there
  try:
    return COMMANDS[args.command](args, overrides) or 0
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


# Imports wait until a command needs them: jax.distributed must be set up before JAX counts its devices, and `--help`
# should not take seconds.


def _fetch(args, _):
  from posttrain_jax.models import fetch

  print(fetch.fetch(args.name))


def _train(args, overrides):
  from posttrain_jax.train import distributed

  distributed.initialize()
  _cache_compilations()
  from posttrain_jax.train import run, settings

  if not args.workdir and not args.dry_run:
    raise settings.ConfigError("--workdir=DIR is needed: the folder that becomes the run")
  return run.train(settings.load(args.config, overrides), args.workdir or "", dry_run=args.dry_run)


def _sweep(args, overrides):
  from posttrain_jax.train import sweep

  return sweep.run(
    args.config, args.workdir, overrides=overrides, jobs=args.jobs, metric=args.metric
  )


def _export(args, _):
  from posttrain_jax.train import export

  print(export.export(args.workdir, args.out, merge=args.merge, merge_base=args.merge_base))


def _merge(args, _):
  _cache_compilations()
  from posttrain_jax.train import merging

  out = merging.merge(
    args.recipe, args.out, workers=args.workers, evaluate=args.evaluate, limit=args.limit
  )
  print(out)


def _chat(args, _):
  _cache_compilations()
  from posttrain_jax.rollout import chat

  return chat.chat(
    args.model,
    args.adapter,
    system=args.system,
    template=args.template,
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    top_p=args.top_p,
  )


def _eval(args, overrides):
  _cache_compilations()
  from posttrain_jax.train import evaluate, judge

  if args.best_of:
    if not (args.model and args.data and args.reward):
      raise ValueError("--best_of=N takes --model, --data (a built-in task) and --reward")
    return judge.best_of(
      model=args.model,
      adapter=args.adapter,
      task=args.data,
      reward=args.reward,
      samples=args.best_of,
      limit=args.limit,
      seed=args.seed,
    )
  if args.reward:
    if not args.data or args.model or args.workdir or args.config:
      raise ValueError("--reward=DIR takes --data (a file of answers), or --best_of with --model")
    return judge.score(reward=args.reward, data=args.data, out=args.out, limit=args.limit)
  if args.out:
    raise ValueError("--out goes with --reward: where the rewards are written")
  return evaluate.evaluate(
    config=args.config,
    overrides=overrides,
    workdir=args.workdir,
    model=args.model,
    adapter=args.adapter,
    data=args.data,
    limit=args.limit,
  )


def _pairs(args, _):
  _cache_compilations()
  from posttrain_jax.train import evaluate

  return evaluate.pairs(
    model=args.model,
    adapter=args.adapter,
    task=args.task,
    out=args.out,
    limit=args.limit,
    samples=args.samples,
    temperature=args.temperature,
    seed=args.seed,
  )


def _plan(args, overrides):
  from posttrain_jax.plan import estimate

  return estimate.plan(
    args.config, overrides, topology=args.topology, devices=args.devices, json_path=args.json
  )


COMMANDS = {
  "fetch": _fetch,
  "train": _train,
  "eval": _eval,
  "pairs": _pairs,
  "chat": _chat,
  "export": _export,
  "merge": _merge,
  "sweep": _sweep,
  "plan": _plan,
}


def _cache_compilations() -> None:
  """Compiled programs are kept in the user's cache, so that the second start of a run is quick."""
  import jax

  from posttrain_jax.models import fetch

  if os.environ.get("JAX_COMPILATION_CACHE_DIR") is None:
    jax.config.update("jax_compilation_cache_dir", str(fetch.cache() / "compiled"))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="posttrain",
    description=__doc__,
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  fetch = commands.add_parser(
    "fetch", help="a built-in model into the user's cache", allow_abbrev=False
  )
  fetch.add_argument("name", nargs="?", default="smollm2")

  train = commands.add_parser("train", help="train as a config file says", allow_abbrev=False)
  _add_config(train)
  train.add_argument(
    "--workdir", metavar="DIR", help="the folder that becomes the run; again: continue it"
  )
  train.add_argument("--dry_run", action="store_true", help="say what would run, and stop")

  evaluation = commands.add_parser(
    "eval", help="what a model or a run is worth", allow_abbrev=False
  )
  evaluation.add_argument("--config", metavar="FILE[:arg=value,...]")
  evaluation.add_argument(
    "--workdir", metavar="DIR", help="a run folder: its model, adapter and data"
  )
  evaluation.add_argument("--model", metavar="NAME_OR_DIR")
  evaluation.add_argument(
    "--adapter", metavar="DIR[,DIR...]", help="several answer a task together, by majority"
  )
  evaluation.add_argument("--data", metavar="SOURCE", help="a built-in task or a data file")
  evaluation.add_argument("--limit", type=int, default=0, help="examples; 0 for all")
  evaluation.add_argument(
    "--best_of", type=int, default=0, metavar="N", help="draw N answers, keep what --reward likes"
  )
  evaluation.add_argument(
    "--reward", metavar="DIR", help="a reward model or its adapter: scores the answers in --data"
  )
  evaluation.add_argument("--out", metavar="FILE.jsonl", help="where the rewards of --reward go")
  evaluation.add_argument("--seed", type=int, default=0, help="of the answers of --best_of")

  pairs = commands.add_parser(
    "pairs",
    help="preference pairs out of a model's own right and wrong answers",
    allow_abbrev=False,
  )
  pairs.add_argument("--model", required=True, metavar="NAME_OR_DIR")
  pairs.add_argument("--adapter", metavar="DIR")
  pairs.add_argument("--task", default="sql", help="a built-in task; its training questions")
  pairs.add_argument("--out", required=True, metavar="FILE.jsonl")
  pairs.add_argument("--limit", type=int, default=256, help="questions; 0 for all")
  pairs.add_argument("--samples", type=int, default=4, help="answers to each")
  pairs.add_argument("--temperature", type=float, default=0.8)
  pairs.add_argument("--seed", type=int, default=0)

  chat = commands.add_parser(
    "chat", help="talk to a model; one prompt a line when piped", allow_abbrev=False
  )
  chat.add_argument("--model", required=True, metavar="NAME_OR_DIR")
  chat.add_argument("--adapter", metavar="DIR")
  chat.add_argument("--system", metavar="TEXT", help="the system message")
  chat.add_argument(
    "--template", metavar="NAME", help="a chat template; default the adapter's or tokenizer's own"
  )
  chat.add_argument("--max_new_tokens", type=int, default=256)
  chat.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
  chat.add_argument("--top_p", type=float, default=1.0)

  export = commands.add_parser(
    "export", help="a run's adapter, or the merged model", allow_abbrev=False
  )
  export.add_argument("--workdir", required=True, metavar="DIR")
  export.add_argument("--out", required=True, metavar="DIR")
  export.add_argument(
    "--merge", action="store_true", help="a merged Hugging Face folder instead of the adapter"
  )
  export.add_argument(
    "--merge_base",
    choices=("original", "dequantised"),
    default="original",
    help="what an adapter of a quantised run is merged into; the logit error of both is printed",
  )

  merge = commands.add_parser(
    "merge", help="several models in one, as a recipe says", allow_abbrev=False
  )
  merge.add_argument(
    "--recipe",
    required=True,
    metavar="FILE",
    help="mergekit's YAML, or a config file with its fields",
  )
  merge.add_argument("--out", required=True, metavar="DIR", help="a new Hugging Face folder")
  merge.add_argument(
    "--evaluate",
    default="",
    metavar="SOURCE[,SOURCE...]",
    help="tasks and data files on which the models and the merge are scored",
  )
  merge.add_argument(
    "--workers", type=int, default=1, metavar="N", help="tensors computed at once (1)"
  )
  merge.add_argument("--limit", type=int, default=0, help="examples of each; 0 for all")

  sweep = commands.add_parser("sweep", help="every point of a config's sweep()", allow_abbrev=False)
  _add_config(sweep)
  sweep.add_argument("--workdir", required=True, metavar="DIR")
  sweep.add_argument("--jobs", type=int, default=1, help="points at the same time")
  sweep.add_argument(
    "--metric", metavar="NAME", help="what the summary compares; default accuracy or loss"
  )

  plan = commands.add_parser(
    "plan", help="will it fit: compile without weights or device", allow_abbrev=False
  )
  _add_config(plan)
  plan.add_argument(
    "--topology", metavar="NAME", help="a TPU topology such as v5p:2x2x1; default this machine"
  )
  plan.add_argument("--devices", type=int, help="how many of its chips; default all")
  plan.add_argument("--json", metavar="FILE", help="write the figures there too")
  return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE[:arg=value,...]",
    help="a config file; --config.field=value after it changes a field",
  )


if __name__ == "__main__":
  sys.exit(main())
