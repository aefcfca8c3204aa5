"""Workers: every call gets an answer or a reason, whatever the calls before it did."""

import os
import sys
import time

import pytest

from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.verifier import Answer, Log
from posttrain_jax.rewards.workers import Apart, WorkerError, Workers
from tests.rewards import faulty


@pytest.fixture(scope="module")
def workers():
  pool = Workers(2 if len(os.sched_getaffinity(0)) > 1 else 1)
  yield pool
  pool.close()


def answers(*texts):
  return [Answer("?", text, {}) for text in texts]


def test_faults_are_missing_with_a_reason_and_the_rest_is_scored(workers):
  asked = ("1", "hang", "crash", "2", "leave", "raise", "loop", "print", "3")
  scores = Apart(faulty.told, workers, 0.4).scores(answers(*asked), Log())
  by = dict(zip(asked, scores))
  assert [by[text].value for text in ("1", "2", "3", "print")] == [1, 2, 3, 0.5]
  assert by["hang"].reason == by["loop"].reason == "timed out after 0.4 s"
  assert by["crash"].reason == "the worker died: signal 9"
  assert by["leave"].reason == "the worker died: exit status 0"
  place, _, fault = by["raise"].reason.partition(": ")
  assert fault == "raised KeyError: 'gold'"
  assert place.startswith(f"{faulty.__file__}:")
  assert int(place.rpartition(":")[2]) > 20


def test_waiting_for_a_worker_is_not_running(workers):
  """Forty calls that take 0.05 s each on two workers: the last has waited for a second, ten times its deadline."""
  scores = Apart(naps, workers, 0.5).scores(answers(*["x"] * 40), Log())
  assert [given.value for given in scores] == [1.0] * 40


def naps(prompt, completion, example):
  time.sleep(0.05)
  return True


def test_what_cannot_be_imported_is_told_at_once(workers):
  with pytest.raises(WorkerError, match=r"cannot be imported.*FILE\.py:name"):
    Apart(lambda prompt, completion, example: 1, workers).scores(answers("x"), Log())
  with pytest.raises(ValueError, match="name a number from 1 to"):
    Workers(10_000)


def test_a_worker_that_was_killed_at_rest_loses_no_call(workers):
  part = Apart(faulty.told, workers, 5)
  part.scores(answers("1", "2", "3"), Log())
  for slot in workers._slots:
    if slot.process is not None:
      os.kill(slot.process.pid, 9)
  assert [given.value for given in part.scores(answers("4", "5", "6", "7"), Log())] == [4, 5, 6, 7]


def test_workers_do_not_import_jax(workers):
  (given,) = Apart(modules, workers, 20).scores(answers("x"), Log())
  assert given.value == 0


def modules(prompt, completion, example):
  return "jax" in sys.modules


def load_of(count):
  """Calls of which one in twenty hangs or ends its process."""
  faults = ("hang", "crash", "leave")
  return [faults[i // 20 % 3] if i % 20 == 7 else str(i) for i in range(count)]


def holds(workers, count, seconds):
  texts = load_of(count)
  result = Reward([Part("told", Apart(faulty.told, workers, seconds))], retries=1).score(
    answers(*texts)
  )
  totals = [one.total for one in result.answers]
  assert len(totals) == count
  wrong = [
    (text, total) for text, total in zip(texts, totals)
    if (text.isdigit() and total.value not in (None, float(text))) or (not text.isdigit() and not total.is_missing)
  ]  # fmt: skip
  assert not wrong
  lost = [text for text, total in zip(texts, totals) if text.isdigit() and total.is_missing]
  return lost, result


def test_none_of_many_calls_is_lost_among_hangs_and_crashes(workers):
  lost, result = holds(workers, 80, 0.3)
  assert not lost
  assert result.retried == sum(result.missing.values()) > 0


@pytest.mark.slow
def test_two_thousand_calls_on_busy_cores():
  """Other programs keep every core busy: what times out through them is missing, never wrong."""
  import subprocess

  busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
  pool = Workers()
  began = time.monotonic()
  try:
    lost, result = holds(pool, 2_000, 1.0)
  finally:
    for process in busy:
      process.kill()
      process.wait()
    pool.close()
  assert not lost
  print(f"\n2,000 calls: {time.monotonic() - began:.1f} s, {result.retried} asked again")
