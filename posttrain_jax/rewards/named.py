"""A function in a file of the user's, by which `FILE.py:name` goes to a worker."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
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
