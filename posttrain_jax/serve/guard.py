"""What stands between the network and the application: who may ask, how much is read, what leaves when something fails.

Browsers: a page of a stranger's may send requests to this machine's loopback.  A body is read where its type is JSON
alone, which such a page cannot set without asking first, and nobody answers that question; and on loopback only
requests whose Host is this machine are answered, so that a name that was made to point here opens nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from posttrain_jax.core import words
from posttrain_jax.serve.errors import AUTHENTICATION, MISSING, Refused, failed, wrong
from posttrain_jax.serve.limits import Limits
from posttrain_jax.serve.metrics import Metrics

log = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/health",)  # answered without a key: whoever watches over the process has none
LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")


class Guard:
  """An ASGI application around another.

  keys: any of them opens; () for none.
  local: whether the server listens on loopback alone.
  """

  def __init__(
    self, app: Any, *, keys: tuple[str, ...], local: bool, limits: Limits, metrics: Metrics
  ) -> None:
    self._app, self._local, self._limits, self._metrics = app, local, limits, metrics
    self._keys = tuple(key.encode() for key in keys)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      if scope["type"] == "lifespan":
        await self._app(scope, receive, send)
      return
    started = False

    async def watched(message: MutableMapping[str, Any]) -> None:
      nonlocal started
      started = started or message["type"] == "http.response.start"
      await send(message)

    try:
      self._check(scope)
      scope["app"] = self._app  # by which Starlette's router raises what it has no route for
      await self._app(scope, receive, watched)
    except HTTPException as error:
      await self.answer(_no_route(scope, error), send)
    except Refused as refused:
      if not started:
        if refused.status == 413 and b"expect" not in dict(scope["headers"]):
          await _dropped(receive, self._limits.unread_seconds)
        await self.answer(refused, send)
    except Gone:
      pass
    except Exception:
      log.exception("a request failed: %s %s", scope["method"], scope["path"][:200])
      if started:
        raise  # the connection is closed, so that nobody takes a part for the whole
      await self.answer(failed(), send)

  async def answer(self, refused: Refused, send: Send) -> None:
    self._metrics.refuse(refused.status)
    await respond(send, refused.status, refused.body, refused.headers)

  def _check(self, scope: Scope) -> None:
    headers = dict(scope["headers"])
    if self._local and not is_local(headers.get(b"host", b"localhost").decode("latin-1")):
      raise Refused(403, "this server answers under the names of this machine alone", code="host")
    if self._keys and scope["path"] not in OPEN:
      self._check_key(headers.get(b"authorization", b""))
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length[:20]) > self._limits.body:
      raise too_large(self._limits)
    if scope["method"] == "POST":
      kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
      if kind != b"application/json":
        raise wrong("write the header content-type: application/json", status=415)
      if headers.get(b"content-encoding", b"identity") != b"identity":
        raise wrong("the body is compressed, which is not read", status=415)

  def _check_key(self, header: bytes) -> None:
    kind, _, given = header.partition(b" ")
    given = given.strip()
    # every key is compared, each in a time that does not depend on how much of it is right
    same = [hmac.compare_digest(given, key) for key in self._keys]
    if kind.lower() != b"bearer" or not any(same):
      what = (
        "is not one of this server's" if given else "is missing: write Authorization: Bearer KEY"
      )
      raise Refused(401, f"the key {what}", None, AUTHENTICATION, "invalid_api_key")


async def _dropped(receive: Receive, seconds: float) -> None:
  """Takes the rest of a body and keeps none: a connection closed amid it is all that its sender would hear."""
  with contextlib.suppress(TimeoutError):
    async with asyncio.timeout(seconds):
      message = await receive()
      while message["type"] == "http.request" and message.get("more_body", False):
        message = await receive()


def _no_route(scope: Scope, error: HTTPException) -> Refused:
  path = words.cut(scope["path"], 200)
  if error.status_code == 405:
    return wrong(f"{path} takes {(error.headers or {}).get('Allow', 'another method')}", status=405)
  return Refused(404, f"{path} is no route of this server", None, MISSING)


def too_large(limits: Limits) -> Refused:
  return wrong(f"the body has more than {limits.body:,} bytes", status=413)


def is_local(host: str) -> bool:
  """Whether a Host header names this machine: a loopback address, or localhost.

  >>> is_local("localhost:8000"), is_local("[::1]:80"), is_local("127.0.0.9"), is_local("evil.example:8000")
  (True, True, True, False)
  """
  name = (
    host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdigit() and host.count(":") != 7 else host
  )
  name = name.strip().rstrip(".").lower()
  if name in LOCAL or name.endswith(".localhost"):
    return True
  try:
    return ipaddress.ip_address(name.strip("[]")).is_loopback
  except ValueError:
    return False


async def body(receive: Receive, limits: Limits) -> bytes:
  """A request's whole body.

  Raises:
    Refused: it is too large, or does not come.
  """
  parts, size = [], 0
  try:
    async with asyncio.timeout(limits.body_seconds):
      while True:
        message = await receive()
        if message["type"] == "http.disconnect":
          raise Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limits.body:
          raise too_large(limits)
        if not message.get("more_body", False):
          return b"".join(parts)
  except TimeoutError:
    raise wrong(
      f"the body did not come within {limits.body_seconds:g} seconds", status=408
    ) from None


class Gone(Exception):
  """The client has closed its connection: there is nobody to answer."""


async def respond(
  send: Send, status: int, value: Any, headers: dict[str, str] | None = None
) -> None:
  """A whole answer in JSON, or in text where the value is one; bytes are JSON that was written already."""
  is_text = isinstance(value, str)
  data = value.encode() if is_text else value if isinstance(value, bytes) else dumps(value)
  kind = "text/plain; version=0.0.4; charset=utf-8" if is_text else "application/json"
  told = {
    "content-type": kind,
    "content-length": str(len(data)),
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    **(headers or {}),
  }
  if status in (408, 413):
    told["connection"] = "close"  # the rest of what was sent is not read
  encoded = [(name.encode(), text.encode()) for name, text in told.items()]
  await send({"type": "http.response.start", "status": status, "headers": encoded})
  await send({"type": "http.response.body", "body": data})


def dumps(value: Any) -> bytes:
  return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
