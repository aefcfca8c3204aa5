"""A function in a file of the user's, by which `FILE.py:name` goes to a worker; what parts of a reward are called."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax import settings


@dataclasses.dataclass(frozen=True)
class Named:
  """The function `name` of the file at `path`: loaded once a process, with the modules beside the file in reach.

  A worker loads the file as it reads this, so that what the file imports is no part of a call's time.
  """

  path: str
  name: str

  def __call__(self, *arguments: Any, **named: Any) -> Any:
    function = load(self.path, self.name)
    with settings.beside(Path(self.path).parent):
      return function(*arguments, **named)

  def __reduce__(self) -> tuple[Callable[..., Named], tuple[str, str]]:
    return _loaded, (self.path, self.name)

  @property
  def __signature__(self) -> inspect.Signature:
    """What `inspect.signature` says of it: what the function takes."""
    return inspect.signature(load(self.path, self.name))

  def __str__(self) -> str:
    return f"{Path(self.path).name}:{self.name}"


@functools.cache
def load(path: str, name: str) -> Callable[..., Any]:
  """Raises ConfigError where there is no such file or function."""
  return settings.function(path, name)


def _loaded(path: str, name: str) -> Named:
  load(path, name)
  return Named(path, name)


def titles(names: Sequence[str]) -> Mapping[str, str]:
  """{name as it is written: what the part is called}, in metrics, columns and sentences.

  That is the end of a path: a file with its function, and of a reward model's folder the last two names, as the last
  one is often `adapter`.  Where two have the same end they have more of it.

  >>> titles(["number", "/home/me/mine.py:f", "work/runs/scorer/adapter"])
  {'number': 'number', '/home/me/mine.py:f': 'mine.py:f', 'work/runs/scorer/adapter': 'scorer/adapter'}
  >>> [*titles(["a/mine.py:f", "b/mine.py:f"]).values()]
  ['a/mine.py:f', 'b/mine.py:f']
  """
  whole = {name: _path(name) for name in names}
  return {name: _title(name, whole) for name in whole}


def _path(name: str) -> tuple[str, ...]:
  """The names of a path."""
  return tuple(os.path.normpath(os.path.expanduser(name)).strip("/").split("/"))


def _title(name: str, whole: Mapping[str, tuple[str, ...]]) -> str:
  own, others = whole[name], [path for other, path in whole.items() if other != name]
  for depth in range(1 if ".py:" in name else 2, len(own)):
    if all(path[-depth:] != own[-depth:] for path in others):
      return "/".join(own[-depth:])
  return "/".join(own)
