"""An engine at an address: vLLM, SGLang, or `posttrain serve`, asked over OpenAI's wire in token ids.

A prompt goes as its ids and an answer comes as its ids with the log-probability of each (`return_token_ids`): nothing
is decoded and read again.  What may pass (no connection, 408, 429, 5xx, a reply that cannot be read) is asked again
until `patience` is over; a server that was started anew and knows an adapter no more is given it again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from posttrain_jax.core import api, words
from posttrain_jax.core.api import Api, Failed, Patience, Unread
from posttrain_jax.rollout.requests import FULL, STOPPED, Answer, Request

UNREAD = 4  # replies to one question that cannot be read, after which it is no use to ask again
SEEDS = 2**31
MODELS = "/models"
Read = TypeVar("Read")


class Refused(ConnectionError):
  """The address does not answer, or not with what was asked."""


@dataclasses.dataclass(frozen=True)
class Address:
  """A server of one base with adapters by name.

  url: of the API, as far as `/v1`.
  vocab: tokens that the model has; an id beyond is of another one.
  key: the environment variable that holds the API's key; "": none is sent.
  patience: seconds for which one question is asked again, with what may pass.
  seconds: for one reply.
  stopping: asked between tries; once it says so, nobody waits for a reply.
  """

  url: str
  vocab: int
  key: str = ""
  patience: float = 300.0
  seconds: float = 600.0
  wait: float = 0.5
  stopping: Callable[[], bool] = lambda: False

  def __post_init__(self) -> None:
    _ = self.api  # raises ValueError where it is no address

  @functools.cached_property
  def api(self) -> Api:
    return Api(self.url, self.key, self.seconds)

  @property
  def name(self) -> str:
    return self.api.name

  def models(self) -> list[str]:
    """The names that it knows; the base is the first."""
    given = self._asked(
      MODELS, None, lambda said: [str(one["id"]) for one in json.loads(said)["data"]]
    )
    if not given:
      raise Refused(f"the engine at {self.name} has no model")
    return given

  def load(self, name: str, folder: str) -> None:
    """Gives it the adapter of a folder, which it reads itself, under a name."""
    body = {"lora_name": name, "lora_path": folder}
    self._asked("/load_lora_adapter", body, lambda _: None)

  def unload(self, name: str) -> None:
    """Takes a name from it; one that it does not know is none the less gone."""
    try:
      self._asked("/unload_lora_adapter", {"lora_name": name}, lambda _: None)
    except Unknown:
      return

  def answer(self, request: Request, model: str, again: Callable[[], None]) -> Answer:
    """The answer to a request by a model of that name.

    again: called where the server does not know the model any more; it gives it the adapter again.
    """
    body = asked(request, model)
    read = lambda said: answered(request, json.loads(said), self.vocab)
    try:
      return self._asked("/completions", body, read)
    except Unknown:
      again()
      return self._asked("/completions", body, read)

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
    if error.status == 404 and path != MODELS:
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
    # these end it, and no other that the server knows as its model's
    "ignore_eos": True,
    "stop_token_ids": [int(token) for token in request.stop_tokens],
    "logprobs": 0,
    "return_token_ids": True,
  }


def seed(request: Request) -> int:
  """One for each of (seed, number, sample): what a server draws by."""
  mixed = np.random.SeedSequence([request.seed, request.number, request.sample])
  return int(mixed.generate_state(1, np.uint32)[0]) % SEEDS


def answered(request: Request, said: Any, vocab: int) -> Answer:
  """The answer that a reply holds.

  Raises:
    One of api.UNREADABLE: it holds none.
  """
  (choice,) = said["choices"]
  tokens = choice.get("token_ids")
  if tokens is None:
    raise Unread(
      "it has no token_ids, without which a text would have to be read again; is it a server that honours"
      " return_token_ids (vLLM 0.10.2 and later, posttrain serve)?"
    )
  logps = choice["logprobs"]["token_logprobs"]
  if not tokens or len(tokens) != len(logps):
    raise Unread(f"{len(tokens)} token ids with {len(logps)} log-probabilities")
  if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
    raise Unread(f"token_ids are {words.shown(tokens, 60)}")
  if beyond := [token for token in tokens if not 0 <= token < vocab]:
    raise Unread(
      f"token {beyond[0]} is none of the {vocab:,} of this run's model; does it serve another one?"
    )
  if len(tokens) > request.max_new_tokens:
    raise Unread(f"{len(tokens)} tokens, where {request.max_new_tokens} were asked")
  values = np.asarray(logps, np.float32)
  if values.shape != (len(tokens),) or not np.isfinite(values).all() or (values > 1e-3).any():
    raise Unread("its log-probabilities are no numbers up to 0")
  reason = choice["finish_reason"]
  if reason not in ("stop", "length"):
    raise Unread(f"finish_reason is {words.shown(reason, 40)}")
  is_stopped = tokens[-1] in request.stop_tokens
  if reason == "stop" and not is_stopped:
    raise Unread("it leaves out the token that ended the answer, of which is to be learned, too")
  return Answer(request, [*tokens], values, STOPPED if is_stopped else FULL)


def _hint(code: int | None, path: str) -> str:
  if code in (401, 403) and "lora" not in path:
    return "; online.engine_key names the environment variable that holds its key"
  if "lora" in path:
    return (
      "; adapters are given to a server while it runs: vLLM wants --enable-lora and"
      " VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, posttrain serve --allow_loading"
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
