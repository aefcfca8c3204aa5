"""Actions: what `step` takes, made of the words of a model's turn."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

JSON = (int, float, bool, dict, list)
EVERY = "metadata"  # a field that all actions of OpenEnv have

Reader = Callable[[str], Any]


class WrongShape(ValueError):
  """What a file names is no environment and no tool."""


class ActionError(ValueError):
  """A turn is no action of this environment."""


def reader(held: Any) -> Reader:
  """What makes an action of a turn's text, as the annotation of the first parameter of `held.step` says.

  It is the text where that is a text or is not told, a JSON value where it is a number, a dictionary or a list, and
  else an object of a class: made of the text where it has one field to be filled, else of a JSON object.  A client of
  OpenEnv says it by its base: `EnvClient[Action, Observation, State]`.

  Raises:
    WrongShape: `step` takes nothing, or what cannot be made of words.
  """
  held = getattr(held, "async_client", held)  # OpenEnv's synchronous clients have one inside
  first = next(iter(inspect.signature(held.step).parameters.values()), None)
  if first is None:
    raise WrongShape("step() takes nothing: an environment's step takes the action")
  function = inspect.unwrap(getattr(held.step, "__func__", held.step))
  kind = _resolved(first.annotation, getattr(function, "__globals__", {}))
  return _reader(_bound(kind, type(held)))


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
  if not isinstance(annotation, str):
    return Any if annotation is inspect.Parameter.empty else annotation
  try:
    return eval(annotation, names)
  except Exception as error:
    raise WrongShape(
      f"step() takes {annotation!r}, which its file does not know ({error}): import or define it at the top of the"
      " file, outside of if TYPE_CHECKING"
    ) from error


def _bound(kind: Any, owner: type) -> Any:
  """What a variable of the generic class that has `step` stands for in `owner`; the variable where nobody says."""
  kinds = owner.__mro__
  place = next((i for i, one in enumerate(kinds) if "step" in vars(one)), 0)
  generic = kinds[place]
  for derived in reversed(kinds[:place]):
    for base in vars(derived).get("__orig_bases__", ()):
      names = getattr(generic, "__parameters__", ())
      if typing.get_origin(base) is generic and kind in names:
        kind, generic = typing.get_args(base)[names.index(kind)], derived
  return kind


def _reader(kind: Any) -> Reader:
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    some = [one for one in typing.get_args(kind) if one is not type(None)]
    return _first_of([_reader(one) for one in some])
  if typing.get_origin(kind) is typing.Annotated:
    return _reader(typing.get_args(kind)[0])
  if typing.get_origin(kind) is typing.Literal:
    return _one_of({str(one): one for one in typing.get_args(kind)})
  plain = typing.get_origin(kind) or kind
  if not isinstance(plain, type) or plain in (str, object, Any):
    return _text
  if issubclass(plain, enum.Enum):
    return _one_of({str(one.value): one for one in plain})
  if plain in JSON or dict in plain.__mro__:
    return lambda text: _json(text, dict if dict in plain.__mro__ else plain)
  if (fields := _fields(plain)) is None:
    raise WrongShape(
      f"step() takes {kind.__name__}, which cannot be made of words: an action is a str, a number, a dict or a list, a"
      " dataclass, or a class of pydantic"
    )
  if not {*fields} - {EVERY}:
    raise WrongShape(
      f"step() takes {kind.__name__}, which has no field to be filled: annotate it with the class of your actions;"
      " tools that an environment calls by name (MCP's) are methods of a class without step()"
    )
  needed = [name for name, field in fields.items() if field.is_needed]
  if len(needed) == 1:
    value = _reader_of_field(fields[needed[0]].kind)
    return lambda text: _made(kind, {needed[0]: value(text)})
  said = f"a JSON object with {', '.join(needed)}" if needed else "a JSON object"
  return lambda text: _made(kind, _json(text, dict, said))


def _reader_of_field(kind: Any) -> Reader:
  try:
    return _reader(kind)
  except WrongShape:  # the class that has the field may make it of a text
    return _text


def _text(text: str) -> str:
  return text


def _one_of(values: dict[str, Any]) -> Reader:
  def read(text: str) -> Any:
    if (said := text.strip()) not in values:
      raise ActionError(f"an action is one of {', '.join(values)}")
    return values[said]

  return read


def _made(kind: Any, fields: dict[str, Any]) -> Any:
  try:
    return kind(**fields)
  except (TypeError, ValueError) as error:
    raise ActionError(" ".join(str(error).split())) from None


def _first_of(readers: list[Reader]) -> Reader:
  def read(text: str) -> Any:
    problems = []
    for one in readers:
      try:
        return one(text)
      except ActionError as error:
        problems.append(str(error))
    raise ActionError("; or: ".join(dict.fromkeys(problems)))

  return read


def _json(text: str, kind: type, said: str = "") -> Any:
  """
  >>> _json("3", int), _json("3", float), _json('{"a": 1}', dict)
  (3, 3, {'a': 1})
  >>> _json("left", int)
  Traceback (most recent call last):
    ...
  posttrain_jax.environments.actions.ActionError: an action is JSON of the type int
  """
  error = ActionError(f"an action is {said or f'JSON of the type {kind.__name__}'}")
  try:
    value = json.loads(text)
  except ValueError:
    raise error from None
  is_number = isinstance(value, int) and not isinstance(value, bool)
  if type(value) is kind or (kind is float and is_number):
    return value
  raise error


class _Field(typing.NamedTuple):
  is_needed: bool
  kind: Any


def _fields(kind: type) -> dict[str, _Field] | None:
  """The fields of a class of actions; None where it is no such class."""
  if dataclasses.is_dataclass(kind):
    absent, names = dataclasses.MISSING, vars(sys.modules[kind.__module__])
    return {
      f.name: _Field(f.default is absent and f.default_factory is absent, _resolved(f.type, names))
      for f in dataclasses.fields(kind)
      if f.init
    }
  if (fields := getattr(kind, "model_fields", None)) is not None:  # pydantic's
    return {name: _Field(f.is_required(), f.annotation) for name, f in fields.items()}
  return None
