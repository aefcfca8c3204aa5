"""Being ended by a signal: from the program's first line on it is a sentence, an exit code, and nothing half-written.

It imports next to nothing, so that it is there before anything that takes a while.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP)  # a scheduler's, and that of a terminal that is closed
INTERRUPTED = 130  # exit code: Ctrl-C, as shells have it
PREEMPTED = 75  # exit code: stopped when asked, safe to run again (EX_TEMPFAIL)
PATIENCE = 5.0  # seconds in which what waits in compiled code gets to end by itself
RESUMED = (
  "train",
  "sweep",
  "chain",
)  # verbs that go on where they were, which their exit code says
WRITING: set[Path] = set()  # scratch files and folders, worthless until they are whole


class Ended(BaseException):
  """SIGTERM or SIGHUP, in the main thread: what is open closes, what is half-written is removed."""

  def __init__(self, number: int) -> None:
    super().__init__(signal.Signals(number).name)
    self.number = number


class Guard:
  """Takes the signals of a program that has `verb` as its first argument.

  Before `armed`, and while something is imported, one ends the process; else it is an exception: Ended, or
  KeyboardInterrupt.  What waits in compiled code, or drops the exception (a garbage collection), is not waited for
  longer than PATIENCE, and a second signal is not made to wait at all.
  """

  def __init__(self, verb: str) -> None:
    self.verb = verb
    self.asked = 0  # the number of the signal that came
    self._is_armed = False
    for number in heard():
      signal.signal(number, self.receive)
    self._watch = Watch(self.receive, lambda number: self._leave(number, "ended while it worked"))

  @contextlib.contextmanager
  def armed(self) -> Generator[None]:
    self._is_armed = True
    try:
      yield
    finally:
      self._is_armed = False

  def caught(self) -> None:
    """The exception has come through: there is no more to wait for."""
    self._watch.close()

  def receive(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
      mute()
    if not self._is_armed or self.asked or is_importing(frame):
      self._leave(number, "ended at once" if self._is_armed else "ended before it began")
    self.asked = number
    raise KeyboardInterrupt if number == signal.SIGINT else Ended(number)

  def _leave(self, number: int, how: str) -> None:
    remove_unfinished()
    again = "; run the same command again" if self.verb in RESUMED else ""
    name = "interrupted" if number == signal.SIGINT else signal.Signals(number).name
    say(f"posttrain {self.verb}".rstrip() + f": {name}: {how}{again}")
    os._exit(code(number, self.verb))


def guard(module: str) -> Guard | None:
  """The guard of this process, where the module named is its program: `python -m posttrain_jax`, or `posttrain`."""
  is_program = module == "__main__" or os.path.basename(sys.argv[0]) == "posttrain"
  return Guard(sys.argv[1] if len(sys.argv) > 1 else "") if is_program else None


def is_importing(frame: FrameType | None) -> bool:
  """Whether a signal came in the midst of an import: an exception there can crash a compiled module's start."""
  while frame is not None:
    if frame.f_code.co_filename.startswith("<frozen importlib"):
      return True
    frame = frame.f_back
  return False


def code(number: int, verb: str) -> int:
  """The exit code of a verb that a signal has ended.

  >>> code(signal.SIGTERM, "export"), code(signal.SIGTERM, "train"), code(signal.SIGINT, "train")
  (143, 75, 130)
  """
  return PREEMPTED if verb in RESUMED and number in ENDING else 128 + number


def heard(*numbers: signal.Signals) -> list[signal.Signals]:
  """Of these signals, or of all that end a program, those that nobody ignores (nohup, a job in the background)."""
  asked = numbers or (*ENDING, signal.SIGINT)
  return [number for number in asked if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def handling(
  receive: Callable[[int, FrameType | None], Any], *numbers: signal.Signals
) -> Generator[None]:
  """Inside, these signals are somebody else's; those that are ignored stay so."""
  before = {number: signal.signal(number, receive) for number in heard(*numbers)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
  """Inside, the path is half-written, and whoever ends the process removes it."""
  WRITING.add(path)
  try:
    yield
  finally:
    WRITING.discard(path)


def remove_unfinished() -> None:
  for path in list(WRITING):
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
      path.unlink(missing_ok=True)


class Watch:
  """Calls `leave` when a signal has come and its handler, which compiled code holds up, has not ended the process.

  Args:
    receive: the handler; where another has taken its place, nothing is done.
  """

  def __init__(
    self, receive: Callable[[int, FrameType | None], None], leave: Callable[[int], None]
  ) -> None:
    self._receive, self._leave = receive, leave
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._over = threading.Event()
    self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    threading.Thread(target=self._wait, daemon=True).start()

  def _wait(self) -> None:
    while numbers := os.read(self._reader, 64):
      for number in {*numbers} & {*ENDING, signal.SIGINT}:
        is_ours = signal.getsignal(number) == self._receive
        if is_ours and not self._over.wait(PATIENCE):
          self._leave(number)
    os.close(self._reader)

  def close(self) -> None:
    if not self._over.is_set():
      self._over.set()
      signal.set_wakeup_fd(self._previous)
      os.close(self._writer)


def say(text: str) -> None:
  """A line to standard error, from a handler or a thread; where nobody is left to read, nowhere."""
  try:
    # not print: a handler may run inside another write to the same stream
    os.write(2, f"{text}\n".encode())
  except OSError:
    mute()


def mute() -> None:
  """Output whose reader is gone (a closed terminal, a broken pipe) goes nowhere from here on, and is no error."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for descriptor in (1, 2):
    try:
      os.write(descriptor, b"")
    except OSError:
      os.dup2(nowhere, descriptor)
  os.close(nowhere)
