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

import contextlib
import dataclasses
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters.stacked import Room
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout import engine as engines
from posttrain_jax.rollout import requests
from posttrain_jax.rollout import storage as storages
from posttrain_jax.rollout.prefixes import Prefixes
from posttrain_jax.rollout.requests import Request
from posttrain_jax.serve import asked as asking
from posttrain_jax.serve import checking
from posttrain_jax.serve import slots as slots_lib
from posttrain_jax.serve.adapters import Registry, Version
from posttrain_jax.serve.asked import (
  Asked,
  BadAdapter,
  Closed,
  Deliver,
  Ended,
  Event,
  Failed,
  Full,
  Prompt,
  Started,
  Tokens,
  UnknownAdapter,
)
from posttrain_jax.serve.numbers import Numbers
from posttrain_jax.serve.turns import BASE, Turns

log = logging.getLogger(__name__)
__all__ = ["Asked", "BadAdapter", "Closed", "Full", "Ticket", "UnknownAdapter", "Worker"]
WARMING, READY, DRAINING, CLOSED = "warming", "ready", "draining", "closed"
PIECES = (
  64,
  32,
  16,
)  # tokens of a prompt that are read at once: the first is a block of the prefix cache
AT_ONCE = 256  # tokens of prompts that are read between two windows
WINDOW = 8  # tokens that are drawn between two looks at the queue


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request that the worker has."""

  asked: Asked
  deliver: Deliver
  version: Version | None
  request: Request
  since: float
  of_engine: int | None = None
  began: float = math.inf
  is_told: bool = False  # of its start
  is_over: bool = False
  error: Exception | None = None  # of its grammar

  def fail(self, error: Exception) -> None:
    self.error = error

  @property
  def content(self) -> Hashable:
    return BASE if self.version is None else self.version.digest


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
    window: int = WINDOW,
    dtype: Any = None,
    slots: int = 8,
    rank: int = 16,
    modules: tuple[str, ...] | None = None,
    prompt_slots: int = 0,
    prefix_slots: int = 0,
    prefix_bytes: int = 256 * 2**20,
    root: Path | None = None,
    reserved: tuple[str, ...] = (),
    waiting: int = 256,
    patience: float = 1.0,
    pieces: Sequence[int] = PIECES,
    at_once: int = AT_ONCE,
    mesh: jax.sharding.Mesh | None = None,
    storage: str = storages.AUTO,
  ) -> None:
    """A worker that has not started.

    Args:
      params: the base's, without adapters: dense or quantised, on one device or laid out over `mesh`.
      length: the most tokens of a prompt and its answer, with what an adapter puts before them.
      window: the most tokens drawn between two looks at the queue.
      dtype: of what lies between products; None: the embedding's.
      slots: how many adapters are on the device at once; 0 for the base alone.
      rank, modules, prompt_slots, prefix_slots: the largest adapter that has room in a slot (`stacked.Room`); modules
        None for every matrix of the layers.
      prefix_bytes: of keys and values that are kept of what prompts begin with, 0 for none.
      root: the folder whose folders may be asked for by their names.
      reserved: the base's own names, which no adapter may have.
      waiting: how many requests may wait.
      patience: seconds after which an adapter without a slot may take another's.
      storage: how the base's matrices are kept while it writes (`rollout.storage`).
    """
    self._mesh = mesh
    self.config, self.tokenizer = config, tokenizer
    with self._on_mesh():
      base = engines.prepare(params, config, storage)
      self._slots = None
      if slots:
        paths = slots_lib.paths(params, modules)
        room = Room(slots, rank, paths, prompt_slots, prefix_slots)
        of_factors = jnp.float32 if jax.default_backend() == "cpu" else (dtype or jnp.float32)
        self._slots = slots_lib.Slots(base, room, config, dtype=of_factors, mesh=mesh)
      self.engine = engines.Engine(
        base if self._slots is None else self._slots.ready,
        config,
        rows=rows,
        length=length,
        window=window,
        dtype=dtype,
        top=min(asking.MOST_TOP, config.vocab_size),
        tokenizer=tokenizer,
        serves=True,
        pieces=pieces,
        at_once=at_once,
        prefixes=Prefixes(prefix_bytes) if prefix_bytes else None,
      )
    self.adapters = Registry(
      self._entry, base.stacked, config, root=root, reserved=reserved, entry_context=self._on_mesh
    )
    self.state = WARMING
    self.error: BaseException | None = None  # that ended the thread
    self._turns = Turns(slots, patience)
    self._most_waiting = waiting
    self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._count = itertools.count()
    self._lock = threading.Lock()
    self._held = 0  # requests that are not over
    self._under_way: dict[int, Ticket] = {}
    self._waiting: list[Ticket] = []
    self._read_tokens = self._drawn_tokens = 0
    self._pace = 1.0  # seconds that a request took of late
    self._thread = threading.Thread(target=self._run, name="posttrain-worker", daemon=True)

  # What other threads call

  def start(self) -> None:
    self._thread.start()

  def submit(self, asked: Asked, deliver: Deliver) -> Ticket:
    """The request waits for a row; see the module for what is raised."""
    self._check_open()
    version = None
    if asked.adapter is not None:
      if self._slots is None:
        raise UnknownAdapter(f"no adapter is called {asked.adapter!r}: the base is served alone")
      version = self.adapters.acquire(asked.adapter)
    try:
      request = checking.request(asked, version, self.engine)
      ticket = Ticket(asked, deliver, version, request, time.monotonic())
      allowed = checking.guarded(asked.allowed, self.config.vocab_size, ticket.fail)
      ticket.request = dataclasses.replace(request, allowed=allowed)
      with self._lock:
        self._check_open()
        waiting = self._held - self.engine.rows
        if waiting >= self._most_waiting:
          raise Full(waiting, max(1.0, self._pace * waiting / self.engine.rows))
        self._held += 1
    except BaseException:
      if version is not None:
        self.adapters.release(version)
      raise
    self._inbox.put(ticket)
    return ticket

  def check(self, asked: Asked) -> None:
    """Raises as `submit` does for what can never be answered; nothing is asked."""
    version = None if asked.adapter is None else self.adapters.acquire(asked.adapter)
    try:
      checking.request(asked, version, self.engine)
    finally:
      if version is not None:
        self.adapters.release(version)

  def cancel(self, ticket: Ticket) -> None:
    self._inbox.put(("cancel", ticket))

  def drain(self, seconds: float) -> bool:
    """Whether all that was asked was answered in time; what was not is cancelled."""
    if self.state != CLOSED:
      self.state = DRAINING
    is_done = self._wait_idle(seconds)
    if not is_done:
      self._inbox.put(("cancel all", None))
      self._wait_idle(60.0)
    return is_done

  def close(self) -> None:
    """Ends the thread; what is under way is cancelled."""
    self.state = CLOSED
    self._inbox.put(("cancel all", None))
    if self._thread.is_alive():
      self._thread.join()

  def describe(self, name: str) -> dict[str, Any]:
    """`Registry.describe`, whose state may be "slot": it is on the device, and no request has it."""
    told = self.adapters.describe(name)
    in_slot = (
      self._turns.slot_of(told.get("digest", BASE)) is not None if "digest" in told else False
    )
    return {**told, "state": "slot"} if in_slot and told["state"] == "host" else told

  def numbers(self) -> Numbers:
    rows = list(self._under_way.values())
    held = sum(len(t.request.prompt) + (t.request.bound or 0) for t in rows)
    prefixes = self.engine.prefixes
    in_slots = [slot.content for slot in self._turns.slots if slot.content is not BASE]
    return Numbers(
      running=len(rows),
      waiting=max(0, self._held - len(rows)),
      rows=self.engine.rows,
      cache_usage=min(1.0, held / (self.engine.rows * self.engine.length)),
      prompt_tokens=self._read_tokens,
      generation_tokens=self._drawn_tokens,
      prefix_queries=0 if prefixes is None else prefixes.queries,
      prefix_hits=0 if prefixes is None else prefixes.hits,
      prefix_bytes=0 if prefixes is None else prefixes.used_bytes,
      adapters_registered=self.adapters.registered,
      adapters_on_host=self.adapters.on_host,
      adapters_in_slots=len(in_slots),
      adapters_in_use=len({t.content for t in rows} - {BASE}),
      adapter_evictions=self._turns.evictions,
      adapter_host_bytes=self.adapters.host_bytes,
      compiled_programs=len(self.engine.compiled)
      + (0 if self._slots is None else self._slots.programs()),
    )

  def _check_open(self) -> None:
    if self.state in (DRAINING, CLOSED):
      raise Closed("the server is ending and takes no more requests")

  def _wait_idle(self, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while self._held and self._thread.is_alive() and time.monotonic() < end:
      time.sleep(0.005)
    return not self._held

  def _entry(self, adapter: Any) -> dict[str, Any]:
    if self._slots is None:
      raise ValueError("the base is served alone: there are no slots")
    return self._slots.entry(adapter, self.adapters.params)

  def _on_mesh(self) -> Any:
    return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

  # What the worker's thread does

  def _run(self) -> None:
    try:
      with self._on_mesh():
        self._warm_up()
        if self.state == WARMING:
          self.state = READY
        while self.state != CLOSED or self._under_way or self._waiting:
          self._listen()
          self._turn()
          self._advance()
    except BaseException as error:  # told by state and error; every request hears of it
      log.exception("the worker has ended")
      self.error = error
      self.state = CLOSED
      for ticket in [*self._under_way.values(), *self._waiting]:
        self._end(ticket, Failed(RuntimeError("the server's worker has ended")))

  def _warm_up(self) -> None:
    if (
      self._slots is not None
    ):  # put into once, so that the programs are given slots as they come from then on
      self.engine.swap(self._slots.put(0, self._slots.entry({}, self.adapters.params)), 0)
    self.engine.warm_up()

  def _listen(self) -> None:
    """What was said meanwhile; where there is nothing to do, what is said next."""
    idle = not self._waiting and not self._under_way
    while True:
      try:
        said = self._inbox.get(block=idle)
      except queue.Empty:
        break
      idle = False
      if isinstance(said, Ticket):
        self._waiting.append(said)
      elif said[0] == "cancel":
        self._cancel(said[1])
      else:
        for ticket in [*self._waiting, *self._under_way.values()]:
          self._cancel(ticket)
    for digest in self.adapters.take_gone():
      self._turns.forget(digest)
      if self.engine.prefixes is not None:
        self.engine.prefixes.forget(("adapter", digest))

  def _turn(self) -> None:
    """Waiting requests into free rows."""
    while self._waiting and len(self._under_way) < self.engine.rows:
      now = time.monotonic()
      turn = self._turns.next(self._waiting, now)
      if turn is None:
        return
      ticket = turn.request
      if turn.is_new:
        assert self._slots is not None
        assert turn.slot is not None
        assert ticket.version is not None
        self.engine.swap(self._slots.put(turn.slot, ticket.version.entry), turn.slot)
      self._turns.begin(turn, now)
      self._waiting.remove(ticket)
      row = 0 if self._slots is None else self._slots.none if turn.slot is None else turn.slot
      ticket.began = now
      ticket.of_engine = self.engine.submit(dataclasses.replace(ticket.request, row=row))
      self._under_way[ticket.of_engine] = ticket

  def _advance(self) -> None:
    """A window, and what it brought."""
    if not self._under_way:
      return
    try:
      progress = self.engine.advance(wanted=bool(self._waiting))
    except Exception as error:
      log.exception("a window failed; what was under way is lost")
      for ticket in list(self._under_way.values()):
        self._drop(ticket)
        self._end(ticket, Failed(error))
      return
    for told in progress:
      ticket = self._under_way.get(told.ticket)
      if ticket is not None:
        self._tell(ticket, told)

  def _tell(self, ticket: Ticket, told: engines.Progress) -> None:
    error = ticket.error or _overflow(ticket, told)
    if error is not None:
      self._drop(ticket)
      self._end(ticket, Failed(error))
      return
    if not ticket.is_told:
      ticket.is_told = True
      self._read_tokens += len(ticket.request.prompt)
      self._deliver(ticket, Started(ticket.began - ticket.since, told.cached))
      if ticket.asked.echo_logprobs:
        assert told.prompt is not None
        top = _narrowed(told.prompt.top, ticket.asked.top)
        self._deliver(ticket, Prompt(told.prompt.logps, top))
    if ticket.asked.max_new == 0:
      self._drop(ticket)
      self._end(ticket, Ended(asking.LENGTH))
      return
    if told.tokens:
      assert told.logps is not None
      self._drawn_tokens += len(told.tokens)
      top = _narrowed(told.top, ticket.asked.top)
      self._deliver(ticket, Tokens(told.tokens, told.logps, top))
    if told.answer is not None and not ticket.is_over:
      self._end(ticket, self._ended(ticket, told.answer))

  def _ended(self, ticket: Ticket, answer: requests.Answer) -> Ended:
    if answer.ended == requests.FULL:
      return Ended(asking.LENGTH)
    if answer.ended == requests.STOPPED:
      return Ended(asking.STOP)
    text = requests.text_of(ticket.request.tokenizer, answer.tokens)
    strings = ticket.request.stop_strings
    places = {text.find(string): string for string in strings if string in text}
    return Ended(asking.STOP, places[min(places)] if places else None)

  def _cancel(self, ticket: Ticket) -> None:
    if ticket.is_over:
      return
    self._drop(ticket)
    self._end(ticket, Ended(asking.CANCELLED))

  def _drop(self, ticket: Ticket) -> None:
    if ticket.of_engine is not None:
      self.engine.drop(ticket.of_engine)

  def _end(self, ticket: Ticket, event: Ended | Failed) -> None:
    """The last event, once; its row, its place in the queue and its adapter are free."""
    if ticket.is_over:
      return
    ticket.is_over = True
    now = time.monotonic()
    if ticket.of_engine is None:
      with contextlib.suppress(ValueError):
        self._waiting.remove(ticket)
    else:
      self._under_way.pop(ticket.of_engine, None)
      self._turns.end(ticket.content, now)
      self._pace += 0.1 * (now - ticket.began - self._pace)
    if ticket.version is not None:
      self.adapters.release(ticket.version)
    with self._lock:
      self._held -= 1
    self._deliver(ticket, event)

  def _deliver(self, ticket: Ticket, event: Event) -> None:
    try:
      ticket.deliver(event)
    except Exception:  # whoever listens is gone
      log.exception("an event was not taken; its request is cancelled")
      if not ticket.is_over:
        self._cancel(ticket)


def _overflow(ticket: Ticket, told: engines.Progress) -> ArithmeticError | None:
  """Why nothing of what is told is an answer: weights too large for float32 say no numbers, of which any token may be
  the likeliest."""
  each = (told.logps, None if told.prompt is None else told.prompt.logps)
  if all(logps is None or np.isfinite(logps).all() for logps in each):
    return None
  name = "the base" if ticket.asked.adapter is None else repr(ticket.asked.adapter)
  return ArithmeticError(f"the log-probabilities of {name} are no numbers: its weights overflow")


def _narrowed(top: asking.Top | None, count: int) -> asking.Top | None:
  """The first `count` of those that the engine told."""
  if top is None or not count:
    return None
  return top[0][:, :count], top[1][:, :count]
