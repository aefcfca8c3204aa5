"""The run folder: whose it is, and metrics that are never written twice."""

import json
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from posttrain_jax.runs import folder as workdir
from posttrain_jax.runs import provenance, record
from posttrain_jax.runs.metrics_log import Journal
from posttrain_jax.settings import ConfigError

CONFIG = ml_collections.ConfigDict({"steps": 3, "layers": (1, 2), "optimizer": {"lr": 0.1}})
OTHER = ml_collections.ConfigDict({"steps": 3, "layers": (1, 3), "optimizer": {"lr": 0.2}})


def claim(folder, config=CONFIG):
  with workdir.claimed(workdir.check(folder, config), config):
    pass


@pytest.mark.parametrize("name", ["new", "new/deeper"])
def test_a_folder_is_claimed_and_found_again(tmp_path, name):
  claim(tmp_path / name)
  before = (tmp_path / name / "config.json").read_bytes()
  claim(tmp_path / name)
  assert (tmp_path / name / "config.json").read_bytes() == before
  record = json.loads(before)
  assert record["config"] == {"steps": 3, "layers": [1, 2], "optimizer": {"lr": 0.1}}
  assert {"command", "versions", "commit", "devices"} < record.keys()
  assert "8 x cpu" in record["devices"]


def test_checking_writes_nothing(tmp_path):
  workdir.check(tmp_path / "new", CONFIG)
  assert not list(tmp_path.iterdir())


def test_another_config_is_refused_with_the_differences(tmp_path):
  claim(tmp_path)
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  with pytest.raises(ConfigError) as error:
    claim(tmp_path, OTHER)
  assert "layers: [1, 2] -> [1, 3]\n  optimizer.lr: 0.1 -> 0.2" in str(error.value)
  assert json.loads((tmp_path / "config.json").read_text())["config"]["optimizer"]["lr"] == 0.1


def test_a_run_of_a_version_with_fewer_fields_goes_on_where_they_change_nothing(tmp_path):
  now = lambda context: ml_collections.ConfigDict(
    {**CONFIG.to_dict(), "mesh": {"fsdp": 2, "context": context}, "epochs": None}
  )
  claim(tmp_path, ml_collections.ConfigDict({**CONFIG.to_dict(), "mesh": {"fsdp": 2}}))
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  claim(tmp_path, now(1))
  with pytest.raises(ConfigError, match=r"another config:\n  mesh.context: 1 -> 4\n"):
    claim(tmp_path, now(4))


def test_a_begun_run_may_wait_longer_for_its_verifiers(tmp_path):
  waits = lambda seconds, **other: ml_collections.ConfigDict(
    {"steps": 3, "reward": {"seconds": seconds, "weights": (1,)}, **other}
  )
  claim(tmp_path, waits(10.0))
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  claim(tmp_path, waits(60.0))
  assert record.config(tmp_path)["reward"] == {"seconds": 60.0, "weights": [1]}
  assert record.read_json(tmp_path / "config.json")["versions"]
  with pytest.raises(ConfigError, match=r"another config:\n  seed: '\(absent\)' -> 1\n"):
    claim(tmp_path, waits(90.0, seed=1))
  assert record.config(tmp_path)["reward"]["seconds"] == 60.0
  (tmp_path / record.DONE).touch()
  assert workdir.is_complete(
    tmp_path, waits(90.0).to_dict() | {"reward": {"seconds": 90.0, "weights": [1]}}
  )


def test_somebody_elses_folder_is_refused(tmp_path):
  (tmp_path / ".hidden").touch()
  workdir.check(tmp_path, CONFIG)
  (tmp_path / "thesis.tex").touch()
  with pytest.raises(ConfigError, match="not empty and holds no run"):
    workdir.check(tmp_path, CONFIG)
  with pytest.raises(ConfigError, match="is a file"):
    workdir.check(tmp_path / "thesis.tex", CONFIG)


def test_a_folder_without_a_step_is_the_next_configs(tmp_path):
  """A run that failed before it had taken one: the corrected command has the folder."""
  claim(tmp_path)
  (tmp_path / "metrics.jsonl").touch()
  (tmp_path / "evaluation-before.json").write_text("{}")
  (tmp_path / "checkpoints").mkdir()
  claim(tmp_path, OTHER)
  assert json.loads((tmp_path / "config.json").read_text())["config"]["optimizer"]["lr"] == 0.2
  assert not (tmp_path / "evaluation-before.json").exists()
  (tmp_path / "checkpoints" / "5").mkdir()
  with pytest.raises(ConfigError, match="another config"):
    claim(tmp_path)


def test_a_start_that_is_refused_leaves_nothing_and_one_that_has_worked_leaves_all(tmp_path):
  def refused(folder, *made):
    def start():
      with workdir.claimed(folder, CONFIG):
        (folder / "checkpoints").mkdir(exist_ok=True)
        for name in made:
          (folder / name).touch()
        raise ConfigError("late")

    with pytest.raises(ConfigError):
      start()

  refused(tmp_path / "new")
  assert not (tmp_path / "new").exists()
  (tmp_path / "mine").mkdir()
  refused(tmp_path / "mine")
  assert {entry.name for entry in (tmp_path / "mine").iterdir()} <= {".lock"}
  (tmp_path / "theirs" / "checkpoints" / "kept").mkdir(parents=True)
  refused(tmp_path / "theirs")
  assert (tmp_path / "theirs" / "checkpoints" / "kept").exists()
  refused(tmp_path / "evaluated", "evaluation-before.json")
  claim(tmp_path / "older")
  refused(tmp_path / "older")
  for name in ("evaluated", "older"):
    assert (tmp_path / name / "config.json").exists()


def test_a_refusal_is_told_where_its_folder_cannot_be_removed(tmp_path, monkeypatch):
  def busy(path):
    raise OSError("Directory not empty")  # as on NFS, where the lock is still open

  monkeypatch.setattr(type(tmp_path), "rmdir", busy)
  with (
    pytest.raises(ConfigError, match="late"),
    workdir.claimed(tmp_path / "new", CONFIG),
  ):
    raise ConfigError("late")
  assert not (tmp_path / "new" / "config.json").exists()


def test_a_folder_of_something_else_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": []}')
  with pytest.raises(
    ValueError, match=r"is a model's folder .* is of a llama.* not a run's folder"
  ):
    workdir.check(tmp_path, CONFIG)
  with pytest.raises(ValueError, match="is a model's folder"):
    record.read(tmp_path)
  (tmp_path / "config.json").write_text('{"hello": 1}')
  with pytest.raises(ValueError, match=r"something else .*hello"):
    workdir.check(tmp_path, CONFIG)


def test_a_home_is_a_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert workdir.check("~/runs/x", CONFIG) == tmp_path / "runs" / "x"


HOLD = """
import pathlib, sys, time
from posttrain_jax.runs import lock
with lock.held(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_folder_is_one_runs_until_its_process_is_gone(tmp_path):
  claim(tmp_path)
  command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
    try:
      assert other.stdout.readline() == "held\n"
      before = (tmp_path / "config.json").read_bytes()
      for enter in (workdir.check, lambda *given: workdir.claimed(*given).__enter__()):
        with pytest.raises(ConfigError, match=f"in use: process {other.pid} on .* or name another"):
          enter(tmp_path, CONFIG)
      assert (tmp_path / "config.json").read_bytes() == before
    finally:
      other.kill()
  claim(tmp_path)  # at once, with nothing to remove


def test_what_a_killed_start_left_half_written_is_removed(tmp_path):
  claim(tmp_path)
  (tmp_path / ".metrics.jsonl.partial-123").touch()
  (tmp_path / ".model.partial-abc" / "new").mkdir(parents=True)
  claim(tmp_path)
  assert {p.name for p in tmp_path.iterdir()} == {".lock", "config.json"}


def written(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_journal_goes_on_after_its_step_and_writes_nothing_twice(tmp_path):
  journal = Journal(tmp_path, 0)
  for step in range(1, 6):
    journal.write(step, {"loss": 1 / step})
  journal.write(3, {"eval_loss": 0.5})
  journal.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "lo')  # cut short by a kill
  journal = Journal(tmp_path, 3)
  journal.write(4, {"loss": 9.0})
  journal.close()
  assert written(tmp_path) == [
    {"step": 1, "loss": 1.0},
    {"step": 2, "loss": 0.5},
    {"step": 3, "loss": 1 / 3},
    {"step": 3, "eval_loss": 0.5},
    {"step": 4, "loss": 9.0},
  ]


def test_every_line_is_on_disk_when_it_is_written(tmp_path):
  journal = Journal(tmp_path, 0)
  journal.write(1, {"loss": 2.0})
  assert written(tmp_path) == [{"step": 1, "loss": 2.0}]
  journal.close()


def test_tensorboard_gets_the_same_numbers(tmp_path):
  journal = Journal(tmp_path, 0)
  journal.write(1, {"loss": 2.0, "kl": 0.25})
  journal.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  found, data = {}, file.read_bytes()
  while data:  # length, its checksum, the event, its checksum
    size = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
    data = data[16 + size :]
  assert {k: found[k] for k in ("loss", "kl")} == {"loss": (1, 2.0), "kl": (1, 0.25)}


def test_tensorboard_holds_the_histograms(tmp_path):
  from posttrain_jax.core import metrics

  counts = np.zeros(len(metrics.EDGES) + 1)
  counts[[0, 5]] = 2, 3
  journal = Journal(tmp_path, 0)
  journal.draw(7, {"margins": counts})
  journal.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  data, found = file.read_bytes(), []
  while data:
    length = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12 : 12 + length])
    found += [(event.step, value) for value in event.summary.value]
    data = data[16 + length :]
  ((step, value),) = found
  assert (step, value.tag, value.histo.num) == (7, "margins", 5)
  assert list(value.histo.bucket) == counts.tolist()
  assert len(value.histo.bucket_limit) == len(counts)


@pytest.mark.parametrize(
  ("program", "named"),
  [
    ("/home/a/posttrain_jax/__main__.py", "posttrain"),
    ("/home/a/.venv/bin/posttrain", "posttrain"),
    ("mine.py", "mine.py"),
  ],
)
def test_a_runs_command_is_one_that_can_be_typed(program, named):
  said = provenance.command([program, "train", "--config=sft:data=my rows.jsonl"])
  assert said == f"{named} train '--config=sft:data=my rows.jsonl'"
