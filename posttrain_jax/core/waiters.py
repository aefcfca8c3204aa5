"""Threads that wait for replies of others; the program may end while they do, which those of `futures` hold up."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Given = TypeVar("Given")


class Waiters:
  """At most `most` threads, started as they are needed.

  >>> waiters = Waiters(2)
  >>> waiters.submit(max, 3, 4).result()
  4
  >>> waiters.close()
  """

  def __init__(self, most: int, name: str = "waiter") -> None:
    self._most, self._name, self._started = most, name, 0
    self._asked: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple] | None] = (
      queue.SimpleQueue()
    )

  def submit(self, work: Callable[..., Given], *arguments: Any) -> Future[Given]:
    """What `work` gives or raises, once a thread has come to it; until then it may be cancelled."""
    future: Future[Given] = Future()
    self._asked.put((future, work, arguments))
    if self._started < self._most:
      self._started += 1
      name = f"{self._name}-{self._started}"
      threading.Thread(target=self._run, name=name, daemon=True).start()
    return future

  def close(self) -> None:
    """Cancels what no thread has come to; each thread ends behind what it does."""
    with contextlib.suppress(queue.Empty):
      while (left := self._asked.get_nowait()) is not None:
        left[0].cancel()
    for _ in range(self._started):
      self._asked.put(None)

  def _run(self) -> None:
    while (asked := self._asked.get()) is not None:
      future, work, arguments = asked
      if not future.set_running_or_notify_cancel():
        continue
      try:
        given = work(*arguments)
      except BaseException as error:  # whoever waits for it hears of it
        future.set_exception(error)
      else:
        future.set_result(given)
