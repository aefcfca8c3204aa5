"""An engine at an address: vLLM, SGLang, or `posttrain serve`, asked in token ids as its wire has it (`rollout.wires`).

Nothing is decoded and read again.  What may pass (no connection, 408, 429, 5xx, a reply that cannot be read) is asked
again until `patience` is over; a server that was started anew and knows an adapter no more is given it again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from posttrain_jax.core import api
from posttrain_jax.core.api import Api, Failed, Patience
from posttrain_jax.rollout import wires
from posttrain_jax.rollout.requests import Answer, Request
from posttrain_jax.rollout.wires import Wire

UNREAD = 4  # replies to one question that cannot be read, after which it is no use to ask again
Read = TypeVar("Read")


class Refused(ConnectionError):
  """The address does not answer, or not with what was asked."""


@dataclasses.dataclass(frozen=True)
class Address:
  """A server of one base with adapters by name.

  url: of the API, as far as `/v1`.
  vocab: tokens that the model has; an id beyond is of another one.
  wire: how it is asked.
  key: the environment variable that holds the API's key; "": none is sent.
  patience: seconds for which one question is asked again, with what may pass.
  seconds: for one reply.
  stopping: asked between tries; once it says so, nobody waits for a reply.
  """

  url: str
  vocab: int
  wire: Wire = wires.OPENAI
  key: str = ""
  patience: float = 300.0
  seconds: float = 600.0
  wait: float = 0.5
  stopping: Callable[[], bool] = lambda: False

  def __post_init__(self) -> None:
    _ = self.api  # raises ValueError where it is no address

  @functools.cached_property
  def api(self) -> Api:
    url = self.url.rstrip("/").removesuffix("/v1") if self.wire.above else self.url
    return Api(url, self.key, self.seconds)

  @property
  def name(self) -> str:
    return self.api.name

  def models(self) -> list[str]:
    """The names that it knows; the base is the first."""
    given = self._asked(
      self.wire.models, None, lambda said: [str(one["id"]) for one in json.loads(said)["data"]]
    )
    if not given:
      raise Refused(f"the engine at {self.name} has no model")
    return given

  def load(self, name: str, folder: str) -> None:
    """Gives it the adapter of a folder, which it reads itself, under a name."""
    body = {"lora_name": name, "lora_path": folder}
    self._asked(self.wire.load, body, lambda _: None)

  def unload(self, name: str) -> None:
    """Takes a name from it; one that it does not know is none the less gone."""
    try:
      self._asked(self.wire.unload, {"lora_name": name}, lambda _: None)
    except Unknown:
      return

  def answer(self, request: Request, model: str, again: Callable[[], None]) -> Answer:
    """The answer to a request by a model of that name.

    again: called where the server does not know the model any more; it gives it the adapter again.
    """
    wire = self.wire
    body = wire.asked(request, model)
    read = lambda said: wires.answered(request, wire.told(json.loads(said)), self.vocab)
    try:
      return self._asked(wire.answer, body, read)
    except Unknown:
      again()
      return self._asked(wire.answer, body, read)

  def _asked(
    self, path: str, body: Mapping[str, Any] | None, read: Callable[[bytes], Read]
  ) -> Read:
    """What `read` makes of the reply.

    Raises:
      Unknown: it knows no such model.
      Refused: it refuses the question, or no reply was one until the patience was over.
    """
    patience = Patience(
      seconds=self.patience, unread=UNREAD, wait=self.wait, stopping=self.stopping
    )
    try:
      return self.api.asked(path, body, read, patience, f"answer to {path}")
    except Failed as error:
      raise self._refused(error, path) from None

  def _refused(self, error: Failed, path: str) -> Refused:
    said = f"the engine at {self.name} {error.why}"
    if error.ended == api.STOPPED:
      return Refused(f"{said}; nobody waits for it any more")
    names_one = path in (self.wire.answer, self.wire.unload)
    if names_one and self.wire.is_unknown(error.status, error.why):
      return Unknown(said)
    if error.ended == api.REFUSED:
      return Refused(f"{said}{_hint(error.status, path)}")
    if error.ended == api.UNREAD:
      return Refused(f"{said}, {UNREAD} times")
    return Refused(
      f"{said}, for {self.patience:g} s (online.engine_patience). With the engine mended, run the same command again:"
      " what is written is kept"
    )


class Unknown(Refused):
  """The server knows no model of that name."""


def _hint(code: int | None, path: str) -> str:
  if code in (401, 403) and "lora" not in path:
    return "; online.engine_key names the environment variable that holds its key"
  if "lora" in path:
    return (
      "; adapters are given to a server while it runs: vLLM wants --enable-lora and"
      " VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, SGLang --enable-lora, posttrain serve --allow_loading"
    )
  return ""


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
