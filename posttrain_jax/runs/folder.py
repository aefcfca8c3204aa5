"""A run is a folder: who may have it, and what it is marked with.  The same command again continues it."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from posttrain_jax import settings
from posttrain_jax.core import files
from posttrain_jax.runs import lock, provenance, record, trackers
from posttrain_jax.settings import ConfigError

LOCK = ".lock"
MAY_CHANGE = (*settings.LENGTH, *settings.PATIENCE)
STARTED = (record.CONFIG, "checkpoints")  # what a folder has before any work is done in it


def check(workdir: str | Path, config: ml_collections.ConfigDict) -> Path:
  """The folder that this run may have: absent, empty, one of the same config, or one in which no step was taken.

  A config that differs in its length and patience alone is the same: a run may go on to more steps, and wait longer.

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
  changed = settings.differences(record.config(folder), _plain(config), but=MAY_CHANGE)
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
  if settings.differences(was, config, but=MAY_CHANGE):
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
  killed start left half-written is removed, and so is what this one made where it is refused before it has done work.

  Args:
    about: what else the record says of the run.

  Raises:
    ConfigError: another process trains in it, or has claimed it meanwhile.
  """
  if jax.process_index() != 0:
    yield
    return
  before = {entry.name for entry in folder.iterdir()} if folder.is_dir() else None
  folder.mkdir(parents=True, exist_ok=True)
  with lock.held(folder / LOCK):
    written = folder / record.CONFIG
    is_begun = record.is_begun(folder)
    if is_begun and settings.differences(record.config(folder), _plain(config), but=MAY_CHANGE):
      raise ConfigError(f"{folder} has been claimed by a run of another config meanwhile")
    if (former := former_length(folder, config)) is not None:
      _change_length(folder, config, former)
    elif is_begun and settings.differences(record.config(folder), _plain(config)):
      _change(folder, config, {})
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
    is_new = not written.exists()
    if is_new:
      files.write_json(written, {**described, **provenance.provenance()})
    try:
      yield
    except ValueError:
      if is_new:
        _unclaim(folder, before)
      raise


def _unclaim(folder: Path, before: set[str] | None) -> None:
  """Removes what this start made, where it was refused before there were answers, an evaluation or a step.

  before: what was in the folder; None where there was none.
  """
  names = {entry.name for entry in folder.iterdir()}
  if not names <= {*STARTED, LOCK} or record.is_begun(folder):
    return
  (folder / record.CONFIG).unlink()
  if "checkpoints" not in (before or ()):
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
  if before is None:
    # NFS keeps a name for a lock that is open: the folder then stays, and the refusal is what is told
    with contextlib.suppress(OSError):
      (folder / LOCK).unlink()
      folder.rmdir()


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
  _change(folder, config, {record.HISTORY: history})


def _change(folder: Path, config: ml_collections.ConfigDict, beside: Mapping[str, Any]) -> None:
  """The record of a run that goes on with this config; beside: what else it says from now on."""
  now = {"config": _plain(config), "command": provenance.command(sys.argv), **beside}
  files.write_json(folder / record.CONFIG, {**files.read_json(folder / record.CONFIG), **now})


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as its record holds it."""
  return json.loads(json.dumps(settings.plain(config)))
