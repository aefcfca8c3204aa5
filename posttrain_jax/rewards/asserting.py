"""Whether a test can fail: `f(1) == 2` without `assert` is thrown away, and every program passes it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from posttrain_jax.core import words

_JUDGEMENTS = (ast.Compare, ast.BoolOp, ast.Tuple, ast.List)  # as statements they do nothing
_RUNS_TEXT = ("exec",)


def fault(test: str, setup: str = "") -> str:
  """Why a test says nothing of a program, "" where it may say something.

  A test of another syntax is none of ours: what runs it says so.

  >>> fault("f(1) == 2")
  "'f(1) == 2' asserts nothing: write assert f(1) == 2"
  >>> fault("assert f(1) == 2"), fault("f(1)")
  ('', "'f(1)' asserts nothing, so that any program that runs would pass: write assert statements")

  Args:
    setup: what runs before it; a function of it, or of a module, may assert.
  """
  tree, before = _parsed(test), _parsed(setup)
  if tree is None or before is None:
    return ""
  for node in tree.body:
    if isinstance(node, ast.Expr) and _is_judgement(node.value):
      return f"{_shown(node)} asserts nothing: write assert {ast.unparse(node)}"
  for node in ast.walk(tree):
    if isinstance(node, ast.Assert) and isinstance(node.test, ast.Tuple) and node.test.elts:
      return f"{_shown(node)} asserts a tuple, which is always true: leave the brackets out"
  trusted = {*_imported(tree), *_bound(before), *_RUNS_TEXT}
  if any(_can_fail(node, trusted) for node in ast.walk(tree)):
    return ""
  return f"{words.shown(test, 60)} asserts nothing, so that any program that runs would pass: write assert statements"


def _parsed(code: str) -> ast.Module | None:
  try:
    return ast.parse(code)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return None


def _shown(node: ast.stmt) -> str:
  return words.shown(ast.unparse(node), 60)


def _is_judgement(value: ast.expr) -> bool:
  is_negated = isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)
  return is_negated or isinstance(value, _JUDGEMENTS)


def _can_fail(node: ast.AST, trusted: set[str]) -> bool:
  if isinstance(node, ast.Assert):
    return not (isinstance(node.test, ast.Constant) and node.test.value)
  if isinstance(node, ast.Raise):
    return True
  return isinstance(node, ast.Call) and (
    _root(node.func) in trusted
    or (isinstance(node.func, ast.Attribute) and node.func.attr.startswith(("assert", "fail")))
  )


def _root(function: ast.expr) -> str:
  """`np` of `np.testing.assert_equal`."""
  while isinstance(function, ast.Attribute | ast.Call | ast.Subscript):
    function = function.func if isinstance(function, ast.Call) else function.value
  return function.id if isinstance(function, ast.Name) else ""


def _imported(tree: ast.Module) -> Iterator[str]:
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)


def _bound(tree: ast.Module) -> Iterator[str]:
  """The names that a setup gives to anything."""
  yield from _imported(tree)
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      yield node.id
