"""A sweep runs what is left to run, survives points that fail, and stops when it is asked to."""

import csv
import io
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time

import pytest
import rich.console

from posttrain_jax.build import summary, sweep
from posttrain_jax.settings import ConfigError

CONFIG = """
import ml_collections

def get_config(arg=None):
  args = dict(part.partition("=")[::2] for part in (arg or "").split(",") if part)
  if set(args) - {"model", "smoke", "adapter", "beta"}:
    raise ValueError(f"unknown config argument in {arg}")
  return ml_collections.ConfigDict(dict(
    model=args.get("model", "none"), adapter=dict(method=args.get("adapter", "none"), r=8),
    smoke="smoke" in args, optimizer=dict(lr=1e-3), steps=4, behave="good", layers=(1,), eval=dict(suite=""),
    objective=dict(name="preference", beta=float(args["beta"])) if "beta" in args else dict(name="sft")))

def sweep():
  return POINTS
"""

# What `posttrain train` does to a folder, in a moment; `behave` is what happens to it.
TRAIN = """
import json, pathlib, signal, sys, time
from posttrain_jax import settings

given = [a for a in sys.argv[1:] if a.startswith("--config.")]
named = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a not in given)
config = settings.load(named["config"], given)
folder = pathlib.Path(named["workdir"])
with (folder.parent / "order.txt").open("a") as f:
  f.write(folder.name + chr(10))
(folder / "config.json").write_text(json.dumps({"config": settings.plain(config)}))
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 9.0}) + chr(10))

def save(*_):
  (folder / "saved").touch()
  raise SystemExit(75)

behave = config.behave
if behave in ("hang", "stubborn"):
  signal.signal(signal.SIGTERM, save if behave == "hang" else signal.SIG_IGN)
  (folder / "ready").touch()
  time.sleep(60)
if behave == "preempted":
  raise SystemExit(75)
if behave == "fail":
  print("[red]this is", "what went wrong")
  raise SystemExit(3)
if behave != "forget":
  loss = config.optimizer.lr * config.adapter.r
  final = {"loss": loss, "grad_norm": 1.0}
  if "beta" in config.objective and not config.smoke:  # accuracy and KL fall with beta
    beta = config.objective.beta
    final |= {"eval_loss": 1 - beta, "eval_rewards/accuracies": 1 - beta / 2, "eval_kl": 0.1 / beta}
  if config.eval.suite:  # the larger the rate, the more is forgotten
    lr = config.optimizer.lr
    final |= {"eval_suite/sums": 0.9 - lr, "eval_bits_per_byte/code": 1 + lr, "eval_suite/change": -lr}
  done = {"steps": config.steps, "final": final}
  (folder / "done.json").write_text(json.dumps(done))
"""


class Sweep:
  """A config with these points, and a folder."""

  def __init__(self, folder):
    self.folder, self.workdir = folder, folder / "out"
    self.config = folder / "grid.py"
    (folder / "train.py").write_text(TRAIN)
    self.points([("", {"optimizer.lr": lr}) for lr in (0.1, 0.01)])

  def points(self, points):
    self.config.write_text(f"{CONFIG}\nPOINTS = {points!r}\n")

  def run(self, arguments="", width=200, **options):
    """(exit code, what was printed)."""
    console = rich.console.Console(file=io.StringIO(), width=width)
    options = dict(
      command=(sys.executable, str(self.folder / "train.py")), console=console, **options
    )
    code = sweep.run(f"{self.config}{arguments}", self.workdir, **options)
    return code, console.file.getvalue()

  def started(self):
    """The points in the order in which they were started, since the last look."""
    path = self.workdir / "order.txt"
    names = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return names

  def summary(self):
    return json.loads((self.workdir / "summary.json").read_text())


@pytest.fixture
def grid(tmp_path):
  return Sweep(tmp_path)


def test_every_point_runs_in_its_own_folder(grid):
  grid.points(
    [("adapter=lora", {"adapter.r": r, "optimizer.lr": lr}) for r in (4, 16) for lr in (0.1, 1e-4)]
  )
  code, printed = grid.run(":model=tiny,smoke", overrides=["--config.steps=7"])
  assert code == 0
  names = [
    "adapter=lora__adapter.r=4__optimizer.lr=0.1",
    "adapter=lora__adapter.r=4__optimizer.lr=0.0001",
    "adapter=lora__adapter.r=16__optimizer.lr=0.1",
    "adapter=lora__adapter.r=16__optimizer.lr=0.0001",
  ]
  assert grid.started() == names
  record = json.loads((grid.workdir / names[2] / "config.json").read_text())["config"]
  assert record["adapter"] == {"method": "lora", "r": 16}
  assert (record["model"], record["smoke"], record["steps"]) == ("tiny", True, 7)
  rows = list(csv.DictReader((grid.workdir / "summary.csv").open()))
  assert [row["point"] for row in rows] == names
  assert rows[2]["adapter.r"] == "16"
  assert float(rows[2]["loss"]) == pytest.approx(1.6)
  assert {row["status"] for row in rows} == {"finished"}
  assert [row["metrics"]["loss"] for row in grid.summary()] == pytest.approx(
    [0.4, 4e-4, 1.6, 1.6e-3]
  )
  assert (grid.workdir / "summary.png").read_bytes().startswith(b"\x89PNG")
  # Only what differs is a column; what holds for all points is not.
  assert re.search(r"\br +lr +status +steps +loss", printed)


def test_a_points_arguments_win(grid):
  (point,) = (grid.points([("model=b", {})]), sweep.expand(f"{grid.config}:model=a,smoke"))[1]
  assert point.config == f"{grid.config}:model=b,smoke"
  assert (point.name, point.resolved["model"]) == ("model=b", "b")


def test_finished_points_are_skipped_and_failed_ones_run_again(grid):
  grid.points([("", {"optimizer.lr": 0.1}), ("", {"behave": "fail"}), ("", {"optimizer.lr": 0.3})])
  code, printed = grid.run()
  assert code == 1
  assert grid.started() == ["optimizer.lr=0.1", "behave=fail", "optimizer.lr=0.3"]
  assert [row["status"] for row in grid.summary()] == ["finished", "failed", "finished"]
  assert "behave=fail: FAILED" in printed
  assert "(exit code 3)" in printed
  assert "[red]this is what went wrong" in printed.partition("the end of")[2]
  code, printed = grid.run()
  assert (code, grid.started()) == (1, ["behave=fail"])
  assert "optimizer.lr=0.1: finished before" in printed
  log = (grid.workdir / "behave=fail" / "log.txt").read_text()
  assert log.count("what went wrong") == 2
  assert "--config.behave=fail --workdir=" in log


def test_a_finished_run_of_another_config_is_not_skipped(grid):
  grid.run()
  grid.started()
  grid.run(overrides=["--config.steps=9"])
  assert grid.started() == ["optimizer.lr=0.1", "optimizer.lr=0.01"]


def test_a_command_that_ends_well_without_a_result_has_failed(grid):
  grid.points([("", {"behave": "forget"})])
  code, printed = grid.run()
  assert code == 1
  assert "left no done.json" in printed


def when(ready, *actions):
  """Runs the actions in a thread as soon as the file (or all of them) exists, half a second apart."""
  every = ready if isinstance(ready, list) else [ready]

  def wait():
    until = time.monotonic() + 30
    while not all(path.exists() for path in every) and time.monotonic() < until:
      time.sleep(0.02)
    for action in actions:
      action()
      time.sleep(0.5)

  thread = threading.Thread(target=wait)
  thread.start()
  return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_lets_the_run_save(grid, number):
  grid.points([("", {"optimizer.lr": 0.1}), ("", {"behave": "hang"}), ("", {"steps": 5})])
  before = signal.getsignal(number)
  folder = grid.workdir / "behave=hang"
  thread = when(folder / "ready", lambda: os.kill(os.getpid(), number))
  code, printed = grid.run()
  thread.join()
  assert code == 75
  assert (folder / "saved").exists()
  assert grid.started() == ["optimizer.lr=0.1", "behave=hang"]
  assert [row["status"] for row in grid.summary()] == ["finished", "stopped", "stopped"]
  assert "behave=hang: stopped" in printed
  assert signal.getsignal(number) is before


def test_asked_twice_it_kills(grid):
  grid.points([("", {"behave": "stubborn"})])
  stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
  started = time.monotonic()
  thread = when(grid.workdir / "behave=stubborn" / "ready", stop, stop)
  code, _ = grid.run()
  thread.join()
  assert code == 75
  assert time.monotonic() - started < 30  # the run would sleep for a minute


def test_a_preempted_run_ends_the_sweep(grid):
  grid.points([("", {"behave": "preempted"}), ("", {"optimizer.lr": 0.1})])
  assert grid.run()[0] == 75
  assert grid.started() == ["behave=preempted"]


def test_several_at_once(grid):
  """Neither of two that wait for the stop ends by itself: both must have been started."""
  grid.points([("", {"behave": "hang"}), ("", {"behave": "hang", "steps": 2})])
  both = [grid.workdir / name / "ready" for name in ("behave=hang", "behave=hang__steps=2")]
  thread = when(both, lambda: os.kill(os.getpid(), signal.SIGTERM))
  code, _ = grid.run(jobs=2)
  thread.join()
  assert code == 75
  assert all(
    (grid.workdir / name / "saved").exists() for name in ("behave=hang", "behave=hang__steps=2")
  )


def test_two_sweeps_do_not_share_a_folder(grid):
  grid.points([("", {"behave": "hang"})])
  seen = []

  def second():
    console = rich.console.Console(file=io.StringIO())
    with pytest.raises(ConfigError, match="in use by another sweep"):
      sweep.run(str(grid.config), grid.workdir, command=("train",), console=console)
    seen.append("refused")

  thread = when(
    grid.workdir / "behave=hang" / "ready", second, lambda: os.kill(os.getpid(), signal.SIGTERM)
  )
  grid.run()
  thread.join()
  assert seen == ["refused"]


def test_points_are_announced(grid):
  _, printed = grid.run()
  assert printed.startswith("2 points over optimizer.lr; 2 to run, one at a time\n")
  assert "optimizer.lr=0.01: started, point 2 of 2" in printed
  _, printed = grid.run()
  assert "2 points over optimizer.lr, 2 of them finished before; 0 to run" in printed


def test_across_betas_accuracies_are_compared_and_no_loss(grid):
  grid.points([(f"beta={beta}", {}) for beta in (0.5, 0.1, 0.3)])
  code, printed = grid.run()
  assert code == 0
  assert re.search(r"beta +status +steps +eval_rewards/accuracies +eval_kl", printed)
  assert re.search(r"0\.1 +finished +4 +0\.95 \* +1\b", printed)
  assert "higher is better" in printed
  code, printed = grid.run(metric="eval_loss")
  assert code == 0
  assert "eval_loss is shown, not ranked: the points differ in objective.beta" in printed
  assert " * " not in printed
  assert grid.summary()[0]["values"] == {"beta": 0.5}


def test_where_the_rates_differ_losses_are_compared(grid):
  _, printed = grid.run()
  assert re.search(r"0\.01 +finished +4 +0\.08 \*", printed)
  assert "loss: lower is better, * is the best." in printed


def test_nothing_is_ranked_where_nothing_compares(grid):
  grid.points([(f"beta={beta}", {}) for beta in (0.1, 0.3)])
  code, printed = grid.run(":smoke")  # which leaves no accuracy
  assert code == 0
  assert (
    "nothing that the points have compares between them: the points differ in objective.beta"
    in printed
  )
  assert not (grid.workdir / "summary.png").exists()


@pytest.mark.parametrize(
  ("fields", "has", "metric"),
  [
    ({"objective.loss": ("ppo", "cispo")}, ("loss", "reward", "pass@1", "pass@8"), "pass@1"),
    ({"online.temperature": (0.7, 1.0)}, ("loss", "reward"), "reward"),
    ({"online.temperature": (0.7, 1.0)}, ("loss", "pass@1", "accuracy/after"), "accuracy/after"),
    ({"reward.weights": ((1.0,), (2.0,))}, ("loss", "reward", "pass@1"), "pass@1"),  # not ranked
    ({"optimizer.lr": (0.1, 0.2)}, ("loss",), None),
  ],
)
def test_runs_that_write_their_answers_are_compared_by_them_and_never_by_a_loss(
  fields, has, metric
):
  ((field, values),) = fields.items()
  section, name = field.split(".")
  base = dict(online={}, reward={}, objective=dict(name="grouped"))
  configs = [{**base, section: {**base.get(section, {}), name: value}} for value in values]
  assert summary._compared(dict.fromkeys(has), configs) == metric


@pytest.mark.parametrize("width", [80, 60])
def test_tables_fit_the_terminal(grid, width):
  names = ("adapter.r", "optimizer.lr", "steps", "layers", "smoke")
  grid.points([("beta=0.1", dict(zip(names, (r, 0.000123, 5, (1, 2, 3), r > 4)))) for r in (4, 16)])
  points = sweep.expand(str(grid.config))
  rows = [
    dict(
      point=p.name,
      status="finished",
      values=p.values,
      steps=1000,
      metrics={"eval_rewards/accuracies": 0.5},
    )
    for p in points
  ]
  console = rich.console.Console(file=io.StringIO(), width=width)
  swept = ["beta", *names, "a.very_long_name_of_a_field"]
  console.print(summary._table(rows, swept, ["eval_rewards/accuracies"], 1, console))
  printed = console.file.getvalue()
  assert max(map(len, printed.splitlines())) <= width
  assert "r=16" in printed.replace(" ", "")
  assert "0.5 *" in printed


def test_a_page_of_the_points_beside_each_other(grid):
  grid.run()
  page = (grid.workdir / "compare.html").read_text()
  assert "2 runs compared" in page
  assert "optimizer.lr=0.01" in page


def test_the_metric_to_compare(grid):
  grid.points([("", {"optimizer.lr": lr}) for lr in (0.1, 0.01)])
  assert "grad_norm" in grid.run(metric="grad_norm")[1]
  code, printed = grid.run(metric="los")
  assert code == 1
  assert "no finished point has a metric 'los'; they have loss, grad_norm" in printed
  assert grid.summary()[0]["metrics"]["loss"] == pytest.approx(0.8)


@pytest.mark.parametrize(
  ("points", "overrides", "message"),
  [
    ([("", {"steps": 1}), ("", {"steps": 1})], [], "two points named steps=1"),
    ([("", {"stepz": 1})], [], "unknown config key 'stepz'; did you mean 'steps'"),
    ([("modle=x", {})], [], "unknown config argument"),
    ([("", {"steps": 1})], ["--config.steps=2"], "the sweep sets steps itself"),
    ([], [], "has no points"),
  ],
)
def test_what_is_wrong_is_said_before_anything_runs(grid, points, overrides, message):
  grid.points([("", {"optimizer.lr": 0.1}), *points] if points else [])
  with pytest.raises(ConfigError, match=message):
    grid.run(overrides=overrides)
  assert not grid.workdir.exists()


def test_a_part_of_the_suite_that_runs_measure_is_a_metric(grid):
  asked = ["--config.eval.suite=core"]
  code, printed = grid.run(metric="eval_suite/sums", overrides=asked)
  assert code == 0
  assert re.search(r"lr +status +steps +eval_suite/sums +eval_suite/change", printed)
  assert re.search(r"0\.01 +finished +4 +0\.89 \* +-0\.01", printed)
  assert "eval_suite/sums: higher is better" in printed
  _, printed = grid.run(metric="eval_bits_per_byte/code", overrides=asked)
  assert re.search(r"0\.01 +finished +4 +1\.01 \* +-0\.01", printed)
  _, printed = grid.run(metric="eval_suite/change", overrides=asked)
  assert re.search(r"0\.01 +finished +4 +-0\.01 \*", printed)
  code, printed = grid.run(metric="eval_suite/sum", overrides=asked)
  assert code == 1
  assert "no finished point has a metric 'eval_suite/sum'; they have " in printed
  assert "eval_suite/sums" in printed


def test_parts_of_unequal_suites_are_shown_and_not_ranked(grid):
  grid.points([("", {"eval.suite": name}) for name in ("core", "shop")])
  _, printed = grid.run(metric="eval_suite/sums")
  assert "eval_suite/sums is shown, not ranked: the points differ in eval.suite" in printed
  assert " * " not in printed


def test_points_that_are_spelt_alike_have_folders_of_their_own(grid):
  grid.points([("", {"model": name}) for name in ("données/é", "données/è")])
  assert grid.run()[0] == 0
  assert len({row["point"] for row in grid.summary()}) == 2
  assert all(row["point"].startswith("model=donn-es-") for row in grid.summary())


def test_names_are_fit_for_a_file_system():
  name = sweep._name(["model=/data/my model"], {"layers": (1, 2), "data.train": "../x"})
  assert name == "model=-data-my-model__layers=-1,-2-__data.train=..-x"
  long = [sweep._name([f"model={'x' * 300}{end}"], {}) for end in "ab"]
  assert max(map(len, long)) < 200
  assert long[0] != long[1]


def test_the_shipped_sweep_expands():
  points = sweep.expand(f"{pathlib.Path(__file__).parents[2]}/configs/sft.py:smoke")
  assert len({point.name for point in points}) == 9
  assert points[0].resolved["adapter"]["r"] == 4


def test_what_ran_elsewhere_is_summed_up_and_nothing_is_started(grid):
  grid.points([("", {"optimizer.lr": 0.1}), ("", {"behave": "fail"}), ("", {"optimizer.lr": 0.3})])
  grid.run()
  grid.started()
  code, printed = grid.run(jobs=0)
  assert (code, grid.started()) == (75, [])
  assert [row["status"] for row in grid.summary()] == ["finished", "stopped", "finished"]
  assert "curves and answers side by side" in printed
  with pytest.raises(ConfigError, match="jobs=-1"):
    grid.run(jobs=-1)
