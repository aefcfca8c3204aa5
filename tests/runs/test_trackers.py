"""Trackers beside metrics.jsonl: told the same, once, and never in the way."""

import importlib.util
import json
import logging
import threading
import time

import pytest

from posttrain_jax.runs import record, trackers
from posttrain_jax.runs.metrics_log import Journal
from posttrain_jax.settings import ConfigError

CONFIG = {
  "steps": 3,
  "data": {"train": "https://me:pass1234@host/a.jsonl?sig=1&token=abcd1234"},
  "model": {"name": "hf_abcdefghijklmnopqrstuv"},
  "log": {"wandb": "ours", "mlflow": "", "trackio": ""},
}


class Service:
  """What a tracker's library would have open."""

  def __init__(self):
    self.rows, self.ended, self.opened = [], None, []

  def open(self, project, folder, run, config):
    self.opened.append((project, run, config))
    return self, run or "first"

  def write(self, step, values):
    self.rows.append((step, values))

  def close(self, *, is_complete):
    self.ended = is_complete


@pytest.fixture
def service(monkeypatch):
  made = Service()
  monkeypatch.setattr(trackers, "OPENINGS", {"wandb": made.open})
  return made


def journal(folder, step):
  return Journal(folder, step, trackers.of_run(folder, CONFIG))


def test_a_tracker_is_told_what_the_journal_is(tmp_path, service):
  told = journal(tmp_path, 0)
  told.write(1, {"loss": 2.0, "loss/special": 1.0})
  told.write(1, {"eval_loss": 3.0})
  told.is_complete = True
  told.close()
  assert service.rows == [(1, {"loss": 2.0, "loss/special": 1.0}), (1, {"eval_loss": 3.0})]
  assert service.ended
  rows = [{k: v for k, v in row.items() if k != "step"} for row in record.read_rows(told.path)]
  assert rows == [values for _, values in service.rows]


def test_its_config_is_told_without_what_looks_like_a_secret(tmp_path, service):
  journal(tmp_path, 0).close()
  ((project, _, config),) = service.opened
  assert (project, config["steps"], config["log.wandb"]) == ("ours", 3, "ours")
  assert config["data.train"] == "https://***@host/a.jsonl?sig=1&token=***"
  assert "abcdefgh" not in json.dumps(config)


def test_a_resumed_run_is_the_same_there_and_hears_nothing_twice(tmp_path, service):
  first = journal(tmp_path, 0)
  for step in (1, 2, 3):
    first.write(step, {"loss": 1 / step, "tokens_per_second": 10.0, "timing_s/scoring": 3.0})
  first.close()
  assert not service.ended
  assert json.loads((tmp_path / trackers.RUNS).read_text()) == {"wandb": "first"}
  again = journal(tmp_path, 1)
  again.write(
    2, {"loss": 1 / 2, "tokens_per_second": 20.0, "timing_s/scoring": 0.0}
  )  # as before, but for the clock
  again.write(3, {"loss": 0.25, "tokens_per_second": 20.0})  # by another rate
  again.close()
  assert [run for _, run, _ in service.opened] == [None, "first"]
  assert [(step, values["loss"]) for step, values in service.rows] == [
    *[(1, 1), (2, 1 / 2), (3, 1 / 3)],
    (3, 0.25),
  ]


def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(tmp_path, service, caplog):
  def write(step, values):
    raise ConnectionError("no route\nto host")

  service.write = write
  told = journal(tmp_path, 0)
  for step in (1, 2, 3):
    told.write(step, {"loss": 1.0})
  told.close()
  assert len(record.read_rows(told.path)) == 3
  (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
  assert said == "log.wandb=ours: ConnectionError: no route to host; the run goes on without it"


@pytest.mark.parametrize("waiting", [1, 100])
def test_a_tracker_that_hangs_holds_nothing_up(tmp_path, service, monkeypatch, caplog, waiting):
  monkeypatch.setattr(trackers, "HURRY", 0.05)
  monkeypatch.setattr(trackers, "WAITING", waiting)
  hung = threading.Event()
  service.write = lambda step, values: hung.wait(30)
  told = journal(tmp_path, 0)
  for step in range(5):
    told.write(step, {"loss": 1.0})
  told.close()
  hung.set()
  (said,) = [r.getMessage() for r in caplog.records]
  assert ("1 rows behind" if waiting == 1 else "does not answer") in said


def test_a_library_that_is_not_there_is_said_with_its_name(monkeypatch):
  trackers.check({"steps": 3})
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"log.wandb=ours: .* pip install 'posttrain-jax\[wandb\]'"):
    trackers.check(CONFIG)
  trackers.check({"log": {"wandb": "", "mlflow": "", "trackio": ""}})


# --- the libraries themselves, without a network ---------------------------------------------------------------------


def two_starts(folder, name, *, apart=0.0):
  config = {**CONFIG, "log": {name: "ours"}}
  for steps in ((1, 2), (3,)):
    told = Journal(folder, steps[0] - 1, trackers.of_run(folder, config))
    for step in steps:
      told.write(step, {"loss": 1 / step, "eval_loss/sp+ecial": 2.0})
    told.is_complete = True
    told.close()
    assert not any(tracker.has_failed for tracker in told.trackers)
    time.sleep(apart)
  return json.loads((folder / trackers.RUNS).read_text())[name]


def test_mlflow_has_the_run(tmp_path, monkeypatch):
  pytest.importorskip("mlflow", reason="needs pip install 'posttrain-jax[mlflow]'")
  import mlflow

  address = f"sqlite:///{tmp_path}/mlflow.db"
  monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
  run = two_starts(tmp_path, "mlflow")
  client = mlflow.MlflowClient(address)
  found = client.get_run(run)
  assert (found.info.status, found.data.params["steps"]) == ("FINISHED", "3")
  history = client.get_metric_history(run, "loss")
  assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
  assert found.data.metrics["eval_loss/sp_ecial"] == 2.0


def test_trackio_has_the_run(tmp_path, monkeypatch):
  pytest.importorskip("trackio", reason="needs pip install 'posttrain-jax[trackio]'")
  from trackio import sqlite_storage

  monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path)
  run = two_starts(tmp_path, "trackio")
  rows = sqlite_storage.SQLiteStorage.get_logs("ours", run)
  assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]


def test_wandb_has_the_run(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="needs pip install 'posttrain-jax[wandb]'")
  monkeypatch.setenv("WANDB_MODE", "offline")
  run = two_starts(tmp_path, "wandb", apart=1.0)  # its files are named by the second
  files = sorted(tmp_path.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb"))
  assert [b"eval_loss/sp+ecial" in file.read_bytes() for file in files] == [True, True]
  assert len(files) == 2
  assert not any(b"pass1234" in file.read_bytes() for file in files)
