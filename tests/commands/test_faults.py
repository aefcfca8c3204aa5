"""What is done to a run, how it ends, what is lost (nothing), and within which time: real processes and signals."""

import contextlib
import json
import os
import pathlib
import pty
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posttrain_jax import __main__
from posttrain_jax.__main__ import main
from posttrain_jax.rewards import workers
from posttrain_jax.rollout import engine
from posttrain_jax.train import loop
from tests.commands import faults, test_train
from tests.marks import slow

ROOT = test_train.ROOT
SHORT = dict(eval__every=0, data__eval_rows=0, steps=8, checkpoint__every=0)


@pytest.fixture(scope="module")
def server():
  started = faults.Server(test_train.environment())
  yield started
  started.close()


def command(shared, folder, **fields):
  return test_train.arguments(shared, folder, **SHORT | fields)


def assert_a_sentence(error, *words):
  """One line of ours, and no traceback of anybody's."""
  assert "Traceback" not in error, error
  assert "posttrain train: " in error or "stop" in error or "ended" in error, error
  for word in words:
    assert word in error


# --- while it starts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "code", "words"),
  [
    ("SIGTERM", 75, ["SIGTERM", "before the first step", "same command"]),
    slow("SIGHUP", 75, ["SIGHUP", "before the first step"]),
    ("SIGINT", 130, ["posttrain train: interrupted"]),
  ],
)
def test_asked_to_stop_while_it_reads(name, code, words, server, shared, tmp_path):
  """Ends at once, and nothing is there that would have to be removed."""
  told = server.run(command(shared, tmp_path / "run"), "reading", [name])
  assert told["code"] == code, told
  assert_a_sentence(told["err"], *words)
  assert told["seconds"] < 5
  assert not (tmp_path / "run").exists()


# --- verbs that do not train ------------------------------------------------------------------------------------------

VERBS = {  # what each is told, and a function that it is in when the signal comes
  "export": (
    ["--model={shared}/model", "--gguf=f16", "--out={out}/model.gguf"],
    "posttrain_jax.build.gguf._described",
    "nothing was written to ",
  ),
  "merge": (
    ["--recipe={shared}/recipe.yml", "--out={out}/merged"],
    "posttrain_jax.core.shards.write_index",
    "what is merged so far is kept beside --out, and the same command goes on there",
  ),
  "pairs": (
    [
      "--model={shared}/model",
      "--data={shared}/rows.jsonl",
      "--reward=exact",
      "--out={out}/pairs.jsonl",
    ],
    "posttrain_jax.build.sampling._drawn",
    "every answer and its score is kept",
  ),
  "eval": (
    ["--model={shared}/model", "--data={shared}/rows.jsonl", "--template=chatml"],
    "posttrain_jax.build.evaluation.measured",
    "nothing was written",
  ),
  "fetch": (
    [],
    "posttrain_jax.models.fetch.fetch",
    "what was fetched so far is gone; run the same command again",
  ),
}


@pytest.mark.parametrize(
  ("verb", "name", "code"),
  [
    ("export", "SIGTERM", 143),
    slow("export", "SIGINT", 130),
    slow("merge", "SIGHUP", 129),
    slow("merge", "SIGINT", 130),
    slow("pairs", "SIGTERM", 143),
    slow("eval", "SIGINT", 130),
    slow("eval", "SIGHUP", 129),
    slow("fetch", "SIGTERM", 143),
  ],
)
def test_a_verb_that_is_ended_says_so_and_leaves_nothing_half(
  verb, name, code, server, shared, tmp_path
):
  (shared / "recipe.yml").write_text(
    f"merge_method: linear\nmodels:\n- model: {shared}/model\n  parameters: {{weight: 1.0}}\n"
  )
  arguments, point, left = VERBS[verb]
  out = tmp_path / "out"
  out.mkdir()
  told = server.run(
    [verb, *(text.format(shared=shared, out=out) for text in arguments)], point, [name]
  )
  assert told["code"] == code, told
  assert told["seconds"] < 5
  assert "Traceback" not in told["err"]
  how = "interrupted" if name == "SIGINT" else f"ended by {name}"
  assert told["err"].splitlines()[-1].startswith(f"posttrain {verb}: {how}; {left}"), told["err"]
  assert told["out"] == ""
  kept = {"merge": [".merged.merging"], "pairs": ["pairs.jsonl.answers"]}.get(verb, [])
  assert [path.name for path in out.iterdir()] == kept


# --- while it trains -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_interrupts_stop_at_once(server, shared, tmp_path):
  told = server.run(command(shared, tmp_path), "saving", ["SIGINT", "SIGINT"])
  assert told["code"] == 130, told
  assert_a_sentence(told["err"], "Ctrl-C again", "interrupted")
  assert told["seconds"] < 5


@pytest.mark.slow
def test_a_terminal_that_is_closed_loses_nothing(server, shared, tmp_path):
  """SIGHUP saves and ends with 75; the same command goes on, bit for bit."""
  assert server.run(command(shared, tmp_path / "whole"))["code"] == 0
  again = command(shared, tmp_path / "again")
  told = server.run(again, "step 3", ["SIGHUP"])
  assert told["code"] == 75, told
  assert told["seconds"] < 20
  resumed = server.run(again)
  assert resumed["code"] == 0, resumed
  assert "going on from step" in resumed["out"]
  folders = tmp_path / "again", tmp_path / "whole"
  test_train.assert_equal(*map(test_train.weights, folders))


@pytest.mark.slow
def test_a_terminal_that_is_gone_cannot_be_printed_to(shared, tmp_path):
  """The whole of it: a terminal of its own, closed at the third step."""
  controller, terminal = pty.openpty()
  child = subprocess.Popen(
    [sys.executable, "-m", "posttrain_jax", *command(shared, tmp_path, steps=200)],
    stdin=terminal,
    stdout=terminal,
    stderr=terminal,
    start_new_session=True,
    preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    env=test_train.environment(),
  )
  os.close(terminal)
  os.set_blocking(controller, False)
  until(lambda: drained(controller) and len(lines(tmp_path)) >= 3, 120)
  os.close(controller)
  began = time.monotonic()
  assert child.wait(60) == 75
  assert time.monotonic() - began < 30
  steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()]
  assert len(steps) == 1


def drained(controller):
  with contextlib.suppress(BlockingIOError):
    os.read(controller, 65536)
  return True


def lines(folder):
  path = folder / "metrics.jsonl"
  return path.read_text().splitlines() if path.exists() else []


def until(holds, seconds):
  deadline = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < deadline, "it did not come to that"
    time.sleep(0.05)


@pytest.mark.slow
def test_a_full_disk_is_a_sentence(server, shared, tmp_path):
  """No thread's traceback before or behind it, and the same command goes on when there is room."""
  again = command(shared, tmp_path, checkpoint__every=2)
  told = server.run(again, "disk full")
  assert told["code"] == 1, told
  assert_a_sentence(told["err"], "could not", "run the same command again")
  assert len(told["err"].splitlines()) <= 4, told["err"]
  assert told["seconds"] < 90
  assert server.run(again)["code"] == 0


# --- two runs and one folder -----------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused_and_the_first_is_whole(server, shared, tmp_path):
  """And after a SIGKILL of the first the same command has the folder at once."""
  first = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
  )
  try:
    assert first.stdout.readline() == "held\n"
    told = server.run(command(shared, tmp_path))
    assert told["code"] == 1
    assert_a_sentence(told["err"], f"in use: process {first.pid} on", "name another --workdir")
    assert {p.name for p in tmp_path.iterdir()} == {".lock"}
  finally:
    first.kill()
    first.wait()
  told = server.run(command(shared, tmp_path), "reading", ["SIGTERM"])
  assert told["code"] == 75  # it had the folder


HOLD = """
import pathlib, sys, time
from posttrain_jax.runs import lock
with lock.held(pathlib.Path(sys.argv[1]) / ".lock"):
  print("held", flush=True)
  time.sleep(300)
"""


# --- numbers that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("more", "rate", "steps"),
  [slow("", 1e38, 1), slow("", 1e38, 4), slow("", 1e12, 2), slow(",adapter=none", 1e38, 3)],
)
def test_an_explosion_is_not_done(more, rate, steps, shared, tmp_path, capsys):
  fields = dict(
    optimizer__lr=rate, steps=steps, optimizer__warmup=0, optimizer__schedule="constant"
  )
  assert test_train.train(shared, tmp_path, more=more, **SHORT | fields) == 1
  assert_a_sentence(capsys.readouterr().err, "nothing was exported")
  for name in ("adapter", "model", "done.json", "report.html"):
    assert not (tmp_path / name).exists()


@pytest.mark.slow
def test_a_base_of_nan_is_refused(server, shared, tmp_path):
  folder = tmp_path / "nan"
  shutil.copytree(shared / "model", folder)
  (weights,) = folder.glob("*.safetensors")
  tensors = load_file(weights)
  name = next(name for name in tensors if name.endswith("up_proj.weight"))
  tensors[name] = np.full_like(tensors[name], np.nan)
  save_file(tensors, weights, metadata={"format": "pt"})
  told = server.run(
    command(tmp_path, tmp_path / "run", model="nan", data=shared / "rows.jsonl", steps=2)
  )
  assert told["code"] == 1
  assert_a_sentence(told["err"], f"tensor '{name}'")
  assert not (tmp_path / "run" / "adapter").exists()


# --- mistakes --------------------------------------------------------------------------------------------------------

LATE = {
  "log_every": 0,
  "eval.rows": 0,
  "optimizer.eps": "abc",
  "checkpoint.keep": 0,
  "eval.task": "none",
  "optimizer.clip": -1,
  "data.eval_rows": -2,
  "steps": -5,
  "optimizer.target": "[",
  "optimizer.rank": 4,
}


@pytest.mark.parametrize("name", LATE)
def test_a_late_mistake_is_found_first(name, shared, tmp_path, capsys):
  """Before anything is claimed, so that the corrected command has the folder."""
  fields = {name.replace(".", "__"): LATE[name]}
  if name == "optimizer.target":
    fields["optimizer__name"] = "galore"
  assert test_train.train(shared, tmp_path / "run", **fields) == 1
  error = capsys.readouterr().err
  assert error.startswith("posttrain train: ")
  assert name in error
  assert len(error.splitlines()) == 1
  assert not (tmp_path / "run").exists()


def test_a_home_is_a_home(shared, monkeypatch, capsys):
  monkeypatch.setenv("HOME", str(shared))
  arguments = test_train.arguments(pathlib.Path("~"), pathlib.Path("~/rows.jsonl"), **SHORT)
  assert main(arguments) == 1
  assert f"{shared / 'rows.jsonl'} is a file" in capsys.readouterr().err


def test_a_models_folder_is_named(shared, capsys):
  assert test_train.train(shared, shared / "model") == 1
  assert f"{shared / 'model'} is a model's folder" in capsys.readouterr().err


# --- several processes -----------------------------------------------------------------------------------------------


def launched(shared, folder, config=test_train.CONFIG, **fields):
  """(the launcher, the process ids of its two)."""
  rest = command(shared, folder, mesh__fsdp=-1, **fields)[1:]
  rest[0] = rest[0].replace(str(test_train.CONFIG), str(config))
  launcher = subprocess.Popen(
    [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2", "--", *rest],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=test_train.environment(),
  )
  until(lambda: len(children(launcher.pid)) == 2, 30)
  return launcher, children(launcher.pid)


def children(pid):
  path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  return [int(child) for child in path.read_text().split()] if path.exists() else []


def is_alive(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def ended(pids, seconds):
  began = time.monotonic()
  try:
    until(lambda: not any(map(is_alive, pids)), seconds)
  finally:
    for pid in pids:
      if is_alive(pid):
        os.kill(pid, signal.SIGKILL)
  return time.monotonic() - began


READING = """
import time
from posttrain_jax.build import data
from posttrain_jax.configs import sft


def wait(*_):
  print("reading", flush=True)
  time.sleep(200)


vars(data)["read"] = wait
get_config = sft.get_config
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_is_asked_to_stop_while_they_start(which, shared, tmp_path):
  config = tmp_path / "reading.py"
  config.write_text(READING)
  launcher, pids = launched(shared, tmp_path / "run", config)
  said = []
  while not {"[0] reading\n", "[1] reading\n"} <= {*said}:  # they have joined, and stay there
    said.append(launcher.stdout.readline())
    assert said[-1], "".join(said)
  os.kill(pids[which], signal.SIGTERM)
  seconds = ended([launcher.pid, *pids], 80)
  out = "".join(said) + launcher.communicate()[0]
  assert launcher.returncode == 75, out
  assert seconds < 60
  assert f"[{which}] SIGTERM: ended before the first step" in out
  assert f"process {which} of 2 stopped when asked, others did not; ending them" in out


@pytest.mark.slow
def test_the_launcher_is_killed_and_both_save(shared, tmp_path):
  launcher, pids = launched(shared, tmp_path, steps=4000)
  until(lambda: len(lines(tmp_path)) >= 3, 150)
  launcher.kill()
  assert ended(pids, 60) < 40
  steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()]
  assert len(steps) == 1
  assert steps[0] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_is_killed_while_they_train(which, shared, tmp_path):
  launcher, pids = launched(shared, tmp_path, steps=4000, checkpoint__every=2)
  until(lambda: len(lines(tmp_path)) >= 3, 150)
  os.kill(pids[which], signal.SIGKILL)
  assert ended([launcher.pid, *pids], 60) < 30
  out = launcher.communicate()[0]
  assert launcher.returncode not in (0, None)
  assert f"process {which} of 2" in out or "process 1 of 2" in out
  assert json.loads((tmp_path / "config.json").read_text())


@pytest.mark.slow
def test_without_a_launcher_the_other_finds_out(shared, tmp_path):
  """Two processes that know of each other alone: within the time after which silence is death."""
  from launch import local

  environment = test_train.environment()
  coordinator = f"127.0.0.1:{local._free_port()}"
  rest = command(shared, tmp_path, mesh__fsdp=-1, steps=4000)
  both = [
    subprocess.Popen(
      [sys.executable, "-m", "posttrain_jax", *rest],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      env=environment
      | {
        "POSTTRAIN_COORDINATOR": coordinator,
        "POSTTRAIN_PROCESSES": "2",
        "POSTTRAIN_PROCESS_ID": str(index),
      },
    )
    for index in range(2)
  ]
  until(lambda: len(lines(tmp_path)) >= 3, 150)
  both[1].kill()
  began = time.monotonic()
  try:
    assert both[0].wait(120) != 0
    assert time.monotonic() - began < 60
  finally:
    both[0].kill()


@pytest.mark.parametrize("kind", [loop.Diverged, workers.WorkerError, engine.CompilationError])
def test_an_error_of_ours_is_its_sentence_and_another_is_named_by_its_kind(kind):
  assert __main__._message(kind("it stands still")) == "it stands still"
  assert __main__._message(RuntimeError("boom")).startswith("RuntimeError: boom (")
