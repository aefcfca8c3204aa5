"""`posttrain serve`: a base and many adapters over HTTP, to whoever speaks OpenAI's protocol."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from posttrain_jax.commands import common
from posttrain_jax.settings import ConfigError

KEY = "POSTTRAIN_API_KEY"  # in the environment: requests need it


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--model", metavar="NAME_OR_DIR", help="the base; default that of --workdir")
  parser.add_argument("--workdir", metavar="DIR", help="the folder of a run: its base and adapter")
  parser.add_argument(
    "--adapters",
    metavar="DIR",
    help="a folder of adapters or runs: each is served under its folder's name, read when it is first asked for",
  )
  parser.add_argument(
    "--adapter",
    action="append",
    default=[],
    metavar="NAME=DIR",
    help="an adapter under a name, read at the start; once more for another",
  )
  parser.add_argument("--name", metavar="NAME", help="of the base in requests; default as --model")
  parser.add_argument("--host", default="127.0.0.1", help="the address; default this machine alone")
  parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
  parser.add_argument(
    "--api_key_file",
    metavar="FILE",
    help=f"a key a line, one of which requests must have; or a key in the environment, {KEY}",
  )
  parser.add_argument(
    "--without_key",
    action="store_true",
    help="serve other machines without a key, where something else decides who may ask",
  )
  parser.add_argument(
    "--allow_loading",
    action="store_true",
    help="requests may load and unload adapters (/v1/load_lora_adapter), from --adapters alone",
  )
  parser.add_argument("--rows", type=int, default=8, help="answers that are written at once")
  parser.add_argument("--slots", type=int, default=8, help="adapters on the device at once")
  parser.add_argument(
    "--max_rank", type=int, help="of an adapter; default 16, or the largest at the start"
  )
  for kind in ("prompt", "prefix"):
    parser.add_argument(
      f"--{kind}_slots",
      type=int,
      metavar="N",
      help=f"virtual tokens of an adapter by {kind} tuning; default the most at the start",
    )
  parser.add_argument(
    "--length",
    type=int,
    default=2048,
    help="tokens of a prompt and its answer, at most those of the model",
  )
  parser.add_argument(
    "--waiting", type=int, default=256, help="answers that may wait for a row; more are told 429"
  )
  parser.add_argument("--prefix_cache", type=int, default=256, metavar="MIB", help="0 for none")
  parser.add_argument(
    "--drain",
    type=float,
    default=30.0,
    metavar="SECONDS",
    help="for answers under way after SIGTERM; then they are cut",
  )
  parser.add_argument(
    "--dtype",
    choices=("auto", "float32", "bfloat16"),
    help="of products; auto is bfloat16 where the device multiplies in it, default as the base was trained",
  )
  parser.add_argument(
    "--mesh",
    default="",
    metavar="AXIS=N[,AXIS=N...]",
    help="devices along data (rows), tensor (matrices and heads), expert and fsdp; -1: all that are left; default one",
  )
  common.add_storage(parser)
  common.add_use(parser)


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  """0 after SIGTERM or Ctrl-C; 1 where it could not go on."""
  missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if not _is_there(name)]
  if missing:
    raise ConfigError(f"{missing[0]} is not installed: pip install 'posttrain-jax[serve]'")
  for name, low, high in (("port", 0, 65535), ("rows", 1, 4096), ("slots", 0, 4096),
                          ("waiting", 0, 10**6), ("prefix_cache", 0, 10**6), ("drain", 0, 10**6)):  # fmt: skip
    if not low <= getattr(args, name) <= high:
      raise ConfigError(f"--{name}={getattr(args, name)}: write a number from {low} to {high}")
  keys = _keys(args)
  _check_host(args, keys)
  named = dict(_named(text) for text in args.adapter)
  common.cache_compilations()
  from posttrain_jax.serve import start

  return start.serve(args, keys=keys, named=named)


def _is_there(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
  """Of the file and the environment.

  Raises:
    ConfigError: one is too short to withstand guessing, or the file holds none.
  """
  keys = []
  if args.api_key_file:
    path = Path(args.api_key_file).expanduser()
    keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not keys:
      raise ConfigError(f"--api_key_file={path} holds no key")
  if key := os.environ.get(KEY, "").strip():
    keys.append(key)
  if short := [key for key in keys if len(key) < 16 or not key.isascii()]:
    raise ConfigError(
      f"a key of {len(short[0])} characters: write at least 16 of ASCII, as `openssl rand -hex 24` makes them"
    )
  return tuple(keys)


def _check_host(args: argparse.Namespace, keys: tuple[str, ...]) -> None:
  if not is_loopback(args.host) and not keys and not args.without_key:
    raise ConfigError(
      f"--host={args.host} serves other machines, and nobody needs a key: write --api_key_file=FILE, or --without_key"
      " where something else decides who may ask"
    )


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach an address.

  >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
  (True, True, False)
  """
  import ipaddress

  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _named(text: str) -> tuple[str, str]:
  name, equals, path = text.partition("=")
  if not equals or not name or not path:
    raise ConfigError(f"--adapter={text}: write --adapter=NAME=DIR")
  return name, path
