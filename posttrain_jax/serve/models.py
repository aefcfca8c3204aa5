"""The models that are served: the base under its name, adapters under theirs, and how each is spoken to."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain_jax.serve import asked
from posttrain_jax.serve.errors import Refused, unknown_model, wrong
from posttrain_jax.serve.voice import Voice

KEPT = 64  # voices of adapters; one holds a tokenizer, some MB


@dataclasses.dataclass(frozen=True)
class Model:
  """What a request named: adapter: None for the base; room: positions of a prompt with its answer."""

  name: str
  adapter: str | None
  voice: Voice
  room: int


class Models:
  """Names and what they mean.

  name: of the base, as requests write it; others: further names of it.
  speak: the voice of an adapter by its folder.
  length: positions of a text in the worker.
  """

  def __init__(
    self,
    worker: Any,
    name: str,
    voice: Voice,
    length: int,
    speak: Callable[[Path], Voice],
    root: str = "",
  ) -> None:
    self.worker, self.name, self.voice, self.length, self.root = worker, name, voice, length, root
    self.created = int(time.time())
    self._speak = speak
    self._lock = threading.Lock()
    self._voices: collections.OrderedDict[tuple[str, str], Voice] = collections.OrderedDict()

  def find(self, name: str) -> Model:
    """The model of that name; of an adapter that was not used before the folder is read.

    Raises:
      Refused: there is none (404), or it cannot be served (400).
    """
    if name == self.name:
      return Model(name, None, self.voice, self.length)
    try:
      version = self.worker.adapters.find(name)
    except asked.UnknownAdapter:
      raise unknown_model(name, self.names()) from None
    except asked.BadAdapter as error:
      raise wrong(f"the adapter {name!r} cannot be served: {error}", "model") from None
    return Model(name, name, self._voice(version), self.length - version.bound)

  def is_at_hand(self, name: str) -> bool:
    """Whether `find` reads nothing from the disk."""
    return name == self.name or self.worker.adapters.is_at_hand(name)

  def names(self) -> list[str]:
    return [self.name, *sorted(self.worker.adapters.names())]

  def cards(self) -> list[dict[str, Any]]:
    """As /v1/models lists them: the base, then its adapters."""
    return [self.card(name) for name in self.names()]

  def card(self, name: str) -> dict[str, Any]:
    """One of `names`, as vLLM shows it."""
    is_base = name == self.name
    return dict(
      id=name,
      object="model",
      created=self.created,
      owned_by="posttrain",
      root=self.root or self.name if is_base else name,
      parent=None if is_base else self.name,
      max_model_len=self.length,
    )

  def _voice(self, version: Any) -> Voice:
    """By the adapter's content, so that one that was loaded anew is spoken to as its new files say."""
    key = (str(version.home), version.digest)
    with self._lock:
      if key in self._voices:
        self._voices.move_to_end(key)
        return self._voices[key]
    try:
      voice = self._speak(Path(version.home))
    except ValueError as error:
      raise Refused(400, f"the adapter's tokenizer or template cannot be used: {error}", "model") from None
    with self._lock:
      self._voices[key] = voice
      while len(self._voices) > KEPT:
        self._voices.popitem(last=False)
    return voice
