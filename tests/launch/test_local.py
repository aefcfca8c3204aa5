"""The launcher with tiny programs: environment, prefixes, exit codes, signals."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import local

LAUNCHER = pathlib.Path(local.__file__)
ME = "import os, sys, time; me = os.environ['POSTTRAIN_PROCESS_ID']; "


def run(program, **kwargs):
  return local.run([sys.executable, "-S", "-c", ME + program], **kwargs)


def test_each_process_is_told_who_it_is(capfdbinary):
  program = (
    "print(me, os.environ['POSTTRAIN_PROCESSES'], os.environ['POSTTRAIN_COORDINATOR'],"
    " os.environ['JAX_PLATFORMS'], os.environ['XLA_FLAGS']); print('err', file=sys.stderr)"
  )
  assert run(program, processes=2, devices=3) == 0
  lines = capfdbinary.readouterr().out.decode().splitlines()
  assert {"[0] err", "[1] err"} < set(lines)
  found = sorted(line.split() for line in lines if "err" not in line)
  assert [(f[:3]) for f in found] == [["[0]", "0", "2"], ["[1]", "1", "2"]]
  assert found[0][3] == found[1][3]
  assert found[0][3].startswith("127.0.0.1:")
  assert [word for word in found[0] if "device_count" in word] == [
    "--xla_force_host_platform_device_count=3"
  ]


def test_train_arguments_follow_the_dashes(monkeypatch):
  calls = []
  monkeypatch.setattr(local, "run", lambda command, **kwargs: calls.append((command, kwargs)) or 0)
  local.main(["--processes=2", "--devices_per_process=4", "--", "--config=a.py:x=1", "--workdir=w"])
  ((command, kwargs),) = calls
  assert command[1:] == ["-m", "posttrain_jax", "train", "--config=a.py:x=1", "--workdir=w"]
  assert kwargs == {"processes": 2, "devices": 4}


def test_no_processes_is_an_error(capsys):
  with pytest.raises(SystemExit):
    local.main(["--processes=0", "--", "--workdir=w"])
  assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("program", "code"),
  [
    ("sys.exit(0 if me == '0' else 3)", 3),
    ("sys.exit(75)", 75),
    ("sys.exit(75 if me == '0' else 0)", 75),
    ("sys.exit(75 if me == '0' else 2)", 2),
    ("os.kill(os.getpid(), 9) if me == '1' else sys.exit(0)", 137),
  ],
)
def test_exit_code(program, code):
  assert run(program, processes=2, grace=2) == code


def test_one_failure_ends_the_others_even_those_that_ignore_sigterm():
  program = (
    "import signal; signal.signal(15, signal.SIG_IGN); sys.exit(4) if me == '1' else time.sleep(60)"
  )
  start = time.monotonic()
  assert run(program, processes=3, grace=0.5) == 4
  assert time.monotonic() - start < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_once(number):
  program = ME + (
    "import signal; seen = []; "
    f"signal.signal({int(number)}, lambda *a: seen.append(1)); print('ready'); "
    "[time.sleep(0.05) for _ in range(400) if not seen]; time.sleep(0.3); "
    "print('seen', len(seen)); sys.exit(75)"
  )
  command = [sys.executable, "-c", program]
  script = f"import sys; from launch import local; sys.exit(local.run({command!r}, processes=2))"
  launcher = subprocess.Popen(
    [sys.executable, "-u", "-c", script],
    cwd=LAUNCHER.parent.parent,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    ready = {launcher.stdout.readline().strip() for _ in range(2)}
    assert ready == {"[0] ready", "[1] ready"}
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=20)
  finally:
    launcher.kill()
  assert sorted(out.splitlines()) == ["[0] seen 1", "[1] seen 1"]
  assert launcher.returncode == 75
