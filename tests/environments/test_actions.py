"""What `step` is given, of the words of a turn."""

import dataclasses
import enum
import types
import typing
from typing import Any, Generic, Literal, TypedDict, TypeVar

import pytest

from posttrain_jax.environments import actions

Act, See = TypeVar("Act"), TypeVar("See")


@dataclasses.dataclass
class Word:
  word: str


@dataclasses.dataclass
class Column:
  column: int
  metadata: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Move:
  x: int
  y: int


@dataclasses.dataclass
class Bare:
  metadata: dict = dataclasses.field(default_factory=dict)


class Call(TypedDict):
  name: str


class Way(enum.Enum):
  LEFT = "left"
  RIGHT = "right"


class Client(Generic[Act, See]):
  """OpenEnv's: what an action is stands in the bases of who is derived of it."""

  async def step(self, action: Act, **kwargs: Any) -> See: ...


class Synchronous:
  """OpenEnv's client that is not to be awaited: it has the other inside."""

  def __init__(self, client):
    self.async_client = client

  def step(self, action: Act) -> Any: ...


class Words(Client[Word, str]): ...


class More(Words): ...


class Turned(Client[See, Act]): ...


class Columns(Turned[Column, str]): ...


def of(annotation):
  def step(action): ...

  step.__annotations__["action"] = annotation
  return actions.reader(types.SimpleNamespace(step=step))


@pytest.mark.parametrize(
  "client", [Words(), More(), Synchronous(Words())], ids=["derived", "twice", "inside"]
)
def test_the_class_of_a_clients_actions_is_that_of_its_base(client):
  assert actions.reader(client)("red") == Word("red")


def test_variables_of_generic_bases_are_followed_by_their_places():
  """The client's first is the first of Turned, by another name."""
  assert actions.reader(Columns())("3") == Column(3)


@pytest.mark.parametrize(
  "kind", [str, Any, object, Act, str | None, typing.Annotated[str, "said"], Client], ids=str
)
def test_words_stay_words_where_step_takes_them_or_does_not_say(kind):
  step = Client() if kind is Client else None
  read = of(kind) if step is None else actions.reader(step)
  assert read(" left\n") == " left\n"


@pytest.mark.parametrize(
  ("kind", "text", "wanted"),
  [
    (int, " 3", 3),
    (float, "3", 3),
    (dict[str, Any], '{"a": 1}', {"a": 1}),
    (Call, '{"name": "x"}', {"name": "x"}),
    (list[int], "[1]", [1]),
    (Column, "3", Column(3)),
    (Column | None, "3", Column(3)),
    (Move, '{"x": 1, "y": 2}', Move(1, 2)),
    (Move | Column, "3", Column(3)),
    (Literal["left", 1], "1", 1),
    (Way, "left\n", Way.LEFT),
  ],
  ids=str,
)
def test_other_actions_are_values_and_objects(kind, text, wanted):
  assert of(kind)(text) == wanted
  with pytest.raises(actions.ActionError, match="an action is"):  # what the model got wrong
    of(kind)("up")


def test_what_a_class_refuses_is_what_the_model_got_wrong():
  @dataclasses.dataclass
  class Small:
    number: int

    def __post_init__(self):
      if self.number > 9:
        raise ValueError("one digit")

  assert of(Small)("3") == Small(3)
  with pytest.raises(actions.ActionError, match="one digit"):
    of(Small)("10")
  with pytest.raises(actions.ActionError, match="type int"):
    of(Small)("true")  # no number, though a bool is an int


def test_an_action_that_cannot_be_made_of_words_is_refused_before_the_run():
  with pytest.raises(actions.WrongShape, match="takes Synchronous, which cannot be made of words"):
    of(Synchronous)
  with pytest.raises(actions.WrongShape, match="Bare, which has no field to be filled"):
    of(Bare)
  with pytest.raises(actions.WrongShape, match="takes 'Elsewhere', which its file does not know"):
    of("Elsewhere")
  assert of("Word")("red") == Word("red")
