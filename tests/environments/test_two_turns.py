"""The questions of experiments/two_turns.py: right where the tables are looked at, guessed where they are not."""

import pathlib
import re

import pytest

from posttrain_jax.rewards import sql

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.fixture
def two_turns(monkeypatch):
  monkeypatch.syspath_prepend(EXPERIMENTS)
  import two_turns

  return two_turns


def test_each_question_is_answered_by_its_gold_query_on_its_own_database(two_turns):
  questions = two_turns.drawn("held_out", 60)
  assert {two_turns.right(one["gold"], one) for one in questions} == {1.0}
  others = [two_turns.right(one["gold"], two_turns.drawn("other", 1)[0]) for one in questions]
  assert sum(others) < 6  # names, or rows, are other ones there


def test_no_question_stands_on_both_sides_with_the_same_answer(two_turns):
  train = two_turns.drawn("train", 200)
  key = lambda one: (one["prompt"][-1]["content"], one["gold"])
  held_out = two_turns.drawn("held_out", 60, train)
  assert not {*map(key, train)} & {*map(key, held_out)}
  assert {*map(key, train)} & {*map(key, two_turns.drawn("held_out", 60))}  # without being told


def test_what_the_prompt_leaves_out_is_what_the_tool_shows(two_turns):
  for one in two_turns.drawn("train", 60):
    system, asked, call, told, answer = two_turns.shown(one, [{"type": "function"}])["messages"]
    names = re.findall(r"[a-z_]+", re.sub(r"'[^']*'", "", one["gold"]))
    assert names
    assert all(name in told["content"] for name in names)
    assert call["tool_calls"][0]["function"]["name"] == "tables"
    assert [system, asked, answer] == two_turns.shown(one, [])["messages"]
    assert (
      told["content"]
      == sql.connected(one)[0].execute("SELECT sql FROM sqlite_master").fetchone()[0]
    )
