"""Processes that run verifiers with a deadline of ours.

A call that is over its deadline ends its process and is missing, and so is one whose process died; the next call gets
a new process.  Only running counts: a call waits in this process until a worker is free and has loaded what it calls.
Alarms (SIGALRM) would do nothing off the main thread and nothing against a call that is stuck in C.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pickle
import selectors
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from posttrain_jax.core import apart
from posttrain_jax.core.apart import MEMORY
from posttrain_jax.rewards import score, worker
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Answer, Context, Verifier, called

SECONDS = 10.0  # for one call
LOADING = 120.0  # seconds for a process to start and to import what it calls
ENDS = 3  # processes a slot that may end before they call anything
LOOKS = 0.3  # seconds after which it is looked whether anybody still waits for what runs


class WorkerError(RuntimeError):
  """Nothing can be run: what is to be called cannot be sent, or cannot be loaded."""


class Interrupted(RuntimeError):
  """Nobody waits for the calls any more; they have been ended, and nothing is known of them."""


@dataclasses.dataclass(frozen=True)
class Failed:
  """A call without a result."""

  reason: str


class Workers:
  """As many processes as there are cores, started when they are first needed.

  Args:
    count: of processes; at most one a core, since a time-out should say something of the call.
    stopping: asked while calls run, from their thread; once it says so, they are ended.
  """

  def __init__(
    self,
    count: int | None = None,
    *,
    memory: int = MEMORY,
    stopping: Callable[[], bool] = lambda: False,
  ):
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if count is not None and not 1 <= count <= cores:
      raise ValueError(f"workers={count}: there are {cores} cores; name a number from 1 to {cores}")
    self._slots = [_Slot(memory) for _ in range(count or cores)]
    self.stopping = stopping
    self._tasks: dict[bytes, int] = {}
    self._lock = threading.Lock()
    self._ending = weakref.finalize(self, _end_all, self._slots)

  def run(
    self, task: Callable[..., Any], calls: Sequence[tuple[Any, ...]], seconds: Sequence[float]
  ) -> list[Any]:
    """What `task(*arguments)` returned for each call, as JSON gives it back; Failed where it returned nothing.

    Args:
      task: is sent by its name, and imported by a worker.
      seconds: the deadline of each call.

    Raises:
      WorkerError: no process can load the task.
      Interrupted: `stopping` said so.
    """
    with self._lock:
      body = _pickled(task)
      key = self._tasks.setdefault(body, len(self._tasks))
      try:
        return _Round(self._slots, key, body, calls, seconds, self.stopping).results()
      except BaseException:  # an interrupt: nobody asks for what they would answer
        _end_all([slot for slot in self._slots if slot.state != IDLE])
        raise

  def close(self) -> None:
    """Ends the processes."""
    self._ending()


# LOADS_TASK: it starts or imports; SENT: it has a call and has not begun it
IDLE, LOADS_TASK, SENT, RUNS = "idle", "loads", "sent", "runs"


class _Slot:
  """A place for a process, and what the process is doing."""

  def __init__(self, memory: int):
    self.memory = memory
    self.process: apart.Process | None = None
    self.loaded: set[int] = set()
    self.state, self.key, self.call, self.deadline = IDLE, -1, -1, 0.0
    self.number = 0  # of the last message; a reply to another one is nobody's

  def send(self, kind: str, key: int, body: bytes, seconds: float = 0.0) -> None:
    """Raises BrokenPipeError where the process has ended."""
    if self.process is None:
      self.process = apart.Process(worker.__name__, self.memory)
    self.number += 1
    self.process.send(self.number, kind, key, body, seconds)
    self.state, self.key = LOADS_TASK if kind == "load" else SENT, key
    self.deadline = time.monotonic() + LOADING

  def end(self) -> int:
    """Ends the process and what it started; its status."""
    process, self.process = self.process, None
    self.loaded, self.state, self.call = set(), IDLE, -1
    return 0 if process is None else process.end()


def _end_all(slots: Sequence[_Slot]) -> None:
  for slot in slots:
    slot.end()


class _Round:
  """The calls of one task, handed out to slots as they become free."""

  def __init__(
    self,
    slots: Sequence[_Slot],
    key: int,
    body: bytes,
    calls: Sequence[tuple[Any, ...]],
    seconds: Sequence[float],
    stopping: Callable[[], bool] = lambda: False,
  ):
    self.stopping = stopping
    self.slots, self.key, self.body = slots, key, body
    self.calls, self.seconds = calls, seconds
    self.waiting = collections.deque(range(len(calls)))
    self.given: list[Any] = [None] * len(calls)
    self.ended_early = 0

  def results(self) -> list[Any]:
    while self.waiting or any(slot.state in (SENT, RUNS) for slot in self.slots):
      if self.stopping():
        raise Interrupted("ended while verifiers ran")
      for slot in self.slots:
        loading = sum(s.state == LOADS_TASK and s.key == self.key for s in self.slots)
        if slot.state == IDLE and len(self.waiting) > (0 if self.key in slot.loaded else loading):
          self._hand_out(slot)
      self._wait()
    return self.given

  def _hand_out(self, slot: _Slot) -> None:
    try:
      if self.key in slot.loaded:
        body = pickle.dumps(self.calls[self.waiting[0]])
        slot.call = self.waiting.popleft()
        slot.send("call", self.key, body, self.seconds[slot.call])
      else:
        slot.send("load", self.key, self.body)
    except BrokenPipeError:
      self._ended_early(slot)

  def _wait(self) -> None:
    """Until a busy slot says something, the first deadline, or it is time to look whether it goes on."""
    busy = [slot for slot in self.slots if slot.state != IDLE]
    if not busy:
      return
    with selectors.DefaultSelector() as selector:
      for slot in busy:
        assert slot.process is not None
        selector.register(slot.process.replies, selectors.EVENT_READ, slot)
      first = min(slot.deadline for slot in busy)
      ready = selector.select(min(LOOKS, max(0.0, first - time.monotonic())))
    for key, _ in ready:
      self._read(key.data)
    now = time.monotonic()
    for slot in busy:
      if slot.state != IDLE and slot.deadline <= now:
        self._late(slot)

  def _read(self, slot: _Slot) -> None:
    assert slot.process is not None
    try:
      replies = slot.process.said()
    except EOFError:
      self._died(slot)
      return
    for reply in replies:
      self._take(slot, reply)

  def _take(self, slot: _Slot, reply: dict[str, Any]) -> None:
    if slot.state == IDLE or reply["to"] != slot.number:
      return
    if "error" in reply:
      raise WorkerError(f"a worker cannot load what it should call: {reply['error']}")
    if "began" in reply:
      slot.state, slot.deadline = RUNS, time.monotonic() + self.seconds[slot.call]
      return
    if slot.state == RUNS:
      self.given[slot.call] = Failed(reply["failed"]) if "failed" in reply else reply["result"]
    else:
      slot.loaded.add(slot.key)
    slot.state, slot.call = IDLE, -1

  def _died(self, slot: _Slot) -> None:
    if slot.state != RUNS:
      self._ended_early(slot)
      return
    call = slot.call
    status = slot.end()
    self.given[call] = Failed(
      _late_after(self.seconds[call])
      if status == -signal.SIGALRM
      else f"the worker died: {apart.status(status)}"
    )

  def _late(self, slot: _Slot) -> None:
    if slot.state == RUNS:
      self.given[slot.call] = Failed(_late_after(self.seconds[slot.call]))
      slot.end()
    else:
      self._ended_early(slot, f"they have not begun after {LOADING:g} s")

  def _ended_early(self, slot: _Slot, reason: str = "") -> None:
    """It was ended from outside while it ran nothing, or cannot start: what it was given is asked again."""
    if slot.call >= 0:
      self.waiting.appendleft(slot.call)
    status = slot.end()
    self.ended_early += 1
    if self.ended_early >= ENDS * len(self.slots):
      raise WorkerError(f"workers end before they call anything: {reason or apart.status(status)}")


def _late_after(seconds: float) -> str:
  return f"timed out after {seconds:g} s"


def _pickled(task: Callable[..., Any]) -> bytes:
  try:
    body = pickle.dumps(task)
  except (pickle.PicklingError, AttributeError, TypeError) as error:
    raise WorkerError(
      f"a worker imports what it calls, and this cannot be imported: {error}; define the verifier at the top of a file "
      "of its own, or name it as FILE.py:name"
    ) from error
  if b"__main__" in body:
    raise WorkerError(
      "a worker imports what it calls, and the script that runs cannot be imported; define the verifier at the top of "
      "a file of its own, or name it as FILE.py:name"
    )
  return body


@dataclasses.dataclass(frozen=True)
class One:
  """A verifier as a task of workers."""

  verifier: Verifier

  def __call__(self, answer: Answer) -> tuple[float | None, str, bool]:
    given = called(self.verifier, answer)
    return given.value, given.reason, given.applies


@dataclasses.dataclass(frozen=True)
class Apart:
  """A verifier that runs in worker processes; each answer has a deadline."""

  verifier: Verifier
  workers: Workers
  seconds: float = SECONDS

  def scores(self, answers: Sequence[Answer], context: Context) -> list[Score]:
    calls = [(answer,) for answer in answers]
    given = self.workers.run(One(self.verifier), calls, [self.seconds] * len(calls))
    return [score.missing(g.reason) if isinstance(g, Failed) else Score(*g) for g in given]
