"""A run is a folder: who may have it, and what it is marked with.  The same command again continues it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections

from posttrain_jax import settings
from posttrain_jax.core import files
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError

PACKAGES = (
  "posttrain-jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "transformers",
  "numpy",
)


def check(workdir: str | Path, config: ml_collections.ConfigDict) -> Path:
  """The folder that this run may have: absent, empty, or one that holds a run of the same config.

  Raises:
    ConfigError: the folder holds a run of another config (the differences are shown) or something else.
  """
  folder = Path(workdir).absolute()
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f"{folder} is a file; name another --workdir")
  # listed first: with several processes the main one may be writing the record
  entries = list(folder.iterdir()) if folder.exists() else []
  written = folder / record.CONFIG
  if written.exists():
    mine = json.loads(json.dumps(settings.plain(config)))
    changed = settings.differences(files.read_json(written)["config"], mine)
    if changed:
      listed = "\n  ".join(changed)
      raise ConfigError(
        f"{folder} holds a run of another config:\n  {listed}\nName another --workdir, or restore these fields."
      )
  elif any(not entry.name.startswith(".") and entry.name != record.LOG for entry in entries):
    raise ConfigError(
      f"{folder} is not empty and holds no run (no {record.CONFIG}); name another --workdir"
    )
  return folder


def claim(folder: Path, config: ml_collections.ConfigDict, **about: Any) -> None:
  """Makes the folder this config's run; every process may call it, the main one writes.

  about: what else the record says of it.

  Called once the run is known to start, so that a mistake leaves nothing behind that would have to be removed.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0 and not (folder / record.CONFIG).exists():
    files.write_json(
      folder / record.CONFIG, {"config": settings.plain(config), **about, **origin()}
    )


def origin() -> dict[str, Any]:
  """Command, versions, commit and devices: what a figure needs beside it to be believed."""
  return {
    "command": shlex.join(sys.argv),
    "versions": {
      "python": sys.version.split()[0],
      **{p: importlib.metadata.version(p) for p in PACKAGES},
    },
    "commit": _commit(),
    "devices": [
      f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      f"{os.cpu_count()} host cores",
    ],
  }


def _commit() -> str | None:
  """The project's commit, marked where the tree differs from it; None outside a checkout."""
  root = Path(__file__).parents[2]
  git = lambda *args: subprocess.run(
    ["git", "-C", str(root), *args], capture_output=True, text=True
  )
  try:
    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
  except FileNotFoundError:
    return None
  return head.stdout.strip() + (" (modified)" if changed else "") if head.returncode == 0 else None
