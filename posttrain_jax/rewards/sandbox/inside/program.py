"""The process of the model's program: it runs the code, and then answers what the judge asks.

Nothing of the tests is ever in its memory: it was started before the judge had read them, and is told the arguments of
each call and no more.  Whatever the code does to this loop, it can only answer.
"""

import json
import os
import resource
import sys

from posttrain_jax.rewards.sandbox.inside import values

MAX_ITEMS = 1_000_000  # of an iterator that is asked for as a whole


class Objects:
  """Objects that stayed here, by number."""

  def __init__(self):
    self.held = []

  def keep(self, value):
    self.held.append(value)
    return len(self.held) - 1

  def get(self, number, _name):
    return self.held[number]


def limited(setup):
  """CPU seconds: at the first the program is told (SIGXCPU), a second later it is killed."""
  seconds = setup["seconds"]
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def run(order: dict, asked, replies) -> None:
  """order: `argv`, or `code` with `answers`: whether calls are answered after it has run."""
  for name, text in order["files"].items():
    with open(name, "wb") as file:
      file.write(bytes.fromhex(text))
  if "argv" in order:
    os.execvp(order["argv"][0], order["argv"])
  if not order["answers"]:
    _as_main(order["code"])
    return
  objects, names = Objects(), {"__name__": "solution", "__builtins__": __builtins__}
  sys.modules["solution"] = module = type(sys)("solution")
  module.__dict__.update(names)
  names = module.__dict__
  try:
    exec(compile(order["code"], "solution.py", "exec"), names)
    reply = values.dumps(
      {"defined": {n: v for n, v in names.items() if n in order["names"]}}, objects.keep
    )
  except Exception as error:
    reply = _raised(error)
  _send(replies, reply)
  for line in asked:
    _send(replies, _answer(line, names, objects))


def _as_main(code):
  import linecache

  linecache.cache["solution.py"] = (len(code), None, code.splitlines(True), "solution.py")
  module = type(sys)("__main__")
  sys.modules["__main__"], sys.argv = module, ["solution.py"]
  exec(compile(code, "solution.py", "exec"), module.__dict__)


def _answer(line, names, objects):
  """A reply to [verb, object, arguments, keywords]; arguments that the call changed are told, too."""
  try:
    verb, target, arguments, keywords = values.loads(line, objects.get)
    before = values.dumps(arguments, objects.keep) if verb == "call" else b""
    result = VERBS[verb](target, arguments, keywords)
    told = {"value": result}
    if verb == "call" and values.dumps(arguments, objects.keep) != before:
      told["arguments"] = arguments
    return values.dumps(told, objects.keep)
  except Exception as error:
    return _raised(error)


def _some(iterable):
  from itertools import islice

  return list(islice(iterable, MAX_ITEMS))


VERBS = {
  "call": lambda target, arguments, keywords: target(*arguments, **keywords),
  "attribute": lambda target, arguments, _: getattr(target, *arguments),
  "item": lambda target, arguments, _: target[arguments[0]],
  "list": lambda target, _, __: _some(target),
  "length": lambda target, _, __: len(target),
  "text": lambda target, _, __: str(target),
}


def _raised(error):
  kinds = [kind.__name__ for kind in type(error).__mro__]
  try:
    message = str(error)[:2000]
  except Exception:
    message = ""
  return json.dumps({"d": [["raised", kinds], ["message", message]]}).encode() + b"\n"


def _send(replies, reply):
  replies.write(reply)
  replies.flush()
