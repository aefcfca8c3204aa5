"""A sweep whose points are asked for one after the other: Optuna's ask and tell, over a config's `search()`.

Points that fall behind the median of the others at the same step are ended.  What was asked stands in the sweep's
folder, what came of it in the points' own; a second call tells Optuna all of it anew and goes on.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.text

from posttrain_jax import settings
from posttrain_jax.build import sweep
from posttrain_jax.build.sweep import Point
from posttrain_jax.core import files
from posttrain_jax.evals import compare, meanings
from posttrain_jax.runs import folder as run_folder
from posttrain_jax.runs import record as runs
from posttrain_jax.settings import ConfigError

ASKED = "search.json"  # in the sweep's folder: what was asked, in order
RUNNING, FINISHED, PRUNED, FAILED = "running", "finished", "pruned", "failed"
BEFORE_PRUNING = 4  # points that are done before any is compared with their median
DIGITS = 6  # of a number that a config is given
REPEATS = 50  # of points that were asked before, after which there are no others


def run(
  config: str,
  workdir: str | Path,
  *,
  trials: int,
  metric: str,
  overrides: Sequence[str] = (),
  jobs: int = 1,
  seed: int = 0,
  command: Sequence[str] = sweep.TRAIN,
  console: rich.console.Console | None = None,
) -> int:
  """The exit code of a search, as a sweep's: 75 is stopped, and safe to run again.

  Args:
    trials: points in all, over all calls.
    metric: what is searched for; it says itself which way is better.  Where it is one of held-out rows (`eval_`), a
      point whose best value so far is worse than the others' median at that step is ended.

  Raises:
    ConfigError: no `search()`, a metric of which no way is better, a folder of another search, no Optuna.
  """
  if trials < 1 or jobs < 1:
    raise ConfigError(f"trials={trials}, jobs={jobs}: write at least 1")
  console, workdir = console or rich.console.Console(), Path(workdir)
  source = Search(config, overrides, workdir, trials, metric, seed, checks=command == sweep.TRAIN)
  states: dict[str, int] = {}
  with sweep.claimed(workdir) as lock:
    source.recall(states)
    console.print(rich.text.Text(source.announcement()))
    sweep.run_all(source, workdir, jobs, command, lock, states, console)
  return sweep.summed_up(source.points, states, workdir, metric, console)


def domains(config: str) -> dict[str, Any]:
  """{field: Optuna's distribution} of a config file's `search()`.

  A list is a choice, (low, high) a range, whole numbers where both are; (low, high, "log") one in powers.
  """
  distributions = _optuna().distributions
  read: dict[str, Any] = {}
  for field, domain in settings.search(config).items():
    match domain:
      case [*choices] if isinstance(domain, list) and choices:
        with warnings.catch_warnings(action="ignore"):  # a storage of Optuna's would want no tuples
          read[field] = distributions.CategoricalDistribution(choices)
      case (int(low), int(high), *how) if low < high and how in ([], ["log"]):
        read[field] = distributions.IntDistribution(low, high, log=bool(how))
      case (float() | int() as low, float() | int() as high, *how) if low < high and how in (
        [],
        ["log"],
      ):
        read[field] = distributions.FloatDistribution(low, high, log=bool(how))
      case _:
        raise ConfigError(
          f'{field}: {domain!r} in search(): write a list of choices, (low, high) or (low, high, "log")'
        )
  return read


class Search:
  """A `sweep.Source`: what Optuna asks for, and what it is told."""

  def __init__(
    self,
    config: str,
    overrides: Sequence[str],
    workdir: Path,
    trials: int,
    metric: str,
    seed: int,
    *,
    checks: bool = True,
  ) -> None:
    self._optuna = _optuna()
    self._config, self._overrides, self._checks = config, overrides, checks
    self.workdir, self.count, self.metric, self._seed = workdir, trials, metric, seed
    self._space = domains(config)
    self.points: list[Point] = []
    self._asked: dict[str, dict[str, Any]] = {}  # {point: its fields and state}
    self._trials: dict[str, Any] = {}  # of those that run
    self._told: dict[str, int] = {}  # {point: the last step that Optuna was told of}
    self._again: list[Point] = []  # asked for in an earlier call, and not done
    path, _, base = config.partition(":")
    self._kind = meanings.kind(sweep.resolved(path, base, "", {}, overrides).resolved)
    better = meanings.better(self._kind, metric)
    if better not in (meanings.HIGHER, meanings.LOWER):
      raise ConfigError(f"--metric={metric}: neither way of it is better in such a run")
    self.way = {meanings.HIGHER: "maximize", meanings.LOWER: "minimize"}[better]

  def recall(self, states: dict[str, int]) -> None:
    """What an earlier call asked, told to Optuna anew; those that were stopped come first.

    Raises:
      ConfigError: that was a search for something else.
    """
    was = runs.read_json(self.workdir / ASKED) or {"metric": self.metric, "points": []}
    if was["metric"] != self.metric:
      raise ConfigError(f"{self.workdir} holds a search for {was['metric']}; name another folder")
    # draws that begin anew in each call are not to repeat themselves
    self._study = self._optuna.create_study(
      direction=self.way,
      sampler=self._optuna.samplers.TPESampler(seed=self._seed + len(was["points"])),
      pruner=self._optuna.pruners.MedianPruner(n_startup_trials=BEFORE_PRUNING),
    )
    for row in was["points"]:
      if {*row["fields"]} != {*self._space}:
        raise ConfigError(
          f"{self.workdir} holds a search over {', '.join(row['fields'])}; name another folder"
        )
      row["fields"] = {name: self._drawn(name, value) for name, value in row["fields"].items()}
      point = self._point(row["fields"])
      if row["state"] == FINISHED and not self._is_done(point):
        row["state"] = RUNNING
      self.points.append(point)
      self._asked[point.name] = row
      if row["state"] == RUNNING:
        self._again.append(point)
        continue
      states[point.name] = {FINISHED: 0, PRUNED: sweep.PRUNED}.get(row["state"], 1)
      self._study.enqueue_trial(row["fields"])
      trial = self._study.ask(self._space)
      for step, value in self._seen(self.workdir / point.name):
        trial.report(value, step)
      self._tell(trial, point, row["state"])

  def announcement(self) -> str:
    done = len(self._asked) - len(self._again)
    before = f", {done} of them done before" if done else ""
    how = "the highest" if self.way == "maximize" else "the lowest"
    return f"{self.count} points over {', '.join(self._space)}{before}; for {how} {self.metric}"

  def next(self) -> Point | None:
    if self._again:
      point = self._again.pop(0)
      self._study.enqueue_trial(dict(self._asked[point.name]["fields"]))
      self._trials[point.name] = self._study.ask(self._space)
      return point
    for _ in range(REPEATS):
      if len(self._asked) >= self.count:
        return None
      trial = self._study.ask(self._space)
      fields = {name: _rounded(value) for name, value in trial.params.items()}
      point = self._point(fields)
      if point.name not in self._asked:
        self._trials[point.name] = trial
        self.points.append(point)
        self._asked[point.name] = {"fields": fields, "state": RUNNING}
        self._write()
        return point
      self._tell(trial, point, self._asked[point.name]["state"])
    self.count = len(self._asked)  # of choices alone there is an end
    return None

  def left(self) -> list[Point]:
    return self._again

  def is_hopeless(self, point: Point, folder: Path) -> bool:
    trial, is_news = self._trials[point.name], False
    for step, value in self._seen(folder):
      if step > self._told.get(point.name, -1):
        trial.report(value, step)
        self._told[point.name], is_news = step, True
    return is_news and trial.should_prune()

  def ended(self, point: Point, folder: Path, code: int) -> None:
    if code == sweep.PREEMPTED:
      return  # a second call goes on with it
    state = {0: FINISHED, sweep.PRUNED: PRUNED}.get(code, FAILED)
    self._asked[point.name]["state"] = state
    self._write()
    self._tell(self._trials.pop(point.name), point, state)

  def _tell(self, trial: Any, point: Point, state: str) -> None:
    kinds = self._optuna.trial.TrialState
    value = self._value(point) if state == FINISHED else math.nan
    if math.isfinite(value):
      self._study.tell(trial, value)
    else:
      self._study.tell(trial, state=kinds.PRUNED if state == PRUNED else kinds.FAIL)

  def _value(self, point: Point) -> float:
    finals = compare.finals(runs.read(self.workdir / point.name))
    if self.metric not in finals:
      raise ConfigError(
        f"--metric={self.metric}: {point.name} has no such metric; it has {', '.join(finals)}"
      )
    return finals[self.metric]

  def _seen(self, folder: Path) -> list[tuple[int, float]]:
    """(step, value) of the metric so far; a line that is being written is left out."""
    try:
      lines = (folder / runs.METRICS).read_bytes().split(b"\n")[:-1]
      rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
      return []
    known = {row["step"]: row[self.metric] for row in rows if row.get(self.metric) is not None}
    return [(step, value) for step, value in sorted(known.items()) if math.isfinite(value)]

  def _point(self, fields: Mapping[str, Any]) -> Point:
    path, _, base = self._config.partition(":")
    point = sweep.resolved(path, base, "", fields, self._overrides)
    point = sweep.distinct(point, {point.name: point for point in self.points})
    return sweep.checked(point) if self._checks else point

  def _drawn(self, field: str, value: Any) -> Any:
    """The value as Optuna drew it: a choice that is a tuple was written as a list.

    Raises:
      ConfigError: search() has no such value any more.
    """
    domain = self._space[field]
    if not hasattr(domain, "choices"):
      return value
    for choice in domain.choices:
      if sweep.spelt(choice) == sweep.spelt(value):
        return choice
    raise ConfigError(
      f"{self.workdir} holds a search in which {field} was {value!r}, which search() has no more; name another folder"
    )

  def _is_done(self, point: Point) -> bool:
    return run_folder.is_complete(self.workdir / point.name, point.resolved)

  def _write(self) -> None:
    files.write_json(
      self.workdir / ASKED, {"metric": self.metric, "points": list(self._asked.values())}
    )


def _rounded(value: Any) -> Any:
  """Few digits of a drawn number, which become the name of a folder.

  >>> _rounded(0.00012345678), _rounded(16), _rounded("lora")
  (0.000123457, 16, 'lora')
  """
  return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _optuna() -> Any:
  try:
    optuna = importlib.import_module("optuna")
  except ImportError:
    raise ConfigError("--search needs Optuna: pip install 'posttrain-jax[search]'") from None
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  return optuna
