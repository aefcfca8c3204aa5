"""Environments and tools by name: those that come with the package, and `FILE.py:name` of the user's."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax import settings
from posttrain_jax.settings import ConfigError

# name -> (module, what it has of that name, what it is for)
ENVIRONMENTS: Mapping[str, tuple[str, str, str]] = {
  "sql": ("sql", "Database", "the database of a question: its tables can be looked at and asked before the answer"),
  "python": ("python", "Python", "Python in the sandbox: a program runs, and what it prints comes back"),
}  # fmt: skip
TOOLS: Mapping[str, tuple[str, str, str]] = {
  "python": ("python", "python", "runs a program in the sandbox"),
}


def check(environment: str, tools: Sequence[str]) -> None:
  """Raises ConfigError for a name that is neither built in nor FILE.py:name, or of a file that is not there."""
  for field, name, known in (
    *(("environment", name, ENVIRONMENTS) for name in (environment,) if name),
    *(("tools", name, TOOLS) for name in tools),
  ):
    path, colon, _ = name.rpartition(":")
    if name in known:
      continue
    if not colon or not path.endswith(".py"):
      raise ConfigError(
        f"online.{field}: there is no {name!r}; built in are {', '.join(known)}, or one of yours as FILE.py:name"
      )
    if not Path(path).expanduser().is_file():
      raise ConfigError(f"online.{field}: {path} is not there")


def digest(environment: str, tools: Sequence[str]) -> str:
  """Of the files that are named: other code is another environment."""
  paths = sorted({name.rpartition(":")[0] for name in (environment, *tools)})
  texts = [Path(path).expanduser().read_bytes() for path in paths if path.endswith(".py")]
  return hashlib.blake2b(b"\0".join(texts), digest_size=8).hexdigest() if texts else ""


def factory(name: str, options: Mapping[str, Any]) -> Callable[[], Any]:
  """What makes the environment of a name."""
  if name in ENVIRONMENTS:
    made = _built_in(ENVIRONMENTS[name])
    return lambda: made(**_of(made, options))
  return _own(name)


def tool(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
  if name in TOOLS:
    made = _built_in(TOOLS[name])
    return made(**_of(made, options))
  return _own(name)


def _built_in(entry: tuple[str, str, str]) -> Callable[..., Any]:
  module, attribute, _ = entry
  return getattr(importlib.import_module(f"posttrain_jax.environments.{module}"), attribute)


def _of(made: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
  import inspect

  return {k: v for k, v in options.items() if k in inspect.signature(made).parameters}


def _own(name: str) -> Callable[..., Any]:
  path, _, attribute = name.rpartition(":")
  return settings.function(path, attribute)
