"""Answers of a model behind an OpenAI-compatible address: texts, since nobody says what their tokens are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.core import api, words
from posttrain_jax.core.api import Api, Patience

LARGEST = 1 << 24  # bytes of a reply
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
    if not self.model:
      raise ValueError("--address needs --model=NAME: what the server calls the model")
    try:
      _ = self.api
    except ValueError as error:
      raise ValueError(f"--address: {error}") from None

  @functools.cached_property
  def api(self) -> Api:
    return Api(self.url, self.key, self.seconds, LARGEST)

  def answer(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Text:
    """The next turn of a conversation; options: fields of the request, as max_tokens and temperature.

    Raises:
      Unanswered: it says that the request is wrong, or does not answer in all tries.
    """
    body = {"model": self.model, "messages": [*messages], **options}
    patience = Patience(tries=self.tries, wait=self.wait)
    try:
      return self.api.asked("/chat/completions", body, _read, patience, "chat completion")
    except api.Failed as error:
      each = "" if error.ended == api.REFUSED else f", {words.count(self.tries, 'time')} in a row"
      raise Unanswered(f"{self.api.name} {error.why}{each}") from None


def _read(reply: bytes) -> Text:
  text, why = api.completion(reply)
  return Text(text, why == STOPPED)
