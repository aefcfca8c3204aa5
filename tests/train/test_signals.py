"""Stop: signals become a flag, the second Ctrl-C an interrupt."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from posttrain_jax.train.signals import PREEMPTED, Stop
from tests.marks import slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag(number, capfd):
  with Stop() as stop:
    assert not stop.requested
    assert not stop.agreed()
    os.kill(os.getpid(), number)
    assert stop.requested
    assert stop.agreed()
  assert f"{number.name}: stopping" in capfd.readouterr().err


def test_sigterm_again_and_again_is_one_request(capfd):
  with Stop() as stop:
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGTERM)
    assert stop.agreed()
  assert capfd.readouterr().err.count("stopping") == 1


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_second_interrupt_is_not_waited_for(first):
  with Stop() as stop:
    os.kill(os.getpid(), first)
    if first == signal.SIGTERM:
      os.kill(os.getpid(), signal.SIGINT)  # the first of its kind
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_given_back():
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with Stop():
    assert signal.getsignal(signal.SIGTERM) != before[0]
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_during_the_first_compilation_is_kept(capfd):
  import jax
  import jax.numpy as jnp

  def traced(x):  # runs once, while the step is being compiled
    os.kill(os.getpid(), signal.SIGTERM)
    return x + 1

  with Stop() as stop:
    assert int(jax.jit(traced)(jnp.zeros((), jnp.int32))) == 1
    assert stop.requested


def test_a_program_that_stops_when_asked_exits_with_75():
  program = """
    import sys, time
    from posttrain_jax.train.signals import PREEMPTED, Stop
    with Stop() as stop:
      print("ready", flush=True)
      for step in range(2000):
        time.sleep(0.01)
        if stop.agreed():
          print("saved", flush=True)
          sys.exit(PREEMPTED)
  """
  child = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(program)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  try:
    assert child.stdout.readline() == "ready\n"
    child.terminate()
    out, err = child.communicate(timeout=30)
  finally:
    child.kill()
  assert (out, child.returncode) == ("saved\n", 75), err
  assert PREEMPTED == 75


STUCK = """
import sys, time
from posttrain_jax.core import ending
from posttrain_jax.train import signals
ending.PATIENCE = 0.5
with signals.exiting():
  if sys.argv[1] == "loop":
    with signals.Stop() as stop:
      print("ready", flush=True)
      while not stop.requested:
        time.sleep(0.05)
      time.sleep(1.5)  # a long save
      print("saved", flush=True)
      sys.exit(0)
  end, told = time.monotonic() + 30, False
  while time.monotonic() < end:
    try:
      if not told:
        told = True
        print("ready", flush=True)
      time.sleep(30)
    except BaseException:
      pass  # as what is raised inside a garbage collection
"""


@pytest.mark.parametrize(
  ("how", "number", "code"),
  [
    slow("dropped", signal.SIGTERM, 75),
    slow("dropped", signal.SIGHUP, 75),
    ("dropped", signal.SIGINT, 130),
    ("loop", signal.SIGTERM, 0),
  ],
)
def test_a_start_that_cannot_stop_is_ended_and_a_loop_is_not(how, number, code):
  """Half a second later here; a loop that saves takes the time that it needs."""
  child = subprocess.Popen(
    [sys.executable, "-c", STUCK, how],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  try:
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
  finally:
    child.kill()
  assert child.returncode == code, err
  assert number.name in err
  assert out == ("saved\n" if how == "loop" else "")
