"""Processes that hold environments, seen from the run: what is asked of them, with a deadline of ours.

A process that is over its deadline is ended, and so is one whose run ends.  Nothing here waits but `wait`: whoever
writes looks in between whether something has been answered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import selectors
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain_jax.core import apart
from posttrain_jax.core.apart import MEMORY
from posttrain_jax.environments import child

LOADING = 120.0  # seconds for a process to start and to load its environment
LOOKS = 0.2  # seconds after which whoever waits looks whether it goes on


class EnvironmentFailed(RuntimeError):
  """An environment cannot be had: it does not start, or what is named is none."""


@dataclasses.dataclass(frozen=True)
class Source:
  """What a process holds: the environment's name, "" for none, names of tools, and options of what is built in."""

  environment: str = ""
  tools: tuple[str, ...] = ()
  options: tuple[tuple[str, Any], ...] = ()

  @property
  def name(self) -> str:
    return self.environment or ", ".join(self.tools)


@dataclasses.dataclass(frozen=True)
class Failed:
  """Why nothing was answered.  is_late: the deadline came; else the environment raised, or its process died."""

  reason: str
  is_late: bool = False
  is_lost: bool = True  # the process is no more


class Host:
  """One process, with one question at a time."""

  def __init__(self, source: Source, *, memory: int = MEMORY) -> None:
    self.source = source
    self._number = 0
    self._next: tuple[str, tuple[Any, ...], float] | None = None  # asked once it is loaded
    self._is_loaded = False
    self.asked = False
    self.loaded: Mapping[str, Any] = {}
    self.process = apart.Process(child.__name__, memory)
    self._send("load", (source.environment, source.tools, dict(source.options)), LOADING)

  def ask(self, verb: str, *arguments: Any, seconds: float) -> None:
    """A question, which is asked once the environment is loaded; its time counts from then."""
    assert not self.asked
    self.asked = True
    if self._is_loaded:
      self._send(verb, arguments, seconds)
    else:
      self._next = (verb, arguments, seconds)

  def _send(self, verb: str, arguments: Sequence[Any], seconds: float) -> None:
    self._number += 1
    self._seconds, self._deadline = seconds, time.monotonic() + seconds
    with contextlib.suppress(BrokenPipeError):  # it has died, which is read from its other pipe
      self.process.send(self._number, verb, tuple(arguments))

  def reply(self) -> Mapping[str, Any] | Failed | None:
    """The answer where there is one, Failed where none will come, None as long as neither is known."""
    while self._is_readable():
      try:
        replies = self.process.said()
      except EOFError:
        return self._lost(Failed(f"its process died: {apart.status(self.end())}"))
      for reply in replies:
        if (answer := self._taken(reply)) is not None:
          return answer
    if time.monotonic() >= self._deadline and (self.asked or not self._is_loaded):
      self.end()
      what = "" if self._is_loaded else " while it was loaded"
      return self._lost(Failed(f"timed out after {self._seconds:g} s{what}", is_late=True))
    return None

  def _is_readable(self) -> bool:
    if self.process.replies.closed:
      return False
    with selectors.DefaultSelector() as selector:
      selector.register(self.process.replies, selectors.EVENT_READ)
      return bool(selector.select(0))

  def _taken(self, said: Mapping[str, Any]) -> Mapping[str, Any] | Failed | None:
    if said["to"] != self._number:
      return None
    if not self._is_loaded:
      if "raised" in said:
        self.end()
        raise EnvironmentFailed(f"{self.source.name}: {said['raised']}")
      self._is_loaded, self.loaded = True, said
      if self._next is not None:
        question, self._next = self._next, None
        self._send(*question)
      return None
    self.asked = False
    return Failed(said["raised"], is_lost=False) if "raised" in said else said

  def _lost(self, why: Failed) -> Failed:
    if not self._is_loaded:
      raise EnvironmentFailed(f"{self.source.name}: {why.reason}, before it was there")
    self.asked = False
    return why

  def end(self) -> int:
    """Ends the process and what it started; its status."""
    return self.process.end()


class Hosts:
  """Processes of one source: started as they are needed, used again, at most `most` at once."""

  def __init__(self, source: Source, most: int, *, memory: int = MEMORY) -> None:
    self.source, self.most, self._memory = source, most, memory
    self._free: list[Host] = []
    self._taken: list[Host] = []

  def take(self) -> Host | None:
    """A process that nobody has; None where there are as many as there may be."""
    while self._free:
      if (host := self._free.pop()).process.is_running:
        self._taken.append(host)
        return host
      host.end()  # it died meanwhile, and what it started may be left
    if len(self._taken) >= self.most:
      return None
    self._taken.append(Host(self.source, memory=self._memory))
    return self._taken[-1]

  def give_back(self, host: Host) -> None:
    """One that is under a question is ended: nobody waits for what it would say."""
    self._taken.remove(host)
    if host.asked or not host.process.is_running:
      host.end()
    else:
      self._free.append(host)

  def close(self) -> None:
    for host in (*self._free, *self._taken):
      host.end()
    self._free, self._taken = [], []


def wait(hosts: Iterable[Host], seconds: float = LOOKS) -> None:
  """Until one of them says something, or so long."""
  with selectors.DefaultSelector() as selector:
    for host in hosts:
      if not host.process.replies.closed:
        selector.register(host.process.replies, selectors.EVENT_READ)
    if selector.get_map():
      selector.select(seconds)
    else:
      time.sleep(seconds)


@dataclasses.dataclass(frozen=True)
class Described:
  """What an environment offers: tools as templates are told of them, and whether it acts on turns and scores itself.

  needs: columns of the rows without which it cannot be reset.
  """

  schemas: tuple[Mapping[str, Any], ...]
  acts: bool
  scores: bool
  needs: tuple[str, ...] = ()


def describe(source: Source, seconds: float = LOADING) -> Described:
  """What there is to be told of a source, asked of a process that ends then.

  Raises:
    EnvironmentFailed: it cannot be loaded, or a tool has no docstring or type hints that a template could be told.
  """
  host = Host(source)
  try:
    host.ask("describe", seconds=seconds)
    while (said := host.reply()) is None:
      wait([host])
  finally:
    host.end()
  if isinstance(said, Failed):
    raise EnvironmentFailed(f"{source.name}: {said.reason}")
  return Described(
    tuple(said["schemas"]), host.loaded["acts"], host.loaded["scores"], tuple(said["needs"])
  )
