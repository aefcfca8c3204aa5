"""A program is right when it passes its row's tests, in the sandbox.

Rows are HumanEval's (`prompt`, `test`, `entry_point`), or have `tests`: assert statements, as MBPP's `test_list`, or
pairs of what is read and what is to be written (`{"input": "3 4", "output": "7"}`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.rewards import sandbox
from posttrain_jax.rewards.sandbox import Checks, Limits, Outcome
from posttrain_jax.rewards.score import Score

_FENCE = re.compile(
  r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LANGUAGES = ("python", "py", "python3")


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
  pairs = _pairs(example)
  if pairs:
    return _all_written(code, pairs, options)
  tests, whole = _tests(code, example)
  if tests is None:
    return Score(None, "the row has no tests: give it `test` and `entry_point`, or `tests`")
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


def _tests(code: str, example: Mapping[str, Any]) -> tuple[Checks | None, str]:
  """(tests, the program) of a row; a completion may be a whole function or the body that HumanEval asks for."""
  if example.get("test") and example.get("entry_point"):
    entry, start = str(example["entry_point"]), _text(example.get("prompt"))
    name = entry.partition("(")[0].partition(".")[0]  # of `Solution().sum`
    whole = f"{start}\n{code}" if _defines(code, name) else start + code
    case = f"{example['test']}\ncheck({entry})"
    return Checks(cases=(case,), setup=_helpers(start, name), names=(name,)), whole
  cases = example.get("tests") or example.get("test_list")
  if not isinstance(cases, Sequence) or isinstance(cases, str) or not cases:
    return None, code
  names = (str(example["entry_point"]),) if example.get("entry_point") else ()
  return Checks([str(c) for c in cases], _text(example.get("test_setup_code")), names), code


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
  tests = example.get("tests")
  if isinstance(tests, Mapping) and "inputs" in tests and "outputs" in tests:
    return [(str(i), str(o)) for i, o in zip(tests["inputs"], tests["outputs"], strict=True)]
  if isinstance(tests, Sequence) and tests and all(isinstance(t, Mapping) for t in tests):
    return [(str(t["input"]), str(t["output"])) for t in tests]
  return []


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
