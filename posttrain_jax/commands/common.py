"""What several verbs share: the option that names a config, and the cache of compiled programs."""

from __future__ import annotations

import argparse
import os


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
  parser.add_argument(
    "--config",
    required=required,
    metavar="FILE[:arg=value,...]",
    help="a config file; --config.field=value after it changes a field",
  )


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


def cache_compilations() -> None:
  """Compiled programs are kept in the user's cache, so that the second start of a run is quick."""
  import jax

  from posttrain_jax.models import fetch

  if os.environ.get("JAX_COMPILATION_CACHE_DIR") is None:
    jax.config.update("jax_compilation_cache_dir", str(fetch.cache() / "compiled"))
