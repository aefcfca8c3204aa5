"""A run's configuration: a config file, its arguments and overrides, resolved to one dict that is the run."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import json
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from posttrain_jax.settings import fields, later, listing, names
from posttrain_jax.settings.domains import Number, Text
from posttrain_jax.settings.errors import ConfigError

__all__ = ["ConfigError", "fields", "listing", "load", "names", "section"]
UNREADABLE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)  # of a literal
SHIPPED = Path(__file__).parents[1] / "configs"
CHAINS = ("chain", "quickstart_chain")  # of stages, each of which names a config
NO_CONFIGS = ("__init__", "common", *CHAINS)  # beside them
NO_ARGUMENT = "unknown config argument "  # how config files begin to say so
LENGTH = ("steps", "epochs")  # of which one says how long a run is
# what ends a call or a run, and says nothing of what is computed: a run may go on with others
PATIENCE = (
  *("reward.seconds", "reward.retries", "holdout_reward.seconds", "holdout_reward.retries"),
  *("online.most_drift", "online.engine_patience", "checkpoint.keep"),
)
LISTED = "posttrain train --config=FILE --help lists all of them"
# fields that decide which others a section has -> the argument of the config file that makes the section so
STRUCTURE = {"optimizer.name": "optimizer", "adapter.method": "adapter"}


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

  FILE is a path, or the name alone of a config that comes with the package.

  A value takes the type of the field; an empty dict takes any key (`--config.data.columns.prompt=question`).

  Raises:
    ConfigError: no such file, an unknown argument, an unknown key (the message lists the valid ones), a wrong type.
  """
  path, _, arguments = config.partition(":")
  asked = dict(map(_override, overrides))
  resolved = _resolved(path, arguments, asked)
  opened = {field for field, value in flat(plain(resolved)).items() if value == {}}
  for name, text in asked.items():
    _set(resolved, name, text, opened)
  _check_length(resolved, asked)
  return resolved.lock()


def _check_length(config: ml_collections.ConfigDict, asked: Mapping[str, str]) -> None:
  """One of steps and epochs says how long the run is: the one asked for takes the place of the file's."""
  if not {*LENGTH} <= {*config} or None in (config.steps, config.epochs):
    return
  named = [name for name in LENGTH if name in asked]
  if len(named) != 1:
    where = (
      "leave one of them out"
      if named
      else "write c.steps = None in the config file, or no c.epochs"
    )
    raise ConfigError(
      f"steps={config.steps} and epochs={config.epochs:g} both say how long the run is; {where}"
    )
  (other,) = {*LENGTH} - {*named}
  with config.unlocked(), config.ignore_type():
    config[other] = None


def given(overrides: Sequence[str]) -> list[str]:
  """The fields that overrides name."""
  return [_override(text)[0] for text in overrides]


def _override(text: str) -> tuple[str, str]:
  """(field, value) of `--config.field=value`."""
  name, equals, value = text.removeprefix("--").removeprefix("config.").partition("=")
  if not (equals and name):
    raise ConfigError(f"{text!r}: write --config.{name or 'field'}=value")
  return name, value


def _resolved(path: str, arguments: str, asked: Mapping[str, str]) -> ml_collections.ConfigDict:
  """What the file's `get_config` makes of its arguments, a method that overrides name among them."""
  if path.endswith(".json"):
    return _printed(path, arguments)
  meant = {name: f"{STRUCTURE[name]}={text}" for name, text in asked.items() if name in STRUCTURE}
  with _opened(path) as loaded:
    try:
      resolved = loaded.get_config(",".join(filter(None, [arguments, *meant.values()])) or None)
    except ValueError as error:
      is_unknown = str(error).startswith(NO_ARGUMENT)
      if not meant and is_unknown:
        raise ConfigError(f"{error}{_field_meant(str(error))}") from error
      if not meant:
        raise
      resolved = loaded.get_config(arguments or None)
      if (
        not is_unknown
      ):  # it has the arguments that the fields stand for, and their values are wrong
        fields_given = " ".join(f"--config.{name}={asked[name]}" for name in meant)
        raise ConfigError(f"{fields_given}: {error}") from error
  if not isinstance(resolved, ml_collections.ConfigDict):
    raise ConfigError(
      f"{path}: get_config returned a {type(resolved).__name__}, expected an ml_collections.ConfigDict"
    )
  return resolved


def _field_meant(error: str) -> str:
  """After "unknown config argument 'x'": how x is written where it is a field."""
  name = error.removeprefix(NO_ARGUMENT).partition(":")[0].strip(" '")
  meant = names.SAME.get(name) or ", ".join(names.ending(name, fields.FIELDS))
  return f"; a field is written apart, --config.NAME=value: {meant}" if meant else ""


def _printed(path: str, arguments: str) -> ml_collections.ConfigDict:
  """The config that `--print_config` printed, or the `config.json` of a run."""
  try:
    values = json.loads(Path(path).expanduser().read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(f"config file {path}: {error}") from error
  values = (
    values.get("config", values) if isinstance(values, dict) else values
  )  # as a run records it
  if isinstance(values, dict) and values.get("epochs") is not None:
    values["steps"] = None  # a run records what its epochs came to
  if not isinstance(values, dict) or arguments:
    wrong = f"takes no arguments, {arguments!r}" if arguments else "has no object of fields"
    raise ConfigError(f"config file {path} {wrong}; change its fields with --config.NAME=value")
  return restored(values)


def _set(config: ml_collections.ConfigDict, name: str, text: str, opened: set[str]) -> None:
  *parents, last = name.split(".")
  node = config
  for part in parents:
    node = node.get(part) if isinstance(node, ml_collections.ConfigDict) else None
  free = ".".join(parents) in opened
  if not isinstance(node, ml_collections.ConfigDict) or (last not in node and not free):
    raise ConfigError(_unknown(name, text, config))
  old = node.get(last)
  if isinstance(old, ml_collections.ConfigDict) and name not in opened:
    raise ConfigError(
      f"--config.{name}={text}: {name} holds {', '.join(old)}; set them one by one, "
      f"like --config.{name}.{next(iter(old))}=value"
    )
  try:
    is_open = old is None or free or _may_be_none(name, text)
    value = _unset(name, text) if is_open else _typed(text, old)
  except UNREADABLE:
    raise ConfigError(
      f"--config.{name}={text[:200]}: expected {_expected(old)}, like {_shown(old)}"
    ) from None
  field = fields.FIELDS.get(fields.known_as(name))
  if isinstance(value, bool) and field is not None and isinstance(field.domain, Number):
    # a placeholder of numbers would make 1 and 0 of them
    raise ConfigError(f"--config.{name}={text}: write {field.domain.says}")
  if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
    raise ConfigError(f"--config.{name}={text}: the keys of a dict are texts, in quotes")
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


def _may_be_none(name: str, text: str) -> bool:
  """Whether a text is None, in a number's field that may hold that."""
  field = fields.FIELDS.get(fields.known_as(name))
  is_open = field is not None and isinstance(field.domain, Number) and None in field.domain.also
  return is_open and text.lower() == "none"


def _unset(name: str, text: str) -> Any:
  """The value of a field that holds nothing yet, from which a type could be told."""
  if text.lower() == "none":
    return None
  field = fields.FIELDS.get(fields.known_as(name))
  if field is not None and isinstance(field.domain, Text):
    return text
  return _literal(text)


def _word(text):
  if text.lower() not in ("true", "false", "1", "0"):
    raise ValueError
  return text.lower()


def _literal(text: str) -> Any:
  """A Python literal, or the text itself."""
  try:
    return ast.literal_eval(text)
  except UNREADABLE:
    return text


def _expected(old: Any) -> str:
  names = {bool: "true or false", int: "an integer", float: "a number", tuple: "a tuple"}
  return names.get(type(old), "a dict" if isinstance(old, ml_collections.ConfigDict) else "a value")


def _shown(old: Any) -> str:
  return repr(plain(old) if isinstance(old, ml_collections.ConfigDict) else old)


# sections that not all config files have: which one does
_HAVE = {
  "critic": "--config=rl:method=ppo",
  "online": "--config=rl, or distil:on_policy=0.5,",
  "reward": "--config=rl",
  "holdout_reward": "--config=rl",
}


def _unknown(name: str, text: str, config: ml_collections.ConfigDict) -> str:
  if fields.known_as(name) in fields.FIELDS and (why := fields.unread(plain(config), name)):
    return f"--config.{why}"
  there = flat(plain(config))
  if fields.known_as(name) in fields.FIELDS:
    by = _HAVE.get(name.partition(".")[0], "")
    return f"unknown config key {name!r}: this config does not have it{by and f'; {by} has'}"
  meant = names.elsewhere(name)
  if meant and not names.ending(name, there):
    return f"unknown config key {name!r}: {_here(meant, text, config)}"
  is_here = bool(names.ending(name, there))
  whole = [] if is_here else names.ending(name, fields.FIELDS)  # of a method that this is not
  if whole and (why := _missing(whole[0], config)):
    return f"unknown config key {name!r}; {why}"
  near = names.near(name, there)
  if near:
    return f"unknown config key {name!r}; did you mean {' or '.join(map(repr, near))}? {LISTED}"
  missing = [why for field in names.near(name, fields.FIELDS) if (why := _missing(field, config))]
  if missing:
    return f"unknown config key {name!r}; {missing[0]}"
  if other := names.alike(name):
    here = _here(names.elsewhere(other), text, config)
    return f"unknown config key {name!r}; did you mean another tool's {other!r}? {here}"
  parent = name.rpartition(".")[0]
  siblings = [f for f in there if f.rpartition(".")[0] == parent] or list(there)
  return f"unknown config key {name!r}. Keys there: {', '.join(siblings)}. {LISTED}"


def _here(meant: str, text: str, config: ml_collections.ConfigDict) -> str:
  """What another tool's name is in this config: a field with the value given, or what is said of it."""
  if meant not in fields.FIELDS:
    return f"here, {meant}"
  return _missing(meant, config) or f"here it is {meant}; write --config.{meant}={text}"


def _missing(field: str, config: ml_collections.ConfigDict) -> str:
  """Why this config does not have a field of the table; "" where it does."""
  values = plain(config)
  if field in dict(fields.items(values)):
    return ""
  return fields.unread(values, field) or f"here it is {field}, which this config does not have"


def points(config: str) -> list[tuple[str, dict[str, Any]]]:
  """The points of a config file's `sweep()`: (arguments, {field: value}) pairs.

  Raises:
    ConfigError: the file has no `sweep`.
  """
  path = config.partition(":")[0]
  with _opened(path) as loaded:
    sweep = vars(loaded).get("sweep")
    if sweep is None:
      raise ConfigError(_how_to_sweep(path, _file(path)))
    return list(sweep())


def search(config: str) -> dict[str, Any]:
  """{field: domain} of a config file's `search()`.

  Raises:
    ConfigError: the file has no `search`.
  """
  path = config.partition(":")[0]
  with _opened(path) as loaded:
    space = vars(loaded).get("search")
    if space is None:
      raise ConfigError(
        f'{path} has no search(): write one that returns {{"optimizer.lr": (1e-5, 1e-3, "log"), "adapter.r": [4, 16]}}'
      )
    return dict(space())


def stages(config: str) -> list[Any]:
  """What a chain's file says of its stages, `stages(arg)`: dicts, in their order, as `build.chain` checks.

  Raises:
    ConfigError: no such file, an unknown argument, or it has no `stages`.
  """
  path, _, arguments = config.partition(":")
  with _opened(path, needs="stages") as loaded:
    given = loaded.stages(arguments or None)
    if given is None:
      raise ConfigError(
        f"{path}: stages(arg) returns None; write `yield` before each stage, or return a list"
      )
    return list(given)


def _how_to_sweep(path: str, file: Path) -> str:
  """What to write where a config file has no points."""
  points = '  def sweep():\n    for lr in (1e-5, 1e-4):\n      yield "", {"optimizer.lr": lr}'
  if file.parent.resolve() != SHIPPED.resolve():
    where = f"as in\n\n{points}"
  else:
    where = (
      "in a file of your own, as in sweep.py\n\n"
      f"  from posttrain_jax.configs.{file.stem} import get_config\n\n{points}\n\n"
      f"and name it in its place: --config=sweep.py:ARGUMENTS, those of {file.stem}"
    )
  return (
    f"{path} has no sweep(): write one that yields (arguments, {{field: value}}) pairs, {where}"
  )


def about(config: str, width: int = 80) -> str:
  """What a config file says that it is, and the arguments that it takes with their values; "" of JSON."""
  path = config.partition(":")[0]
  if path.endswith(".json"):
    return ""
  with _opened(path) as loaded:
    title = (loaded.__doc__ or "").strip().partition("\n")[0]
  known = arguments(path)
  listed = "\n".join(
    ["Arguments after the colon:", *(_argument(path, name, width) for name in known)]
  )
  return f"{title}\n\n{listed}\n" if known else f"{title}\n"


def _argument(path: str, name: str, width: int) -> str:
  """A line of help: the argument, and its values where only some words are."""
  words = ", ".join(argument_values(path, name))
  return textwrap.fill(
    f"  {name}: {words}" if words else f"  {name}", width, subsequent_indent="    "
  )


def argument_values(path: str, name: str) -> list[str]:
  """The words that an argument may be; [] where it is another text.

  The file, or the field that the argument becomes, lists them where it is given an unknown one.
  """
  with _opened(path) as loaded:
    try:  # a value that nothing takes
      fields.check_values(plain(loaded.get_config(f"{name}=?")))
    except Exception as error:  # whatever a file makes of it
      found = str(error)
      if found.endswith("write true or false"):
        return ["true", "false"]
      return re.findall(r"[\w-]+", found.partition("known are ")[2])
  return []


def method(objective: Mapping[str, Any]) -> str:
  """What the shipped configs call a policy-gradient loss; "" of one that they do not have.

  >>> method({"loss": "ppo", "aggregation": "sequence_mean", "advantage": "group"})
  'grpo'
  """
  rl = module("rl")
  decide = lambda section: [section.get(name) for name in ("loss", "aggregation", "advantage")]
  named = {name: rl.common.policy_loss(*row) for name, row in rl.METHODS.items()}
  return next((name for name, one in named.items() if decide(one) == decide(objective)), "")


def arguments(path: str) -> list[str]:
  """The arguments that a config file takes, which it lists where it is given an unknown one."""
  with _opened(path) as loaded:
    try:
      loaded.get_config("?")
    except Exception as error:  # whatever a file makes of it
      known = str(error).removeprefix(NO_ARGUMENT).partition("known are ")[2]
      return re.findall(r"\w+", known)
  return []


def module(path: str) -> Any:
  """The config file as a module."""
  with _opened(path) as loaded:
    return loaded


def function(path: str, name: str) -> Callable[..., Any]:
  """A function in a Python file of the user's, as `FILE.py:name` names it.

  Raises:
    ConfigError: no such file or function, or a mistake in the file, with its line.
  """
  file = Path(path).expanduser()
  with _told(file, always=True), beside(file.parent):
    values = vars(_executed(file, f"file {path}"))
  if callable(values.get(name)):
    return values[name]
  own = [key for key, value in values.items() if callable(value) and not key.startswith("_")]
  there = f"; it has {', '.join(own)}" if own else ""
  raise ConfigError(f"{path} has no function {name!r}{there}")


@contextlib.contextmanager
def _opened(path: str, needs: str = "get_config") -> Generator[Any]:
  """The config file as a module, whose mistakes inside are ConfigErrors that name their line."""
  file = _file(path)
  with _told(file), beside(file.parent):
    loaded = _executed(file, f"config file {path}", _shipped_hint(file))
    if not callable(vars(loaded).get(needs)):
      what = "a config file" if needs == "get_config" else "a chain of stages"
      raise ConfigError(f"{path} has no {needs}(arg): it is not {what}{_other(loaded, needs)}")
    yield loaded


def _other(loaded: Any, needs: str) -> str:
  """Which command reads the file, where it is of another kind."""
  commands = {"stages": "posttrain chain", "get_config": "posttrain train"}
  kinds = [kind for kind in commands if kind != needs and callable(vars(loaded).get(kind))]
  return "".join(f"; `{commands[kind]}` reads it" for kind in kinds)


@contextlib.contextmanager
def _told(file: Path, *, always: bool = False) -> Generator[None]:
  """A mistake in a file of the user's is a ConfigError that names its line; with `always` where it has words too."""
  try:
    yield
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:
    raise ConfigError(_in_file(error, file, always)) from error


def _file(path: str) -> Path:
  """Where a config file is; a bare name is that of one that comes with the package."""
  shipped = SHIPPED / f"{path}.py"
  return shipped if path in (*shipped_names(), *CHAINS) else Path(path).expanduser()


def shipped_names() -> list[str]:
  """The config files that come with the package, by the names that `--config` takes."""
  return sorted(file.stem for file in SHIPPED.glob("*.py") if file.stem not in NO_CONFIGS)


@contextlib.contextmanager
def beside(folder: Path) -> Generator[None]:
  """Modules of the folder can be imported, and are those of no other folder, before or after.

  Two folders of configs each have a `common`.
  """
  folder = folder.absolute()
  names = {p.stem for p in folder.glob("*.py")} | {
    p.parent.name for p in folder.glob("*/__init__.py")
  }
  names -= {*sys.stdlib_module_names}
  before = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] in names}
  others = {name for name in before if not _lies_in(before.get(name.partition(".")[0]), folder)}
  for name in others:
    del sys.modules[name]
  sys.path.insert(0, str(folder))
  importlib.invalidate_caches()
  try:
    yield
  finally:
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
      del sys.modules[name]
    sys.modules.update(before)


def _lies_in(loaded: Any, folder: Path) -> bool:
  """Whether a module was imported from that folder."""
  spec = None if loaded is None else loaded.__spec__
  return spec is not None and str(spec.origin).startswith(f"{folder}{os.sep}")


def _in_file(error: BaseException, file: Path, always: bool = False) -> str:
  """What went wrong in a config file or what it imports from its folder, with the place."""
  if isinstance(error, ValueError) and str(error) and not always:
    return str(error)
  if isinstance(error, SyntaxError) and error.filename:
    return f"{error.filename}:{error.lineno}: {error.msg}"
  folder = file.parent.resolve()
  frames = traceback.extract_tb(error.__traceback__)
  at = [frame for frame in frames if Path(frame.filename).parent.resolve() == folder]
  place = f"{file}:{at[-1].lineno}" if at else str(file)
  return f"{place}: {type(error).__name__}: {error}"


def _executed(file: Path, what: str, hint: str = "") -> Any:
  if not file.is_file():
    near = difflib.get_close_matches(
      file.name, [p.name for p in file.parent.glob("*.py") if p.is_file()], n=1, cutoff=0.3
    )
    if file.is_dir():
      raise ConfigError(f"{what} is a folder; name a file in it")
    there = f"; there is {file.parent / near[0]}" if near else ""
    raise ConfigError(f"{what} does not exist{there or hint}")
  spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  if spec is None or spec.loader is None:
    raise ConfigError(f"{what} is not a Python file; its name must end in .py")
  loaded = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = loaded  # where a dataclass looks for the module that it is defined in
  spec.loader.exec_module(loaded)
  return loaded


def _shipped_hint(file: Path) -> str:
  """What to write where no file is near: the config of that name that comes with the package, or their names."""
  shipped = shipped_names()
  if file.stem in shipped:
    return f"; the one that comes with posttrain is --config={file.stem}"
  return f"; without a path there are {', '.join(shipped)}"


def override(field: str, value: Any) -> str:
  """The command-line form of a sweep's {field: value}."""
  return f"--config.{field}={value}"


def restored(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The config whose `plain` form this is, as a run's record holds it; patterns over module names have dots in them."""
  return ml_collections.ConfigDict(values, allow_dotted_keys=True)


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Nested dicts and lists, as JSON will hold them."""
  return _plain(config.to_dict())


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  return value


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any], but: Collection[str] = ()
) -> list[str]:
  """`field: old -> new` for every field, but some, in which two resolved configs differ.

  old may be of a version that had fewer fields: it did what `later.LATER` says.
  """
  a, b = ({k: v for k, v in flat(config).items() if k not in but} for config in (old, new))
  a = {**{name: value for name, value in later.LATER.items() if name in b}, **a}
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
