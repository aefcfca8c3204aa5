"""The process that serves: a socket, connections with bounds in time, and an end that loses no answer.

SIGTERM and Ctrl-C: no more requests; the answers under way are finished, or cut when the time for that is over; exit
code 0.  What has not ended a few seconds later, such as an adapter that is being read, is left.  A second signal ends
it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from posttrain_jax.core import ending
from posttrain_jax.serve.errors import BUSY, Refused, wrong
from posttrain_jax.serve.guard import dumps
from posttrain_jax.serve.limits import Limits

log = logging.getLogger(__name__)
AFTER = 5.0  # seconds in which the last answers are written to their sockets, and threads end


def listening(host: str, port: int) -> socket.socket:
  """A bound socket; port 0 takes a free one.

  Raises:
    OSError: the address is taken, or none of this machine's.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  made = socket.socket(family, socket.SOCK_STREAM)
  made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    made.bind((host, port))
  except OSError as error:
    made.close()
    raise OSError(
      f"cannot listen on {host}:{port}: {error.strerror}; --port=0 takes a free one"
    ) from None
  return made


def run(
  app: Any,
  worker: Any,
  sock: socket.socket,
  *,
  limits: Limits,
  drain_seconds: float,
  ready: Callable[[], None],
) -> int:
  """Serves until a signal comes; 0, or 1 where the worker has ended by itself.

  ready: called once requests are answered.
  """
  server = Server(app, worker, limits)
  asked, was_ready = 0, threading.Event()

  def receive(number: int, frame: FrameType | None) -> None:
    nonlocal asked
    asked += 1
    if asked > 1:
      ending.say("posttrain serve: ended at once; answers under way are lost")
      os._exit(128 + number)  # an exception would wait for what reads adapters, and for the worker
    server.ends.set()

  def drained() -> None:
    """The worker's end, on a thread of its own; the sockets are closed after it."""
    server.ends.wait()
    bound = threading.Timer(drain_seconds + 3 * AFTER, late)
    bound.daemon = True
    bound.start()
    worker.drain(drain_seconds)
    server.should_exit = True

  def late() -> None:
    """What waits for the disk, or computes, is waited for no longer."""
    ending.say("posttrain serve: ended by its deadline; what had not come to an end was left")
    leave(0)

  def told() -> None:
    while worker.state == "warming":
      if server.ends.wait(0.02):
        return
    if worker.state == "ready":
      was_ready.set()
      ready()

  with ending.handling(receive, signal.SIGTERM, signal.SIGINT):
    for target in (drained, told):
      threading.Thread(target=target, daemon=True).start()
    server.run(sockets=[sock])
  if not was_ready.is_set() and worker.error is None:
    leave(0)  # its thread compiles, which nothing interrupts and nobody waits for
  worker.close()
  return 0 if server.ends.is_set() else 1


def leave(code: int) -> None:
  """Ends the process without waiting for its threads."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


class Server(uvicorn.Server):
  """uvicorn's, which leaves signals to us: its own handling would end the process by the signal, and not with 0."""

  def __init__(self, app: Any, worker: Any, limits: Limits) -> None:
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    super().__init__(
      uvicorn.Config(
        app,
        http=_protocol(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.header,
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=int(AFTER),  # once it is drained
      )
    )
    self._worker = worker
    self.ends = threading.Event()

  async def serve(self, sockets: list[socket.socket] | None = None) -> None:
    await self._serve(sockets)

  async def on_tick(self, counter: int) -> bool:
    if self.ends.is_set():  # who connects now is refused by the system, not left waiting
      for server in self.servers:
        server.close()
    elif self._worker.state == "closed":
      log.error("the worker has ended, and nothing can be answered any more")
      self.should_exit = True
    return await super().on_tick(counter)


def _protocol(limits: Limits) -> type[asyncio.Protocol]:
  """HTTP/1.1 with bounds in time and number, and errors in OpenAI's shape."""

  class Bounded(H11Protocol):
    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      if len(self.connections) > limits.connections:
        self._refuse(Refused(503, "too many connections", None, BUSY, None, 1.0))
        return
      self._head = self.loop.call_later(limits.head_seconds, self._late)

    def data_received(self, data: bytes) -> None:
      super().data_received(data)
      if self.cycle is None or self.cycle.response_complete:
        if self._head is None and self.conn.their_state is h11.IDLE:
          self._head = self.loop.call_later(limits.head_seconds, self._late)
      else:
        self._unset_head()

    def connection_lost(self, exc: Exception | None) -> None:
      self._unset_head()
      self.resume_writing()
      super().connection_lost(exc)

    def pause_writing(self) -> None:
      super().pause_writing()
      if self._stalled is None:
        self._stalled = self.loop.call_later(limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
      super().resume_writing()
      if self._stalled is not None:
        self._stalled.cancel()
        self._stalled = None

    def send_400_response(self, msg: str) -> None:
      self._refuse(wrong(f"{msg} A request's line and headers have at most {limits.header} bytes."))

    def _unset_head(self) -> None:
      if self._head is not None:
        self._head.cancel()
        self._head = None

    def _late(self) -> None:
      self._head = None
      self._refuse(wrong("the request's head did not come in time", status=408))

    def _refuse(self, refused: Refused) -> None:
      """Written past h11, whose state may be that of a broken request; then the connection is closed."""
      if self.transport.is_closing():
        return
      data = dumps(refused.body)
      phrase = {400: "Bad Request", 408: "Request Timeout"}.get(refused.status, "Unavailable")
      head = (
        f"HTTP/1.1 {refused.status} {phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
      )
      self.transport.write(head.encode() + data)
      self.transport.close()

  return Bounded
