"""A run is a folder: who may have it, and what it is marked with.  The same command again continues it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from posttrain_jax import settings
from posttrain_jax.core import files
from posttrain_jax.runs import lock, record
from posttrain_jax.settings import ConfigError

LOCK = ".lock"
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
  """The folder that this run may have: absent, empty, one of the same config, or one in which no step was taken.

  Raises:
    ConfigError: the folder holds a run of another config (the differences are shown) or something else, or another
      process trains in it.
  """
  folder = Path(workdir).expanduser().absolute()
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f"{folder} is a file; name another --workdir")
  # listed first: with several processes the main one may be writing the record
  entries = list(folder.iterdir()) if folder.exists() else []
  if not (folder / record.CONFIG).exists():
    if any(not entry.name.startswith(".") and entry.name != record.LOG for entry in entries):
      raise ConfigError(
        f"{folder} is not empty and holds no run (no {record.CONFIG}); name another --workdir"
      )
    return folder
  changed = settings.differences(record.config(folder), _plain(config))
  if changed and record.is_begun(folder):
    listed = "\n  ".join(changed)
    raise ConfigError(
      f"{folder} holds a run of another config:\n  {listed}\nName another --workdir, or restore these fields."
    )
  if jax.process_index() == 0 and not (folder / record.DONE).exists():
    lock.check(folder / LOCK)
  return folder


@contextlib.contextmanager
def claimed(folder: Path, config: ml_collections.ConfigDict, **about: Any) -> Generator[None]:
  """Inside, the folder is this config's run, and no other process's; every process may enter, the main one writes.

  Entered once the run is known to start, so that a mistake leaves nothing behind that would have to be removed.  What a
  killed start left half-written is removed.

  Args:
    about: what else the record says of the run.

  Raises:
    ConfigError: another process trains in it, or has claimed it meanwhile.
  """
  if jax.process_index() != 0:
    yield
    return
  folder.mkdir(parents=True, exist_ok=True)
  with lock.held(folder / LOCK):
    written = folder / record.CONFIG
    is_begun = record.is_begun(folder)
    if is_begun and settings.differences(record.config(folder), _plain(config)):
      raise ConfigError(f"{folder} has been claimed by a run of another config meanwhile")
    described = {"config": _plain(config), **about}
    if (
      not is_begun
      and written.exists()
      and not described.items() <= files.read_json(written).items()
    ):
      for name in (record.CONFIG, record.METRICS, record.BEFORE):
        (folder / name).unlink(missing_ok=True)
      shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    files.remove_abandoned(folder, age=0)
    if not written.exists():
      files.write_json(written, {**described, **origin()})
    yield


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as its record holds it."""
  return json.loads(json.dumps(settings.plain(config)))


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
