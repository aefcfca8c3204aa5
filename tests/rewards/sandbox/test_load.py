"""Thousands of programs on busy cores: none is lost, none scored wrong; and what a sandbox costs."""

import collections
import concurrent.futures
import os
import random
import statistics
import subprocess
import sys
import time

import pytest

from posttrain_jax.rewards import sandbox
from posttrain_jax.rewards.python import python
from posttrain_jax.rewards.sandbox import Limits
from tests.rewards.sandbox import here

RIGHT = "def f(n):\n  return sum(i * i for i in range(n))\n"
WRONG = "def f(n):\n  return sum(i * i for i in range(n + 1))\n"
FAULTS = {
  "hangs": "def f(n):\n  import time\n  time.sleep(1000)\n",
  "loops": "def f(n):\n  while True: pass\n",
  "exits": "import os\ndef f(n): os._exit(0)\n",
  "crashes": "import ctypes\ndef f(n): ctypes.string_at(0)\n",
  "is killed": "import os\ndef f(n): os.kill(os.getpid(), 9)\n",
}
ROW = dict(tests=["assert f(4) == 14", "assert f(100) == 328350"])


def programs(count, seed):
  """(kind, code, what it is worth): one in twenty at fault, the rest half right."""
  rng = random.Random(seed)
  for i in range(count):
    kind = rng.choice([*FAULTS]) if i % 20 == 0 else rng.choice(["right", "wrong"])
    code = {"right": RIGHT, "wrong": WRONG, **FAULTS}[kind]
    yield kind, code, float(kind == "right")


@pytest.fixture
def busy():
  """As many processes that take a core as there are cores."""
  loops = [
    subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    for _ in range(os.cpu_count() or 1)
  ]
  yield
  for loop in loops:
    loop.kill()
    loop.wait()


def scored(count, seed, limits):
  """Score of each, asked again where it is missing, and how many were."""
  every = list(programs(count, seed))

  def one(program):
    for tries in range(1, 4):
      score = python("", program[1], ROW, limits=limits, deadline=20)
      if score.value is not None:
        return score, tries
    return score, tries

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    return every, list(pool.map(one, every))


@pytest.mark.parametrize("count", [20, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_none_is_lost_and_none_scored_wrong(count, busy):
  here.needs("bubblewrap")
  started = time.monotonic()
  every, scores = scored(count, seed=count, limits=Limits(seconds=1))
  seconds = time.monotonic() - started
  print(f"{count} programs on busy cores: {seconds:.0f} s, {1000 * seconds / count:.0f} ms each")
  print(collections.Counter(tries for _, tries in scores))
  assert len(scores) == count
  for (kind, _, worth), (score, _) in zip(every, scores):
    assert score.value == worth, (kind, score)


@pytest.mark.slow
def test_a_time_out_under_load_is_missing_and_never_wrong(busy):
  """Right programs with a deadline that busy cores cannot keep."""
  here.needs("bubblewrap")
  slow = "def f(n):\n  for i in range(6000000): pass\n  return sum(i * i for i in range(n))\n"

  def one(_):
    return python("", slow, ROW, limits=Limits(seconds=10), deadline=0.5)

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    scores = list(pool.map(one, range(12)))
  assert {score.value for score in scores} <= {1.0, None}
  missing = [score.reason for score in scores if score.value is None]
  assert missing
  assert all(reason.startswith("timed out after 0.5 s") for reason in missing)


@pytest.mark.slow
def test_what_a_sandbox_costs():
  """Medians of a trivial program, printed beside each other; isolation is a fraction of a second."""
  here.needs("bubblewrap")

  def plain():
    subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)

  def bare():
    command = ["bwrap", "--ro-bind", "/", "/", "--unshare-all"]
    subprocess.run([*command, sys.executable, "-I", "-S", "-c", "pass"], check=True)

  ways = dict(python=plain, bwrap=bare)
  for isolation in ("bubblewrap", "landlock", "none"):
    if not here.trouble(isolation):
      ways[isolation] = lambda isolation=isolation: sandbox.run(
        "pass", isolation=isolation, unsafe=True
      )
  times = {name: [] for name in ways}
  for _ in range(30):  # in turn, so that each meets the same load
    for name, way in ways.items():
      started = time.perf_counter()
      way()
      times[name].append(1000 * (time.perf_counter() - started))
  medians = {name: statistics.median(some) for name, some in times.items()}
  print({name: f"{median:.0f} ms" for name, median in medians.items()})
  assert medians["bubblewrap"] < medians["bwrap"] + 200
