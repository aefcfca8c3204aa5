"""Programs scored by their tests: forms of rows, what of an answer is the program, right and wrong and missing."""

import pytest

from posttrain_jax.rewards import asserting, sandbox
from posttrain_jax.rewards import python as module
from posttrain_jax.rewards.python import extract, python
from posttrain_jax.rewards.sandbox import Limits
from posttrain_jax.rewards.score import Score
from tests.rewards.sandbox import here

QUICK = Limits(seconds=1)
# As a row of HumanEval: its tests use a helper of the prompt's.
ROOTS = dict(
  prompt='from typing import List\n\ndef poly(xs: List, x):\n  return sum(c * x**i for i, c in enumerate(xs))\n\n'
  'def zero(xs: List):\n    """A zero of the polynomial.\n    >>> zero([1, 1])\n    -1\n    """\n',
  entry_point="zero",
  test="METADATA = {}\n\ndef check(candidate):\n  for xs in ([1, 1], [4, 2]):\n"
  "    assert abs(poly(xs, candidate(list(xs)))) < 1e-6\n",
)  # fmt: skip
BODY = "    return -xs[0] / xs[1]\n"
WHOLE = "def zero(xs):\n  return -xs[0] / xs[1]\n"
METHOD = dict(
  prompt="from typing import List\n",
  entry_point="Sums().add",
  test="def check(candidate):\n  assert candidate(1, 2) == 3",
)
ADD = dict(tests=["assert add(1, 2) == 3", "assert add(-1, 1) == 0"])
SUMS = dict(tests=[dict(input="1 2\n", output="3\n"), dict(input="4 5", output="9")])


@pytest.fixture(autouse=True)
def _isolated():
  if not sandbox.probe().isolation:
    here.needs("bubblewrap")


@pytest.mark.parametrize(
  ("completion", "row", "value"),
  [
    (BODY, ROOTS, 1),
    (WHOLE, ROOTS, 1),
    (f"The zero is found so:\n```python\n{WHOLE}```\nDone.", ROOTS, 1),
    (f"```python\n{BODY}```", ROOTS, 1),
    ("    return xs[0] / xs[1]\n", ROOTS, 0),
    ("    return None\n", ROOTS, 0),
    ("def poly(xs, x): return 0\ndef zero(xs): return 1", ROOTS, 0),
    ("I do not know.", ROOTS, 0),
    ("", ROOTS, 0),
    ("\ud800", ROOTS, 0),
    ("class Sums:\n  def add(self, a, b): return a + b", METHOD, 1),
    ("class Sums:\n  def add(self, a, b): return a - b", METHOD, 0),
    ("def add(a, b): return a + b", ADD, 1),
    ("def add(a, b): return 3", ADD, 0),
    ("def plus(a, b): return a + b", ADD, 0),
    ("print(sum(map(int, input().split())))", SUMS, 1),
    ("print(3)", SUMS, 0),
    ("import sys; sys.stdout.buffer.write(b'\\xff\\0')", SUMS, 0),
    ("print('nan')", SUMS, 0),
    ("1 / 0", SUMS, 0),
    ("print(sum(map(int, input().split())), end='  ')", dict(tests=dict(inputs=["1 2"], outputs=["3\n\n"])), 1),
    ("def add(a, b): return a + b", dict(test_list=ADD["tests"], test_setup_code="import math"), 1),
    ("def add(a, b): return a + b", dict(tests="\n".join(ADD["tests"])), 1),
    ("def add(a, b): return 3", dict(tests="\n".join(ADD["tests"])), 0),
    ("def add(a, b): return 3", dict(tests=["check(add)"], test_setup_code="def check(f): assert f(1, 1) == 2"), 0),
  ],
)  # fmt: skip
def test_right_is_one_and_wrong_is_zero(completion, row, value):
  score = python("", completion, row, limits=QUICK)
  assert score.value == value, score.reason
  assert score.reason


@pytest.mark.parametrize(
  ("completion", "row", "reason"),
  [
    (BODY, {}, "the row has no tests"),
    (BODY, dict(tests=[]), "the row has no tests"),
    ("def add(a, b): return 3", dict(tests=["assert add(1"]), "tests cannot be run: SyntaxError"),
    ("", dict(tests=["add(1, 2) == 3"]), "tests: test 1 of 1, 'add(1, 2) == 3' asserts nothing: write assert add"),
    ("", dict(test_list="not add(1, 2)"), "test_list: test 1 of 1, 'not add(1, 2)' asserts nothing"),
    ("", dict(tests=[*ADD["tests"], "x = add(1, 2)\nx == 3"]), "test 3 of 3, 'x == 3' asserts nothing"),
    ("", dict(tests=["add(1, 2)"]), "'add(1, 2)' asserts nothing, so that any program"),
    ("", dict(tests=["for i in (1, 2):\n  add(i, i) == 2 * i"]), "asserts nothing, so that any program"),
    ("", dict(tests=["assert True"]), "'assert True' asserts nothing"),
    ("", dict(tests=["assert (add(1, 2) == 3, 'sum')"]), "asserts a tuple, which is always true"),
    ("", dict(tests=["# none"]), "asserts nothing"),
    ("", dict(tests=[3]), "the row's tests is [3]: write assert statements"),
    ("", dict(tests=dict(input="1", output="2")), "the row's tests is {'input': '1', 'output': '2'}: write"),
    ("", dict(tests=[dict(input="1")]), "test 1 of 1 has no 'output'; it has input"),
    ("", dict(tests=[dict(input="1", output=None)]), "test 1 of 1 has None as 'output', which is no text"),
    ("", dict(tests=dict(inputs=["1", "2"], outputs=["1"])), "2 inputs and 1 outputs"),
    ("", dict(tests=dict(inputs="12", outputs="12")), "`inputs` and `outputs` are lists of texts"),
    ("", dict(test="assert add(1, 2) == 3", entry_point="add"), "the row's test defines no check(candidate)"),
    ("", dict(test="def check(candidate):\n  return candidate(1) == 2", entry_point="f"), "asserts nothing"),
  ],
)  # fmt: skip
def test_a_row_that_cannot_be_scored_is_missing(completion, row, reason):
  score = python("", completion, row)
  assert score.value is None
  assert reason in score.reason


@pytest.mark.parametrize(
  "test",
  [
    "import unittest as u\nclass T(u.TestCase):\n  def test(self):\n    self.assertEqual(f(1), 2)",
    "import numpy as np\nnp.testing.assert_allclose(f(1), 2)",
    "try:\n  f(1)\nexcept ValueError:\n  pass\nelse:\n  raise AssertionError",
    "exec('assert f(1) == 2')",
    "'a docstring'\nassert f",
    "assert f(",
  ],
)
def test_a_test_that_may_fail_is_taken(test):
  assert asserting.fault(test) == ""


def test_a_deadline_is_missing_and_used_up_time_is_wrong():
  loop = "def add(a, b):\n  while True: pass"
  late = python("", loop, ADD, deadline=0.4)
  assert late.value is None
  assert late.reason.startswith("timed out after 0.4 s")
  assert python("", "while True: pass", SUMS, limits=QUICK).value == 0
  waits = python("", "import time; time.sleep(100)", SUMS, limits=QUICK)
  assert waits == Score(0.0, "test 1 of 2: waited for 1 s, for nothing that comes")


def test_each_verdict_has_a_score():
  from posttrain_jax.rewards.sandbox.outcome import MISSING, RIGHT, WRONG

  def value(verdict):
    return module.of(sandbox.Outcome(b"", b"", verdict, "", 0.1)).value

  assert [value(v) for v in RIGHT] == [1.0, 1.0]
  assert {value(v) for v in WRONG} == {0.0}
  assert {value(v) for v in MISSING} == {None}


@pytest.mark.parametrize(
  ("text", "program"),
  [
    ("x = 1", "x = 1"),
    ("```\nx = 1\n```", "x = 1\n"),
    ("```py\nx = 1\n```\n```python\nx = 2\n```\n```text\n3\n```", "x = 2\n"),
    ("```python\nx = 1", "x = 1"),
    ("```Python title=a\n  x = 1\n```", "  x = 1\n"),
    ("a `code` b", "a `code` b"),
    ("```python\ns = '```'\n```", "s = '```'\n"),
    ("", ""),
  ],
)
def test_the_last_block_is_the_program(text, program):
  assert extract(text) == program


def test_without_isolation_nothing_is_scored(monkeypatch):
  nothing = sandbox.Probe("", "Programs cannot be run here.")
  monkeypatch.setattr(sandbox, "probe", lambda: nothing)
  with pytest.raises(sandbox.NoSandbox):
    python("", WHOLE, ROOTS)
  assert python("", WHOLE, ROOTS, unsafe=True).value == 1
