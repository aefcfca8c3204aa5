"""What a person watching a run sees: a bar with time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

EVERY = 15.0  # seconds between lines where there is no terminal


class Bar:
  """Counts steps; `silent` in all processes but one."""

  def __init__(self, steps: int, start: int = 0, *, silent: bool = False):
    self.steps, self.silent = steps, silent
    self.began, self.first, self.last = time.monotonic(), start, 0.0
    self.rich = None
    if sys.stdout.isatty() and not silent:
      self.rich = Progress(
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
      )
      self.rich.start()
      self.task = self.rich.add_task("train", total=steps, completed=start, values="")

  def update(self, step: int, values: Mapping[str, float]) -> None:
    shown = "loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s".format_map(_Missing(values))
    if self.rich:
      self.rich.update(self.task, completed=step, values=shown)
    elif not self.silent and (time.monotonic() - self.last > EVERY or step == self.steps):
      self.last = time.monotonic()
      done = max(step - self.first, 1)
      left = (self.last - self.began) / done * (self.steps - step)
      print(f"step {step}/{self.steps}  {shown}  {_clock(left)} left", flush=True)

  def say(self, text: str) -> None:
    """A line above the bar."""
    if self.silent:
      return
    if self.rich:
      self.rich.console.print(text, markup=False, highlight=False)
    else:
      print(text, flush=True)

  def close(self) -> None:
    if self.rich:
      self.rich.stop()


class _Missing(dict):
  def __missing__(self, key):
    return float("nan")


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
