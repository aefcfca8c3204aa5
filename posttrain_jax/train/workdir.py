"""A run is a folder: its config, its metrics, what it produced.  The same command again continues it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import tensorboardX

from posttrain_jax.core import files
from posttrain_jax.evals import run as runs
from posttrain_jax.train import metrics, settings
from posttrain_jax.train.settings import ConfigError

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
  record = folder / runs.CONFIG
  if record.exists():
    mine = json.loads(json.dumps(settings.plain(config)))
    changed = settings.differences(files.read_json(record)["config"], mine)
    if changed:
      listed = "\n  ".join(changed)
      raise ConfigError(
        f"{folder} holds a run of another config:\n  {listed}\nName another --workdir, or restore these fields."
      )
  elif any(not entry.name.startswith(".") and entry.name != runs.LOG for entry in entries):
    raise ConfigError(
      f"{folder} is not empty and holds no run (no {runs.CONFIG}); name another --workdir"
    )
  return folder


def claim(folder: Path, config: ml_collections.ConfigDict) -> None:
  """Makes the folder this config's run; every process may call it, the main one writes.

  Called once the run is known to start, so that a mistake leaves nothing behind that would have to be removed.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0 and not (folder / runs.CONFIG).exists():
    files.write_json(folder / runs.CONFIG, {"config": settings.plain(config), **origin()})


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


class Journal:
  """`metrics.jsonl` and TensorBoard; a resumed run goes on after `step` with nothing written twice."""

  def __init__(self, folder: Path, step: int):
    self.path = folder / runs.METRICS
    if self.path.exists():
      kept = [line for line in self.path.read_text().splitlines() if _step(line) <= step]
      files.write_text(self.path, "".join(f"{line}\n" for line in kept))
    self.lines = self.path.open("a", encoding="utf-8")
    self.board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self.lines.write(json.dumps({"step": step, **values}) + "\n")
    self.lines.flush()
    for name, value in values.items():
      self.board.add_scalar(name, value, step)

  def draw(self, step: int, histograms: Mapping[str, np.ndarray]) -> None:
    """Counts between `metrics.EDGES`, to TensorBoard alone."""
    for name, counts in histograms.items():
      self._histogram(name, counts, step)

  def _histogram(self, name: str, counts: np.ndarray, step: int) -> None:
    limits = np.append(metrics.EDGES, 2 * metrics.EDGES[-1])  # TensorBoard wants a last one
    middles = np.append(metrics.EDGES[0], (limits[1:] + limits[:-1]) / 2)
    self.board.add_histogram_raw(
      name,
      min=float(limits[np.flatnonzero(counts)[0]]) if counts.any() else 0.0,
      max=float(limits[np.flatnonzero(counts)[-1]]) if counts.any() else 0.0,
      num=float(counts.sum()),
      sum=float(counts @ middles),
      sum_squares=float(counts @ middles**2),
      bucket_limits=limits.tolist(),
      bucket_counts=counts.tolist(),
      global_step=step,
    )

  def close(self) -> None:
    self.lines.close()
    self.board.close()


def _step(line: str) -> float:
  """The step of a line; a line cut short by a kill counts as later than any."""
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):
    return float("inf")
