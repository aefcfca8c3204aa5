"""Environments of TRL's, OpenEnv's and GEM's shapes behind the same verbs."""

import asyncio
import dataclasses
import time
import types

import pytest

from posttrain_jax.environments import actions, shapes
from tests.environments import made


def test_methods_of_an_environment_are_its_tools():
  shape = shapes.of(made.Counter, [made.double])
  assert [tool.__name__ for tool in shape.tools()] == ["double", "add", "fail", "wait"]
  assert not shape.acts
  assert shape.reset({"start": 3, "other": 1}, 0, "a") == " The count is 3."
  add = shape.tools()[1]
  assert shapes.called(add, {"number": 4}) == ("7", False)
  assert shape.left() == {"total": 7, "reward": 7.0}  # no private and no unspeakable attribute
  assert not shape.scores
  assert shape.reward() is None


def test_a_tool_that_raises_says_so_in_trls_words():
  shape = shapes.of(made.Counter, ())
  fail = next(tool for tool in shape.tools() if tool.__name__ == "fail")
  assert shapes.called(fail, {}) == (str({"error": "'no such thing'"}), True)
  said, failed = shapes.called(fail, {"x": 1})
  assert failed
  assert "unexpected keyword argument" in said


def test_an_environment_may_own_its_reward():
  shape = shapes.of(made.Owns, ())
  shape.reset({}, 0, "a")
  shapes.called(shape.tools()[0], {"number": 3})
  assert shape.scores
  assert shape.reward() == 1.5
  assert "get_reward" not in [tool.__name__ for tool in shape.tools()]


def test_typed_actions_are_made_of_a_turn_and_observations_are_read():
  shape = shapes.of(made.Guessing, ())
  assert shape.acts
  assert shape.reset({"prompt": "?"}, 7, "1-2") == "Guess a colour."
  assert (shape.held.seed, shape.held.episode) == (7, "1-2")
  assert shape.act("blue") == shapes.Stepped("wrong", -0.25, False)
  assert shape.act("red") == shapes.Stepped("right", 1.0, True)
  assert shape.reward() == 0.75
  shape.reset({}, 0, "b")
  assert shape.reward() == 0.0  # of no steps: an answer that was cut within its first turn


def test_steps_that_tell_no_reward_are_no_reward_of_zero():
  silent = types.SimpleNamespace(reset=lambda: None, step=lambda action: "heard")
  shape = shapes.of(lambda: silent, ())
  shape.reset({}, 0, "a")
  shape.act("x")
  assert shape.reward() is None


def test_the_same_rewards_in_another_order_are_the_same_reward():
  texts = types.SimpleNamespace(reset=lambda: None, step=lambda action: ("", float(action), 0, {}))
  shape, totals = shapes.of(lambda: texts, ()), set()
  for rewards in ("0.1 0.1 0.2 0.2", "0.1 0.2 0.1 0.2", "0.2 0.2 0.1 0.1"):
    shape.reset({}, 0, "a")
    for one in rewards.split():
      shape.act(one)
    totals.add(shape.reward())
  assert len(totals) == 1  # as a group that agrees


def test_results_of_a_client_hold_observation_reward_and_done():
  class Client:
    def reset(self):
      return types.SimpleNamespace(observation=made.Seen("begin"), reward=None, done=False)

    def step(self, action: str):
      return types.SimpleNamespace(observation={"a": 1, "b": "x"}, reward=2, done=True)

  shape = shapes.of(Client, ())
  assert shape.reset({}, 0, "a") == "begin"
  assert shape.act("go") == shapes.Stepped('{"a": 1, "b": "x"}', 2.0, True)


def test_tuples_of_gem_and_gymnasium_are_read():
  shape = shapes.of(made.Texts, ())
  assert shape.reset({}, 0, "a") == "say x"
  assert shape.act("y") == shapes.Stepped("heard y", 0.0, False)
  assert shape.act("x") == shapes.Stepped("heard x", 1.0, True)
  four = types.SimpleNamespace(reset=lambda: None, step=lambda action: ("o", 1, True, {}))
  assert shapes.Actions(four).act("a").done
  three = types.SimpleNamespace(reset=lambda: None, step=lambda action: ("o", 1, True))
  with pytest.raises(shapes.WrongShape, match="a tuple of 3"):
    shapes.Actions(three).act("a")


def test_actions_of_several_fields_are_json():
  @dataclasses.dataclass
  class Move:
    x: int
    y: int

  class Board:
    def reset(self):
      return None

    def step(self, action):
      return str(action.x + action.y)

  Board.step.__annotations__["action"] = Move
  shape = shapes.of(Board, ())
  assert shape.act('{"x": 1, "y": 2}').said == "3"
  for text in ("left", "[1, 2]", '{"x": 1}', '{"x": 1, "y": 2, "z": 3}'):
    with pytest.raises(actions.ActionError):
      shape.act(text)


def test_what_is_no_environment_is_refused():
  with pytest.raises(shapes.WrongShape, match="NoReset has no reset"):
    shapes.of(made.NoReset, ())
  with pytest.raises(shapes.WrongShape, match="nothing can be done in it"):
    shapes.of(made.Neither, ())
  with pytest.raises(shapes.WrongShape, match="calls no tools"):
    shapes.of(made.Guessing, [made.double])
  with pytest.raises(shapes.WrongShape, match="takes nothing"):
    shapes.Actions(types.SimpleNamespace(reset=lambda: None, step=lambda: None))


def test_async_tools_are_awaited():
  async def later(number):
    return number + 1

  assert shapes.called(later, {"number": 1}) == ("2", False)


def test_coroutines_of_a_process_share_a_loop_that_goes_on_between_them():
  class Connected:
    """As a client of a server: what it opened belongs to the loop that it was opened in."""

    async def reset(self, **row):
      self.loop, self.beats = asyncio.get_running_loop(), 0
      self.heart = asyncio.ensure_future(self.beat())

    async def beat(self):
      while True:
        self.beats += 1
        await asyncio.sleep(0.001)

    async def ask(self, text: str):
      """Asks."""
      if text == "leave":
        raise SystemExit(3)
      return self.loop is asyncio.get_running_loop()

  shape = shapes.of(Connected, ())
  shape.reset({}, 0, "a")
  (ask,) = [tool for tool in shape.tools() if tool.__name__ == "ask"]
  assert shapes.called(ask, {"text": "x"}) == ("True", False)
  seen = shape.held.beats
  time.sleep(0.05)
  assert shape.held.beats > seen  # which answers a server's pings
  with pytest.raises(SystemExit):
    shapes.called(ask, {"text": "leave"})
  assert shapes.called(ask, {"text": "x"}) == ("True", False)


def test_a_client_is_given_seed_and_episode_with_the_row():
  class Client:
    def reset(self, **given):
      return made.Seen(str(given))

    def step(self, action: str):
      return made.Seen("")

  told = {"seed": 7, "episode_id": "1-2", "level": 3}
  assert shapes.of(Client, ()).reset({"level": 3}, 7, "1-2") == str(told)
  assert shapes.of(Client, ()).reset({"seed": 1}, 7, "1-2") == str({"seed": 1, "episode_id": "1-2"})
