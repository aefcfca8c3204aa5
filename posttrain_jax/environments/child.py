"""The program of a process that holds an environment: it answers each message with a line of JSON.

What the environment prints goes to standard error.  The process ends with who started it, and what it started, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

HEADER = struct.Struct("<Q")  # the length of a pickled message
MOST_SAID = 1_000_000  # characters that are said at once; a run cuts them further, by tokens


class Served:
  """The environment of this process, by the names of messages."""

  def __init__(self) -> None:
    self._tools: dict[str, Callable[..., Any]] = {}

  def load(
    self, environment: str, tools: tuple[str, ...], options: dict[str, Any]
  ) -> dict[str, Any]:
    from posttrain_jax.environments import named, shapes

    self.shape = shapes.of(
      named.factory(environment, options) if environment else None,
      [named.tool(name, options) for name in tools],
    )
    self._tools = {shapes.name_of(tool): tool for tool in self.shape.tools()}
    return {"scores": self.shape.scores, "acts": self.shape.acts, "tools": [*self._tools]}

  def describe(self) -> dict[str, Any]:
    """The schema of each tool, as Transformers makes it of its hints and docstring, and what a row must have."""
    return {"schemas": [_schema(tool) for tool in self.shape.tools()], "needs": self.shape.needs()}

  def reset(self, row: dict[str, Any], seed: int, episode: str) -> dict[str, Any]:
    said = self.shape.reset(row, seed, episode)
    return {"said": said and said[:MOST_SAID]}

  def call(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"results": [self._called(one) for one in calls]}

  def _called(self, one: dict[str, Any]) -> tuple[str, bool]:
    from posttrain_jax.environments import shapes

    tool = self._tools.get(one["name"])
    if tool is None:
      return str({"error": f"Tool {one['name']} not found."}), True
    said, failed = shapes.called(tool, one["arguments"])
    return said[:MOST_SAID], failed

  def act(self, text: str) -> dict[str, Any]:
    from posttrain_jax.environments import shapes

    try:
      stepped = self.shape.act(text)
      return {**dataclasses.asdict(stepped), "said": stepped.said and stepped.said[:MOST_SAID]}
    except shapes.ActionError as error:
      return {"unreadable": str(error)}

  def end(self) -> dict[str, Any]:
    return {"reward": self.shape.reward(), "left": self.shape.left()}


def _schema(tool: Callable[..., Any]) -> dict[str, Any]:
  from transformers.utils import get_json_schema

  from posttrain_jax.environments import shapes

  try:
    return get_json_schema(tool)
  except Exception as error:
    raise shapes.WrongShape(
      f"the tool {shapes.name_of(tool)} cannot be told to a model: {error}; write type hints, and a docstring that says"
      " what it does and under Args: what each argument is"
    ) from error


def serve(asked: Any, answer: Callable[[Any], None]) -> None:
  served = Served()
  while len(header := asked.read(HEADER.size)) == HEADER.size:
    number, verb, arguments = pickle.loads(asked.read(*HEADER.unpack(header)))
    try:
      reply = getattr(served, verb)(*arguments)
    except (Exception, SystemExit) as error:
      reply = {"raised": _raised(error)}
    answer({"to": number, **reply})


def _raised(error: BaseException) -> str:
  """The error in a line, with the last line of the user's own file."""
  here = os.path.dirname(__file__)
  frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(here)]
  own = [frame for frame in frames if "posttrain_jax" not in frame.filename] or frames
  place = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
  said = " ".join(str(error).split())[:300]
  kind = type(error).__name__
  if kind in ("WrongShape", "ConfigError"):  # ours, in whole sentences
    return said
  return f"{place}raised {kind}: {said}"


def _ends_with(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(1)
  _end()


def _end() -> None:
  """Ends this process and what was started here, which nobody else does once the run is gone."""
  os.killpg(0, signal.SIGKILL)


def main() -> None:
  settings = json.loads(sys.argv[1])
  sys.path[:] = settings["paths"]
  if (
    settings["memory"] and sys.platform == "linux"
  ):  # elsewhere the address space cannot be limited
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (settings["memory"], settings["memory"]))
  threading.Thread(target=_ends_with, args=(settings["parent"],), daemon=True).start()
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for who asks
  asked, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.dup2(2, 1)  # what an environment prints is no reply
  own = os.getpid()

  def answer(value: Any) -> None:
    if os.getpid() != own:  # a child of the environment's that came back with our pipes
      os._exit(0)
    line = json.dumps(value, default=str, ensure_ascii=False) + "\n"
    # half of a surrogate pair becomes ?: no tokenizer reads it, and no table of answers holds it
    rest = memoryview(line.encode("utf-8", "replace"))
    try:
      while rest:
        rest = rest[os.write(replies, rest) :]
    except BrokenPipeError:
      _end()

  serve(asked, answer)
  _end()


if __name__ == "__main__":
  main()
