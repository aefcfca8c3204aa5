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
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from posttrain_jax import settings
from posttrain_jax.core import files
from posttrain_jax.runs import lock, record, trackers
from posttrain_jax.settings import ConfigError

LOCK = ".lock"
MODULE = ("posttrain_jax", "__main__.py")  # as `python -m posttrain_jax` names its program
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

  A config that differs in its length alone is the same: a run may go on to more steps.

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
  changed = settings.differences(record.config(folder), _plain(config), but=settings.LENGTH)
  if changed and record.is_begun(folder):
    listed = "\n  ".join(changed)
    raise ConfigError(
      f"{folder} holds a run of another config:\n  {listed}\nName another --workdir, or restore these fields."
    )
  if jax.process_index() == 0 and not (folder / record.DONE).exists():
    lock.check(folder / LOCK)
  return folder


def is_complete(folder: Path, config: Mapping[str, Any]) -> bool:
  """Whether the folder holds a finished run of this very config, its length included.

  config: plain; where its epochs have not been made steps yet, the epochs are compared.
  """
  if not (folder / record.DONE).exists():
    return False
  was = (record.read_json(folder / record.CONFIG) or {}).get("config", {})
  if settings.differences(was, config, but=settings.LENGTH):
    return False
  name = "epochs" if config.get("steps") is None else "steps"
  return was.get(name) == config.get(name)


def former_length(folder: Path, config: ml_collections.ConfigDict) -> dict[str, Any] | None:
  """What a begun run in the folder was told of its length, as its history will have it; None where that is unchanged.

  {"step": where it goes on from, "reached": the last step done, "steps", "epochs", "command": the former ones}.
  """
  if not (folder / record.CONFIG).exists() or not record.is_begun(folder):
    return None
  written = files.read_json(folder / record.CONFIG)
  was, now = written["config"], _plain(config)
  if all(was.get(name) == now.get(name) for name in settings.LENGTH):
    return None
  step = record.saved_step(folder)
  return {
    "step": step,
    "reached": max(step, record.last_step(folder)),
    "steps": was["steps"],
    "epochs": was.get("epochs"),
    "command": written["command"],
  }


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
    if is_begun and settings.differences(
      record.config(folder), _plain(config), but=settings.LENGTH
    ):
      raise ConfigError(f"{folder} has been claimed by a run of another config meanwhile")
    if (former := former_length(folder, config)) is not None:
      _change_length(folder, config, former)
    described = {"config": _plain(config), **about}
    if (
      not is_begun
      and written.exists()
      and not described.items() <= files.read_json(written).items()
    ):
      for name in (record.CONFIG, record.METRICS, record.BEFORE, trackers.RUNS):
        (folder / name).unlink(missing_ok=True)
      shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    files.remove_abandoned(folder, age=0)
    if not written.exists():
      files.write_json(written, {**described, **origin()})
    yield


def _change_length(
  folder: Path, config: ml_collections.ConfigDict, former: Mapping[str, Any]
) -> None:
  """The record of a run that goes on to another number of steps; the former one is in its history.

  What says that the run is finished goes first: killed in between, it is as before the change.
  """
  for name in (record.DONE, record.AFTER):
    (folder / name).unlink(missing_ok=True)
  written = files.read_json(folder / record.CONFIG)
  history = written.get(record.HISTORY, [])
  if former["steps"] != config.steps:
    history = [*history, former]
  changed = {"config": _plain(config), "command": command(sys.argv), record.HISTORY: history}
  files.write_json(folder / record.CONFIG, {**written, **changed})


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as its record holds it."""
  return json.loads(json.dumps(settings.plain(config)))


def command(argv: Sequence[str]) -> str:
  """The command of this process as it is typed again, however the program was found.

  >>> command(["/a/posttrain_jax/__main__.py", "train", "--config=my sft.py"])
  "posttrain train '--config=my sft.py'"
  """
  program, *rest = argv
  is_ours = Path(program).name == "posttrain" or Path(program).parts[-2:] == MODULE
  return shlex.join(["posttrain" if is_ours else program, *rest])


def origin() -> dict[str, Any]:
  """Command, versions, commit and devices: what a figure needs beside it to be believed."""
  return {
    "command": command(sys.argv),
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
