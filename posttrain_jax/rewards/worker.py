"""The program that a worker runs: it loads tasks and calls them, and answers each message with a line of JSON.

A reply says which message it answers.  A task is a picklable function whose result is JSON.  What it prints goes to
standard error.  The program ends with who started it, and what it started itself ends, too; a call that is stuck in C
then is ended by the kernel's clock.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

HEADER = struct.Struct("<Q")  # the length of a pickled message
PATIENCE = (
  5.0  # seconds after its deadline at which a call ends even though nobody is left to end it
)


def serve(asked: BinaryIO, answer: Callable[[Any], None]) -> None:
  tasks: dict[int, Callable[..., Any]] = {}
  own = os.getpid()
  while len(header := asked.read(HEADER.size)) == HEADER.size:
    number, kind, key, body, seconds = pickle.loads(asked.read(*HEADER.unpack(header)))
    if kind == "load":
      reply: dict[str, Any] = _loaded(tasks, key, body)
    else:
      # only from here does time count, and is a death one of the call
      answer({"to": number, "began": True})
      reply = _called(tasks[key], body, seconds)
    if os.getpid() != own:  # a child of the task's that came back from it, with our pipes
      os._exit(0)
    answer({"to": number, **reply})


def _loaded(tasks: dict[int, Callable[..., Any]], key: int, body: bytes) -> dict[str, str]:
  try:
    tasks[key] = pickle.loads(body)
  except Exception as error:
    return {"error": f"{type(error).__name__}: {error}"}
  return {}


def _called(task: Callable[..., Any], body: bytes, seconds: float) -> dict[str, Any]:
  try:
    return {"result": _timed(task, pickle.loads(body), seconds)}
  except (Exception, SystemExit) as error:
    return {"failed": f"raised {type(error).__name__}: {error}"}


def _timed(task: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
  signal.setitimer(signal.ITIMER_REAL, seconds + PATIENCE)
  try:
    return task(*arguments)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # as it was, whatever the task made of it


def _search(paths: list[str]) -> list[str]:
  """Where modules are looked for: as in the process that asks, but for Python's own, which come first.

  A file of the user's that is called types.py lies beside the script there, which Python has read by then.
  """
  library = os.path.dirname(os.__file__)
  own = (library, os.path.join(library, "lib-dynload"))
  return sorted(paths, key=lambda path: path not in own)


def _ends_with(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(1)
  _end()


def _end() -> None:
  """Ends this process and what was started here, which nobody else does once the run is gone."""
  os.killpg(0, signal.SIGKILL)


def main() -> None:
  settings = json.loads(sys.argv[1])
  memory, sys.path[:] = settings["memory"], _search(settings["paths"])
  if memory and sys.platform == "linux":  # elsewhere the address space cannot be limited
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  threading.Thread(target=_ends_with, args=(settings["parent"],), daemon=True).start()
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for who asks
  asked, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
  nothing = os.open(os.devnull, os.O_RDONLY)
  os.dup2(nothing, 0)
  os.dup2(2, 1)  # what a task prints is no reply

  def answer(value: Any) -> None:
    rest = memoryview(json.dumps(value, default=str).encode() + b"\n")
    try:
      while rest:
        rest = rest[os.write(replies, rest) :]
    except BrokenPipeError:
      _end()

  serve(asked, answer)
  _end()


if __name__ == "__main__":
  main()
