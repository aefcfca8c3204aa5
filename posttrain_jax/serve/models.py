"""The models that are served: the base under its name, adapters under theirs, and how each is spoken to."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain_jax.adapters import peft_format
from posttrain_jax.serve import asked
from posttrain_jax.serve.errors import Refused, unknown_model, wrong
from posttrain_jax.serve.voice import Voice

# of an adapter's folder, what decides how it is spoken to
SPOKEN = (
  "tokenizer.json",
  "tokenizer_config.json",
  "chat_template.jinja",
  "posttrain.json",
)
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
    self._voices: collections.OrderedDict[Any, Voice] = collections.OrderedDict()
    self._latest: collections.OrderedDict[Path, Voice] = collections.OrderedDict()

  def find(self, name: str) -> Model:
    """The model of that name; of an adapter that was not used before the folder is read.

    Raises:
      Refused: there is none (404), or it cannot be served (400).
    """
    if name == self.name:
      return Model(name, None, self.voice, self.length)
    adapters = self.worker.adapters
    try:
      version = adapters.acquire(name)
      bound = version.bound
      adapters.release(version)
      folder = adapters.folder(name)
    except asked.UnknownAdapter:
      raise unknown_model(name, self.names()) from None
    except asked.BadAdapter as error:
      raise self.bad(error, "model") from None
    return Model(name, name, self._voice(folder), self.length - bound)

  def load(self, name: str, path: str) -> None:
    """Registers a folder under the server's folder of adapters under a name.

    Raises:
      Refused: it leads out of there, or cannot be served; what was served under the name still is.
    """
    if name == self.name:
      raise wrong(f"{name!r} is the base's own name: an adapter needs another", "lora_name")
    root = self.worker.adapters.root
    if root is None:
      raise wrong(
        "adapters are loaded from the server's folder of them, --adapters=DIR", "lora_path"
      )
    try:
      home = (root / path).resolve()
      is_inside = all(at.resolve().is_relative_to(root) for at in (home, *home.rglob("*")))
    except (OSError, ValueError, RuntimeError):  # no name of a file, or links in a circle
      is_inside = False
    if not is_inside:
      raise wrong("lora_path leads out of the server's folder of adapters", "lora_path")
    try:
      self.worker.adapters.load(name, home)
    except (ValueError, OSError) as error:
      raise self.bad(error, "lora_path") from None

  def bad(self, error: Exception, param: str) -> Refused:
    """An adapter that cannot be served."""
    root = self.worker.adapters.root
    told = str(error) if root is None else _without(str(error), root)
    return wrong(f"cannot be served: {told}", param)

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

  def _voice(self, folder: Path) -> Voice:
    """Of the adapter's folder, made anew where a file of it that says how to speak has changed.

    An adapter whose folder is gone is still served, and spoken to as it was.
    """
    try:
      home = peft_format.locate(folder)
    except FileNotFoundError:
      if (kept := self._latest.get(folder)) is not None:
        return kept
      raise wrong("the adapter's folder is gone", "model") from None
    key = (home, *(_stamp(home / name) for name in SPOKEN))
    with self._lock:
      if key in self._voices:
        self._voices.move_to_end(key)
        self._latest[folder] = self._voices[key]
        return self._voices[key]
    try:
      voice = self._speak(home)
    except (ValueError, OSError) as error:
      told = _without(str(error), folder.parent)
      raise wrong(f"the adapter's tokenizer or template cannot be used: {told}", "model") from None
    with self._lock:
      self._voices[key] = self._latest[folder] = voice
      while len(self._voices) > KEPT:
        self._voices.popitem(last=False)
      while len(self._latest) > KEPT:
        self._latest.popitem(last=False)
    return voice


def _without(told: str, root: Path) -> str:
  """What is told of files under a root: where the server has its folders is nobody's business."""
  return told.replace(f"{root}{os.sep}", "").replace(str(root), "the folder of adapters")


def _stamp(path: Path) -> tuple[int, int] | None:
  try:
    stat = path.stat()
  except OSError:
    return None
  return stat.st_mtime_ns, stat.st_size
