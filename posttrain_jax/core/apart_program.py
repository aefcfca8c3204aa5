"""The program of a process that `apart.Process` starts: it answers each message with a line of JSON.

What is printed here goes to standard error.  The program ends with who started it, and what was started here, too.
It is run as a file, since it may import nothing of the project before it knows where modules are looked for.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

HEADER = struct.Struct("<Q")  # the length of a pickled message


def messages(asked: BinaryIO) -> Iterator[tuple[Any, ...]]:
  while len(header := asked.read(HEADER.size)) == HEADER.size:
    yield pickle.loads(asked.read(*HEADER.unpack(header)))


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


def _answering(replies: int) -> Callable[[Any], None]:
  own = os.getpid()

  def answer(value: Any) -> None:
    if os.getpid() != own:  # a child of what runs here that came back from it, with our pipes
      os._exit(0)
    line = json.dumps(value, default=str, ensure_ascii=False) + "\n"
    # half of a surrogate pair becomes ?: no tokenizer reads it, and no table of answers holds it
    rest = memoryview(line.encode("utf-8", "replace"))
    try:
      while rest:
        rest = rest[os.write(replies, rest) :]
    except BrokenPipeError:
      _end()

  return answer


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
  os.dup2(2, 1)  # what is printed is no reply
  importlib.import_module(settings["module"]).serve(asked, _answering(replies))
  _end()


if __name__ == "__main__":
  main()
