"""What several verbs share: the option that names a config, and the cache of compiled programs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from posttrain_jax import settings


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
  """The option that names a config, and `--print_config`; with a config, `--help` lists its fields."""
  parser.add_argument(
    "--config",
    required=required,
    metavar="FILE[:arg=value,...]",
    help="a config file, or one that comes with posttrain:"
    f" {', '.join(settings.shipped_names())}; --config.field=value after it changes a field",
  )
  parser.add_argument(
    "--print_config",
    action="store_true",
    help="print the config with all its fields as JSON, and stop",
  )
  parser.epilog = f"{parser.prog} --config=FILE --help lists every field of that config."


def asks_for_fields(argv: Sequence[str]) -> str:
  """The config whose fields `--help` is to list; "" where help is not asked for, or of no config."""
  if argv[:1] == ["chain"]:  # whose file names a config for each stage
    return ""
  asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  asked.add_argument("--config", nargs="?", default="", const="")
  asked.add_argument("-h", "--help", action="store_true")
  asked.add_argument("--print_config", action="store_true")
  found, _ = asked.parse_known_args(argv)
  return found.config if found.help else ""


def print_config(config: str | None, overrides: Sequence[str]) -> int:
  """Prints what a config with its arguments and overrides is: JSON that `--config=FILE.json` reads."""
  if config is None:
    raise settings.ConfigError("--print_config needs --config=FILE")
  resolved = settings.plain(settings.load(config, overrides))
  settings.fields.check(resolved, settings.given(overrides))
  print(json.dumps(resolved, indent=2))
  return 0


SOURCE = "a data file, or a hub dataset (owner/name[:config][#split])"


def add_use(parser: argparse.ArgumentParser) -> None:
  """How a model is used, where that is not as it was trained."""
  parser.add_argument(
    "--base",
    choices=("dense", "nf4", "fp4", "int8"),
    help="how the base's matrices are stored; default as when the adapter was trained",
  )
  parser.add_argument(
    "--template",
    metavar="NAME",
    help="a chat template, tokenizer for the tokenizer's own, none for plain text; default what was trained with",
  )


def add_drawing(parser: argparse.ArgumentParser, *, temperature: float) -> None:
  """How tokens are drawn and when a text ends; `drawing` checks it."""
  parser.add_argument(
    "--temperature",
    type=float,
    default=temperature,
    help="0: always the likeliest token; else from 0.001 to 1000",
  )
  parser.add_argument(
    "--top_p", type=float, default=1.0, help="share of the probability; 1 for all"
  )
  parser.add_argument("--top_k", type=int, default=0, help="most likely tokens; 0 for all")
  parser.add_argument(
    "--min_p", type=float, default=0.0, help="least share of the likeliest token's; 0 for all"
  )
  parser.add_argument(
    "--repetition_penalty", type=float, default=1.0, help="of what the text holds; 1 for none"
  )
  parser.add_argument(
    "--stop",
    action="append",
    default=[],
    metavar="TEXT",
    help="an answer ends with the token by which it holds this; once more for another",
  )
  parser.add_argument(
    "--min_new_tokens", type=int, default=0, help="before an answer may end of its own"
  )


def drawing(args: argparse.Namespace) -> dict[str, Any]:
  """sampling, stop_strings and min_new_tokens, as `use.speaker` and `sampling.Wanted` take them.

  Raises:
    ValueError: a value is outside its range.
  """
  from posttrain_jax.rollout.sampling import Sampling

  least, most = args.min_new_tokens, args.max_new_tokens
  if least < 0 or (most and least > most):
    raise ValueError(f"--min_new_tokens={least}: from 0 to --max_new_tokens={most}")
  how = (args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
  return dict(sampling=Sampling(*how), stop_strings=tuple(args.stop), min_new_tokens=least)


def add_storage(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--storage",
    default="auto",
    choices=("auto", "bfloat16", "int8"),
    help="how weights are kept while it writes: auto (as the model has them), bfloat16, or int8, the fastest on a CPU"
    " of float32 products and off by a KL of about 0.007 nats a token",
  )


def add_reward(parser: argparse.ArgumentParser) -> None:
  """What scores answers, where no config says so."""
  parser.add_argument(
    "--reward",
    default="",
    metavar="NAME[,NAME...]",
    help="verifiers whose scores are added: number, exact, python, ..., a function of yours as FILE.py:name, a reward"
    " model's folder; or a FILE.json with the fields of a config's section reward",
  )
  parser.add_argument(
    "--gate", default="", metavar="NAME[,NAME...]", help="verifiers that multiply the sum, as tags"
  )
  parser.add_argument(
    "--untested",
    default="",
    metavar="NAME[,NAME...]",
    help="verifiers of yours that do not ask whether an answer is right, as of style: no row tries them",
  )
  parser.add_argument(
    "--unsafe_code",
    action="store_true",
    help="run programs that the model wrote where nothing isolates them",
  )


def add_columns(parser: argparse.ArgumentParser) -> None:
  """What columns of --data mean, where no config says so."""
  parser.add_argument(
    "--columns",
    action="append",
    default=[],
    metavar="prompt=NAME",
    help="which column of --data is the prompt; once more for others, as completion=NAME",
  )


def columns(args: argparse.Namespace) -> dict[str, Any]:
  """config.data.columns, which --columns writes: `--columns=prompt=question`.

  Raises:
    ConfigError: no field has the name, or there is no --data whose columns they could be.
  """
  if args.columns and not args.data:
    raise settings.ConfigError(
      f"--columns={args.columns[0]} names a column of --data: write --data=SOURCE beside it"
    )
  fields = [f"--config.data.columns.{text}" for text in args.columns]
  named = settings.load("sft:adapter=none", fields).data.columns.to_dict()
  return {name: [*of] if isinstance(of, tuple) else of for name, of in named.items()}


ROOM = 2 * 1024**3  # bytes of compiled programs; a run of SmolLM2 leaves about 10 MB


def cache_compilations() -> None:
  """Compiled programs are kept in the user's cache, so that the second start of a run compiles nothing.

  Small ones too: a hundred of them are seconds.  The environment has the last word, in JAX's own variables.
  """
  import jax

  from posttrain_jax.core import compiled, files
  from posttrain_jax.models import fetch

  if os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS") is None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  if os.environ.get("JAX_COMPILATION_CACHE_DIR") is None:
    folder = fetch.cache() / "compiled"
    files.prune(folder, ROOM)
    compiled.drop_cut(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
