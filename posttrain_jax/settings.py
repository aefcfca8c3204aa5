"""A run's configuration: a config file, its arguments and overrides, resolved to one dict that is the run."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import re
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections


class ConfigError(ValueError):
  """The user's mistake in a config file, its arguments or an override."""


@contextlib.contextmanager
def section(name: str) -> Generator[None]:
  """What a library says is wrong with its arguments is said of the config's section that they come from."""
  try:
    yield
  except ConfigError:
    raise
  except ValueError as error:
    begins_with_field = re.match(r"[a-z]\w*[=:]", str(error))
    raise ConfigError(f"{name}{'.' if begins_with_field else ': '}{error}") from error


def load(config: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """The ConfigDict of `FILE[:argument,...]` with `--config.field=value` overrides applied; locked.

  A value takes the type of the field; an empty dict takes any key (`--config.data.columns.prompt=question`).

  Raises:
    ConfigError: no such file, an unknown argument, an unknown key (the message lists the valid ones), a wrong type.
  """
  path, _, arguments = config.partition(":")
  try:
    resolved = module(path).get_config(arguments or None)
  except ValueError as error:
    raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
  opened = {field for field, value in flat(plain(resolved)).items() if value == {}}
  for text in overrides:
    name, equals, value = text.removeprefix("--").removeprefix("config.").partition("=")
    if not equals:
      raise ConfigError(f"{text!r}: write --config.{name}=value")
    _set(resolved, name, value, opened)
  return resolved.lock()


def _set(config: ml_collections.ConfigDict, name: str, text: str, opened: set[str]) -> None:
  *parents, last = name.split(".")
  node = config
  for part in parents:
    node = node.get(part) if isinstance(node, ml_collections.ConfigDict) else None
  free = ".".join(parents) in opened
  if not isinstance(node, ml_collections.ConfigDict) or (last not in node and not free):
    raise ConfigError(_unknown(name, config))
  old = node.get(last)
  if isinstance(old, ml_collections.ConfigDict) and name not in opened:
    raise ConfigError(
      f"--config.{name}={text}: {name} holds {', '.join(old)}; set them one by one, "
      f"like --config.{name}.{next(iter(old))}=value"
    )
  try:
    value = _literal(text) if old is None or free else _typed(text, old)
  except (ValueError, SyntaxError):
    raise ConfigError(f"--config.{name}={text}: expected {_expected(old)}, like {old!r}") from None
  with node.unlocked(), node.ignore_type():
    # patterns over module names (rank_pattern) have dots in them
    as_section = lambda keys: ml_collections.ConfigDict(keys, allow_dotted_keys=True)
    node[last] = as_section(value) if isinstance(value, dict) else value


def _typed(text: str, old: Any) -> Any:
  if isinstance(old, bool):
    return {"true": True, "1": True, "false": False, "0": False}[_word(text)]
  if isinstance(old, int):
    return int(text)
  if isinstance(old, float):
    return float(text)
  if isinstance(old, ml_collections.ConfigDict):
    value = ast.literal_eval(text)
    if not isinstance(value, dict):
      raise ValueError
    return value
  value = _literal(text)
  if isinstance(old, tuple | list):
    return tuple(value) if isinstance(value, tuple | list) else (value,)
  return tuple(value) if isinstance(value, tuple | list) else text


def _word(text):
  if text.lower() not in ("true", "false", "1", "0"):
    raise ValueError
  return text.lower()


def _literal(text: str) -> Any:
  """A Python literal, or the text itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _expected(old: Any) -> str:
  names = {bool: "true or false", int: "an integer", float: "a number", tuple: "a tuple"}
  return names.get(type(old), "a dict" if isinstance(old, ml_collections.ConfigDict) else "a value")


def _unknown(name: str, config: ml_collections.ConfigDict) -> str:
  fields = flat(plain(config))
  parent = name.rpartition(".")[0]
  siblings = [f for f in fields if f.rpartition(".")[0] == parent] or list(fields)
  near = difflib.get_close_matches(name, fields, n=1)
  hint = f"; did you mean {near[0]!r}?" if near else "."
  return f"unknown config key {name!r}{hint} Keys there: {', '.join(siblings)}"


def points(config: str) -> list[tuple[str, dict[str, Any]]]:
  """The points of a config file's `sweep()`: (arguments, {field: value}) pairs.

  Raises:
    ConfigError: the file has no `sweep`.
  """
  path = config.partition(":")[0]
  sweep = vars(module(path)).get("sweep")
  if sweep is None:
    raise ConfigError(
      f"{path} has no sweep(): write one that yields (arguments, {{field: value}}) pairs"
    )
  return list(sweep())


def module(path: str) -> Any:
  """The config file as a module; its folder joins the import path, for what config files share."""
  file = Path(path)
  if not file.is_file():
    near = difflib.get_close_matches(
      file.name, [p.name for p in file.parent.glob("*.py")], n=1, cutoff=0.3
    )
    hint = f"; there is {file.parent / near[0]}" if near else ""
    raise ConfigError(f"config file {path} does not exist{hint}")
  folder = str(file.parent.absolute())
  if folder not in sys.path:
    sys.path.insert(0, folder)
  spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  if spec is None or spec.loader is None:
    raise ConfigError(f"config file {path} is not a Python file; its name must end in .py")
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  if not callable(vars(loaded).get("get_config")):
    raise ConfigError(f"{path} has no get_config(arg): it is not a config file")
  return loaded


def override(field: str, value: Any) -> str:
  """The command-line form of a sweep's {field: value}."""
  return f"--config.{field}={value}"


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Nested dicts and lists, as JSON will hold them."""
  return _plain(config.to_dict())


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """`field: old -> new` for every field in which two resolved configs differ."""
  a, b = flat(old), flat(new)
  missing = "(absent)"
  return [
    f"{key}: {a.get(key, missing)!r} -> {b.get(key, missing)!r}"
    for key in sorted({*a, *b})
    if a.get(key, missing) != b.get(key, missing)
  ]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{dotted field: value}."""
  fields: dict[str, Any] = {}
  for key, value in config.items():
    name = f"{prefix}{key}"
    fields.update(
      flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    )
  return fields
