"""An engine at an address: vLLM, SGLang, or `posttrain serve`, asked over OpenAI's wire in token ids.

A prompt goes as its ids and an answer comes as its ids with the log-probability of each (`return_token_ids`): nothing
is decoded and read again.  What may pass (no connection, 408, 429, 5xx, a reply that cannot be read) is asked again
until `patience` is over; a server that was started anew and knows an adapter no more is given it again.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from posttrain_jax.core import words
from posttrain_jax.rollout.requests import FULL, STOPPED, Answer, Request

LARGEST = 1 << 26  # bytes of a reply
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses that may pass
UNREAD = 4  # replies to one question that cannot be read, after which it is no use to ask again
SLOWEST = 30.0  # seconds between two tries, at most
SEEDS = 2**31


class Refused(ConnectionError):
  """The address does not answer, or not with what was asked."""


class _Unread(ValueError):
  """A reply that is none to the question."""


@dataclasses.dataclass(frozen=True)
class Address:
  """A server of one base with adapters by name.

  url: of the API, as far as `/v1`.
  key: the environment variable that holds the API's key; "": none is sent.
  patience: seconds for which one question is asked again, with what may pass.
  seconds: for one reply.
  stopping: asked between tries; once it says so, nobody waits for a reply.
  """

  url: str
  key: str = ""
  patience: float = 300.0
  seconds: float = 600.0
  wait: float = 0.5
  stopping: Callable[[], bool] = lambda: False

  def __post_init__(self) -> None:
    if not self.url.startswith(("http://", "https://")):
      raise ValueError(f"{words.shown(self.url)} is no address: it begins with http:// or https://")
    if self.key and self.key not in os.environ:
      raise ValueError(f"the environment has no {self.key}, which holds the key of {self.name}")

  @property
  def name(self) -> str:
    """What is said of the url: a password in it is for nobody."""
    return re.sub(r"//[^/@]*@", "//", self.url)

  def models(self) -> list[str]:
    """The names that it knows; the base is the first."""
    given = self._asked("/models", None, lambda said: [str(one["id"]) for one in said["data"]])
    if not given:
      raise Refused(f"the engine at {self.name} has no model")
    return given

  def load(self, name: str, folder: str) -> None:
    """Gives it the adapter of a folder, which it reads itself, under a name."""
    body = {"lora_name": name, "lora_path": folder}
    self._asked("/load_lora_adapter", body, lambda _: None, is_text=True)

  def unload(self, name: str) -> None:
    """Takes a name from it; one that it does not know is none the less gone."""
    try:
      self._asked("/unload_lora_adapter", {"lora_name": name}, lambda _: None, is_text=True)
    except Unknown:
      return

  def answer(self, request: Request, model: str, again: Callable[[], None]) -> Answer:
    """The answer to a request by a model of that name.

    again: called where the server does not know the model any more; it gives it the adapter again.
    """
    body = asked(request, model)
    read = lambda said: answered(request, said)
    try:
      return self._asked("/completions", body, read)
    except Unknown:
      again()
      return self._asked("/completions", body, read)

  def _asked(
    self,
    path: str,
    body: Mapping[str, Any] | None,
    read: Callable[[Any], Any],
    *,
    is_text: bool = False,
  ) -> Any:
    """What `read` makes of the reply.

    Raises:
      Unknown: it knows no such model.
      Refused: it refuses the question, or no reply was one until the patience was over.
    """
    began, tries, unread, why = time.monotonic(), 0, 0, ""
    while True:
      pause = min(SLOWEST, self.wait * 2 ** min(tries, 10)) * random.uniform(0.75, 1.25)
      try:
        text = self._reply(path, body)
        return read(None if is_text else json.loads(text))
      except urllib.error.HTTPError as error:
        said = _said(error)
        if error.code == 404 and body is not None:
          raise Unknown(f"the engine at {self.name} answered 404: {said}") from None
        why = f"answered {error.code}: {said}"
        if error.code not in AGAIN:
          raise Refused(f"the engine at {self.name} {why}{_hint(error.code, path)}") from None
        pause = _retry_after(error) or pause
      except (OSError, http.client.HTTPException) as error:
        why = f"does not answer: {_why(error)}"
      except (ValueError, KeyError, IndexError, TypeError) as error:
        unread += 1
        why = f"sent what is no answer to {path}: {error if isinstance(error, _Unread) else _kind(error)}"
        if unread >= UNREAD:
          raise Refused(f"the engine at {self.name} {why}, {UNREAD} times") from None
      tries += 1
      if time.monotonic() + pause - began > self.patience:
        raise Refused(
          f"the engine at {self.name} {why}, for {self.patience:g} s (online.engine_patience). With the engine mended,"
          " run the same command again: what is written is kept"
        )
      self._sleep(pause)

  def _sleep(self, seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
      if self.stopping():
        raise Refused("nobody waits for it any more")
      time.sleep(min(left, 0.2))

  def _reply(self, path: str, body: Mapping[str, Any] | None) -> str:
    headers = {"Content-Type": "application/json"}
    if self.key:
      headers["Authorization"] = f"Bearer {os.environ[self.key]}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{self.url.rstrip('/')}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=self.seconds) as response:
      text = response.read(LARGEST + 1)
    if len(text) > LARGEST:
      raise _Unread(f"more than {LARGEST:,} bytes")
    return text.decode("utf-8", "replace")


class Unknown(Refused):
  """The server knows no model of that name."""


def asked(request: Request, model: str) -> dict[str, Any]:
  """The body of a request: what a server would fill in by a file of its own is said, too."""
  return {
    "model": model,
    "prompt": [int(token) for token in request.prompt],
    "max_tokens": int(request.max_new_tokens),
    "min_tokens": int(request.min_new_tokens),
    "temperature": float(request.sampling.temperature),
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": seed(request),
    "n": 1,
    "stop_token_ids": [int(token) for token in request.stop_tokens],
    "logprobs": 0,
    "return_token_ids": True,
  }


def seed(request: Request) -> int:
  """One for each of (seed, number, sample): what a server draws by."""
  mixed = np.random.SeedSequence([request.seed, request.number, request.sample])
  return int(mixed.generate_state(1, np.uint32)[0]) % SEEDS


def answered(request: Request, said: Any) -> Answer:
  """The answer that a reply holds.

  Raises:
    ValueError, KeyError, TypeError, IndexError: it holds none.
  """
  (choice,) = said["choices"]
  tokens = choice.get("token_ids")
  if tokens is None:
    raise _Unread(
      "it has no token_ids, without which a text would have to be read again; is it a server that honours"
      " return_token_ids (vLLM 0.10.2 and later, posttrain serve)?"
    )
  logps = choice["logprobs"]["token_logprobs"]
  if not tokens or len(tokens) != len(logps):
    raise _Unread(f"{len(tokens)} token ids with {len(logps)} log-probabilities")
  if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
    raise _Unread(f"token_ids are {words.shown(tokens, 60)}")
  if len(tokens) > request.max_new_tokens:
    raise _Unread(f"{len(tokens)} tokens, where {request.max_new_tokens} were asked")
  values = np.asarray(logps, np.float32)
  if values.shape != (len(tokens),) or not np.isfinite(values).all() or (values > 1e-3).any():
    raise _Unread("its log-probabilities are no numbers up to 0")
  reason = choice["finish_reason"]
  if reason not in ("stop", "length"):
    raise _Unread(f"finish_reason is {words.shown(reason, 40)}")
  is_stopped = tokens[-1] in request.stop_tokens
  if reason == "stop" and not is_stopped:
    raise _Unread("it leaves out the token that ended the answer, of which is to be learned, too")
  return Answer(request, [*tokens], values, STOPPED if is_stopped else FULL)


def _said(error: urllib.error.HTTPError) -> str:
  """What a server says of an error, in a line."""
  try:
    text = error.read(4096).decode("utf-8", "replace")
  except (OSError, http.client.HTTPException):
    return str(error.reason)
  try:
    inner = json.loads(text)
    found = inner.get("error", inner)
    text = found.get("message", text) if isinstance(found, Mapping) else str(found)
  except (ValueError, AttributeError):
    pass
  return words.shown(" ".join(str(text).split()), 200) if text.strip() else str(error.reason)


def _hint(code: int, path: str) -> str:
  if code in (401, 403) and "lora" not in path:
    return "; online.engine_key names the environment variable that holds its key"
  if "lora" in path:
    return (
      "; adapters are given to a server while it runs: vLLM wants --enable-lora and"
      " VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, posttrain serve --allow_loading"
    )
  return ""


def _retry_after(error: urllib.error.HTTPError) -> float | None:
  """Seconds that a server asks to be left alone; None where it does not say."""
  try:
    return min(max(float(error.headers.get("Retry-After", "")), 0.05), SLOWEST)
  except ValueError:
    return None


def _why(error: BaseException) -> str:
  inner = error.reason if isinstance(error, urllib.error.URLError) else error
  if isinstance(inner, OSError) and inner.strerror:
    return inner.strerror
  return f"{type(inner).__name__}: {inner}"


def _kind(error: BaseException) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


class Once:
  """Does a thing once for all threads that ask for it of the same state."""

  def __init__(self, does: Callable[[], None]) -> None:
    self._does, self._lock, self._done = does, threading.Lock(), 0

  def of(self, seen: int) -> None:
    """Does it, unless it was done since `seen`."""
    with self._lock:
      if self._done == seen:
        self._does()
        self._done += 1

  @property
  def done(self) -> int:
    return self._done
