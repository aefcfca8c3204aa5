"""A search asks Optuna, ends what falls behind, and goes on where it was stopped."""

import io
import json
import math
import os
import signal
import sys

import pytest
import rich.console

from posttrain_jax.build import search
from posttrain_jax.settings import ConfigError
from tests.build import test_sweep

pytest.importorskip("optuna", reason="no optuna: pip install 'posttrain-jax[search]'")

# eval_loss falls to (log10(lr) + 3)^2 over four evaluations; far from it, a run would take a minute
TRAIN = """
import json, math, pathlib, signal, sys, time
from posttrain_jax import settings

given = [a for a in sys.argv[1:] if a.startswith("--config.")]
named = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a not in given)
config = settings.load(named["config"], given)
folder = pathlib.Path(named["workdir"])
with (folder.parent / "order.txt").open("a") as f:
  f.write(folder.name + chr(10))
(folder / "config.json").write_text(json.dumps({"config": settings.plain(config)}))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
loss = (math.log10(config.optimizer.lr) + 3) ** 2
with (folder / "metrics.jsonl").open("w") as f:
  for step in range(1, 5):
    f.write(json.dumps({"step": step, "eval_loss": loss + 1 / step}) + chr(10))
    f.flush()
    if step == 2 and (loss > 0.8 or config.behave == "hang" and not (folder / "once").exists()):
      (folder / "once").touch()
      (folder.parent / "ready").touch()
      time.sleep(3 if loss > 0.8 and config.behave != "hang" else 60)
if config.behave == "fail":
  sys.exit(3)
done = {"steps": config.steps, "final": {"eval_loss": loss, "loss": loss}}
(folder / "done.json").write_text(json.dumps(done))
"""
SPACE = '{"optimizer.lr": (1e-5, 1e-1, "log")}'


class Search(test_sweep.Sweep):
  def __init__(self, folder):
    super().__init__(folder)
    (folder / "train.py").write_text(TRAIN)
    self.space(SPACE)

  def space(self, text):
    self.config.write_text(f"{test_sweep.CONFIG}\ndef search():\n  return {text}\n")

  def run(self, trials=10, metric="eval_loss", overrides=(), **options):
    console = rich.console.Console(file=io.StringIO(), width=200)
    command = (sys.executable, str(self.folder / "train.py"))
    options = dict(command=command, console=console, overrides=overrides, **options)
    code = search.run(f"{self.config}", self.workdir, trials=trials, metric=metric, **options)
    return code, console.file.getvalue()

  def asked(self):
    return json.loads((self.workdir / search.ASKED).read_text())["points"]


@pytest.fixture
def grid(tmp_path):
  return Search(tmp_path)


def test_it_finds_the_best_and_ends_what_falls_behind(grid):
  code, printed = grid.run(trials=12, jobs=3)
  assert code == 0
  rows = grid.summary()
  assert len(rows) == len(grid.asked()) == 12
  states = [row["status"] for row in rows]
  assert {*states} == {"finished", "pruned"}
  best = min(row["metrics"]["eval_loss"] for row in rows if row["metrics"])
  assert best < 0.1
  # the best at a step is never behind the median
  ended = [row["values"]["optimizer.lr"] for row in rows if row["status"] == "pruned"]
  assert all((math.log10(lr) + 3) ** 2 > best for lr in ended)
  assert printed.startswith("12 points over optimizer.lr; for the lowest eval_loss\n")
  assert "pruned after" in printed


def test_stopped_it_goes_on_with_what_ran_and_asks_no_more_than_it_was_to(grid):
  grid.space('{"optimizer.lr": [1e-3, 2e-3, 3e-3]}')
  asked = dict(trials=3, overrides=["--config.behave=hang"])
  thread = test_sweep.when(grid.workdir / "ready", lambda: os.kill(os.getpid(), signal.SIGTERM))
  assert grid.run(**asked)[0] == 75
  thread.join()
  (first,) = grid.started()
  assert [row["state"] for row in grid.asked()] == ["running"]
  (grid.workdir / "ready").unlink()
  for path in (grid.workdir / first).iterdir():
    assert path.name != "done.json"
  for lr in ("0.001", "0.002", "0.003"):  # the others need not hang
    (grid.workdir / f"optimizer.lr={lr}").mkdir(exist_ok=True)
    (grid.workdir / f"optimizer.lr={lr}" / "once").touch()
  code, printed = grid.run(**asked)
  assert code == 0
  assert grid.started()[0] == first
  assert [row["state"] for row in grid.asked()] == ["finished"] * 3
  code, printed = grid.run(**asked)
  assert (code, grid.started()) == (0, [])
  assert "3 of them done before" in printed


def test_choices_that_are_all_tried_are_the_end(grid):
  grid.space('{"optimizer.lr": [1e-3, 2e-3]}')
  code, _ = grid.run(trials=9)
  assert code == 0
  assert sorted(grid.started()) == ["optimizer.lr=0.001", "optimizer.lr=0.002"]


def test_choices_that_are_tuples_are_known_again(grid):
  grid.space('{"layers": [(1,), (2, 3), (4,)]}')
  assert grid.run(trials=3)[0] == 0
  assert len({*grid.started()}) == 3
  code, printed = grid.run(trials=3)
  assert (code, grid.started()) == (0, [])
  assert "3 of them done before" in printed
  grid.space('{"layers": [(1,), (2, 3)]}')
  with pytest.raises(ConfigError, match=r"layers was \[4\], which search"):
    grid.run(trials=3)


def test_choices_that_are_spelt_alike_are_all_tried(grid):
  grid.space('{"optimizer.lr": [1e-3], "model": ["a/é", "a/è", "a-é"]}')
  assert grid.run(trials=9)[0] == 0
  assert len({*grid.started()}) == 3
  assert grid.run(trials=9)[0] == 0
  assert grid.started() == []


def test_a_failure_is_told_and_the_search_goes_on(grid):
  grid.space('{"optimizer.lr": [1e-3], "behave": ["fail", "good"]}')
  code, _ = grid.run(trials=2)
  assert code == 1
  assert sorted(row["state"] for row in grid.asked()) == ["failed", "finished"]


@pytest.mark.parametrize(
  ("space", "metric", "said"),
  [
    ('{"optimizer.lr": (1e-1, 1e-5)}', "eval_loss", "write a list of choices"),
    ('{"optimizer.lr": "big"}', "eval_loss", "write a list of choices"),
    (SPACE, "learning_rate", "neither way of it is better"),
    (SPACE, "eval_mean_token_accuracy", "has no such metric; it has"),
  ],
)
def test_what_cannot_be_searched_is_said(grid, space, metric, said):
  grid.space(space)
  with pytest.raises(ConfigError, match=said):
    grid.run(trials=2, metric=metric)


def test_another_search_in_the_folder_is_refused(grid):
  grid.space('{"optimizer.lr": [1e-3]}')
  grid.run(trials=1)
  with pytest.raises(ConfigError, match="holds a search for eval_loss"):
    grid.run(trials=1, metric="loss")
  grid.space('{"steps": [4, 5]}')
  with pytest.raises(ConfigError, match=r"holds a search over optimizer.lr"):
    grid.run(trials=1)


def test_a_file_without_a_space_is_told_how_to_write_one(tmp_path):
  (tmp_path / "plain.py").write_text(test_sweep.CONFIG)
  with pytest.raises(ConfigError, match=r"has no search\(\): write one"):
    search.domains(f"{tmp_path}/plain.py")


def test_domains_are_optunas(grid):
  grid.space('{"a": [1, "b"], "b": (1, 64, "log"), "c": (0, 1.0), "d": (2, 8)}')
  read = search.domains(str(grid.config))
  assert read["a"].choices == (1, "b")
  assert (read["b"].low, read["b"].high, read["b"].log) == (1, 64, True)
  assert type(read["c"]).__name__ == "FloatDistribution"
  assert type(read["d"]).__name__ == "IntDistribution"
