"""What a run says as it goes: `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorboardX

from posttrain_jax.core import files, metrics
from posttrain_jax.runs import record, trackers

CLOCK = ("tokens_per_second", "timing_")  # begins what differs where the same step is done again


class Journal:
  """`metrics.jsonl`, TensorBoard and trackers; a resumed run goes on after `step` with nothing written twice.

  is_complete: set before `close` where the run is at its end.
  """

  def __init__(self, folder: Path, step: int, told: Sequence[trackers.Tracker] = ()):
    self.path, self.trackers, self.is_complete = folder / record.METRICS, told, False
    self.known: set[str] = set()  # to trackers, of the rows that are done again
    if self.path.exists():
      rows = record.read_rows(self.path)
      kept = [row for row in rows if row["step"] <= step]
      self.known = {_mark(row) for row in rows if row["step"] > step}
      files.write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))
    self.lines = self.path.open("a", encoding="utf-8")
    self.board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    try:
      self.lines.write(json.dumps({"step": step, **values}) + "\n")
      self.lines.flush()
    except OSError as error:
      raise OSError(
        f"could not write {self.path}: {error.strerror}; with the cause gone, run the same command again"
      ) from error
    for name, value in values.items():
      self.board.add_scalar(name, value, step)
    if _mark({"step": step, **values}) not in self.known:
      for tracker in self.trackers:
        tracker.write(step, values)

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
    trackers.close(self.trackers, is_complete=self.is_complete)


def _mark(row: Mapping[str, float]) -> str:
  """A row but for its clock."""
  return json.dumps({name: value for name, value in row.items() if not name.startswith(CLOCK)})
