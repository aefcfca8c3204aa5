"""A program is right when it passes its row's tests, in the sandbox.

Rows are HumanEval's (`prompt`, `test`, `entry_point`), or have `tests`: assert statements, as MBPP's `test_list`, or
pairs of what is read and what is to be written (`{"input": "3 4", "output": "7"}`).  What cannot be read as one of
them, and a test that no program fails, is missing and no score.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.core import words
from posttrain_jax.rewards import asserting, sandbox
from posttrain_jax.rewards.sandbox import Checks, Limits, Outcome
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Known, Prompt, Tried

_FENCE = re.compile(
  r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LANGUAGES = ("python", "py", "python3")
SECONDS = 120.0  # for all the runs of one answer; each has its own deadline


@dataclasses.dataclass(frozen=True)
class Program(Tried):
  """`python` as a part of a reward.

  unsafe_code: run programs where nothing isolates them.
  """

  unsafe_code: bool = False

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    return python(prompt, completion, example, unsafe=self.unsafe_code)

  def known(self) -> list[Known]:
    row = {"tests": ["assert double(3) == 6"]}
    return [
      Known("```python\ndef double(x):\n  return 2 * x\n```", row, True),
      Known("```python\ndef double(x):\n  return x\n```", row, False),
      Known("double(3) == 6", row, False),
    ]


def verifier(unsafe_code: bool = False) -> Program:
  """Raises ValueError where no program can be run here."""
  try:
    sandbox.check(unsafe_code)
  except sandbox.NoSandbox as error:
    raise ValueError(f"python: {error}") from error
  return Program(unsafe_code)


def python(
  prompt: Any,
  completion: str,
  example: Mapping[str, Any],
  *,
  limits: Limits = Limits(),  # noqa: B008 (frozen)
  deadline: float = 30.0,
  unsafe: bool = False,
) -> Score:
  """1 where the program passes every test of its row, 0 where it does not; missing where nobody can tell.

  Args:
    prompt: unused; HumanEval's is the example's.
    completion: the last ```python block is the program, or all of it.
    limits: of each run, `deadline` and `unsafe` too, as `sandbox.run` takes them.

  Raises:
    NoSandbox: nothing here isolates a program, and `unsafe` is not said.
  """
  code = extract(completion)
  options: dict[str, Any] = dict(limits=limits, deadline=deadline, unsafe=unsafe)
  try:
    pairs = _pairs(example)
    tests, whole = (None, code) if pairs else _tests(code, example)
  except ValueError as error:
    return Score(None, str(error))
  if tests is None:
    return _all_written(code, pairs, options)
  return of(sandbox.run(whole, tests=tests, **options))


def of(outcome: Outcome) -> Score:
  """The score of an outcome; missing where it says nothing of the program."""
  if outcome.is_missing:
    return Score(None, outcome.reason)
  return Score(float(outcome.verdict in ("passed", "ended")), outcome.reason or outcome.verdict)


def extract(text: str) -> str:
  """The last block of Python in an answer, the last block of any kind, or the text.

  >>> extract("So:\\n```python\\nx = 1\\n```\\nand then\\n```\\n2\\n```")
  'x = 1\\n'
  """
  blocks = _FENCE.findall(text)
  named = [block for language, block in blocks if language.lower() in _LANGUAGES]
  return (named or [block for _, block in blocks] or [text])[-1]


def _tests(code: str, example: Mapping[str, Any]) -> tuple[Checks, str]:
  """(tests, the program) of a row; a completion may be a whole function or the body that HumanEval asks for.

  Raises:
    ValueError: the row has no test that a program could fail.
  """
  if example.get("test") and example.get("entry_point"):
    entry, start = str(example["entry_point"]), _text(example.get("prompt"))
    name = entry.partition("(")[0].partition(".")[0]  # of `Solution().sum`
    whole = f"{start}\n{code}" if _defines(code, name) else start + code
    case = f"{example['test']}\ncheck({entry})"
    helpers = _helpers(start, name)
    _check_candidates(str(example["test"]), helpers)
    return Checks(cases=(case,), setup=helpers, names=(name,)), whole
  column = "tests" if example.get("tests") else "test_list"
  cases, setup = _cases(column, example.get(column)), _text(example.get("test_setup_code"))
  for i, case in enumerate(cases):
    wrong = asserting.fault(case, setup)
    if wrong:
      raise ValueError(f"the row's {column}: test {i + 1} of {len(cases)}, {wrong}")
  names = (str(example["entry_point"]),) if example.get("entry_point") else ()
  return Checks(cases, setup, names), code


def _cases(column: str, value: Any) -> list[str]:
  """The tests of a list, or of one text."""
  if not value:
    raise ValueError("the row has no tests: give it `test` and `entry_point`, or `tests`")
  listed = [value] if isinstance(value, str) else value
  if isinstance(listed, Sequence) and all(isinstance(case, str) for case in listed):
    return list(listed)
  raise ValueError(
    f"the row's {column} is {words.shown(value, 60)}: write assert statements, as a list or one text, or a list of"
    ' {"input": TEXT, "output": TEXT}'
  )


def _check_candidates(test: str, helpers: str) -> None:
  """Raises ValueError where what HumanEval calls `check` is not there, or passes whatever it is given."""
  if not _defines(test, "check"):
    raise ValueError(
      "the row's test defines no check(candidate), which `entry_point` is given to; tests without one are `tests`"
    )
  wrong = asserting.fault(test, helpers)
  if wrong:
    raise ValueError(f"the row's test: {wrong}")


def _text(value: Any) -> str:
  return value if isinstance(value, str) else ""


def _defines(code: str, name: str) -> bool:
  try:
    body = ast.parse(code).body
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return re.search(rf"^(def|class|async def) {re.escape(name)}\b", code, re.MULTILINE) is not None
  return any(isinstance(n, _DEFINITIONS) and n.name == name for n in body)


def _helpers(start: str, name: str) -> str:
  """What the prompt defines beside the function that is asked for: HumanEval's tests use it (`poly`)."""
  try:
    tree = ast.parse(start)
  except SyntaxError:  # it ends where a body is to begin
    return ""
  tree.body = [n for n in tree.body if not (isinstance(n, _DEFINITIONS) and n.name == name)]
  return ast.unparse(tree)


def _pairs(example: Mapping[str, Any]) -> list[tuple[str, str]]:
  """(what is read, what is to be written); none where the row's tests are of another form.

  Raises:
    ValueError: one is without the other, or is no text.
  """
  tests = example.get("tests")
  if isinstance(tests, Mapping) and "inputs" in tests and "outputs" in tests:
    lists = (tests["inputs"], tests["outputs"])
    if any(isinstance(one, str) or not isinstance(one, Sequence) for one in lists):
      raise ValueError("the row's tests: `inputs` and `outputs` are lists of texts")
    if len(lists[0]) != len(lists[1]):
      raise ValueError(f"the row's tests: {len(lists[0])} inputs and {len(lists[1])} outputs")
    tests = [{"input": given, "output": wanted} for given, wanted in zip(*lists, strict=True)]
  if not isinstance(tests, Sequence) or not all(isinstance(test, Mapping) for test in tests):
    return []
  where = [f"the row's tests: test {i + 1} of {len(tests)}" for i in range(len(tests))]
  return [
    (_said(test, "input", place), _said(test, "output", place))
    for test, place in zip(tests, where, strict=True)
  ]


def _said(test: Mapping[str, Any], key: str, place: str) -> str:
  if key not in test:
    raise ValueError(f"{place} has no {key!r}; it has {', '.join(map(str, test)) or 'nothing'}")
  if not isinstance(test[key], str | int | float):
    raise ValueError(f"{place} has {words.shown(test[key], 60)} as {key!r}, which is no text")
  return str(test[key])


def _all_written(code: str, pairs: Sequence[tuple[str, str]], options: Mapping[str, Any]) -> Score:
  """Each in a sandbox of its own; what is expected is compared here and never enters one."""
  for i, (given, expected) in enumerate(pairs):
    outcome = sandbox.run(code, stdin=given.encode(errors="replace"), **options)
    if outcome.is_missing or outcome.verdict != "ended":
      score = of(outcome)
      return Score(score.value, f"test {i + 1} of {len(pairs)}: {score.reason}")
    if _lines(outcome.stdout.decode(errors="replace")) != _lines(expected):
      return Score(0.0, f"test {i + 1} of {len(pairs)}: wrong output")
  return Score(1.0, "passed")


def _lines(text: str) -> list[str]:
  """Lines without blanks at their ends; empty ones at the end of all do not count."""
  return [line.rstrip() for line in text.rstrip().splitlines()]
