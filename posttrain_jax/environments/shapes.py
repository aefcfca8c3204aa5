"""Environments of the shapes that people have, behind the same verbs.

Tools are plain functions, or the public methods of an object with `reset` (TRL's `environment_factory`), called by
the model's turns.  An object with `step` (OpenEnv's, GEM's, Gymnasium's) takes a whole turn as an action.  This file
runs in the process that holds the object (`environments.child`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain_jax.environments import actions
from posttrain_jax.environments.actions import WrongShape

NOT_TOOLS = ("reset", "get_reward", "step")
BESIDE = ("seed", "episode_id")  # what reset is given beside the row's columns
DONE, REWARD, METADATA = "done", "reward", "metadata"
MOST_LEFT = 100_000  # characters of what an environment leaves for reward functions


@dataclasses.dataclass
class Stepped:
  """What an action brought: what is said to the model, None for nothing; the reward, None for none."""

  said: str | None
  reward: float | None
  done: bool


class Shape:
  """An environment or a set of tools, as the process that holds it serves it."""

  acts = False  # whether a turn is an action as a whole, and not words with calls

  def tools(self) -> list[Callable[..., Any]]:
    return []

  def reset(self, row: Mapping[str, Any], seed: int, episode: str) -> str | None:
    """Begins an episode for a row; what is said to the model before its first turn."""
    return None

  def needs(self) -> list[str]:
    """The columns of a row without which it cannot be reset."""
    return []

  def act(self, text: str) -> Stepped:
    raise NotImplementedError

  @property
  def scores(self) -> bool:
    """Whether it has a reward of its own."""
    return False

  def reward(self) -> float | None:
    return None

  def left(self) -> dict[str, Any]:
    """What is known of it after an episode: its public attributes that are JSON."""
    return {}


class Toolbox(Shape):
  """Functions that keep nothing from one call to the next."""

  def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
    self._functions = [*functions]

  def tools(self) -> list[Callable[..., Any]]:
    return self._functions


class Methods(Shape):
  """TRL's: `reset(**row) -> None | str`, public methods that are tools, and perhaps `get_reward() -> float`."""

  def __init__(self, held: Any, functions: Sequence[Callable[..., Any]] = ()) -> None:
    self.held, self._functions = held, [*functions]

  def tools(self) -> list[Callable[..., Any]]:
    every = inspect.getmembers(type(self.held), predicate=inspect.isfunction)
    own = [name for name, _ in every if name not in NOT_TOOLS and not name.startswith("_")]
    return [*self._functions, *(getattr(self.held, name) for name in own)]

  def reset(self, row: Mapping[str, Any], seed: int, episode: str) -> str | None:
    return _said(_awaited(_taken(self.held.reset, row, seed=seed, episode_id=episode)))

  def needs(self) -> list[str]:
    return _needed_of(self.held.reset)

  @property
  def scores(self) -> bool:
    return callable(getattr(self.held, "get_reward", None))

  def reward(self) -> float | None:
    return None if not self.scores else _number(_awaited(self.held.get_reward()))

  def left(self) -> dict[str, Any]:
    return _attributes(self.held)


class Actions(Shape):
  """`reset()` and `step(action)`: OpenEnv's observations, results of its clients, or tuples of GEM and Gymnasium.

  The action is the model's turn, as `actions.reader` reads it.
  The reward of an episode is the sum of its steps': 0 where it was cut before the first, None where no step told any.
  """

  acts = True

  def __init__(self, held: Any) -> None:
    self.held = held
    self._rewards: list[float | None] = []  # of each step
    self._action = actions.reader(held)

  def reset(self, row: Mapping[str, Any], seed: int, episode: str) -> str | None:
    self._rewards = []
    reset = self.held.reset
    # a client hands on whatever it is given, which its signature does not name
    row = {"seed": seed, "episode_id": episode, **row} if _takes_any(reset) else row
    return self._read(_awaited(_taken(reset, row, seed=seed, episode_id=episode))).said

  def needs(self) -> list[str]:
    return _needed_of(self.held.reset)

  def act(self, text: str) -> Stepped:
    stepped = self._read(_awaited(self.held.step(self._action(text))))
    self._rewards.append(stepped.reward)
    return stepped

  def _read(self, given: Any) -> Stepped:
    """Of an observation, a result that has one, (observation, info) or (observation, reward, ends ..., info)."""
    if isinstance(given, tuple):
      if len(given) == 2:
        return Stepped(_said(given[0]), None, False)
      if len(given) in (4, 5):
        return Stepped(_said(given[0]), _number(given[1]), any(map(bool, given[2:-1])))
      raise WrongShape(
        f"step returned a tuple of {len(given)}: (observation, reward, terminated, truncated, info) has 5"
      )
    inner = getattr(given, "observation", given)
    own = lambda name: getattr(given, name, None)
    of = lambda name: getattr(inner, name, None) if own(name) is None else own(name)
    return Stepped(_said(inner), _number(of(REWARD)), bool(of(DONE)))

  @property
  def scores(self) -> bool:
    return True

  def reward(self) -> float | None:
    if callable(getattr(self.held, "get_reward", None)):
      return _number(_awaited(self.held.get_reward()))
    told = [reward for reward in self._rewards if reward is not None]
    return math.fsum(told) if told or not self._rewards else None

  def left(self) -> dict[str, Any]:
    return _attributes(self.held)


def of(environment: Callable[[], Any] | None, functions: Sequence[Callable[..., Any]]) -> Shape:
  """What a factory makes, with tools beside it.

  Raises:
    WrongShape: it is no environment, or has tools where its turns are actions.
  """
  if environment is None:
    return Toolbox(functions)
  held = environment()
  name = type(held).__name__
  if not callable(getattr(held, "reset", None)):
    raise WrongShape(
      f"{name} has no reset(): an environment has reset(), and step() or methods that are tools"
    )
  if callable(getattr(held, "step", None)):
    if functions:
      raise WrongShape(
        f"{name} has step(), so a turn is its action as a whole and calls no tools; leave tools out"
      )
    return Actions(held)
  methods = Methods(held, functions)
  if not methods.tools():
    raise WrongShape(
      f"{name} has no step() and no public method beside reset() and get_reward(): nothing can be done in it"
    )
  return methods


def name_of(tool: Callable[..., Any]) -> str:
  """What the model calls it by."""
  return getattr(tool, "__name__", type(tool).__name__)


def called(tool: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[str, bool]:
  """(what a tool says, whether it failed), in TRL's words."""
  try:
    return str(_awaited(tool(**arguments))), False
  except Exception as error:
    return str({"error": str(error)}), True


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
  """The loop of this process's coroutines.  It goes on between them: a connection belongs to it, and is kept alive."""
  loop = asyncio.new_event_loop()
  threading.Thread(target=loop.run_forever, daemon=True).start()
  return loop


def _awaited(value: Any) -> Any:
  if not inspect.isawaitable(value):
    return value
  result, error = asyncio.run_coroutine_threadsafe(_outcome(value), _loop()).result()
  if error is not None:
    raise error
  return result


async def _outcome(awaitable: Any) -> tuple[Any, BaseException | None]:
  """(result, error): a SystemExit that left the coroutine would end the loop."""
  try:
    return await awaitable, None
  except BaseException as error:
    return None, error


def _taken(function: Callable[..., Any], row: Mapping[str, Any], **beside: Any) -> Any:
  """The function called with what it takes of a row and of what is beside it; all of the row, where it has a `**`."""
  parameters = inspect.signature(function).parameters.values()
  named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
  given = {k: v for k, v in row.items() if k in named or _takes_any(function)}
  return function(**given, **{k: v for k, v in beside.items() if k in named and k not in given})


def _takes_any(function: Callable[..., Any]) -> bool:
  return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _needed_of(reset: Callable[..., Any]) -> list[str]:
  """What it takes without a default, but for what it is given beside a row.

  >>> _needed_of(lambda answer, seed, level=1, **row: None)
  ['answer']
  """
  parameters = inspect.signature(reset).parameters.values()
  named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
  return [p.name for p in named if p.default is p.empty and p.name not in BESIDE]


def _number(value: Any) -> float | None:
  return None if value is None else float(value)


def _said(observation: Any) -> str | None:
  """An observation in words: text as it is, of an object the only text that it holds, else JSON of its fields."""
  if observation is None or isinstance(observation, str):
    return observation
  fields = _fields(observation)
  if fields is None:
    return str(observation)
  shown = {k: v for k, v in fields.items() if k not in (DONE, REWARD, METADATA) and v is not None}
  texts = [value for value in shown.values() if isinstance(value, str)]
  if len(shown) == 1 and texts:
    return texts[0]
  return json.dumps(shown, ensure_ascii=False, default=str) if shown else None


def _fields(value: Any) -> dict[str, Any] | None:
  if isinstance(value, Mapping):
    return dict(value)
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  if callable(getattr(value, "model_dump", None)):  # pydantic's
    return value.model_dump()
  return None


def _attributes(held: Any) -> dict[str, Any]:
  """Public attributes and properties that JSON can hold: what reward functions of TRL's read of `environments`."""
  names = [*vars(held)] if hasattr(held, "__dict__") else []
  names += [name for name, _ in inspect.getmembers(type(held), lambda m: isinstance(m, property))]
  left, size = {}, 0
  for name in names:
    if name.startswith("_"):
      continue
    try:
      value = getattr(held, name)
      text = json.dumps(value)
    except Exception:  # of the user's property, or no JSON
      continue
    size += len(text)
    if size <= MOST_LEFT:
      left[name] = value
  return left
