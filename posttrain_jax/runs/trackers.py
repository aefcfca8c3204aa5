"""The run in Weights & Biases, MLflow and trackio as well, where its owner asks for that: by their own libraries.

A tracker is told in a thread of its own, so that nothing it does slows the run; where it fails that is said once, and
the run goes on without it.  What it is told are the names and numbers that TensorBoard has, and the config, from which
what looks like a password or a key has been taken out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from posttrain_jax import settings
from posttrain_jax.core import files
from posttrain_jax.settings import ConfigError

log = logging.getLogger(__name__)
NAMES = (
  "wandb",
  "mlflow",
  "trackio",
)  # of the fields of config.log, of the extras, and of the libraries
RUNS = "trackers.json"  # {name: what the tracker calls this run}
WAITING = 10_000  # rows that a slow tracker may be behind
PATIENCE = 30.0  # seconds that the end of a run waits for what a tracker has not sent yet
HURRY = 5.0  # of a run that was stopped
SECRETS = (
  (re.compile(r"(?<=://)[^/@\s]+(?=@)"), "***"),  # user:password@ of an address
  (re.compile(r"(?i)((?:token|key|secret|password|signature|credential)\w*=)[^&\s]+"), r"\1***"),
  (re.compile(r"\b(?:hf|sk|ghp|gho|glpat|xox[a-z])[_-][\w-]{16,}"), "***"),
)


class Service(Protocol):
  """A run that a tracker's library has open."""

  def write(self, step: int, values: Mapping[str, float]) -> None: ...

  def close(self, *, is_complete: bool) -> None: ...


# (project, folder, what the tracker calls the run or None, config) -> (its run, what it calls it)
Open = Callable[[str, Path, str | None, Mapping[str, Any]], tuple[Service, str]]


def asked(config: Mapping[str, Any]) -> dict[str, str]:
  """{name: project} of the trackers that a plain config asks for."""
  section = config.get("log", {})  # runs of older versions have none
  return {name: section[name] for name in NAMES if section.get(name)}


def check(config: Mapping[str, Any]) -> None:
  """Raises ConfigError where the library of a tracker is not installed."""
  for name, project in asked(config).items():
    if importlib.util.find_spec(name) is None:
      raise ConfigError(
        f"log.{name}={project}: its library is not installed; write pip install 'posttrain-jax[{name}]' (or {name}"
        f" alone), or leave log.{name} out"
      )


def of_run(folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
  """The trackers of a run, each of which goes on with the run that it has of this folder."""
  told = clean(settings.flat(dict(config)))
  return [Tracker(name, project, folder, told) for name, project in asked(config).items()]


def close(trackers: Sequence[Tracker], *, is_complete: bool) -> None:
  """What they have not sent yet is sent, for a while."""
  for tracker in trackers:
    tracker.end(is_complete=is_complete)
  deadline = time.monotonic() + (PATIENCE if is_complete else HURRY)
  for tracker in trackers:
    tracker.wait(max(deadline - time.monotonic(), 0))


def clean(values: Mapping[str, Any]) -> dict[str, Any]:
  """The values, without what looks like a password or a key.

  >>> clean({"data.train": "https://me:secret@host/a.jsonl?token=abc&x=1", "steps": 3})
  {'data.train': 'https://***@host/a.jsonl?token=***&x=1', 'steps': 3}
  """
  return {name: _cleaned(value) for name, value in values.items()}


def _cleaned(value: Any) -> Any:
  if isinstance(value, list):
    return [_cleaned(each) for each in value]
  if not isinstance(value, str):
    return value
  for pattern, instead in SECRETS:
    value = pattern.sub(instead, value)
  return value


class Tracker:
  """A tracker's run, opened, told and closed in a thread of its own."""

  def __init__(
    self,
    name: str,
    project: str,
    folder: Path,
    config: Mapping[str, Any],
    opening: Open | None = None,
  ):
    self.name, self.project, self.folder, self.config = name, project, folder, config
    self.opening = opening or OPENINGS[name]
    self.rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
    self.has_failed = self.is_complete = False
    self.thread = threading.Thread(target=self._run, name=name, daemon=True)
    self.thread.start()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if self.has_failed:
      return
    try:
      self.rows.put_nowait((step, dict(values)))
    except queue.Full:
      self._fail(f"it is {WAITING:,} rows behind")

  def end(self, *, is_complete: bool) -> None:
    """There are no more rows."""
    self.is_complete = is_complete
    with contextlib.suppress(queue.Full):  # so far behind it has failed
      self.rows.put_nowait(None)

  def wait(self, seconds: float) -> None:
    """Returns when it has told all rows, or has failed, or after so long."""
    if self.has_failed:
      return
    self.thread.join(seconds)
    if self.thread.is_alive():
      self._fail("it does not answer, and may lack the last rows")

  def _run(self) -> None:
    try:
      service = self._opened()
      while (row := self.rows.get()) is not None and not self.has_failed:
        service.write(*row)
      service.close(is_complete=self.is_complete)
    except Exception as error:  # whatever a library makes of its network
      self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

  def _opened(self) -> Service:
    path = self.folder / RUNS
    with _WRITING:
      known = files.read_json(path) if path.exists() else {}
    service, called = self.opening(self.project, self.folder, known.get(self.name), self.config)
    with _WRITING:
      known = files.read_json(path) if path.exists() else {}
      files.write_json(path, {**known, self.name: called})
    return service

  def _fail(self, why: str) -> None:
    if not self.has_failed:
      self.has_failed = True
      log.warning("log.%s=%s: %s; the run goes on without it", self.name, self.project, why)


_WRITING = threading.Lock()  # of the file that trackers share


# --- the libraries ---------------------------------------------------------------------------------------------------


def _wandb(
  project: str, folder: Path, run: str | None, config: Mapping[str, Any]
) -> tuple[Service, str]:
  import wandb

  how = wandb.Settings(
    console="off",  # what is printed stays here
    disable_git=True,
    disable_code=True,
    save_code=False,
    x_disable_meta=True,  # the command, the host, the user
    x_disable_stats=True,
    quiet=True,
  )
  # init would ask for a key at the terminal
  if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
    raise PermissionError(
      "no key: write `wandb login` once, or WANDB_MODE=offline before the command"
    )
  called = run or uuid.uuid4().hex[:8]
  opened = wandb.init(
    project=project,
    id=called,
    name=folder.name,
    dir=str(folder),
    config=dict(config),
    resume="allow",
    settings=how,
  )
  return _Wandb(opened), called


class _Wandb:
  def __init__(self, run: Any):
    self.run = run

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self.run.log(dict(values), step=step)

  def close(self, *, is_complete: bool) -> None:
    self.run.finish(exit_code=0 if is_complete else 1)


def _mlflow(
  project: str, folder: Path, run: str | None, config: Mapping[str, Any]
) -> tuple[Service, str]:
  import mlflow
  from mlflow.entities import Param

  client = mlflow.MlflowClient()
  if run is not None:
    client.update_run(run, status="RUNNING")
    return _MLflow(client, run), run
  experiment = client.get_experiment_by_name(project)
  number = client.create_experiment(project) if experiment is None else experiment.experiment_id
  run = client.create_run(number, run_name=folder.name).info.run_id
  params = [Param(_of_mlflow(name), str(value)[:6000]) for name, value in config.items()]
  for start in range(0, len(params), 100):  # as many as it takes at once
    client.log_batch(run, params=params[start : start + 100])
  return _MLflow(client, run), run


class _MLflow:
  def __init__(self, client: Any, run: str):
    self.client, self.run = client, run

  def write(self, step: int, values: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    rows = [Metric(_of_mlflow(name), float(value), now, step) for name, value in values.items()]
    self.client.log_batch(self.run, metrics=rows)

  def close(self, *, is_complete: bool) -> None:
    self.client.set_terminated(self.run, "FINISHED" if is_complete else "KILLED")


def _of_mlflow(name: str) -> str:
  """A name with the letters that MLflow takes, as it is where it has no others.

  >>> _of_mlflow("eval_loss/special"), _of_mlflow("loss/a+b//c")
  ('eval_loss/special', 'loss/a_b/c')
  """
  return re.sub(r"/+", "/", re.sub(r"[^/\w.\- :]", "_", name)).strip("/")


def _trackio(
  project: str, folder: Path, run: str | None, config: Mapping[str, Any]
) -> tuple[Service, str]:
  import trackio

  called = run or f"{folder.name}-{uuid.uuid4().hex[:8]}"  # it knows runs by their names
  opened = trackio.init(
    project,
    name=called,
    config=dict(config),
    resume="allow",
    embed=False,
    auto_log_gpu=False,
    auto_log_cpu=False,
  )
  return _Trackio(opened), called


class _Trackio:
  def __init__(self, run: Any):
    self.run = run

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self.run.log(dict(values), step=step)

  def close(self, *, is_complete: bool) -> None:
    self.run.finish()


OPENINGS: Mapping[str, Open] = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
