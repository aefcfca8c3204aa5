"""An API behind an address that is asked in JSON until it answers: engines, teachers and judges are asked by this.

What may pass (no connection, 408, 409, 425, 429, 5xx, a reply that cannot be read) is asked again as long as a patience
says; a wait that the server asks for (`Retry-After`) is kept.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import math
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from posttrain_jax.core import words

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses that may pass
SLOWEST = 60.0  # seconds between two tries, at most
LOOKS = 0.2  # seconds after which whoever waits looks whether it goes on
# why nobody asks again
REFUSED, UNREAD, SPENT, LATE, STOPPED = "refused", "unread", "spent", "late", "stopped"
# what `read` may raise where a reply is none: it may hold anything, of any kind and nested as deeply as it likes
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
Read = TypeVar("Read")


class Failed(OSError):
  """The address gave no answer.

  why: what it did the last time, as `answered 503 Service Unavailable: 'busy'`.
  status: of that reply; None where there was none, or none that can be read.
  ended: why nobody asks again.
  """

  def __init__(self, why: str, ended: str, status: int | None = None) -> None:
    super().__init__(why)
    self.why, self.ended, self.status = why, ended, status


class Unread(ValueError):
  """A reply that is none to the question; it says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Patience:
  """How long one question is asked again.

  tries: at most.  seconds: after which no new one begins; with `cuts` they end a reply under way, too.
  unread: replies that cannot be read, after which it is no use to ask again.
  wait: seconds between the first two tries; it doubles.
  stopping: asked between tries; once it says so, nobody waits for a reply.
  """

  tries: float = math.inf
  seconds: float = math.inf
  cuts: bool = False
  unread: float = math.inf
  wait: float = 1.0
  stopping: Callable[[], bool] | None = None

  def pause(self, tries: int) -> float:
    """Seconds after so many tries, drawn so that callers do not come all at once."""
    return min(SLOWEST, self.wait * 2 ** min(tries - 1, 10)) * random.uniform(0.75, 1.25)

  def sleep(self, seconds: float, why: str) -> None:
    """Raises Failed once it is to stop."""
    if self.stopping is None:
      time.sleep(seconds)
      return
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
      if self.stopping():
        raise Failed(why, STOPPED)
      time.sleep(min(left, LOOKS))


@dataclasses.dataclass(frozen=True)
class Api:
  """An API at a url, as far as `/v1`; a user with a password may stand in it.

  key: the environment variable that holds its key; "": none is sent.
  seconds: for one reply, from the question to its last byte.
  largest: bytes of a reply.
  """

  url: str
  key: str = ""
  seconds: float = 300.0
  largest: int = 1 << 26

  def __post_init__(self) -> None:
    if not self.url.startswith(("http://", "https://")):
      raise ValueError(
        f"{words.shown(self.url)} is no address: it begins with http:// or https://, and ends with /v1"
      )
    if self.key and self.key not in os.environ:
      raise ValueError(
        f"the environment has no {self.key}, which is to hold the key of {self.name}"
      )

  @property
  def name(self) -> str:
    """What is said of the url: a password in it is for nobody."""
    return re.sub(r"//[^/@]*@", "//", self.url)

  def asked(
    self,
    path: str,
    body: Mapping[str, Any] | None,
    read: Callable[[bytes], Read],
    patience: Patience,
    what: str,
  ) -> Read:
    """What `read` makes of the reply to a POST, without a body to a GET.

    read: it raises one of UNREADABLE where the reply is none.
    what: a reply is to be, as `chat completion`.

    Raises:
      Failed: the question is refused, or the patience is over.
    """
    began, tries, unread = time.monotonic(), 0, 0
    ends = began + patience.seconds
    while True:
      tries, pause, status = tries + 1, patience.pause(tries + 1), None
      try:
        return read(self._reply(path, body, ends if patience.cuts else math.inf))
      except urllib.error.HTTPError as error:
        status, why = error.code, f"answered {error.code} {error.reason}{_said(error)}"
        pause = _asked_to_wait(error) or pause
        if status not in AGAIN:
          raise Failed(why, REFUSED, status) from None
      except (OSError, http.client.HTTPException) as error:
        why = f"does not answer: {_why(error)}"
        if patience.cuts and time.monotonic() >= ends:
          raise Failed(why, LATE) from None
      except UNREADABLE as error:
        unread += 1
        why = f"sent what is no {what}: {error if isinstance(error, Unread) else _kind(error)}"
        if unread >= patience.unread:
          raise Failed(why, UNREAD) from None
      if tries >= patience.tries or time.monotonic() + pause > ends:
        raise Failed(why, SPENT, status)
      patience.sleep(pause, why)

  def _reply(self, path: str, body: Mapping[str, Any] | None, ends: float) -> bytes:
    """The whole reply; a server may send it in drops, of which a socket's own time-out counts each anew."""
    headers = {"Content-Type": "application/json"}
    if self.key:
      headers["Authorization"] = f"Bearer {os.environ[self.key]}"
    elif found := re.match(r"https?://([^/@]*)@", self.url):
      pair = urllib.parse.unquote(found[1]).encode()
      headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{self.name.rstrip('/')}{path}", data, headers)
    ends = min(ends, time.monotonic() + self.seconds)
    with urllib.request.urlopen(request, timeout=_left(ends)) as response:
      read = b""
      while some := response.read1(1 << 16):
        read += some
        if len(read) > self.largest:
          raise Unread(f"more than {self.largest:,} bytes")
        _left(ends)
      told = response.headers.get("Content-Length", "")
    if told.isdigit() and len(read) < int(told):
      raise http.client.IncompleteRead(read, int(told) - len(read))
    return read


def completion(reply: bytes) -> tuple[str, str]:
  """(text, why it ended) of a chat completion.

  Raises:
    One of UNREADABLE: it is none.
  """
  choice = json.loads(reply)["choices"][0]
  text = choice["message"]["content"]
  if not isinstance(text, str):
    raise Unread(f"its content is {words.shown(text, 60)}")
  return words.whole(text), str(choice.get("finish_reason"))


def _left(ends: float) -> float:
  left = ends - time.monotonic()
  if left <= 0:
    raise TimeoutError("timed out")
  return left


def _said(error: urllib.error.HTTPError) -> str:
  """What the server says of an error, behind a colon; "" where it says nothing."""
  text = ""
  with contextlib.suppress(OSError, http.client.HTTPException):
    text = error.read(4096).decode("utf-8", "replace")
  with contextlib.suppress(*UNREADABLE):
    inner = json.loads(text)
    found = inner.get("error", inner)
    text = str(found.get("message", text) if isinstance(found, Mapping) else found)
  text = " ".join(text.split())
  return f": {words.shown(text, 200)}" if text else ""


def _asked_to_wait(error: urllib.error.HTTPError) -> float:
  """Seconds that the server names; 0 where it names none."""
  given = error.headers.get("Retry-After", "") if error.headers else ""
  return min(float(given), SLOWEST) if re.fullmatch(r"\d+(\.\d+)?", given) else 0.0


def _why(error: BaseException) -> str:
  """What the system says of a connection, in its own words."""
  inner = error.reason if isinstance(error, urllib.error.URLError) else error
  if isinstance(inner, OSError) and inner.strerror:
    return inner.strerror
  return f"{type(inner).__name__}: {inner}" if isinstance(inner, BaseException) else str(inner)


def _kind(error: BaseException) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
