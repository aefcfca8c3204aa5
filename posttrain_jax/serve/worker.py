"""The worker: one thread owns the device, everything else talks to it through queues.

The seam between the engine and whoever speaks HTTP:

  worker = Worker(params, config, tokenizer=tokenizer, rows=8, length=2048)   # params: of `decoder`, no adapter bound
  worker.start()                    # warms up on its own thread; `state` goes from "warming" to "ready"
  ticket = worker.submit(asked, deliver)
  worker.cancel(ticket)             # no event but Ended("cancelled") comes after it; the row is free within a window
  worker.drain(seconds)             # no more requests; waits for those that there are, then cancels them
  worker.close()                    # ends the thread
  worker.adapters                   # a `Registry`: names(), load(name, path), unload(name), describe(name)
  worker.numbers()                  # what /metrics tells, a `Numbers`

`deliver(event)` is called on the worker's thread and must not block.  Events of an answer come in this order: Started,
Prompt (echo_logprobs alone), Tokens any number of times, then one of Ended or Failed.  `submit` raises ValueError for
what cannot be answered (400), UnknownAdapter (404), BadAdapter (400), Full (429) and Closed (503).  It reads an adapter
from the disk where `adapters.is_at_hand(name)` is false: call it off the event loop then.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import queue
import threading
import time
from typing import Any

from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout import engine as engines
from posttrain_jax.rollout import requests
from posttrain_jax.rollout.requests import Request
from posttrain_jax.serve import asked as asking
from posttrain_jax.serve.asked import (
  Asked,
  Closed,
  Deliver,
  Ended,
  Failed,
  Full,
  Started,
  Tokens,
  UnknownAdapter,
)

log = logging.getLogger(__name__)
__all__ = ["Asked", "Closed", "Full", "Ticket", "UnknownAdapter", "Worker"]
WARMING, READY, DRAINING, CLOSED = "warming", "ready", "draining", "closed"


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request that the worker has."""

  number: int
  asked: Asked
  deliver: Deliver
  since: float
  of_engine: int | None = None
  is_over: bool = False


class Worker:
  """Answers for many at once, each as if it were alone."""

  def __init__(
    self,
    params: Any,
    config: ModelConfig,
    *,
    tokenizer: Any,
    rows: int = 8,
    length: int,
    window: int = 8,
    dtype: Any = None,
    waiting: int = 256,
  ) -> None:
    self.engine = engines.Engine(
      params, config, rows=rows, length=length, window=window, dtype=dtype, tokenizer=tokenizer
    )
    self.state = WARMING
    self._most_waiting = waiting
    self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._numbers = itertools.count()
    self._under_way: dict[int, Ticket] = {}
    self._waiting: list[Ticket] = []
    self._thread = threading.Thread(target=self._run, name="posttrain-worker", daemon=True)

  def start(self) -> None:
    self._thread.start()

  def submit(self, asked: Asked, deliver: Deliver) -> Ticket:
    if self.state in (DRAINING, CLOSED):
      raise Closed("the server is ending and takes no more requests")
    if asked.adapter is not None:
      raise UnknownAdapter(f"no adapter is called {asked.adapter!r}")
    if len(self._waiting) >= self._most_waiting:
      raise Full(len(self._waiting), 1.0)
    ticket = Ticket(next(self._numbers), asked, deliver, time.monotonic())
    requests.check(self._request(ticket), self.engine.config, self.engine.length, 0, None)
    self._inbox.put(ticket)
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    self._inbox.put(("cancel", ticket))

  def drain(self, seconds: float) -> None:
    self.state = DRAINING
    end = time.monotonic() + seconds
    while (self._waiting or self._under_way or not self._inbox.empty()) and time.monotonic() < end:
      time.sleep(0.01)
    for ticket in [*self._waiting, *self._under_way.values()]:
      self.cancel(ticket)

  def close(self) -> None:
    self.state = CLOSED
    self._inbox.put(None)
    self._thread.join()

  def _request(self, ticket: Ticket) -> Request:
    a = ticket.asked
    return Request(
      a.prompt,
      a.max_new,
      a.min_new,
      a.sampling,
      tuple(a.stop_ids),
      a.stop_strings,
      a.seed,
      a.number,
      a.sample,
    )

  def _run(self) -> None:
    self.engine.warm_up()
    if self.state == WARMING:
      self.state = READY
    while self.state != CLOSED or self._waiting or self._under_way:
      self._listen()
      while self._waiting and len(self._under_way) < self.engine.rows:
        ticket = self._waiting.pop(0)
        ticket.of_engine = self.engine.submit(self._request(ticket))
        self._under_way[ticket.of_engine] = ticket
        ticket.deliver(Started(time.monotonic() - ticket.since, 0))
      for told in self.engine.advance():
        self._tell(told)

  def _listen(self) -> None:
    block = not self._waiting and not self._under_way
    while True:
      try:
        said = self._inbox.get(block=block)
      except queue.Empty:
        return
      block = False
      if said is None:
        return
      if isinstance(said, Ticket):
        self._waiting.append(said)
      else:
        self._cancel(said[1])

  def _cancel(self, ticket: Ticket) -> None:
    if ticket.is_over:
      return
    if ticket in self._waiting:
      self._waiting.remove(ticket)
    if ticket.of_engine is not None:
      self._under_way.pop(ticket.of_engine, None)
      self.engine.drop(ticket.of_engine)
    self._end(ticket, Ended(asking.CANCELLED))

  def _tell(self, told: engines.Progress) -> None:
    ticket = self._under_way[told.ticket]
    if told.tokens:
      ticket.deliver(Tokens(told.tokens, None, None))
    if told.answer is not None:
      del self._under_way[told.ticket]
      reason = asking.LENGTH if told.answer.ended == requests.FULL else asking.STOP
      self._end(ticket, Ended(reason))

  def _end(self, ticket: Ticket, event: Ended | Failed) -> None:
    ticket.is_over = True
    ticket.deliver(event)
