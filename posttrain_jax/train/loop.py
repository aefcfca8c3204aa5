"""The loop: input and output only.  Batches go in, metrics come out one step late, checkpoints are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from posttrain_jax.core import distributed
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core.checkpoint import Checkpoints
from posttrain_jax.core.progress import beat
from posttrain_jax.core.started import Started
from posttrain_jax.objectives import Context, measured
from posttrain_jax.runs.metrics_log import Journal
from posttrain_jax.runs.trackers import Tracker
from posttrain_jax.train.progress import EVALUATING, SAVING, Bar
from posttrain_jax.train.signals import Stop, Stopped
from posttrain_jax.train.state import State


class Diverged(RuntimeError):
  """Too many updates in a row were not finite, or what the run made is not."""


@dataclasses.dataclass
class Progress:
  """What a run remembers besides its state; saved with it."""

  step: int = 0
  seconds: float = 0.0  # of training, over all starts
  tokens: int = 0
  best_step: int = 0  # 0: none yet
  best_value: float | None = None  # of the metric that says which step is the best
  unimproved: int = 0  # evaluations since that step
  evaluated: int = 0  # the last step that was evaluated
  is_sound: bool = True  # whether the last evaluation gave a number


@dataclasses.dataclass(frozen=True)
class Best:
  """Which evaluated step is the best, and what that decides."""

  metric: str = "eval_loss"
  is_higher: bool = False  # whether the best is the highest value
  is_given: bool = (
    False  # whether the run gives that step: its checkpoint is kept, whatever follows
  )
  stop_after: int = 0  # evaluations without a better one after which the run ends; 0: it goes on

  def improves(self, value: float, best: float | None) -> bool:
    if best is None or not math.isfinite(value):
      return math.isfinite(value)
    return value > best if self.is_higher else value < best

  def gives_up(self, progress: Progress) -> bool:
    return 0 < self.stop_after <= progress.unimproved


class Source(Protocol):
  """Where a run's batches come from: rows in an order, or a policy that writes them."""

  @property
  def epoch(self) -> float: ...

  def batch(self, state: State, stopping: Callable[[], bool]) -> Any:
    """The next one, for a step from this state.

    Raises:
      Stopped: `stopping` said that no step will be taken from it, before it was there.
    """

  def told(self, step: int) -> Mapping[str, float]:
    """What else is to be logged of the step that took the last batch; raises where the run must end."""

  def get_state(self) -> dict: ...

  def set_state(self, state: dict) -> None: ...


@dataclasses.dataclass(frozen=True)
class Run:
  """The pieces of a run; `build` makes them, `loop` turns the handle."""

  folder: Path
  steps: int
  step: Callable[[State, Context, Any], tuple[State, dict[str, Any]]]  # jitted, state donated
  evaluate: Callable[[Any, Context, Any, Any], dict[str, Any]]  # jitted
  context: Context
  batches: Source
  eval_batches: Callable[[], Iterable[Any]]
  learning_rate: Callable[[int], Any]
  export: Callable[[State, str], None]  # (state, folder name): the adapter in PEFT's format
  check_start: Callable[[Mapping[str, float]], None]  # of the first step's metrics; may raise
  check_step: Callable[[Mapping[str, float]], None]  # of every step's; may raise
  best: Best
  trackers: Callable[[], Sequence[Tracker]]  # opened by the main process alone
  mesh: jax.sharding.Mesh | None
  eval_every: int
  save_every: int
  log_every: int
  max_skipped: int
  started: Started  # told where the start ends


def loop(
  run: Run, state: State, progress: Progress, checkpoints: Checkpoints
) -> tuple[State, Progress, bool]:
  """(state, progress, whether the run is complete); False after SIGTERM or Ctrl-C, with the state saved.

  Raises:
    Diverged: `max_skipped` updates in a row had gradients that were not finite; nothing of theirs was kept.
  """
  main = distributed.is_main()
  journal = Journal(run.folder, progress.step, run.trackers()) if main else None
  bar = Bar(
    run.steps,
    progress.step,
    eval_every=run.eval_every,
    save_every=run.save_every,
    silent=not main,
  )
  step = bar.compiled(run.step, lambda: run.started.ends("compiling"))
  reader = _Reader(run, journal, bar)
  saved = progress.step
  clock = time.monotonic()

  def tick():
    nonlocal clock
    now = time.monotonic()
    progress.seconds += now - clock
    clock = now

  def save():
    nonlocal saved
    reader.flush(progress)
    tick()
    data = {"batches": run.batches.get_state(), "progress": dataclasses.asdict(progress)}
    with bar.phase(SAVING):
      checkpoints.save(progress.step, state, data)
    if run.best.is_given:  # the former one is pruned once this save is whole
      checkpoints.stay({progress.best_step})
    saved = progress.step

  def stopped(what: str) -> tuple[State, Progress, bool]:
    if saved != progress.step:
      save()
    checkpoints.wait()
    bar.say(
      f"stopped at step {progress.step} of {run.steps}, {what}; run the same command again to go on"
    )
    return state, progress, False

  def asked(stop: Stop) -> bool:
    beat(f"the batch of step {progress.step + 1}")
    return stop.is_requested()

  with Stop() as stop, contextlib.ExitStack() as closing:
    closing.callback(bar.close)
    if journal:
      closing.callback(journal.close)
    if run.best.is_given:
      checkpoints.stay({progress.best_step})
    # an interrupted run may be given no steps but those that it has done
    if progress.step == run.steps and progress.evaluated != progress.step:
      with bar.phase(EVALUATING):
        _evaluate(run, state, progress, journal, bar)
    while progress.step < run.steps and not run.best.gives_up(progress):
      beat(f"the batch of step {progress.step + 1}")
      try:
        batch = run.batches.batch(state, lambda: asked(stop))
      except Stopped as error:
        return stopped(str(error))
      beat(f"step {progress.step + 1}")
      state, metrics = step(state, run.context, _placed(run, batch))
      progress.step += 1
      reader.put(progress, metrics)
      last, is_better = progress.step == run.steps, False
      if last or (run.eval_every and progress.step % run.eval_every == 0):
        reader.flush(progress)
        with bar.phase(EVALUATING):
          is_better = _evaluate(run, state, progress, journal, bar)
        reader.restart()
        last = last or run.best.gives_up(progress)
      is_due = run.save_every and progress.step % run.save_every == 0
      if last or is_due or (is_better and run.best.is_given):
        save()
      if stop.agreed() and not last:
        return stopped("saved")
    tick()
    if journal:
      journal.is_complete = True
    if run.best.gives_up(progress) and progress.step < run.steps:
      bar.say(
        f"ending at step {progress.step} of {run.steps}: {run.best.metric} has not improved in {progress.unimproved}"
        f" evaluations (eval.stop_after), {_the_best(run.best, progress)}"
      )
  checkpoints.wait()
  return state, progress, True


def _the_best(best: Best, progress: Progress) -> str:
  if progress.best_value is None:
    return "and none gave a number"
  return f"the best is {progress.best_value:.4f} of step {progress.best_step}"


class _Reader:
  """Reads a step's metrics when the next one has been started, so that the device never waits for the host."""

  def __init__(self, run: Run, journal: Journal | None, bar: Bar):
    self.run, self.journal, self.bar = run, journal, bar
    self.is_started = False
    self.pending: tuple[int, dict[str, Any], float, Mapping[str, float]] | None = None
    self.restart()

  def restart(self) -> None:
    """The clock of tokens per second starts anew (after a compilation, an evaluation, a save)."""
    self.since = time.monotonic()

  def put(self, progress: Progress, metrics: Mapping[str, Any]) -> None:
    self.flush(progress)
    # of the data up to this step's batch: when its metrics are read the next one is drawn
    batches = self.run.batches
    self.pending = (progress.step, dict(metrics), batches.epoch, batches.told(progress.step))

  def flush(self, progress: Progress) -> None:
    if self.pending is None:
      return
    (step, metrics, epoch, beside), self.pending = self.pending, None
    values = {**metrics_lib.read(metrics), **beside}
    now = time.monotonic()
    values["tokens_per_second"] = values["tokens"] / (now - self.since)
    if not self.is_started:
      self.is_started = True
      self.run.started.ends("first step")
      self.bar.say(self.run.started.told())
    values["learning_rate"] = float(self.run.learning_rate(step - 1))
    values["epoch"] = epoch
    self.since = now
    progress.tokens += int(values["tokens"])
    values["num_tokens"] = progress.tokens
    self.bar.update(step, values)
    if self.journal and (step % self.run.log_every == 0 or step == self.run.steps):
      self.journal.write(step, values)
      self.journal.draw(step, metrics_lib.histograms(metrics))
    if step == 1:
      self.run.check_start(values)
    self.run.check_step(values)
    if values["skipped_in_a_row"] >= self.run.max_skipped:
      raise Diverged(
        f"{int(values['skipped_in_a_row'])} updates in a row, up to step {step}, were not finite, or their gradient was"
        f" not; parameters are those of the last good update and nothing was exported. Lower optimizer.lr "
        f"(now {values['learning_rate']:.3g}), raise optimizer.warmup, or look at the data near step {step}."
      )


def _placed(run: Run, batch: Any) -> Any:
  return batch if run.mesh is None else distributed.global_batch(run.mesh, batch)


def _evaluate(
  run: Run, state: State, progress: Progress, journal: Journal | None, bar: Bar
) -> bool:
  """Metrics over every held-out example, `eval_` before each name; whether they are the best so far.

  Nothing without held-out data.
  """

  def placed() -> Iterator[Any]:
    for batch in run.eval_batches():
      beat(f"evaluating after step {progress.step}")
      yield _placed(run, batch)

  context = state.context(run.context)
  total = measured(run.evaluate, placed(), state.trainable, context, state.memory)
  if not total:
    return False
  named = lambda values: {f"eval_{name}": value for name, value in values.items()}
  values = named(metrics_lib.read(total))
  if journal:
    journal.write(progress.step, values)
    journal.draw(progress.step, named(metrics_lib.histograms(total)))
  progress.is_sound = math.isfinite(values["eval_loss"])
  progress.evaluated = progress.step
  # of what no row has (pairs whose chosen answer is the longer one) there is no mean
  value = values.get(run.best.metric, math.nan)
  is_better = run.best.improves(value, progress.best_value)
  if is_better:
    progress.best_step, progress.best_value, progress.unimproved = progress.step, value, 0
  else:
    progress.unimproved += 1
  bar.say(f"step {progress.step}: {_evaluated(run.best, progress, values, is_better)}")
  if is_better:
    run.export(state, "adapter")
  return is_better


def _evaluated(best: Best, progress: Progress, values: Mapping[str, float], is_better: bool) -> str:
  """What a line says of an evaluation."""
  names = dict.fromkeys(["eval_loss", best.metric])
  said = ", ".join(f"{name} {values.get(name, math.nan):.4f}" for name in names)
  if not best.is_given:
    return said
  if is_better:
    return f"{said}, the best so far"
  of = f" of {best.stop_after}" if best.stop_after else ""
  return f"{said}; {_the_best(best, progress)}, {progress.unimproved}{of} without improvement"
