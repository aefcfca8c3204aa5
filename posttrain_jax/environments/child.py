"""What a process does that holds an environment: it answers messages by their names."""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from posttrain_jax.core import apart_program

MOST_SAID = 1_000_000  # characters that are said at once; a run cuts them further, by tokens


class Served:
  """The environment of this process, by the names of messages."""

  def __init__(self) -> None:
    self._tools: dict[str, Callable[..., Any]] = {}

  def load(
    self, environment: str, tools: tuple[str, ...], options: dict[str, Any]
  ) -> dict[str, Any]:
    from posttrain_jax.environments import named, shapes

    self.shape = shapes.of(
      named.factory(environment, options) if environment else None,
      [named.tool(name, options) for name in tools],
    )
    self._tools = {shapes.name_of(tool): tool for tool in self.shape.tools()}
    return {"scores": self.shape.scores, "acts": self.shape.acts, "tools": [*self._tools]}

  def describe(self) -> dict[str, Any]:
    """The schema of each tool, as Transformers makes it of its hints and docstring, and what a row must have."""
    return {"schemas": [_schema(tool) for tool in self.shape.tools()], "needs": self.shape.needs()}

  def reset(self, row: dict[str, Any], seed: int, episode: str) -> dict[str, Any]:
    said = self.shape.reset(row, seed, episode)
    return {"said": said and said[:MOST_SAID]}

  def call(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"results": [self._called(one) for one in calls]}

  def _called(self, one: dict[str, Any]) -> tuple[str, bool]:
    from posttrain_jax.environments import shapes

    tool = self._tools.get(one["name"])
    if tool is None:
      return str({"error": f"Tool {one['name']} not found."}), True
    said, failed = shapes.called(tool, one["arguments"])
    return said[:MOST_SAID], failed

  def act(self, text: str) -> dict[str, Any]:
    from posttrain_jax.environments import actions

    try:
      stepped = self.shape.act(text)
      return {**dataclasses.asdict(stepped), "said": stepped.said and stepped.said[:MOST_SAID]}
    except actions.ActionError as error:
      return {"unreadable": str(error)}

  def end(self) -> dict[str, Any]:
    return {"reward": self.shape.reward(), "left": self.shape.left()}


def _schema(tool: Callable[..., Any]) -> dict[str, Any]:
  from transformers.utils import get_json_schema

  from posttrain_jax.environments import shapes

  try:
    return get_json_schema(tool)
  except Exception as error:
    raise shapes.WrongShape(
      f"the tool {shapes.name_of(tool)} cannot be told to a model: {error}; write type hints, and a docstring that says"
      " what it does and under Args: what each argument is"
    ) from error


def serve(asked: BinaryIO, answer: Callable[[Any], None]) -> None:
  served = Served()
  for number, verb, arguments in apart_program.messages(asked):
    try:
      reply = getattr(served, verb)(*arguments)
    except (Exception, SystemExit) as error:
      reply = {"raised": _raised(error)}
    answer({"to": number, **reply})


def _raised(error: BaseException) -> str:
  """The error in a line, with the last line of the user's own file."""
  here = os.path.dirname(__file__)
  frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(here)]
  own = [frame for frame in frames if "posttrain_jax" not in frame.filename] or frames
  place = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
  said = " ".join(str(error).split())[:300]
  kind = type(error).__name__
  if kind in ("WrongShape", "ConfigError"):  # ours, in whole sentences
    return said
  return f"{place}raised {kind}: {said}"
