"""Answers of a model behind an OpenAI-compatible address: texts, since nobody says what their tokens are."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.core import words

LARGEST = 1 << 24  # bytes of a reply
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses that may pass
STOPPED = "stop"  # why a text ends that came to an end of its own


class Unanswered(OSError):
  """The address gave no answer in all its tries; the message says why the last time."""


@dataclasses.dataclass(frozen=True)
class Text:
  """finished: whether it came to an end of its own, not to that of its room."""

  text: str
  finished: bool


@dataclasses.dataclass(frozen=True)
class Address:
  """A model behind an address.

  Args:
    url: of the API, as far as `/v1`.
    key: the environment variable that holds the API's key; "": none is sent.
    seconds: for one request.
    tries: at most; the wait between them doubles, or is what the server asks for.
    at_once: requests that are open at a time.
  """

  url: str
  model: str
  key: str = ""
  seconds: float = 300.0
  tries: int = 5
  wait: float = 1.0
  at_once: int = 8

  def __post_init__(self) -> None:
    if not self.url.startswith(("http://", "https://")):
      raise ValueError(
        f"--address={self.url}: it begins with http:// or https://, and ends with /v1"
      )
    if not self.model:
      raise ValueError("--address needs --model=NAME: what the server calls the model")
    if self.key and self.key not in os.environ:
      raise ValueError(f"--key={self.key}: the environment has no such variable")

  @property
  def said(self) -> str:
    """The address without a password, which may be in it."""
    return re.sub(r"//[^/@]*@", "//", self.url)

  def answer(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Text:
    """The next turn of a conversation; options: fields of the request, as max_tokens and temperature.

    Raises:
      Unanswered: it says that the request is wrong, or does not answer in all tries.
    """
    body = {"model": self.model, "messages": [*messages], **options}
    reason, pause = "", 0.0
    for attempt in range(self.tries):
      if attempt:
        time.sleep(pause or self.wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
      try:
        return _read(self._reply(body))
      except urllib.error.HTTPError as error:
        reason, pause = f"answered {error.code} {error.reason}", _asked_to_wait(error)
        if error.code not in AGAIN:
          said = words.shown(error.read(400).decode(errors="replace"), 200)
          raise Unanswered(f"{self.said} {reason}: {said}") from None
      except (OSError, http.client.HTTPException) as error:
        inner = error.reason if isinstance(error, urllib.error.URLError) else error
        reason, pause = f"does not answer ({inner or type(error).__name__})", 0.0
      except (ValueError, KeyError, IndexError, TypeError) as error:
        reason, pause = f"sent what is no chat completion ({type(error).__name__}: {error})", 0.0
    raise Unanswered(f"{self.said} {reason}, {words.count(self.tries, 'time')} in a row")

  def _reply(self, body: Mapping[str, Any]) -> bytes:
    headers = {"Content-Type": "application/json"}
    if self.key:
      headers["Authorization"] = f"Bearer {os.environ[self.key]}"
    request = urllib.request.Request(
      f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=self.seconds) as response:
      read = response.read(LARGEST + 1)
    if len(read) > LARGEST:
      raise ValueError(f"more than {LARGEST:,} bytes")
    return read


def _read(reply: bytes) -> Text:
  choice = json.loads(reply)["choices"][0]
  text = choice["message"]["content"]
  if not isinstance(text, str):
    raise TypeError(f"its content is {words.shown(text, 60)}")
  return Text(text, choice.get("finish_reason") == STOPPED)


def _asked_to_wait(error: urllib.error.HTTPError) -> float:
  """Seconds that the server names, at most a minute; 0 where it names none."""
  given = (error.headers or {}).get("Retry-After", "")
  return min(float(given), 60.0) if re.fullmatch(r"\d+(\.\d+)?", given or "") else 0.0
