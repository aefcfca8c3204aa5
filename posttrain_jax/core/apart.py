"""Processes that answer messages, for what may hang, crash or fill the memory: a user's verifiers, environments, tools.

A message is a pickled tuple whose first item is its number; a reply is a line of JSON, {"to": number, ...}.  What such
a process starts is of its group and ends with it, and it ends with who started it.  Nothing here waits for a reply.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import weakref
from typing import IO, Any

from posttrain_jax.core import apart_program
from posttrain_jax.core.apart_program import HEADER

MEMORY = 8 << 30  # bytes of address space of one process; 0: without a limit
# the accelerator is the trainer's, and so are the other cores
OWN = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


class Process:
  """A process whose messages the function `serve(asked, answer)` of a module answers.

  asked is a stream of `apart_program.messages`, answer writes one reply.
  """

  def __init__(self, module: str, memory: int = MEMORY) -> None:
    settings = {
      "module": module,
      "memory": memory,
      "paths": [path or os.getcwd() for path in sys.path],
      "parent": os.getpid(),
    }
    self._popen = subprocess.Popen(
      [sys.executable, "-P", apart_program.__file__, json.dumps(settings)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      start_new_session=True,
      env={**os.environ, **OWN},
    )
    self._received = b""
    self._status: list[int] = []
    self._ending = weakref.finalize(self, _end, self._popen, self._status)

  @property
  def pid(self) -> int:
    return self._popen.pid

  @property
  def replies(self) -> IO[bytes]:
    """What a selector waits for; closed once the process has been ended."""
    assert self._popen.stdout is not None
    return self._popen.stdout

  @property
  def is_running(self) -> bool:
    return not self._status and self._popen.poll() is None

  def send(self, *message: Any) -> None:
    """Raises BrokenPipeError where the process has ended."""
    body = pickle.dumps(message)
    assert self._popen.stdin is not None
    self._popen.stdin.write(HEADER.pack(len(body)) + body)
    self._popen.stdin.flush()

  def said(self) -> list[Any]:
    """The replies that have come whole; waits for something to read.

    Raises:
      EOFError: the process has ended.
    """
    some = os.read(self.replies.fileno(), 1 << 16)
    if not some:
      raise EOFError
    *lines, self._received = (self._received + some).split(b"\n")
    return [json.loads(line) for line in lines]

  def end(self) -> int:
    """Ends the process and what it started; the status that it ended with by itself, or that of the kill."""
    self._ending()
    return self._status[0]


def _end(process: subprocess.Popen[bytes], status: list[int]) -> None:
  # read before the kill, which is for what is left of its group
  ended = process.poll()
  with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses for dead processes
    os.killpg(process.pid, signal.SIGKILL)
  killed = process.wait()
  status.append(killed if ended is None else ended)
  for pipe in (process.stdin, process.stdout):
    if pipe is not None:
      with contextlib.suppress(BrokenPipeError):  # half a message was left in it
        pipe.close()


def status(number: int) -> str:
  """
  >>> status(-9), status(1)
  ('signal 9', 'exit status 1')
  """
  return f"signal {-number}" if number < 0 else f"exit status {number}"
