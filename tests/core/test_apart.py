"""Processes that answer messages: what is asked of them, and how they end."""

import os
import pathlib
import pickle
import subprocess
import sys
import time

import pytest

from posttrain_jax.core import apart, apart_program

ECHO = """
import os, select, subprocess, sys
from posttrain_jax.core import apart_program

def serve(asked, answer):
  for number, what in apart_program.messages(asked):
    if what == "starts":
      what = subprocess.Popen(["sleep", "600"]).pid
    elif what == "forks" and os.fork() == 0:
      pass  # the child says the same
    elif what == "prints":
      print("no reply", flush=True)
    elif what == "leaves":
      os._exit(3)
    elif what == "reads":
      what = sys.stdin.read() if select.select([0], [], [], 1.0)[0] else "waits"
    answer({"to": number, "said": what})
"""


@pytest.fixture
def process(tmp_path, monkeypatch):
  (tmp_path / "echo_apart.py").write_text(ECHO)
  monkeypatch.syspath_prepend(str(tmp_path))
  process = apart.Process("echo_apart", memory=1 << 30)
  yield process
  process.end()


def replies(process, count):
  said = []
  while len(said) < count:
    said += process.said()
  return [one["said"] for one in said]


def test_each_message_has_one_reply_whatever_is_printed_read_or_forked(process):
  asked = ["one", "prints", "forks", "reads", "last"]
  for number, what in enumerate(asked):
    process.send(number, what)
  assert replies(process, len(asked)) == ["one", "prints", "forks", "", "last"]


def test_half_of_a_surrogate_pair_is_a_question_mark(process):
  process.send(0, "a\ud800b")
  assert replies(process, 1) == ["a?b"]


def test_its_own_status_is_told_and_not_that_of_the_kill(process):
  assert process.is_running
  process.send(0, "leaves")
  with pytest.raises(EOFError):
    process.said()
  assert apart.status(process.end()) == "exit status 3"
  assert process.end() == 3
  assert not process.is_running
  assert process.replies.closed


@pytest.mark.parametrize("how", ["end", "closed"])
def test_what_it_started_ends_with_it(process, how):
  process.send(0, "starts")
  (pid,) = replies(process, 1)
  assert is_running(pid)
  if how == "end":
    process.end()
  else:
    process._popen.stdin.close()  # as the kernel does where who asks was killed
  deadline = time.monotonic() + 10
  while is_running(pid):
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_it_ends_without_a_word_where_nobody_reads_its_answer(tmp_path):
  (tmp_path / "echo_apart.py").write_text(ECHO)
  settings = (
    f'{{"module": "echo_apart", "memory": 0, "paths": {[str(tmp_path), *sys.path]}, "parent": {os.getpid()}}}'
  ).replace("'", '"')
  process = subprocess.Popen(
    [sys.executable, "-P", apart_program.__file__, settings],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
  )
  assert process.stdout is not None
  process.stdout.close()
  process.stdout = None
  body = pickle.dumps((1, "one"))
  _, said = process.communicate(apart_program.HEADER.pack(len(body)) + body, timeout=60)
  assert said == b""


def is_running(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False
