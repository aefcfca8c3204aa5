"""The process that holds an environment, once the run that asks it is gone."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain_jax.environments import child
from tests.environments import made


@pytest.fixture
def process():
  settings = {"memory": 0, "paths": sys.path, "parent": os.getpid()}
  with subprocess.Popen(
    [sys.executable, "-P", child.__file__, json.dumps(settings)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
  ) as process:
    yield process
    process.kill()


def ask(process, *message):
  body = pickle.dumps(message)
  process.stdin.write(child.HEADER.pack(len(body)) + body)
  process.stdin.flush()


def test_it_ends_without_a_word_where_nobody_reads_its_answer(process):
  process.stdout.close()
  ask(process, 1, "load", (f"{made.__file__}:Neither", (), {}))
  said = process.stderr.read().decode()
  assert "Traceback" not in said


def test_what_an_environment_started_ends_with_the_run(process):
  ask(process, 1, "load", (f"{made.__file__}:Starts", (), {}))
  ask(process, 2, "reset", ({}, 0, ""))
  process.stdout.readline()
  pid = int(json.loads(process.stdout.readline())["said"])
  assert is_running(pid)
  process.stdin.close()  # as the kernel does where the run was killed
  process.wait()
  deadline = time.monotonic() + 10
  while is_running(pid):
    assert time.monotonic() < deadline
    time.sleep(0.01)


def is_running(pid):
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False
