"""What a person watching a run sees: a bar with time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from posttrain_jax.core.progress import EVERY, LONG, beat, took

CUT = "completions/clipped_ratio"
COMPILING, EVALUATING, SAVING = "compiling", "evaluating", "saving"


class Bar:
  """Counts steps, and says what else takes a while; `silent` in all processes but one.

  The time left counts from the first step that was not compiled, and has evaluations and saves in it: each as long as
  the shortest so far, which compiled nothing.
  """

  def __init__(
    self,
    steps: int,
    start: int = 0,
    *,
    eval_every: int = 0,
    save_every: int = 0,
    silent: bool = False,
  ) -> None:
    self.steps, self.silent = steps, silent
    self.every = {EVALUATING: eval_every, SAVING: save_every}
    self.took: dict[str, float] = {}  # the shortest time of each
    self.apart = 0.0  # seconds of other things than steps, since `began`
    self.began, self.first = time.monotonic(), -1
    self.last = -EVERY
    self.rich = None
    if sys.stdout.isatty() and not silent:
      self.rich = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
      )
      self.rich.start()
      self.task = self.rich.add_task("train", total=steps, completed=start, values="", left="")

  def update(self, step: int, values: Mapping[str, float]) -> None:
    now = time.monotonic()
    if self.first < 0:
      self.began, self.first, self.apart = now, step, 0.0
    shown = _told(values)
    if self.rich:
      self.rich.update(self.task, completed=step, values=shown, left=self.left(step, now))
    elif not self.silent and (now - self.last > EVERY or step == self.steps):
      self.last = now
      left = self.left(step, now)
      print(f"step {step}/{self.steps}  {shown}{f'  {left}' if left else ''}", flush=True)

  def left(self, step: int, now: float) -> str:
    """How long the run will take from a step on; "" where no step has been measured yet."""
    if step <= self.first < self.steps:
      return ""
    seconds = (now - self.began - self.apart) / max(step - self.first, 1) * (self.steps - step)
    due = {doing: _due(step, self.steps, every) for doing, every in self.every.items()}
    seconds += sum(self.took.get(doing, 0.0) * count for doing, count in due.items())
    said = f"{_clock(seconds)} left"
    count = due[EVALUATING]
    if EVALUATING in self.took or not count or not self.every[EVALUATING]:
      return said
    return f"{said}, {count} evaluation{'s' if count > 1 else ''} not counted"

  def compiled(self, step: Callable[..., Any], done: Callable[[], None]) -> Callable[..., Any]:
    """The step, whose first call compiles it and says so, and then calls `done`."""
    is_first = True

    def called(*arguments: Any) -> Any:
      nonlocal is_first
      if not is_first:
        return step(*arguments)
      is_first = False
      with self.phase(COMPILING):
        result = step(*arguments)  # which is dispatched, not done
      done()
      if not self.rich:
        self.say("training ...")
      return result

    return called

  @contextlib.contextmanager
  def phase(self, doing: str) -> Generator[None]:
    """Something else than steps; said before where it may be long, and behind where it was."""
    beat(doing)
    beat(doing)
    if self.rich:
      self.rich.update(self.task, description=doing)
    elif self.took.get(doing, LONG) >= LONG:
      self.say(f"{doing} ...")
    began = time.monotonic()
    yield
    beat(f"what follows {doing}")
    taken = time.monotonic() - began
    self.apart += taken
    self.took[doing] = min(taken, self.took.get(doing, taken))
    if self.rich:
      self.rich.update(self.task, description="train")
    if taken >= LONG:
      self.say(f"{doing}: {took(taken)}")

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


def _told(values: Mapping[str, float]) -> str:
  """How well a step went: its loss and speed; of an online run, whose loss is 0, the reward and what is written.

  agree: the share of groups that teach nothing; cut: of answers without an end.

  >>> _told({"reward": 0.3125, "pass@1": 0.25, "frac_groups_dead": 0.375, CUT: 0.1})
  'reward 0.312  pass@1 0.25  agree 0.38  cut 0.10'
  """
  if "frac_groups_dead" not in values:
    return "loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s".format_map(_Missing(values))
  reward = values.get("reward", math.nan)
  told = [f"reward {reward:.3g}" if math.isfinite(reward) else "no scores"]
  told += [f"{name} {values[name]:.2f}" for name in ("pass@1",) if name in values]
  told += [f"agree {values['frac_groups_dead']:.2f}", f"cut {_Missing(values)[CUT]:.2f}"]
  return "  ".join(told)


class _Missing(dict):
  def __missing__(self, key):
    return float("nan")


def _due(step: int, steps: int, every: int) -> int:
  """How often something is still to come that is done after every so many steps, this one too, and after the last.

  >>> _due(3, 10, 4), _due(8, 8, 4), _due(4, 8, 4), _due(0, 5, 0)
  (3, 1, 2, 1)
  """
  return 1 if not every else steps // every - (step - 1) // every + (steps % every > 0)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
