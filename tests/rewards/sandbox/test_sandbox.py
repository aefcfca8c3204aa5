"""What a program is given and what comes back, verdicts and their reasons, limits, the queue, and the refusal."""

import concurrent.futures
import os
import struct
import subprocess
import threading
import time

import pytest

from posttrain_jax.rewards import sandbox
from posttrain_jax.rewards.sandbox import (
  Checks,
  Limits,
  NoSandbox,
  Outcome,
  isolation,
  slots,
  start,
  supervise,
)
from posttrain_jax.rewards.sandbox.inside import seccomp, syscalls, values
from tests.marks import slow
from tests.rewards.sandbox import here

QUICK = Limits(seconds=1)


@pytest.fixture(params=["bubblewrap", slow("landlock")])
def where(request):
  here.needs(request.param)
  return request.param


def asked(code, *cases, where, **options):
  return sandbox.run(code, tests=Checks(cases, **options), isolation=where, limits=QUICK)


def test_a_program_reads_and_writes(where):
  code = "import sys; print(sum(map(int, input().split()))); print('no', file=sys.stderr)"
  outcome = sandbox.run(code, stdin=b"3 4\n", isolation=where)
  assert (outcome.stdout, outcome.stderr) == (b"7\n", b"no\n")
  assert (outcome.verdict, outcome.reason, outcome.is_missing) == ("ended", "", False)
  assert 0 < outcome.seconds < 10


def test_much_is_read_and_written(where):
  given = os.urandom(200_000)
  code = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
  assert sandbox.run(code, stdin=given, isolation=where).stdout == given
  assert sandbox.run("pass", stdin=given, isolation=where).verdict == "ended"


@pytest.mark.parametrize(
  ("code", "reason"),
  [
    ("1 / 0", "exit code 1"),
    ("import sys; sys.exit(3)", "exit code 3"),
    ("import sys; sys.exit('no')", "exit code 1"),
    ("import os; os.abort()", "SIGABRT"),
    ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    ("def f(:", "exit code 1"),
    ("\0", "exit code 1"),
  ],
)
def test_how_a_program_failed(code, reason, where):
  outcome = sandbox.run(code, isolation=where)
  assert outcome.verdict == "failed"
  assert reason in outcome.reason


def test_a_command_and_files():
  here.needs("bubblewrap")
  outcome = sandbox.run(["cat", "a.txt"], files={"a.txt": b"\0hello"}, isolation="bubblewrap")
  assert (outcome.stdout, outcome.verdict) == (b"\0hello", "ended")
  assert sandbox.run(["false"], isolation="bubblewrap").reason == "ended with exit code 1"
  assert sandbox.run(["no-such-command"], isolation="bubblewrap").verdict == "failed"


@pytest.mark.parametrize(
  ("program", "files", "message"),
  [("pass", {"a": b""}, "has no files"), (["true"], None, "has no files")],
)
def test_what_landlock_has_not_is_refused(program, files, message):
  with pytest.raises(ValueError, match=message):
    sandbox.run(program, files=files, isolation="landlock")


def test_a_command_has_no_functions_to_test():
  with pytest.raises(ValueError, match="not of a command"):
    sandbox.run(["true"], tests=Checks(["pass"]), isolation="bubblewrap")


# Checks


VALUES = """
import collections, enum, fractions
Point = collections.namedtuple("Point", "x y")
class Color(enum.IntEnum): RED = 1
def same(x): return x
def values():
  return [1, -2.5, True, None, "\\ud800", "a\\0b", b"\\xff", 2 ** 200, -2 ** 63, float("inf"), (1, (2,)), {1, 2},
    frozenset([3]), {"a": {2: [3]}, (1, 2): 4}, 1j, Point(1, 2), Color.RED, collections.Counter("aab")]
"""


def test_values_cross_over_as_they_are(where):
  expected = (
    "[1, -2.5, True, None, '\\ud800', 'a\\0b', b'\\xff', 2 ** 200, -2 ** 63, float('inf'), (1, (2,)), {1, 2},"
    "frozenset([3]), {'a': {2: [3]}, (1, 2): 4}, 1j, (1, 2), 1, {'a': 2, 'b': 1}]"
  )
  outcome = asked(
    VALUES,
    f"assert values() == {expected}",
    f"assert same({expected}) == {expected}",
    f"assert [type(v) for v in values()] == [type(v) for v in {expected}]",
    where=where,
  )
  assert outcome.verdict == "passed", outcome.reason


def test_each_type_is_told_from_its_likes(where):
  for answer, expected in [("(1, 2)", "[1, 2]"), ("'1'", "1"), ("{1}", "[1]")]:
    outcome = asked(f"def f(): return {answer}", f"assert f() == {expected}", where=where)
    assert outcome.verdict == "failed"


OBJECTS = """
class Stack:
  def __init__(self, *items): self.items = list(items)
  def push(self, item): self.items.append(item); return self
  def pop(self):
    return self.items.pop()
  def __len__(self): return len(self.items)
  def __getitem__(self, i): return self.items[i]
  def __iter__(self): return iter(self.items)
def top(stack): return stack.items[-1]
def count(n):
  for i in range(n): yield i
def sort(xs, by): xs.sort(); by["done"] = True
def fails(x): raise KeyError("no " + x)
class Own(ValueError): pass
def own(): raise Own("mine")
"""


@pytest.mark.parametrize(
  "case",
  [
    "s = Stack(1, 2)\ns.push(3).push(4)\nassert (s.pop(), len(s), s[0], list(s), top(s)) == (4, 3, 1, [1, 2, 3], 3)",
    "assert list(count(3)) == [0, 1, 2]",
    "xs, by = [3, 1, 2], {}\nsort(xs, by)\nassert xs == [1, 2, 3] and by == {'done': True}",
    "try:\n  fails('x')\n  assert False\nexcept KeyError as e:\n  assert 'no x' in str(e)",
    "try:\n  own()\n  assert False\nexcept ValueError as e:\n  assert str(e) == 'mine'",
    "assert sorted(map(lambda x: x, count(n=2))) == [0, 1]",
    "assert math.isclose(sum(count(3)), 3.0)",
  ],
)
def test_what_tests_do_with_a_programs_objects(case, where):
  assert asked("import math\n" + OBJECTS, case, where=where).verdict == "passed"


@pytest.mark.parametrize(
  ("code", "cases", "verdict", "reason"),
  [
    ("def f(x): return x", ["assert f(1) == 1", "x = 2\nassert f(x) == 3, 'odd'"], "failed",
      "test 2 of 2: AssertionError: odd in assert f(x) == 3, 'odd'"),
    ("def g(x): return x", ["assert f(1) == 1"], "failed", "defines no f"),
    ("def f(x): return y", ["assert f(1) == 1"], "failed", "name 'y' is not defined in assert f(1)"),
    ("def f(x:", ["assert f(1) == 1"], "failed", "raised SyntaxError"),
    ("raise ValueError('early')\ndef f(x): pass", ["assert f(1)"], "failed", "raised ValueError: early"),
    ("f = 3", ["assert f == 3", "assert f(1) == 1"], "failed", "test 2 of 2: TypeError"),
    ("def f(x): pass", ["assert f(1"], "broken", "the tests cannot be run: SyntaxError"),
    ("def f(x): pass", ["assert f(lambda: 1)"], "broken", "give a function to the program"),
  ],
)  # fmt: skip
def test_verdicts_and_their_reasons(code, cases, verdict, reason, where):
  outcome = asked(code, *cases, where=where)
  assert outcome.verdict == verdict
  assert reason in outcome.reason
  assert outcome.is_missing == (verdict == "broken")


def test_setup_is_not_the_programs(where):
  """A program that defines a helper of the tests anew does not change them."""
  code = "def f(x): return 1\ndef near(a, b): return True"
  outcome = asked(
    code, "assert near(f(2), 4)", where=where, setup="def near(a, b): return abs(a - b) < 1"
  )
  assert outcome.verdict == "failed"


def test_a_verdict_that_is_read_late_is_no_time_out(where, monkeypatch):
  """It is this process that was kept waiting, by more than the deadline."""
  looked = supervise.Supervisor._looked

  def late(supervisor, moved):
    supervisor.process.wait()
    supervisor.started -= 100
    return looked(supervisor, moved)

  monkeypatch.setattr(supervise.Supervisor, "_looked", late)
  outcome = asked("def f(x): return x", "assert f(1) == 1", where=where)
  assert (outcome.verdict, outcome.reason) == ("passed", "")


def test_nothing_of_one_run_is_there_in_the_next(where):
  code = "import os\nprint(os.path.exists('/tmp/kept'))\nopen('/tmp/kept', 'w').close()"
  if where == "landlock":
    return
  assert [sandbox.run(code, isolation=where).stdout for _ in range(2)] == [b"False\n"] * 2


# Time and its limits


def test_a_deadline_is_missing_and_a_limit_is_an_answer(where):
  """The clock may have been used up by others; CPU time and waiting are a program's own."""
  loop = "while True: pass"
  late = sandbox.run(loop, deadline=0.4, isolation=where)
  assert (late.verdict, late.is_missing) == ("timed out", True)
  assert late.reason.startswith("timed out after 0.4 s, of which it computed 0.")
  assert "; its processes were then " in late.reason
  assert "running" in late.reason
  used = sandbox.run(loop, deadline=60, limits=QUICK, isolation=where)
  assert (used.verdict, used.is_missing) == ("cpu", False)
  waits = sandbox.run("import time; time.sleep(100)", limits=QUICK, isolation=where)
  assert (waits.verdict, waits.is_missing) == ("waited", False)
  assert waits.seconds < 10


def test_the_kernels_limit_is_told_as_such_however_little_was_counted(where):
  code = "import os, signal; os.kill(os.getpid(), signal.SIGXCPU)"
  outcome = sandbox.run(code, limits=QUICK, isolation=where)
  assert (outcome.verdict, outcome.reason) == ("cpu", f"used its {QUICK.seconds} s of CPU time")


def test_the_queue_is_not_run_time(where):
  """With one slot, twelve programs of which the last waits for all others have a deadline of their own each."""
  slot = slots.Slots(1, with_uids=os.geteuid() == 0)
  begun = time.monotonic()
  with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor(6) as pool:
    patch.setattr(slots, "shared", lambda: slot)
    code = "import time; time.sleep(0.2)"
    outcomes = list(pool.map(lambda _: sandbox.run(code, deadline=0.9, isolation=where), range(6)))
  assert {o.verdict for o in outcomes} == {"ended"}
  assert max(o.seconds for o in outcomes) < 0.9 < time.monotonic() - begun


def test_no_more_run_at_once_than_there_are_slots(where):
  count, most, lock = 0, 0, threading.Lock()
  slot = slots.Slots(2, with_uids=False)

  def one(_):
    nonlocal count, most
    with slot.one():
      with lock:
        count += 1
        most = max(most, count)
      time.sleep(0.01)
      with lock:
        count -= 1

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(one, range(20)))
  assert most == 2


def test_slots_of_two_processes_have_uids_of_their_own():
  free = [slots.Slots(3, with_uids=True) for _ in range(2)]
  uids = [uid for s in free for uid in s.uids]
  assert len({*uids}) == 6
  assert all(30_000 < uid < 60_000 for uid in uids)


def test_a_sandbox_that_is_killed_is_missing(where, monkeypatch):
  """By the system, for want of memory, say."""
  outcome: list[Outcome] = []
  thread = threading.Thread(
    target=lambda: outcome.append(sandbox.run("import time; time.sleep(5)", isolation=where))
  )
  started = []
  popen = subprocess.Popen
  monkeypatch.setattr(
    start.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
  )
  thread.start()
  while not started:
    time.sleep(0.01)
  time.sleep(0.2)
  started[0].kill()
  thread.join()
  assert (outcome[0].verdict, outcome[0].is_missing) == ("lost", True)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(seconds=0), "seconds must be at least 1, found 0"),
    (dict(memory=1000), "at least 64 MiB to start Python"),
  ],
)
def test_limits_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    Limits(**options)


# What isolates, and what is said where nothing does


def test_the_probe_tells_what_is_missing(monkeypatch):
  monkeypatch.setattr(isolation, "trouble", lambda name: "" if name == "landlock" else "no bwrap")
  found = isolation.probe.__wrapped__()
  assert found.isolation == "landlock"
  assert "since bubblewrap does not work here (no bwrap)" in found.sentence
  assert "apt-get install bubblewrap" in found.sentence


def test_without_isolation_programs_are_refused_unless_a_flag_says_otherwise(monkeypatch):
  monkeypatch.setattr(isolation, "trouble", lambda name: f"no {name}")
  nothing = isolation.probe.__wrapped__()
  monkeypatch.setattr(sandbox, "probe", lambda: nothing)
  with pytest.raises(NoSandbox, match=r"apt-get install bubblewrap.*reward\.unsafe_code=true"):
    sandbox.run("pass")
  assert sandbox.run("print(1)", unsafe=True).stdout == b"1\n"
  assert sandbox.run("while True: pass", unsafe=True, limits=QUICK).verdict == "cpu"
  with pytest.raises(NoSandbox, match="unsafe=True, too"):
    sandbox.run("pass", isolation="none")


def test_a_machine_without_bubblewrap_says_so(monkeypatch):
  monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
  assert isolation.trouble("bubblewrap") == "bwrap is not installed"


def test_a_probe_that_gets_out_is_trouble(monkeypatch):
  here.needs("bubblewrap")
  monkeypatch.setattr(isolation, "TRY", "def escapes(): return ['sockets']")
  assert "a program gets out: ['sockets']" in isolation.trouble("bubblewrap")


# Parts


@pytest.mark.parametrize(
  ("line", "verdict"),
  [
    (b'{"nonce": "0", "verdict": "passed", "reason": ""}', ("failed", "a forged verdict")),
    (b'{"nonce": "right", "verdict": "perfect", "reason": ""}', ("failed", "a forged verdict")),
    (b'{"nonce": "right", "verdict": "passed"}', ("failed", "a forged verdict")),
    (b'{"nonce": "right", "verdict": "lost", "reason": ""}', ("failed", "a forged verdict")),
    (b"[1]", ("failed", "a forged verdict")),
    (b"\xff{", ("failed", "a forged verdict")),
    (b'{"nonce": "right", "verdict": "passed", "reason": ""}', ("passed", "")),
  ],
)
def test_a_verdict_without_its_nonce_is_none(line, verdict):
  """Though no program has the descriptor that it would need to write one."""
  with subprocess.Popen(["true"]) as process:
    supervisor = supervise.Supervisor(process, QUICK, 1.0, "right")
    assert supervisor._verdict(line) == verdict
    supervisor.close()


def test_a_filter_is_well_formed_on_both_architectures():
  """Every jump stays inside, the last instruction returns, and each denied call is in it."""
  for machine in syscalls.ARCHITECTURES:
    base = seccomp.base(machine=machine)
    alone, answering = seccomp.base(alone=7, machine=machine), seccomp.answering(7, machine=machine)
    for program in (base, alone, answering):
      lines = [struct.unpack_from("=HBBI", program, i) for i in range(0, len(program), 8)]
      assert len(lines) < 4096
      assert lines[-1] == (seccomp.RETURN, 0, 0, seccomp.ALLOW)
      for i, (code, yes, no, _) in enumerate(lines):
        if code in (seccomp.EQUAL, seccomp.AT_LEAST, seccomp.ANY_BIT):
          assert i + 1 + max(yes, no) < len(lines)
    for number in syscalls.numbers(syscalls.DENIED, machine):
      assert struct.pack("=HBBI", seccomp.EQUAL, 0, 1, number) in base


def test_other_architectures_have_no_filter(monkeypatch):
  monkeypatch.setattr(syscalls.platform, "machine", lambda: "riscv64")
  with pytest.raises(OSError, match="no table of system calls for riscv64"):
    seccomp.base()


@pytest.mark.parametrize("line", [b'{"x": 1}', b'{"s": [[1]]}', b"[" * 100_000, b"{}", b'{"h": 1}'])
def test_what_is_no_value_raises_and_does_no_more(line):
  with pytest.raises((ValueError, TypeError, KeyError, RecursionError, StopIteration)):
    values.loads(line)


def test_an_object_needs_a_place_to_stay():
  with pytest.raises(values.NotPlain, match="a object cannot be given"):
    values.dumps(object())
