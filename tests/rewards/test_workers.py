"""Workers: every call gets an answer or a reason, whatever the calls before it did."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from posttrain_jax.rewards import workers as workers_lib
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.verifier import Answer, Context
from posttrain_jax.rewards.workers import Apart, Interrupted, WorkerError, Workers
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
  began = time.monotonic()
  scores = Apart(faulty.told, workers, 0.4).scores(answers(*asked), Context())
  assert time.monotonic() - began < 5  # by our deadline, and not by the kernel's clock behind it
  by = dict(zip(asked, scores))
  assert [by[text].value for text in ("1", "2", "3", "print")] == [1, 2, 3, 0.5]
  assert by["hang"].reason == by["loop"].reason == "timed out after 0.4 s"
  assert by["crash"].reason == "the worker died: signal 9"
  assert by["leave"].reason == "the worker died: exit status 0"
  place, _, fault = by["raise"].reason.partition(": ")
  assert fault == "raised KeyError: 'gold'"
  assert place.startswith(f"{faulty.__file__}:")
  assert int(place.rpartition(":")[2]) > 20


def test_what_a_child_of_a_verifier_says_is_nobodys_score():
  """Whether it comes back before its parent (0, 2) or after it (1, 3): parent and child have one pipe."""
  pool = Workers(1)
  try:
    part = Apart(faulty.forks, pool, 5)
    for _ in range(2):
      given = part.scores(answers("0", "1", "2", "3"), Context())
      assert [one.value for one in given] == [0, 1, 2, 3]
  finally:
    pool.close()


def test_a_reply_to_an_earlier_call_is_dropped():
  slot = workers_lib._Slot(0)
  slot.state, slot.call, slot.number = workers_lib.RUNS, 0, 7
  batch = workers_lib._Round([slot], 0, b"", [()], [1.0])
  batch._take(slot, {"to": 6, "result": [0.0, "", True]})
  assert batch.given == [None]
  assert slot.state == workers_lib.RUNS
  batch._take(slot, {"to": 7, "result": [1.0, "", True]})
  assert batch.given == [[1.0, "", True]]
  batch._take(slot, {"to": 7, "result": [0.0, "", True]})
  assert batch.given == [[1.0, "", True]]


def test_whoever_stops_does_not_wait_for_a_verifier():
  """And what it ran has ended, and is not taken for a fault of the verifier's."""
  asked = []

  def stopping():
    asked.append(time.monotonic())
    return len(asked) > 3

  pool = Workers(1, stopping=stopping)
  try:
    with pytest.raises(Interrupted):
      Apart(faulty.told, pool, 60).scores(answers("hang"), Context())
    assert time.monotonic() - asked[0] < 10
    assert [slot.process for slot in pool._slots] == [None]
  finally:
    pool.close()


def test_waiting_for_a_worker_is_not_running(workers):
  """The last of 24 calls of 0.05 s has waited for more than its deadline."""
  scores = Apart(naps, workers, 0.5).scores(answers(*["x"] * 24), Context())
  assert [given.value for given in scores] == [1.0] * 24


def naps(prompt, completion, example):
  time.sleep(0.05)
  return True


def test_what_cannot_be_imported_is_told_at_once(workers):
  with pytest.raises(WorkerError, match=r"cannot be imported.*FILE\.py:name"):
    Apart(lambda prompt, completion, example: 1, workers).scores(answers("x"), Context())
  with pytest.raises(ValueError, match="name a number from 1 to"):
    Workers(10_000)


def test_a_worker_that_was_killed_at_rest_loses_no_call(workers):
  part = Apart(faulty.told, workers, 5)
  part.scores(answers("1", "2", "3"), Context())
  for slot in workers._slots:
    if slot.process is not None:
      os.kill(slot.process.pid, 9)
  assert [given.value for given in part.scores(answers("4", "5", "6", "7"), Context())] == [
    4,
    5,
    6,
    7,
  ]


def test_workers_do_not_import_jax(workers):
  (given,) = Apart(modules, workers, 20).scores(answers("x"), Context())
  assert given.value == 0


def modules(prompt, completion, example):
  return "jax" in sys.modules


def lives(process):
  """Whether a process runs; one that ended and that nobody has asked for is a zombie."""
  try:
    state = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
  except FileNotFoundError:
    return False
  return state != "Z"


def ended_within(processes, seconds):
  processes = [*processes]
  until = time.monotonic() + seconds
  while any(map(lives, processes)) and time.monotonic() < until:
    time.sleep(0.02)
  return not any(map(lives, processes))


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at in /proc")


@on_linux
def test_what_a_verifier_started_ends_with_it(workers, tmp_path):
  told = tmp_path / "processes"
  (given,) = Apart(faulty.leaves_a_child, workers, 1.0).scores(answers(str(told)), Context())
  assert given.reason == "timed out after 1 s"
  assert ended_within(map(int, told.read_text().split()), 2)


def test_an_interrupt_leaves_no_answers_to_others(workers, monkeypatch):
  """Ctrl-C while a call runs: what it returns later is no answer to the next one."""
  part = Apart(faulty.told, workers, 5)
  part.scores(answers("1", "2", "3", "4"), Context())  # both have loaded it

  def interrupted(self):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(workers_lib._Round, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
      part.scores(answers("slow"), Context())
  assert [given.value for given in part.scores(answers("4"), Context())] == [4]


SCRIPT = """
import sys
from posttrain_jax.rewards.verifier import Answer, Context
from posttrain_jax.rewards.workers import Apart, Workers
from tests.rewards import faulty

asked, workers = [Answer("?", sys.argv[2], {})], Workers(1)
print(Apart(getattr(faulty, sys.argv[1]), workers, 60.0).scores(asked, Context())[0].value, flush=True)
sys.stdin.read()
"""


def started(folder, *arguments):
  """A run of the script, beside a file that has the name of one of Python's own."""
  (folder / "types.py").write_text("raise ImportError('the wrong types')\n")
  (folder / "run.py").write_text(SCRIPT)
  return subprocess.Popen(
    [sys.executable, str(folder / "run.py"), *arguments],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def test_a_file_beside_the_script_is_not_taken_for_one_of_pythons(tmp_path):
  with started(tmp_path, "length", "four") as process:
    assert process.communicate(timeout=60)[0] == "4.0\n"


@on_linux
@pytest.mark.parametrize("verifier", ["leaves_a_child", "keeps_a_child"])
def test_workers_end_with_a_run_that_was_killed(verifier, tmp_path):
  told = tmp_path / "processes"
  process = started(tmp_path, verifier, str(told))
  until = time.monotonic() + 30
  while not (told.exists() and told.read_text()) and time.monotonic() < until:
    time.sleep(0.02)
  if verifier == "keeps_a_child":  # killed once its workers are at rest
    assert process.stdout is not None
    assert process.stdout.readline() == "1.0\n"
  process.kill()
  process.communicate()
  assert ended_within(map(int, told.read_text().split()), 5)


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
