"""Small faults for a module's syntax tree, one at a time: what a test suite has to notice.

A break has a name that an edit elsewhere leaves alone, `losses/policy.py:grpo:arithmetic:3`: the file, the function,
the kind of break, and which of that kind in that function. Docstrings, annotations, decorators, messages and
`__repr__` stay as they are.
"""

from __future__ import annotations

import ast
import collections
import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

OPERATORS = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Div,
  ast.Div: ast.Mult,
  ast.FloorDiv: ast.Mult,
  ast.Pow: ast.Mult,
}
BOUNDARIES = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
REVERSED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
NEGATED = {
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.In: ast.NotIn,
  ast.NotIn: ast.In,
  ast.Is: ast.IsNot,
  ast.IsNot: ast.Is,
}
_PAIRS = (
  "sum mean, min max, minimum maximum, argmin argmax, any all, floor ceil, zeros ones, "
  "zeros_like ones_like, cumsum cumprod, exp log, logical_and logical_or"
)
NAMES: dict[str, str] = {
  a: b for pair in _PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])
}
# Calls whose first argument alone is a plausible slip: f(x, ...) becomes x.
UNWRAPPED = {"stop_gradient", "abs", "sqrt", "sort", "square", "clip", "round", "softmax"}
# Swapping their arguments changes nothing, or leaves nothing that runs.
SYMMETRIC = {"min", "max", "minimum", "maximum", "add", "multiply", "isinstance", "allclose", "gcd"}
# Keywords of numpy and jax that have defaults; those of the package are read from its functions.
DEFAULTED = {"axis", "keepdims", "dtype", "where", "side", "ord", "key", "reverse", "strict"}
SILENT = {"annotation", "returns", "decorator_list", "msg", "format_spec"}
REPORTING = {"warn", "warning", "info", "debug", "print"}


class Break(NamedTuple):
  name: str  # losses/policy.py:grpo:arithmetic:3
  function: str  # outermost function or method, "" at the level of the module
  line: int
  change: str  # "a + b  ->  a - b"
  place: tuple[ast.AST, str, int | None]  # holder, field, index in it
  node: ast.AST  # what is put there

  def apply(self) -> None:
    """Changes the tree that this break was found in."""
    _put(*self.place, self.node)


def defaults(trees: list[ast.Module]) -> dict[str, set[str]]:
  """{function: its parameters that may be left out}, of all modules together."""
  names = collections.defaultdict(set)
  for tree in trees:
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef):
        positional = node.args.posonlyargs + node.args.args
        optional = positional[len(positional) - len(node.args.defaults) :]
        optional += [a for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults) if d]
        names[node.name] |= {a.arg for a in optional}
  return dict(names)


def breaks(file: str, tree: ast.Module, optional: Mapping[str, set[str]] = {}) -> list[Break]:
  """All breaks of a module, in the order of the source."""
  counts: collections.Counter = collections.Counter()
  results = []
  for place, node, statement, function in _nodes(tree):
    for kind, new in _variants(place, node, optional):
      where = function or "module"
      name = f"{file}:{where}:{kind}:{counts[where, kind]}"
      counts[where, kind] += 1
      change = _change(place, node, new, statement)
      results.append(Break(name, function, node.lineno, change, place, new))
  return results


def _nodes(tree) -> Iterator[tuple]:
  """(place, node, statement, function) of all that may be broken."""

  def visit(holder, statement, path, function):
    for field, index, node in _children(holder):
      if _stays(node):
        continue
      inner_path, inner_function = path, function
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        inner_path = [*path, node.name]
        if isinstance(node, ast.FunctionDef):
          inner_function = function or ".".join(inner_path)
      inner = node if isinstance(node, ast.stmt) else statement
      if isinstance(node, ast.expr | ast.stmt):
        yield (holder, field, index), node, inner, inner_function
      if not isinstance(node, ast.Raise):
        yield from visit(node, inner, inner_path, inner_function)

  return visit(tree, None, [], "")


def _children(node):
  for field, value in ast.iter_fields(node):
    if field in SILENT:
      continue
    if isinstance(value, ast.AST):
      yield field, None, value
    elif isinstance(value, list):
      yield from ((field, i, item) for i, item in enumerate(value) if isinstance(item, ast.AST))


def _stays(node) -> bool:
  match node:
    case ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom():
      return True
    case ast.FunctionDef(name="__repr__" | "__str__") | ast.If(test=ast.Name("TYPE_CHECKING")):
      return True
    case ast.Expr(value=ast.Constant()):
      return True
    case ast.Call():
      return _called(node) in REPORTING
  return False


def _called(call: ast.Call) -> str:
  match call.func:
    case ast.Name(id=name) | ast.Attribute(attr=name):
      return name
  return ""


def _variants(place, node, optional) -> Iterator[tuple[str, ast.AST]]:
  """(kind, what stands there instead)."""
  match node:
    case ast.BinOp(op=op) if type(op) in OPERATORS and not (_text(node.left) or _text(node.right)):
      yield "arithmetic", _with(node, op=OPERATORS[type(op)]())
    case ast.AugAssign(op=op) if type(op) in OPERATORS and not _text(node.value):
      yield "arithmetic", _with(node, op=OPERATORS[type(op)]())
    case ast.Compare(ops=[op]):
      for kind, table in (("boundary", BOUNDARIES), ("reversed", REVERSED), ("negated", NEGATED)):
        if type(op) in table:
          yield kind, _with(node, ops=[table[type(op)]()])
    case ast.BoolOp(op=op):
      yield "logic", _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
    case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
      yield "sign", operand
    case ast.Constant(value=bool(value)):
      yield "flag", _with(node, value=not value)
    case ast.Constant(value=int(value) | float(value)):
      following = value + 1 if value + 1 != value else 2 * value  # 1e38 + 1 is 1e38
      yield "number", _with(node, value={1: type(value)(0), 0.5: 1.0}.get(value, following))
    case ast.Call():
      yield from _call(node, optional)
    case ast.Raise():
      yield "raise", ast.copy_location(ast.Pass(), node)
  if _is_condition(place):
    yield "always", ast.copy_location(ast.Constant(True), node)
    yield "never", ast.copy_location(ast.Constant(False), node)


def _is_condition(place) -> bool:
  holder, field, _ = place
  if isinstance(holder, ast.If) and isinstance(holder.body[0], ast.Raise):
    return False  # always raises: seen by whatever runs it; never: the raise removed
  return (isinstance(holder, ast.If | ast.IfExp) and field == "test") or field == "ifs"


def _call(node, optional) -> Iterator[tuple[str, ast.AST]]:
  called, args = _called(node), node.args
  if called in NAMES:
    field = "attr" if isinstance(node.func, ast.Attribute) else "id"
    yield "name", _with(node, func=_with(node.func, **{field: NAMES[called]}))
  if called in UNWRAPPED and args:
    yield "unwrapped", args[0]
  first = 1 if called == "where" else 0
  if called not in SYMMETRIC and not any(isinstance(a, ast.Starred) for a in args):
    for i in range(first, len(args) - 1):
      swapped = [*args[:i], args[i + 1], args[i], *args[i + 2 :]]
      if not any(map(_is_itself, args[i : i + 2])) and ast.dump(args[i]) != ast.dump(args[i + 1]):
        yield "swapped", _with(node, args=swapped)
  for i, keyword in enumerate(node.keywords):
    if keyword.arg in optional.get(called, DEFAULTED):
      yield "keyword", _with(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def _is_itself(node) -> bool:
  """A constant, a function or a dtype: in another's place it ends the program at once."""
  match node:
    case ast.Constant() | ast.Lambda() | ast.Attribute(value=ast.Name("jnp" | "np")):
      return True
    case ast.Name("bool" | "int" | "float" | "key"):
      return True
  return False


def _text(node) -> bool:
  return isinstance(node, ast.JoinedStr) or (
    isinstance(node, ast.Constant) and isinstance(node.value, str)
  )


def _with(node, **fields):
  new = copy.copy(node)
  for name, value in fields.items():
    setattr(new, name, value)
  return new


def _put(holder, field, index, node):
  if index is None:
    setattr(holder, field, node)
  else:
    getattr(holder, field)[index] = node


def _change(place, node, new, statement) -> str:
  """`before  ->  after`, each with a little of its statement on both sides."""
  if node is statement:
    return f"{_line(node)}  ->  {_line(new)}"
  before = _line(_header(statement))
  _put(*place, new)
  after = _line(_header(statement))
  _put(*place, node)
  return _shortened(before, after)


def _header(statement):
  """The statement without those inside it."""
  empty = {"body": [ast.Pass()], "orelse": [], "handlers": [], "finalbody": []}
  return _with(statement, **{name: empty[name] for name in statement._fields if name in empty})


def _line(node) -> str:
  return " ".join(ast.unparse(node).removesuffix("pass").split())


def _shortened(before, after, around=36) -> str:
  start = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), len(before))
  tail = 0
  while tail < min(len(before), len(after)) - start and before[-1 - tail] == after[-1 - tail]:
    tail += 1
  left = max(0, start - around)

  def cut(text):
    right = min(len(text), len(text) - tail + around)
    return "…" * (left > 0) + text[left:right] + "…" * (right < len(text))

  return f"{cut(before)}  ->  {cut(after)}"
