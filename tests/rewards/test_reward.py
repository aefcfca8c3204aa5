"""Parts, weights, gates, and scores that are missing."""

import math

import pytest

from posttrain_jax.core import words
from posttrain_jax.rewards import reward as reward_lib
from posttrain_jax.rewards import score
from posttrain_jax.rewards.model import Model
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.verifier import Answer


def of(**values):
  """An answer, of which each part says what its own column has."""
  return Answer("?", "!", values)


def reads(name):
  return lambda prompt, completion, example: example[name]


A, B, G = Part("a", reads("a")), Part("b", reads("b"), 0.5), Part("g", reads("g"), gate=True)


@pytest.mark.parametrize(
  ("values", "total"),
  [
    (dict(a=1, b=1, g=1), 1.5),
    (dict(a=1, b=1, g=0), 0.0),
    (dict(a=1, b=1, g=0.5), 0.75),
    (dict(a=0, b=0, g=1), 0.0),  # a format alone earns nothing
    (dict(a=0, b=-1, g=1), -0.5),
    (dict(a=0, b=-1, g=0), -0.5),  # and a broken one does not raise what is below 0
  ],
)
def test_a_gate_multiplies_the_weighted_sum(values, total):
  (scored,) = Reward([A, B, G]).score([of(**values)]).answers
  assert scored.total.value == total
  assert {name: given.value for name, given in scored.parts.items()} == values


def test_a_missing_part_makes_the_total_missing_and_is_never_0():
  asked = [of(a=1, b=1, g=1), of(a=None, b=1, g=1), of(a=1, b="x", g=0), of(a=1, b=1, g=2)]
  result = Reward([A, B, G], retries=2).score(asked)
  totals = [one.total for one in result.answers]
  assert [total.value for total in totals] == [1.5, None, None, None]
  assert totals[1].reason.startswith("a: returned None")
  assert totals[2].reason.startswith("b: returned 'x'")
  assert totals[3].reason == "g: returned 2.0, which is not within 0 and 1"
  assert result.retried == 6
  assert result.missing[("g", "returned N, which is not within N and N")] == 1
  assert sum(result.missing.values()) == 3
  why = result.why["g", "returned N, which is not within N and N"]
  assert why == "returned 2.0, which is not within 0 and 1"
  assert result.metrics["rewards/missing"] == 0.75
  assert result.metrics["rewards/a/missing"] == 0.25
  assert result.metrics["reward"] == 1.5
  assert (result.metrics["rewards/b/mean"], result.metrics["rewards/b/std"]) == (1, 0)


def test_what_is_missing_is_asked_again_and_nothing_else_is():
  asked = []

  def fails_once(prompt, completion, example):
    asked.append(completion)
    return None if completion == "b" and asked.count("b") == 1 else len(asked)

  answers = [Answer("?", text, {}) for text in "abc"]
  result = Reward([Part("p", fails_once)], retries=1).score(answers)
  assert asked == ["a", "b", "c", "b"]
  assert [one.total.value for one in result.answers] == [1, 4, 3]
  assert (result.retried, result.missing) == (1, {})
  again = Reward([Part("p", lambda *_: None)], retries=0).score(answers)
  assert (again.retried, again.metrics["rewards/missing"]) == (0, 1)


def test_a_part_that_does_not_apply_is_left_out_of_the_sum():
  no = score.not_applicable("not code")
  first, second, third = (
    Reward([A, B, G]).score([of(a=1, b=no, g=1), of(a=no, b=1, g=no), of(a=no, b=no, g=1)]).answers
  )
  assert first.total.value == 1
  assert second.total.value == 0.5
  assert third.total == score.missing("no part applies to this row")


def test_left_out_of_the_sum_of_one_answer_and_in_that_of_its_peers_would_be_0():
  no = score.not_applicable("not code")
  rows = [(dict(a=1, b=1), 0), (dict(a=1, b=no), 0), (dict(a=1, b=no), 1), (dict(a=1, b=no), None)]
  asked = [Answer("?", "!", values, group=group) for values, group in rows]
  totals = [one.total for one in Reward([A, B]).score(asked).answers]
  assert [total.value for total in totals] == [1.5, None, 1, 1]
  assert totals[1].reason == "b: not code, though to another answer of the same prompt it does"


def test_a_model_scores_in_batches():
  sizes = []

  def scores(pairs):
    sizes.append(len(pairs))
    return [len(completion) for _, completion in pairs]

  answers = [Answer("?", "x" * i, {}) for i in range(5)]
  result = Reward([Part("model", Model(scores, rows=2))]).score(answers)
  assert [one.total.value for one in result.answers] == [0, 1, 2, 3, 4]
  assert sizes == [2, 2, 1]
  with pytest.raises(ValueError, match="gave 1 scores for 2 answers"):
    Reward([Part("model", Model(lambda pairs: [1.0], rows=2))]).score(answers)
  assert Reward([Part("model", Model(scores))]).score([]).answers == ()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Reward([A, A]), "two parts are called a"),
    (lambda: Reward([G]), "nothing to multiply"),
    (lambda: Reward([]), "nothing to multiply"),
    (lambda: Reward([A], retries=-1), "retries=-1"),
    (lambda: Part("g", reads("g"), 0.5, gate=True), "its weight 0.5 would mean nothing"),
    (lambda: Part("a", reads("a"), range=(1, 1)), "within 1 and 1, so that no two differ"),
    (lambda: Part("a", reads("a"), range=(math.nan, 1)), "within nan and 1"),
    (lambda: Part("a", reads("a"), float("nan")), "the weight of a is nan"),
    (lambda: Part("a", reads("a"), 1e39), "the weight of a is 1e\\+39.*float32"),
  ],
)
def test_what_means_nothing_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


RIGHT = Part("right", reads("right"), range=(0, 1))
SHORT = Part("short", reads("short"), 0.5, range=(-1, 0), untested=True)
FREE = Part("free", reads("free"))
LOGGED = Part("logged", reads("logged"), weight=0)
BAD = Part("bad", reads("bad"), -2.0, range=(0, 1))
HALF = Part("half", reads("half"), gate=True, range=(0.25, 0.5))


@pytest.mark.parametrize(
  ("parts", "bounds"),
  [
    ([RIGHT], (0, 1)),
    ([RIGHT, SHORT], (-0.5, 1)),
    ([RIGHT, BAD], (-2, 1)),
    ([RIGHT, FREE], (-math.inf, math.inf)),
    ([RIGHT, LOGGED], (0, 1)),  # what has no weight has no bound to miss
    ([RIGHT, HALF], (0, 0.5)),
    ([RIGHT, BAD, HALF], (-2, 0.5)),
  ],
)
def test_the_bounds_of_a_total(parts, bounds):
  assert Reward(parts).bounds() == bounds
  assert Reward(parts).has_most == math.isfinite(bounds[1])


@pytest.mark.parametrize(
  ("parts", "name", "outcome"),
  [
    ([RIGHT, SHORT], "", ("right",)),
    ([RIGHT, SHORT], "short", ("short",)),
    ([RIGHT, SHORT], "total", ("right", "short")),
    ([SHORT], "", ("short",)),  # nothing else is left
    ([RIGHT, SHORT, G], "", ("right", "g")),  # without its gate an answer earns nothing
    ([SHORT, G], "", ("short", "g")),
    ([LOGGED, SHORT], "", ("logged", "short")),
    ([LOGGED, RIGHT, SHORT], "", ("right",)),
    ([RIGHT, G], "g", ("g",)),
  ],
)
def test_the_outcome_is_what_asks_whether_an_answer_is_right(parts, name, outcome):
  assert Reward(parts).outcome(name).names == outcome


def test_an_answer_is_right_whatever_shapes_its_reward():
  """By the highest outcome of its row, to which some parts may not apply; not where the reward itself is missing."""
  other = Part("other", reads("other"), range=(0, 1))
  reward = Reward([RIGHT, SHORT, other], retries=0)
  apart = score.not_applicable()
  rows = [
    of(right=1, short=0, other=apart),
    of(right=1, short=-0.875, other=apart),
    of(right=0, short=0, other=apart),
    of(right=1, short=None, other=apart),
    of(right=1, short=0, other=1),
    of(right=1, short=0, other=0),
  ]
  scored, outcome = reward.score(rows).answers, reward.outcome()
  assert [outcome.is_right(one) for one in scored] == [True, True, False, False, True, False]
  assert [outcome.value(one) for one in scored] == [1, 1, 0, None, 2, 1]
  assert [reward.is_right(one) for one in scored[:2]] == [True, False]


@pytest.mark.parametrize(
  ("reasons", "counted"),
  [
    (["the row's answer 'one' is: none", "the row's answer \"it's\" is: none"], "the row's answer '…' is: none"),
    ([f"the row's answer {words.shown('a' * n, 20)}, 7" for n in (3, 30)], "the row's answer '…', N"),
    ([f"returned {words.shown(text)}, a str" for text in ("a", "a'b", "a\"b", "'\"", "a, 'b'")], "returned '…', a str"),
    ([f"returned {[*range(n)]}, a list" for n in (1, 2, 9)], "returned […], a list"),
    ([f"returned {words.shown([*range(n)])}, a list" for n in (9, 900)], "returned […], a list"),
    ([f"returned {dict.fromkeys('abc'[:n], n)}, a dict" for n in (2, 3)], "returned {…}, a dict"),
    ([f"returned <generator object f at {hex(n)}>, a generator" for n in (10**9, 10**8)],
     "returned <generator object f at N>, a generator"),
    (["/tmp/it's/a.py:3: raised KeyError: 'a'", "b.py:4: raised KeyError: 'raised x'"], "raised KeyError"),
    (["the rows' answers 'a' and 'raised x' differ"], "the rows' answers '…' and '…' differ"),
  ],
)  # fmt: skip
def test_reasons_that_differ_in_what_they_show_are_counted_together(reasons, counted):
  kinds = {reward_lib.kind(reason) for reason in reasons}
  assert kinds == {counted}
