"""Who is gone, who failed and who hangs: with a store in memory, and with two processes under gloo."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from launch import local
from posttrain_jax.core import progress, watch
from tests.commands import test_train

PULSE, SILENCE = 0.05, 0.4


class Memory:
  """A store for watches of one process."""

  def __init__(self):
    self.words, self.lock, self.is_there = {}, threading.Lock(), True

  def put(self, folder, name, value):
    with self.lock:
      if not self.is_there:
        raise RuntimeError("UNAVAILABLE")
      self.words[folder, name] = value

  def all(self, folder):
    with self.lock:
      if not self.is_there:
        raise RuntimeError("UNAVAILABLE")
      return {name: value for (f, name), value in self.words.items() if f == folder}


class Two:
  """Two watches; `codes` has what they leave with."""

  def __init__(self, count=2, deadline=None):
    self.store, self.codes = Memory(), {}
    self.watches = [
      watch.Watch(
        index,
        count,
        self.store,
        deadline,
        pulse=PULSE,
        silence=SILENCE,
        leave=lambda code, index=index: self.codes.setdefault(index, code),
      )
      for index in range(count)
    ]
    for each in self.watches:
      each.start()

  def until(self, is_so, seconds=10):
    deadline = time.monotonic() + seconds
    while not is_so():
      assert time.monotonic() < deadline, self.store.words
      time.sleep(0.01)

  def stop(self, index):
    """No sign comes any more, as when its process was killed."""
    each = self.watches[index]
    each._look = lambda: None

  def close(self):
    for each in self.watches:
      each.close()


@pytest.fixture
def two():
  started = Two()
  yield started
  started.close()


BROKEN = RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")


def test_a_mistake_of_one_is_everybodys_end(two, capfd):
  two.watches[1].settle(ValueError("row 7 is no row\nmore of it"))
  two.until(lambda: two.codes == {0: 1})
  assert "posttrain: process 1 of 2 failed: row 7 is no row\n" in capfd.readouterr().err
  assert 1 not in two.codes  # which says so itself


def test_the_first_ones_mistake_is_told_before_the_store_is_gone(two):
  two.watches[0].settle(ValueError("no"))
  assert two.codes == {1: 1}


@pytest.mark.parametrize("lost", [0, 1])
def test_a_broken_collective_is_no_mistake_where_a_process_is_gone(lost, two, capfd):
  left = 1 - lost
  two.until(lambda: len(two.store.all(watch.SIGNS)) == 2)
  if lost:
    two.stop(1)
  else:
    two.store.is_there = False  # it was the coordinator
  began = time.monotonic()
  two.watches[left].settle(BROKEN)
  two.until(lambda: left in two.codes)
  assert two.codes[left] == 75
  assert time.monotonic() - began < 5
  assert f"posttrain: process {lost} of 2 is gone: " in capfd.readouterr().err


def test_a_broken_collective_is_its_own_where_all_are_there(two):
  began = time.monotonic()
  two.watches[1].settle(BROKEN)
  assert time.monotonic() - began > SILENCE
  assert two.watches[1].verdict.kind == watch.FAILURE
  two.until(lambda: two.codes == {0: 1})


def test_who_hangs_is_named_with_the_stacks_of_all(capfd):
  two = Two(deadline=0.6)
  try:
    for step in range(6):
      two.watches[0].beat(f"step {step}")
      time.sleep(0.05)
      if step < 3:
        two.watches[1].beat(f"the batch of step {step}")
    two.until(lambda: two.codes == {0: 75, 1: 75})
    said = capfd.readouterr().err
    assert "process 1 of 2 hangs: at the batch of step 2 for " in said
    assert "what process 0 does:" in said
    assert "what process 1 does:" in said
    assert "test_who_hangs_is_named" in said  # a line of a stack
  finally:
    two.close()


def test_one_that_works_is_waited_for():
  two = Two(deadline=0.4)
  try:
    for _ in range(30):
      two.watches[0].beat("exporting")
      time.sleep(0.03)
    assert two.codes == {}
    two.watches[1].close()  # done, it is no longer looked after
    assert two.codes == {}
  finally:
    two.close()


def test_one_process_alone_has_a_deadline(capfd):
  codes = []
  alone = watch.Watch(0, 1, None, 0.3, pulse=PULSE, leave=codes.append)
  alone.start()
  alone.beat("step 3")
  deadline = time.monotonic() + 5
  while not codes and time.monotonic() < deadline:
    time.sleep(0.02)
  alone.close()
  assert codes == [75]
  said = capfd.readouterr().err
  assert "process 0 of 1 hangs: at step 3 for 0 s, longer than POSTTRAIN_DEADLINE=0.3" in said


def test_nobody_is_watched_where_nobody_asked(monkeypatch):
  monkeypatch.delenv(watch.DEADLINE, raising=False)
  threads = threading.active_count()
  with watch.kept():
    assert progress.heard == []
    assert threading.active_count() == threads


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_deadline_that_is_none_is_said(text):
  with pytest.raises(ValueError, match=f"{watch.DEADLINE}={text}: write seconds"):
    watch.deadline({watch.DEADLINE: text}, 1)


# Two real ones: `does` happens in process 1 at its fourth step.
REAL = """
import os, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from posttrain_jax.core import distributed, progress, sharding, watch
from posttrain_jax.__main__ import _leave

distributed.initialize()
does = sys.argv[1]

def train():
  with watch.kept():
    mesh = sharding.mesh(fsdp=-1)
    total = jax.jit(lambda x: x.sum())
    for step in range(1000):
      if step == 4 and distributed.shard()[0] == int(does[-1]):
        print("now", flush=True)
        if does.startswith("kill"): os.kill(os.getpid(), signal.SIGKILL)
        if does.startswith("hang"): time.sleep(1000)
        if does.startswith("fail"): raise ValueError("a mistake")
        if does.startswith("stop"): os.kill(os.getpid(), signal.SIGSTOP)
      progress.beat(f"step {step}")
      float(total(distributed.global_batch(mesh, np.ones((4, 2), np.float32))))
      time.sleep(0.01)

try:
  train()
except Exception as error:
  print(type(error).__name__, error, file=sys.stderr, flush=True)
  _leave(1)
"""


def ended(does, **environment):
  """(exit codes, what was said, seconds from the fault until the other's end)."""
  coordinator = f"127.0.0.1:{local._free_port()}"
  both = [
    subprocess.Popen(
      [sys.executable, "-u", "-c", REAL, does],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=test_train.environment()
      | {
        "POSTTRAIN_COORDINATOR": coordinator,
        "POSTTRAIN_PROCESSES": "2",
        "POSTTRAIN_PROCESS_ID": str(index),
        **environment,
      },
    )
    for index in range(2)
  ]
  victim = both[int(does[-1])]
  other = both[1 - int(does[-1])]
  said = ["", ""]
  try:
    lines = []
    while "now\n" not in lines:
      lines.append(victim.stdout.readline())
      assert lines[-1], "".join(lines)
    began = time.monotonic()
    said[1 - int(does[-1])] = other.communicate(timeout=90)[0]
    seconds = time.monotonic() - began
    if does.startswith("stop"):
      victim.send_signal(signal.SIGCONT)
    said[int(does[-1])] = victim.communicate(timeout=90)[0]
  finally:
    for process in both:
      process.kill()
  return [process.returncode for process in both], said, seconds


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed():
  codes, said, seconds = ended("kill1")
  assert codes == [75, -signal.SIGKILL], said
  assert seconds < 40
  assert "process 1 of 2 is gone: no sign of it for" in said[0]


@pytest.mark.slow
def test_two_processes_one_of_which_fails():
  codes, said, seconds = ended("fail1")
  assert codes == [1, 1], said
  assert seconds < 20
  assert "process 1 of 2 failed: a mistake" in said[0]


@pytest.mark.slow
def test_two_processes_one_of_which_hangs():
  codes, said, seconds = ended("hang1", **{watch.DEADLINE: "8"})
  assert codes == [75, 75], said
  assert seconds < 40
  assert "process 1 of 2 hangs: at step 3 for" in said[0]
  assert "time.sleep" in said[1] or "in train" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("does", ["kill0", "stop0", "stop1"])
def test_two_processes_whose_machine_is_gone(does):
  """JAX's heartbeats end the one that is left, or ours: within SILENCE of `distributed`, and it is no mistake."""
  codes, said, seconds = ended(does)
  assert codes[1 - int(does[-1])] in (75, -signal.SIGABRT), said
  assert seconds < 70
