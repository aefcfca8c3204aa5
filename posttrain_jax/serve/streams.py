"""An answer in pieces as server-sent events, and a watch on whoever reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from posttrain_jax.serve.errors import Refused
from posttrain_jax.serve.guard import Gone, Receive, Send, dumps

DONE = b"data: [DONE]\n\n"
HEADERS = [
  (b"content-type", b"text/event-stream; charset=utf-8"),
  (b"cache-control", b"no-store"),
  (b"x-accel-buffering", b"no"),  # a proxy that collects pieces would undo the stream
]


async def attended(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
  """The work's result, as long as the client waits for it.

  Raises:
    Gone: the client went; the work is cancelled.
  """
  working = asyncio.ensure_future(work)
  watching = asyncio.ensure_future(gone(receive))
  try:
    await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    if working.done():
      return working.result()
    raise Gone
  finally:
    await ended(working)
    await ended(watching)


async def gone(receive: Receive) -> None:
  """Until the client is gone."""
  while (await receive())["type"] != "http.disconnect":
    pass


async def ended(task: asyncio.Future) -> None:
  """The task has ended, and what it ran into is nobody's business."""
  if not task.done():
    task.cancel()
  await asyncio.wait({task})
  if not task.cancelled():
    task.exception()


async def events(send: Send, pieces: AsyncIterator[Any]) -> None:
  """Sends each piece as an event as soon as it is there; an error becomes the last one.

  Where the client reads slowly `send` waits, and nobody else does: what is drawn meanwhile waits in the queue of this
  request.
  """
  await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
  try:
    async for piece in pieces:
      await _sent(send, b"data: " + dumps(piece) + b"\n\n")
  except Refused as refused:
    await _sent(send, b"data: " + dumps(refused.body) + b"\n\n")
  await _sent(send, DONE)
  await send({"type": "http.response.body", "body": b""})


async def _sent(send: Send, data: bytes) -> None:
  await send({"type": "http.response.body", "body": data, "more_body": True})
