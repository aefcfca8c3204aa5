"""`posttrain sample`: a model's answers, scored, the best of them kept to be trained on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from posttrain_jax import settings
from posttrain_jax.commands import common
from posttrain_jax.core import progress

ALL_RIGHT = "all_right"  # the rule of `evals.keeping` by default


def add(parser: argparse.ArgumentParser) -> None:
  add_answers(parser, samples=8, limit=0, temperature=1.0)
  parser.add_argument(
    "--keep",
    default=ALL_RIGHT,
    metavar="RULE",
    help="what of a prompt's answers is kept: all_right (default), best, top:K, above:SCORE, all, or pairs, as"
    " `posttrain pairs` makes them",
  )
  parser.add_argument(
    "--per_prompt", type=int, default=0, metavar="K", help="at most so many of a prompt; 0 for all"
  )


def add_answers(
  parser: argparse.ArgumentParser, *, samples: int, limit: int, temperature: float, task: str = ""
) -> None:
  """Who answers what, how often, and what scores the answers; `task` is asked where nothing else is named."""
  parser.add_argument("--model", metavar="NAME_OR_DIR", help="a model, or the folder of a run")
  parser.add_argument("--adapter", metavar="DIR")
  parser.add_argument(
    "--address",
    metavar="URL",
    help="an OpenAI-compatible API, as far as /v1, whose --model answers in the place of one loaded here",
  )
  parser.add_argument(
    "--key", default="", metavar="NAME", help="the environment variable with the key of --address"
  )
  common.add_use(parser)
  otherwise = f"; without --data {task}" if task else ""
  parser.add_argument(
    "--task", default="", help=f"a built-in task, for its training questions{otherwise}"
  )
  parser.add_argument(
    "--data", default="", metavar="SOURCE", help=f"prompts of yours: {common.SOURCE}"
  )
  common.add_columns(parser)
  common.add_reward(parser)
  parser.add_argument("--out", required=True, metavar="FILE.jsonl")
  parser.add_argument(
    "--n", type=int, default=samples, help="answers to each prompt; default %(default)s"
  )
  parser.add_argument(
    "--right",
    type=float,
    metavar="SCORE",
    help="from which on an answer is right; default the highest score there is, forms and lengths left out",
  )
  parser.add_argument(
    "--limit", type=int, default=limit, help="prompts, drawn; 0 for all; default %(default)s"
  )
  common.add_drawing(parser, temperature=temperature)
  parser.add_argument(
    "--max_new_tokens",
    type=int,
    default=0,
    help="of an answer; 0: what the task needs, or a quarter more than the longest expected answer",
  )
  parser.add_argument("--seed", type=int, default=0)
  common.add_storage(parser)
  parser.add_argument("--batch_size", type=int, default=32, help="answers written at once")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Writes the answers that are kept, JSONL; the same command goes on where it was ended.

  Raises:
    ConfigError, RowError: as `build.sampling.write`.
  """
  return write(args, args.keep, args.per_prompt)


def write(args: argparse.Namespace, keep: str, per_prompt: int = 0) -> int:
  """What `run` does, by a rule."""
  with progress.phase("starting"):
    common.cache_compilations()
    from posttrain_jax.build import sampling, scoring, use
    from posttrain_jax.evals import keeping
    from posttrain_jax.rollout.address import Address

  columns = common.columns(args)
  reward = scoring.spec(
    args.reward, args.gate, untested=args.untested, unsafe_code=args.unsafe_code
  )
  wanted = sampling.Wanted(
    out=Path(args.out),
    task=args.task,
    data=args.data,
    samples=args.n,
    keep=keeping.parse(keep, per_prompt),
    reward=reward,
    columns=columns,
    **common.drawing(args),
    right=args.right,
    max_new_tokens=args.max_new_tokens,
    seed=args.seed,
    rows=args.batch_size,
    storage=args.storage,
    limit=args.limit,
  )
  if args.key and not args.address:
    raise settings.ConfigError(f"--key={args.key} is of an --address; write both, or neither")
  if args.address:
    local = [name for name in ("adapter", "base", "template") if getattr(args, name)]
    if local:
      raise settings.ConfigError(
        f"--{local[0]} is of a model that is loaded here; leave it out with --address"
      )
    there = Address(args.address, args.model or "", args.key)
    load = lambda: there
  else:
    load = lambda: use.load(args.model, args.adapter, base=args.base, template=args.template)
  print(f"{sampling.write(wanted, load)}\nwritten: {args.out}")
  return 0
