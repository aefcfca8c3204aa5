"""Signals of a program: before it works, while it works, and where nothing it does can be interrupted."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from posttrain_jax.core import ending, files
from tests.marks import slow

GUARDED = """
import pathlib, sys, time
how, path = sys.argv[1:]
from posttrain_jax.core import ending
ending.PATIENCE = 0.3
guard = ending.Guard("export")
if how == "early":
  print("ready", flush=True)
  time.sleep(30)
try:
  with guard.armed(), ending.writing(pathlib.Path(path)):
    pathlib.Path(path).mkdir()
    end, told = time.monotonic() + 30, False
    while time.monotonic() < end:
      try:
        if not told:
          told = True
          print("ready", flush=True)
        time.sleep(30)
      except BaseException:
        if how == "working":
          raise
except (KeyboardInterrupt, ending.Ended) as error:
  guard.caught()
  print("unwound", flush=True)
  time.sleep(0.6)
  sys.exit(99)
"""


@pytest.mark.parametrize(
  ("how", "numbers", "code", "said"),
  [
    ("early", ["SIGINT"], 130, "posttrain export: interrupted: ended before it began\n"),
    ("early", ["SIGTERM"], 143, "posttrain export: SIGTERM: ended before it began\n"),
    ("early", ["SIGHUP"], 129, "posttrain export: SIGHUP: ended before it began\n"),
    ("working", ["SIGTERM"], 99, ""),
    # Python drops the exception, as in a garbage collection, or compiled code holds it up
    ("stuck", ["SIGTERM"], 143, "posttrain export: SIGTERM: ended while it worked\n"),
    ("stuck", ["SIGINT", "SIGINT"], 130, "posttrain export: interrupted: ended at once\n"),
  ],
)
def test_a_signal_is_a_sentence_and_an_exit_code(how, numbers, code, said, tmp_path):
  path = tmp_path / "half-written"
  child = subprocess.Popen(
    [sys.executable, "-c", GUARDED, how, str(path)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert child.stdout.readline() == "ready\n"
    for name in numbers:
      child.send_signal(signal.Signals[name])
      time.sleep(0.1)
    out, err = child.communicate(timeout=20)
  finally:
    child.kill()
  assert (child.returncode, err) == (code, said)
  assert out == ("unwound\n" if how == "working" else "")
  assert path.exists() == (how == "working")  # whose own `finally` it is


def test_what_is_ignored_stays_ignored():
  """Under nohup a closed terminal ends nothing."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    assert signal.SIGHUP not in ending.heard()
    with ending.handling(lambda *_: pytest.fail("heard"), *ending.ENDING):
      os.kill(os.getpid(), signal.SIGHUP)
  finally:
    signal.signal(signal.SIGHUP, before)


def test_what_is_whole_is_no_longer_removed(tmp_path, monkeypatch):
  """Between the two renames of `publish` both folders are whole."""
  with files.publish(tmp_path / "out") as new:
    (new / "first").touch()
    assert {path.name for path in ending.WRITING} == {new.parent.name}
  rename = pathlib.Path.rename

  def renamed(self, target):
    assert not ending.WRITING
    return rename(self, target)

  monkeypatch.setattr(pathlib.Path, "rename", renamed)
  with files.publish(tmp_path / "out") as new:
    (new / "second").touch()
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]
  with files.publish(tmp_path / "never") as new:
    ending.remove_unfinished()
    new.mkdir(parents=True)
  assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def catches(pid, number):
  """Whether a process has a handler for a signal: Python has none for SIGTERM by itself."""
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
  return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, slow(signal.SIGTERM)], ids=str)
@pytest.mark.parametrize("later", [0.0, slow(0.3), slow(1.0), slow(1.7)])
def test_the_program_hears_while_it_imports(number, later, tmp_path):
  child = subprocess.Popen(
    [sys.executable, "-m", "posttrain_jax", "eval", "--model=smollm2", "--data=none.jsonl"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "POSTTRAIN_CACHE": str(tmp_path), "PIP_NO_INDEX": "1"},
  )
  try:
    deadline = time.monotonic() + 60
    while not catches(child.pid, signal.SIGTERM):
      assert time.monotonic() < deadline
    time.sleep(later)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
  finally:
    child.kill()
  assert child.returncode == 128 + number, err
  assert "Traceback" not in err
  last = err.splitlines()[-1]
  assert last.startswith(("posttrain eval: ", "posttrain: ")), err
