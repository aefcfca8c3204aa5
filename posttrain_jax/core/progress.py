"""What takes a while is said, on stderr: a spinner or a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TextIO

import rich.console
import rich.progress

EVERY = 15.0  # seconds between lines where there is no terminal
LONG = 1.0  # seconds from which on it is said how long something took


_muted = [False]
heard: list[Callable[[str], None]] = []  # told of all that begins and is counted, muted or not


def beat(doing: str) -> None:
  """The program gets on; `doing` is what it does from here on."""
  for listener in heard:
    listener(doing)


@contextlib.contextmanager
def muted() -> Generator[None]:
  """Inside, nothing is said: where a program reads what is printed."""
  before, _muted[0] = _muted[0], True
  try:
    yield
  finally:
    _muted[0] = before


@contextlib.contextmanager
def phase(doing: str, *, stream: TextIO | None = None) -> Generator[None]:
  """Says what begins, and where it took longer than LONG how long: "reading smollm2", "reading smollm2: 2.1 s".

  Args:
    stream: default stderr.
  """
  out = stream or sys.stderr
  began = time.monotonic()
  beat(doing)
  if not out.isatty():
    _print(f"{doing} ...", out)
  with waiting(doing, stream=out):
    yield
  beat(f"what follows {doing}")
  taken = time.monotonic() - began
  if taken >= LONG:
    _print(f"{doing}: {took(taken)}", out)


@contextlib.contextmanager
def waiting(doing: str, *, stream: TextIO | None = None) -> Generator[None]:
  """On a terminal a spinner with the time beside it, gone when the block ends; elsewhere nothing."""
  out = stream or sys.stderr
  if _muted[0] or not out.isatty():
    yield
    return
  columns = (
    rich.progress.SpinnerColumn(),
    rich.progress.TextColumn("{task.description}", markup=False),
    rich.progress.TimeElapsedColumn(),
  )
  console = rich.console.Console(file=out)
  with rich.progress.Progress(*columns, console=console, transient=True) as bar:
    bar.add_task(doing, total=None)
    yield


@contextlib.contextmanager
def counter(what: str) -> Generator[Callable[[int, int | None], None]]:
  """A function of (how many are done, of how many; None where nobody knows)."""
  began = time.monotonic()
  console = rich.console.Console(stderr=True)
  if console.is_terminal and not _muted[0]:
    columns = (
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
      task = bar.add_task(what, total=None)
      shown = lambda done, total: bar.update(task, completed=done, total=total)
      yield _heard(what, shown)
  else:
    _print(f"{what} ...")
    shown = lines(what)
    yield _heard(what, shown)
  taken = time.monotonic() - began
  if taken >= LONG:
    _print(f"{what}: {took(taken)}")


def _heard(
  what: str, count: Callable[[int, int | None], None]
) -> Callable[[int, int | None], None]:
  def counted(done: int, total: int | None) -> None:
    beat(what)
    count(done, total)

  return counted


def told(items: Iterable[Any], what: str) -> Iterator[Any]:
  """The items, counted as they are gone through."""
  items = list(items)
  with counter(what) as count:
    for done, item in enumerate(items):
      count(done, len(items))
      yield item
    count(len(items), len(items))


def took(seconds: float) -> str:
  """
  >>> took(0.42), took(75), took(3700)
  ('0.4 s', '1:15 min', '1:01:40 h')
  """
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d} h" if hours else f"{minutes}:{seconds:02d} min"


@contextlib.contextmanager
def announced(what: str, say: Callable[[str], None]) -> Generator[None]:
  """Says every now and then that something is still going on; of what is short nothing."""
  began, over = time.monotonic(), threading.Event()

  def tell() -> None:
    while not over.wait(EVERY):
      say(f"{what} ... {took(time.monotonic() - began)} so far")

  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def lines(what: str, say: Callable[[str], None] | None = None) -> Callable[[int, int | None], None]:
  """A function of (how many are done, of how many), which says so every now and then, on stderr by default.

  How long the rest takes is said from the second time on, by what came since the first: until then programs compile,
  and what is done side by side, or was done by an earlier command, says nothing of the pace.
  """
  say = say or _print
  last = [time.monotonic()]
  first: list[tuple[float, int]] = []

  def count(done: int, total: int | None) -> None:
    now = time.monotonic()
    if now - last[0] < EVERY:
      return
    last[0] = now
    left = ""
    if not first:
      first.append((now, done))
    elif total and done > first[0][1]:
      pace = (now - first[0][0]) / (done - first[0][1])
      left = f", {took(pace * (total - done))} left"
    say(f"{what}: {done}{'' if total is None else f' of {total}'}{left}")

  return count


def _print(text: str, stream: TextIO | None = None) -> None:
  if not _muted[0]:
    with contextlib.suppress(OSError):  # nobody reads it any more
      print(text, file=stream or sys.stderr, flush=True)
