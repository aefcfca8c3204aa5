"""A real Slurm with two nodes on this machine: arrays, requeues, the time limit, a node that is lost."""

import json
import pathlib
import sys

import pytest

from posttrain_jax.build.sweep import Point
from posttrain_jax.launch import jobs, start
from posttrain_jax.launch.jobs import Job, Options
from tests.commands import test_train
from tests.launch import cluster

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "there is one")

# What training does to a folder, in a moment.  "save": stopped when asked, done the second time.
TRAIN = """
import json, os, pathlib, signal, sys, time
named = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
does = json.loads(pathlib.Path(named["config"]).read_text())["does"]
folder = pathlib.Path(named["workdir"])
folder.mkdir(parents=True, exist_ok=True)
me = os.environ.get("SLURM_PROCID", "0")
with (folder / f"starts-{me}").open("a") as f:
  f.write(os.environ["SLURMD_NODENAME"] + chr(10))
starts = (folder / f"starts-{me}").read_text().split()
print("started", flush=True)

def save(*_):
  time.sleep(0.5 * int(me))  # not all are equally quick
  (folder / f"saved-{me}").touch()
  raise SystemExit(75)

signal.signal(signal.SIGTERM, save)
if does == "mistake" or does == f"mistake-{me}":
  raise SystemExit(1)
if does == "preempted" and len(starts) == 1:
  raise SystemExit(75)
if does.startswith("mistake") or (does in ("save", "wait") and len(starts) == 1):
  time.sleep(60 if does != "mistake-0" else 1)
  raise SystemExit(75)
if does == "hold":
  time.sleep(120)
(folder / "done.json").write_text("{}")
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  with cluster.started(tmp_path_factory.mktemp("slurm")) as started:
    yield started


def submitted(slurm, folder, does, **options):
  """(job, its number); `does` is what each point does."""
  (folder / "train.py").write_text(TRAIN)
  job = Job(
    name="test",
    root=str(folder),
    folder=folder / "job",
    home=folder,
    points={i: Point(f"p{i}", "", (), {"does": what}, {}) for i, what in enumerate(does)},
    workdirs={i: str(folder / f"p{i}") for i in range(len(does))},
    program=[sys.executable, "-S", str(folder / "train.py")],
    options=Options(**options),
    summary=["bash", "-c", "ls p*/done.json"] if len(does) > 1 else None,
  )
  start.write(job, "slurm")
  said = slurm.run("bash", str(job.folder / jobs.SUBMIT))
  return job, said.splitlines()[0].removeprefix("job ")


def log(job):
  return "".join(p.read_text() for p in sorted(job.folder.glob("log-*.txt")))


def starts(job, point=0, process=0):
  path = pathlib.Path(job.workdirs[point]) / f"starts-{process}"
  return path.read_text().split() if path.exists() else []


def test_an_array_goes_on_where_it_was_preempted_and_stops_at_a_mistake(slurm, tmp_path):
  job, number = submitted(slurm, tmp_path, ["done", "mistake", "preempted"], at_once=2)
  cluster.until(lambda: (job.folder / "summary.txt").exists(), 90, "the summary is there")
  cluster.until(lambda: "p2" in (job.folder / "summary.txt").read_text(), 20, "it has the last")
  assert [len(starts(job, i)) for i in range(3)] == [1, 1, 2]
  assert (job.folder / "summary.txt").read_text().split() == ["p0/done.json", "p2/done.json"]
  states = slurm.jobs()
  assert states[f"{number}_1"]["JobState"] == "FAILED"
  assert states[f"{number}_1"]["ExitCode"] == "1:0"
  assert states[f"{number}_2"]["JobState"] == "COMPLETED"
  assert log(job).count("stopped when asked; requeued") == 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_folder_of_any_name_is_launched_from(nodes, slurm, tmp_path):
  folder = tmp_path / """it's "a" $(touch pwned) #b 100%j ü"""
  folder.mkdir()
  job, _ = submitted(slurm, folder, ["done"], nodes=nodes)
  cluster.until(lambda: (folder / "p0/done.json").exists(), 60, "it ended")
  cluster.until(lambda: "started" in log(job), 20, "its log is beside its files")
  assert not list(tmp_path.rglob("pwned"))
  assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_what_the_site_is_told_arrives_as_it_was_written(slurm, tmp_path):
  told = """two  words, 'one' "of" them #1 \\ 100%j"""
  _, number = submitted(slurm, tmp_path, ["done"], site=(f"comment={told}", "partition=high"))
  said = slurm.run("scontrol", "show", "job", number)
  assert f"\n   Comment={told}" in said
  assert "Partition=high" in said
  cluster.until(lambda: slurm.jobs()[number]["JobState"] == "COMPLETED", 60, "it ended")


def test_the_signal_before_the_time_limit_lets_every_process_save(slurm, tmp_path):
  job, number = submitted(slurm, tmp_path, ["save"], nodes=2)
  cluster.until(lambda: starts(job) and starts(job, process=1), 30, "both have started")
  # what --signal=B:USR1@grace does when its time comes
  slurm.run("scancel", "--signal=USR1", "--batch", number)
  cluster.until(lambda: (tmp_path / "p0/done.json").exists(), 90, "it went on and ended")
  assert (tmp_path / "p0/saved-0").exists()
  assert (tmp_path / "p0/saved-1").exists()
  assert sorted({*starts(job), *starts(job, process=1)}) == ["n1", "n2"]
  assert slurm.jobs()[number]["Restarts"] == "1"


@pytest.mark.slow
def test_a_mistake_of_one_host_is_not_hidden_by_the_others(slurm, tmp_path):
  job, number = submitted(slurm, tmp_path, ["mistake-0"], nodes=2)
  # the other ends with 75, as a process does that lost the one it works with
  cluster.until(lambda: starts(job, process=1), 30, "both have started")
  cluster.until(lambda: slurm.jobs()[number]["JobState"] not in ("PENDING", "RUNNING"), 90, "ends")
  assert slurm.jobs()[number]["JobState"] == "FAILED"
  assert slurm.jobs()[number]["ExitCode"] == "1:0"


@pytest.mark.slow
def test_a_job_that_is_cancelled_stays_so(slurm, tmp_path):
  job, number = submitted(slurm, tmp_path, ["save"])
  cluster.until(lambda: starts(job), 30, "it has started")
  slurm.run("scancel", number)
  cluster.until(lambda: slurm.jobs()[number]["JobState"] == "CANCELLED", 30, "it is cancelled")
  cluster.until(lambda: "is not requeued here" in log(job), 30, "the script says so")
  assert (tmp_path / "p0/saved-0").exists()
  assert len(starts(job)) == 1


@pytest.mark.slow
def test_preempted_by_a_better_partition_it_saves_and_comes_back(slurm, tmp_path):
  job, _ = submitted(slurm, tmp_path, ["save"])
  cluster.until(lambda: starts(job), 30, "it has started")
  slurm.run(
    "sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 3", cwd=tmp_path
  )
  cluster.until(lambda: (tmp_path / "p0/done.json").exists(), 90, "it went on and ended")
  assert (tmp_path / "p0/saved-0").exists()


@pytest.mark.slow
def test_a_lost_node_costs_its_job_a_restart_on_the_other(slurm, tmp_path):
  job, _ = submitted(slurm, tmp_path, ["wait"])
  cluster.until(lambda: starts(job), 30, "it has started")
  (node,) = starts(job)
  slurm.kill(node)
  try:
    cluster.until(lambda: (tmp_path / "p0/done.json").exists(), 120, "it ended elsewhere")
    assert starts(job) == [node, *(other for other in cluster.NODES if other != node)]
    assert not (tmp_path / "p0/saved-0").exists()
    assert json.loads((tmp_path / "p0/done.json").read_text()) == {}
  finally:
    slurm.join(node)
    cluster.until(lambda: slurm.states().get(node) in ("IDLE", "MIXED"), 60, "it is back")


@pytest.mark.slow
def test_two_hosts_are_one_run(slurm, shared, tmp_path, monkeypatch):
  """`posttrain train` itself; JAX reads Slurm's variables, but for the address: these hosts have no names."""
  monkeypatch.chdir(tmp_path)
  command = test_train.arguments(shared, tmp_path / "run", steps=4, mesh__fsdp=-1)
  config = command[1].removeprefix("--config=")
  fields = [arg for arg in command if arg.startswith("--config.")]
  job = start.prepare(config, "run", to="slurm", overrides=fields, options=Options(nodes=2))
  start.write(job, "slurm")
  address = f"127.0.0.1:{cluster._free_ports(1)[0]}"
  ours = test_train.environment() | {"JAX_COORDINATOR_ADDRESS": address}
  monkeypatch.setattr(
    slurm, "environment", {**ours, **slurm.environment, **ours, "PATH": cluster.PATH}
  )
  slurm.run("bash", str(job.folder / jobs.SUBMIT))
  cluster.until(lambda: (tmp_path / "run/done.json").exists(), 200, "the run is done: " + log(job))
  assert "Rank 1 is connected to 1 peer ranks" in log(job)
  assert test_train.steps(tmp_path / "run") == [1, 2, 3, 4]
