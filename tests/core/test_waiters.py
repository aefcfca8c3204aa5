"""Threads that wait for others."""

import subprocess
import sys
import threading

import pytest

from posttrain_jax.core.waiters import Waiters


def test_what_is_asked_is_given_or_raised_by_so_many_threads_at_once():
  waiters, both = Waiters(2), threading.Barrier(3, timeout=10)
  some = [waiters.submit(lambda i=i: (both.wait(), i)[1]) for i in range(2)]
  third = waiters.submit(lambda: 1 / 0)
  assert not third.running()
  both.wait()
  assert [one.result(10) for one in some] == [0, 1]
  with pytest.raises(ZeroDivisionError):
    third.result(10)
  waiters.close()


def test_what_no_thread_has_come_to_is_cancelled():
  waiters, gate = Waiters(1), threading.Event()
  first = waiters.submit(gate.wait, 10)
  while not first.running():
    pass
  left = [waiters.submit(max, 1, 2) for _ in range(3)]
  assert left[0].cancel()
  waiters.close()
  assert all(one.cancelled() for one in left)
  gate.set()
  assert first.result(10)


def test_a_program_ends_while_one_waits():
  text = (
    "from posttrain_jax.core.waiters import Waiters; import time; Waiters(1).submit(time.sleep, 60)"
  )
  assert subprocess.run([sys.executable, "-c", text], timeout=30).returncode == 0
