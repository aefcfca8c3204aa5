"""Every point of a config's `sweep()`, each in a process and a folder of its own.

A second call with the same folder skips the points that are finished and continues the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import rich.box
import rich.console
import rich.table
import rich.text

from posttrain_jax import settings
from posttrain_jax.build import summary
from posttrain_jax.evals import compare, report
from posttrain_jax.runs import folder as run_folder
from posttrain_jax.runs import record as runs
from posttrain_jax.settings import ConfigError
from posttrain_jax.train.signals import PREEMPTED

TRAIN = (sys.executable, "-m", "posttrain_jax", "train")
LOG, LOCK = runs.LOG, report.SWEEP
LONGEST_NAME = 150  # bytes; file systems take 255
TAIL = 12  # lines of a failed point's log
POLL = 0.2  # seconds
PRUNED = 256  # in the place of an exit code: ended as others did better, and left at that
STATUS = {0: "finished", PREEMPTED: "stopped", PRUNED: "pruned"}  # any other code: failed


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a sweep.  `values` is what the sweep says about it: arguments and fields."""

  name: str
  config: str  # FILE:arguments
  overrides: tuple[str, ...]
  resolved: Mapping[str, Any]
  values: Mapping[str, Any]


@dataclasses.dataclass
class _Job:
  point: Point
  process: subprocess.Popen
  started: float
  is_pruned: bool = False


class Source(Protocol):
  """Which points are to be trained: those of a list, or those that a search asks for one after the other."""

  @property
  def count(self) -> int:
    """Points in all, those that were done before among them."""

  def next(self) -> Point | None:
    """The point to start now; None where there is none, or none yet."""

  def left(self) -> list[Point]:
    """Points that are known and were not started."""

  def is_hopeless(self, point: Point, folder: Path) -> bool:
    """Whether a point that runs is to be ended as it is."""

  def ended(self, point: Point, folder: Path, code: int) -> None: ...


class Listed:
  """Points in their order."""

  def __init__(self, points: Sequence[Point], count: int) -> None:
    self._points, self.count = list(points), count

  def next(self) -> Point | None:
    return self._points.pop(0) if self._points else None

  def left(self) -> list[Point]:
    return self._points

  def is_hopeless(self, point: Point, folder: Path) -> bool:
    return False

  def ended(self, point: Point, folder: Path, code: int) -> None:
    pass


def run(
  config: str,
  workdir: str | Path,
  *,
  overrides: Sequence[str] = (),
  jobs: int = 1,
  metric: str | None = None,
  command: Sequence[str] = TRAIN,
  console: rich.console.Console | None = None,
) -> int:
  """The exit code of a sweep: 0 all points finished, 1 some failed, 75 stopped and safe to run again.

  Writes `summary.csv`, `summary.json` and, once a point is finished, `summary.png` and `compare.html` (its curves and
  answers beside those of the others) into workdir; each point's output is in `<point>/log.txt`.

  Args:
    config: `FILE[:arguments]`; a point's own arguments win.
    overrides: `--config.field=value` for every point.
    jobs: points at once; more than one only where they do not share a device.  0: they run elsewhere (`posttrain
      launch`), and what there is of them is summed up.
    metric: compared in table and figure; None for the first of `summary.METRICS` that compares between the points.
    command: what trains, before `--config=... --workdir=...`.

  Raises:
    ConfigError: before anything runs: no sweep, a point that is no valid config, two points of one name.
  """
  if jobs < 0:
    raise ConfigError(
      f"jobs={jobs}: write the points that run at a time, or 0 to sum up what there is"
    )
  console = console or rich.console.Console()
  points, workdir = expand(config, overrides), Path(workdir)
  if command == TRAIN:  # which would refuse it, each point when its turn comes
    points = [fitting(point) for point in points]
  states: dict[str, int] = {}
  with claimed(workdir) as lock:
    for point in points:
      if run_folder.is_complete(workdir / point.name, point.resolved):
        states[point.name] = 0
      elif not jobs:
        states[point.name] = PREEMPTED
    waiting = [point for point in points if point.name not in states]
    if jobs:
      for name in states:
        _say(console, name, "finished before")
      _announce(console, points, waiting, jobs)
      run_all(Listed(waiting, len(points)), workdir, jobs, command, lock, states, console)
  return summed_up(points, states, workdir, metric, console)


def summed_up(
  points: Sequence[Point],
  states: Mapping[str, int],
  workdir: Path,
  metric: str | None,
  console: rich.console.Console,
) -> int:
  """The exit code of these points, with their summary written and shown.  states: {name: exit code, or PRUNED}."""
  rows = [_summary(point, states[point.name], workdir / point.name) for point in points]
  configs = [point.resolved for point in points]
  is_drawn = summary.write(rows, _swept(points), configs, workdir, metric, console)
  for row in rows:
    if row["status"] == "failed":
      log = workdir / row["point"] / LOG
      console.print(rich.text.Text(f"{row['point']} failed; the end of {log}:\n{tail(log)}"))
  if PREEMPTED in states.values():
    return PREEMPTED
  return 0 if is_drawn and {*states.values()} <= {0, PRUNED} else 1


def expand(config: str, overrides: Sequence[str] = ()) -> list[Point]:
  """The points of a config's sweep, every one of them resolved."""
  path, _, base = config.partition(":")
  points = [
    resolved(path, base, arguments, fields, overrides)
    for arguments, fields in settings.points(config)
  ]
  if not points:
    raise ConfigError(f"the sweep of {path} has no points")
  named: dict[str, Point] = {}
  for point in points:
    point = distinct(point, named)
    if point.name in named:
      raise ConfigError(f"the sweep of {path} has two points named {point.name}: they must differ")
    named[point.name] = point
  return list(named.values())


def distinct(point: Point, named: Mapping[str, Point]) -> Point:
  """The point under a name that is no other's: in names `a/b` and `a-b` are one, and so are `é` and `è`."""
  other = named.get(point.name)
  if other is None or spelt(other.values) == spelt(point.values):
    return point
  digest = hashlib.sha256(spelt(point.values).encode()).hexdigest()[:8]
  return dataclasses.replace(point, name=f"{point.name}-{digest}")


def spelt(values: Any) -> str:
  """Fields or their values as a file has them, in which a tuple is a list."""
  return json.dumps(values, sort_keys=True, default=str)


def resolved(
  path: str, base: str, arguments: str, fields: Mapping[str, Any], overrides: Sequence[str]
) -> Point:
  """The point of these arguments and fields, resolved.  base: arguments for all points; a point's own win."""
  for text in overrides:
    field = text.removeprefix("--").removeprefix("config.").partition("=")[0]
    if field in fields:
      raise ConfigError(f"{text}: the sweep sets {field} itself; leave it out here or there")
  point_arguments = _arguments(arguments)
  merged = ",".join({**_arguments(base), **point_arguments}.values())
  full = f"{path}:{merged}" if merged else path
  all_overrides = (
    *overrides,
    *(settings.override(field, value) for field, value in fields.items()),
  )
  return Point(
    name=_name(list(point_arguments.values()), fields),
    config=full,
    overrides=tuple(all_overrides),
    resolved=settings.plain(settings.load(full, all_overrides)),
    values={
      **{name: _value(text.partition("=")[2]) for name, text in point_arguments.items()},
      **fields,
    },
  )


def _arguments(text: str | None) -> dict[str, str]:
  """{name: "name=value"} of a config's arguments."""
  return {part.partition("=")[0]: part for part in (text or "").split(",") if part}


def _value(text: str) -> Any:
  """An argument's value: a number where it is one, True where there is none.

  >>> _value("16"), _value("0.1"), _value("lora"), _value("")
  (16, 0.1, 'lora', True)
  """
  for kind in (int, float):
    with contextlib.suppress(ValueError):
      return kind(text)
  return text or True


def _name(arguments: Sequence[str], fields: Mapping[str, Any]) -> str:
  """A folder's name that says what the point is.

  >>> _name(["adapter=lora"], {"adapter.r": 4, "optimizer.lr": 1e-4})
  'adapter=lora__adapter.r=4__optimizer.lr=0.0001'
  """
  parts = [*arguments, *(f"{field}={value}" for field, value in fields.items())]
  whole = "__".join(parts) or "base"
  name = re.sub(r"[^A-Za-z0-9=.,_+-]+", "-", whole).lstrip(".-")
  if len(name) > LONGEST_NAME:
    name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
  return name


# Running


def run_all(
  source: Source,
  workdir: Path,
  jobs: int,
  command: Sequence[str],
  lock: int,
  states: dict[str, int],
  console: rich.console.Console,
) -> None:
  """Trains a source's points, `jobs` at a time; states gets {name: exit code} of each.

  PREEMPTED stands for those that were stopped or not reached, PRUNED for those that the source gave up.
  """
  started, running = len(states), []
  with stopping() as asked, console.status("") as status:
    try:
      while True:
        while not asked.count and len(running) < jobs and (point := source.next()) is not None:
          started += 1
          running.append(_start(point, workdir, command, lock))
          _say(console, point.name, f"started, point {started} of {source.count}")
        if not running:
          break
        _signal(running, asked)
        status.update(_status(running, workdir, len(states), source.count, asked))
        time.sleep(POLL)
        for job in running:
          folder = workdir / job.point.name
          if not job.is_pruned and not asked.count and source.is_hopeless(job.point, folder):
            job.is_pruned = True
            job.process.terminate()
        for job in [job for job in running if job.process.poll() is not None]:
          running.remove(job)
          code = _ended(job, workdir, asked, console)
          states[job.point.name] = code
          source.ended(job.point, workdir / job.point.name, code)
    finally:
      for job in running:  # only where something above failed
        job.process.terminate()
  states |= dict.fromkeys((point.name for point in source.left()), PREEMPTED)


def _announce(console, points, waiting, jobs) -> None:
  done = len(points) - len(waiting)
  before = f", {done} of them finished before" if done else ""
  at_once = "one at a time" if jobs == 1 else f"{jobs} at a time"
  listed = ", ".join(_swept(points))
  over = f" over {listed}" if listed else ""
  console.print(
    rich.text.Text(f"{len(points)} points{over}{before}; {len(waiting)} to run, {at_once}")
  )


def checked(point: Point) -> Point:
  """The point with what the adapter that it starts from decides, as its run will have it.

  Raises:
    ConfigError: `posttrain train` would refuse it.
  """
  settings.fields.check(point.resolved, settings.given(point.overrides))
  if not point.resolved.get("model", {}).get("adapter"):
    return point
  from posttrain_jax.build import earlier_adapter

  config = settings.restored(point.resolved)
  config, _ = earlier_adapter.settled(config, settings.given(point.overrides))
  return dataclasses.replace(point, resolved=settings.plain(config))


def fitting(point: Point) -> Point:
  """`checked`, and its sections fit one another; a search finds that out of each point by itself."""
  from posttrain_jax.build import checks

  point = checked(point)
  checks.sections(settings.restored(point.resolved))
  return point


def _start(point, workdir, command, lock) -> _Job:
  folder = workdir / point.name
  folder.mkdir(parents=True, exist_ok=True)
  line = [*command, f"--config={point.config}", *point.overrides, f"--workdir={folder}"]
  with (folder / LOG).open("ab") as log:
    log.write(f"\n$ {shlex.join(line)}\n".encode())
    log.flush()
    process = subprocess.Popen(
      line,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      # A terminal's Ctrl-C is for the sweep, which tells its runs to save.
      start_new_session=True,
      # Should the sweep be killed, its runs hold on to the folder until they end.
      pass_fds=(lock,),
      env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
  return _Job(point, process, time.monotonic())


def _ended(job, workdir, asked, console) -> int:
  """The point's exit code, with a line said about it.  A run preempted by another's hand ends the sweep too."""
  code = job.process.returncode
  took = f"{time.monotonic() - job.started:.0f} s"
  if code == 0 and not (workdir / job.point.name / runs.DONE).exists():
    code = 1
    with (workdir / job.point.name / LOG).open("a") as log:
      log.write(f"the command ended well, but left no {runs.DONE}\n")
  if job.is_pruned and code != 0:
    _say(console, job.point.name, f"pruned after {took}")
    return PRUNED
  if code == PREEMPTED or (code != 0 and asked.count):
    asked.count = max(asked.count, 1)
    _say(console, job.point.name, f"stopped after {took}")
    return PREEMPTED
  if code == 0:
    _say(console, job.point.name, f"finished in {took}")
    return 0
  _say(
    console,
    job.point.name,
    f"FAILED after {took} ({cause(code)}): {workdir / job.point.name / LOG}",
  )
  return code


def cause(code: int) -> str:
  return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def tail(path: Path) -> str:
  with path.open("rb") as log:
    log.seek(max(0, path.stat().st_size - 8192))
    lines = log.read().decode(errors="replace").strip().splitlines()
  return "\n".join(f"  {line}" for line in lines[-TAIL:])


def _say(console, name, what):
  console.print(rich.text.Text(f"{name}: {what}"), soft_wrap=True)


def _status(running, workdir, done, total, asked) -> rich.text.Text:
  doing = "; ".join(
    f"{job.point.name}{_progress(job, workdir)}, {time.monotonic() - job.started:.0f} s"
    for job in running
  )
  stopping = "stopping (again to kill), " if asked.count else ""
  return rich.text.Text(
    f"{stopping}{done} of {total} points done; {doing}", no_wrap=True, overflow="ellipsis"
  )


def _progress(job, workdir) -> str:
  """`, step 3/100, loss 1.234` from the last whole line of the run's metrics."""
  try:
    with (workdir / job.point.name / runs.METRICS).open("rb") as f:
      f.seek(max(0, os.fstat(f.fileno()).st_size - 65536))
      rows = [json.loads(line) for line in f.read().split(b"\n")[-3:-1]]
  except (OSError, ValueError):  # not there yet, or just being written
    return ""
  row = next((row for row in reversed(rows) if "loss" in row), None)
  if row is None:
    return ""
  steps = runs.config(workdir / job.point.name)["steps"]  # which epochs may have decided
  return f", step {row['step']}/{steps}, loss {row['loss']:.4g}"


# Stopping


@dataclasses.dataclass
class Asked:
  """How often the sweep was asked to stop, and how often it has passed that on."""

  count: int = 0
  told: int = 0


@contextlib.contextmanager
def stopping() -> Generator[Asked]:
  """Inside, SIGINT, SIGTERM and SIGHUP are counted instead of ending the process."""
  asked = Asked()

  def handle(*_):
    asked.count += 1

  old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  try:
    yield asked
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def _signal(running, asked) -> None:
  """Passes a request on: SIGTERM (save and end) the first time, SIGKILL from the second on."""
  if asked.count == asked.told:
    return
  for job in running:
    with contextlib.suppress(ProcessLookupError):
      if asked.count == 1:
        job.process.terminate()
      else:
        os.killpg(job.process.pid, signal.SIGKILL)
  asked.told = asked.count


@contextlib.contextmanager
def claimed(workdir: Path, name: str = LOCK, what: str = "sweep") -> Generator[int]:
  """The folder is made, with a lock on it that the runs inherit; what: has it, as is said where another one does."""
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / name).open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(
        f"{workdir} is in use by another {what}, or by a run that one left; wait for it or end it"
      ) from None
    yield lock.fileno()


# Summary


def _swept(points: Sequence[Point]) -> list[str]:
  """The arguments and fields in which the points differ."""
  names = dict.fromkeys(name for point in points for name in point.values)
  return [name for name in names if len({repr(p.values.get(name)) for p in points}) > 1]


def _summary(point: Point, code: int, folder: Path) -> dict[str, Any]:
  status = STATUS.get(code, "failed")
  row: dict[str, Any] = dict(point=point.name, status=status)
  row |= dict(values=dict(point.values), steps=0, metrics={})
  if code == 0:
    run = runs.read(folder)
    row |= dict(steps=run.steps, metrics=compare.finals(run))
  return row
