"""Checks, run by the judge on functions that are in another process.

What is compared has crossed over as plain data (`values`), so that nothing of the program's (an `__eq__`, a patched
builtin, a frame, an early exit) takes part in the comparison.
"""

import ast
import builtins
import importlib
import json
import sys
import traceback

from posttrain_jax.rewards.sandbox.inside import values
from posttrain_jax.rewards.sandbox.inside.child import Ended, Wrong


class Remote:
  """A function or object of the program's."""

  def __init__(self, link, number, name):
    self.__dict__.update(_link=link, _number=number, _name=name)

  def __call__(self, *arguments, **keywords):
    return self._link.ask("call", self, list(arguments), keywords)

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return self._link.ask("attribute", self, [name])

  def __getitem__(self, key):
    return self._link.ask("item", self, [key])

  def __iter__(self):
    return iter(self._link.ask("list", self, []))

  def __len__(self):
    return self._link.ask("length", self, [])

  def __str__(self):
    return str(self._link.ask("text", self, []))


class Link:
  """Questions to the program and its answers."""

  def __init__(self, child):
    self.child, self.trouble = child, None

  def ask(self, verb, target, arguments, keywords=None):
    try:
      line = values.dumps([verb, target, arguments, keywords or {}], self.number)
    except values.NotPlain as error:
      self.trouble = str(error)  # of the tests, not of the program
      raise
    self.child.send(line)
    reply = self.reply()
    if "arguments" in reply:
      _brought_back(arguments, reply["arguments"])
    if "value" not in reply:
      raise Wrong("the program did not answer a call")
    return reply["value"]

  def number(self, value):
    if isinstance(value, Remote):
      return value._number
    raise values.NotPlain(f"the tests give a {type(value).__name__} to the program")

  def reply(self):
    line = self.child.line()
    try:
      reply = values.loads(line, lambda number, name: Remote(self, number, name))
    except Exception as error:
      raise Wrong(f"the program answered what cannot be read ({type(error).__name__})") from None
    if not isinstance(reply, dict):
      raise Wrong("the program answered what cannot be read")
    if "raised" in reply:
      raise exception(reply["raised"], str(reply.get("message", "")))
    return reply


def exception(kinds, message):
  """The nearest builtin exception; one that would end a loop or the judge itself is a RuntimeError.

  A StopIteration would end `all(map(f, inputs))` with True.
  """
  for name in kinds if isinstance(kinds, list) else []:
    kind = builtins.__dict__.get(name) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, Exception):
      if issubclass(kind, StopIteration | StopAsyncIteration):
        break
      try:
        return kind(message)
      except TypeError:  # UnicodeDecodeError takes five arguments
        return (ValueError if issubclass(kind, ValueError) else RuntimeError)(message)
  return RuntimeError(message)


def _brought_back(arguments, changed):
  """A call that sorts its list in place has sorted the caller's."""
  if not isinstance(changed, list) or len(changed) != len(arguments):
    return
  for ours, theirs in zip(arguments, changed):
    if isinstance(ours, list) and isinstance(theirs, list):
      ours[:] = theirs
    elif isinstance(ours, dict | set) and type(theirs) is type(ours):
      ours.clear()
      ours.update(theirs)


def run(order, child, told):
  """(verdict, reason).  order: `setup`, trusted code; `cases`, statements; `names`: what is the program's, or None.

  A name that the cases read, and neither they nor `setup` nor Python defines, is the program's.
  """
  names, link = {"__name__": "tests"}, Link(child)
  try:
    exec(compile(order["setup"], "setup.py", "exec"), names)
    cases = [compile(case, "tests.py", "exec") for case in order["cases"]]
  except Exception as error:
    return "broken", f"the tests cannot be run: {type(error).__name__}: {error}"
  wanted = order["names"] or _free("\n".join(order["cases"]), names)
  modules = [name for name in wanted if name in sys.stdlib_module_names]
  names |= {name: importlib.import_module(name) for name in modules}
  told["names"] = [name for name in wanted if name not in modules]
  child.send(json.dumps(told).encode() + b"\n")
  try:
    defined = link.reply().get("defined")
  except Wrong:
    raise
  except Exception as error:
    return "failed", f"the program raised {_line(error)}"
  if not isinstance(defined, dict):
    raise Wrong("the program did not say what it defines")
  missing = [name for name in told["names"] if name not in defined]
  if missing:
    return "failed", f"the program defines no {', '.join(missing)}"
  names |= {name: defined[name] for name in told["names"]}
  return _cases(cases, order["cases"], names, link)


def _cases(cases, texts, names, link):
  for i, case in enumerate(cases):
    try:
      exec(case, names)
    except (Ended, Wrong):
      raise
    except BaseException as error:
      if link.trouble:
        return "broken", f"the tests cannot be run here: {link.trouble}"
      return "failed", f"test {i + 1} of {len(cases)}: {_line(error)} in {_place(error, texts[i])}"
  return "passed", ""


def _line(error):
  return f"{type(error).__name__}: {str(error)[:300]}".removesuffix(": ")


def _place(error, text):
  """The deepest line of the tests that was running."""
  numbers = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == "tests.py"
  ]
  lines = text.splitlines()
  return lines[numbers[-1] - 1].strip()[:200] if numbers and numbers[-1] else lines[0][:200]


def _free(text, defined):
  """Names that a text reads and nobody here defines."""
  nodes = list(ast.walk(ast.parse(text)))
  reads = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
  writes = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
  writes |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
  writes |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
  writes |= {n.arg for n in nodes if isinstance(n, ast.arg)}
  writes |= {
    (alias.asname or alias.name).partition(".")[0]
    for n in nodes
    if isinstance(n, ast.Import | ast.ImportFrom)
    for alias in n.names
  }
  return sorted(reads - writes - defined.keys() - builtins.__dict__.keys())
