"""How far something is that takes a while: a bar on a terminal, a line now and then elsewhere; on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import rich.console
import rich.progress

EVERY = 15.0  # seconds between lines where there is no terminal


@contextlib.contextmanager
def counter(what: str) -> Generator[Callable[[int, int | None], None]]:
  """A function of (how many are done, of how many; None where nobody knows)."""
  console = rich.console.Console(stderr=True)
  if not console.is_terminal:
    yield _lines(what)
    return
  columns = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
  )
  with rich.progress.Progress(*columns, console=console, transient=True) as bar:
    task = bar.add_task(what, total=None)
    yield lambda done, total: bar.update(task, completed=done, total=total)


def told(items: Iterable[Any], what: str) -> Iterator[Any]:
  """The items, counted as they are gone through."""
  items = list(items)
  with counter(what) as count:
    for done, item in enumerate(items):
      count(done, len(items))
      yield item
    count(len(items), len(items))


def _lines(what: str) -> Callable[[int, int | None], None]:
  last = [time.monotonic()]

  def count(done: int, total: int | None) -> None:
    if time.monotonic() - last[0] < EVERY:
      return
    last[0] = time.monotonic()
    print(f"{what}: {done}{'' if total is None else f' of {total}'}", file=sys.stderr, flush=True)

  return count
