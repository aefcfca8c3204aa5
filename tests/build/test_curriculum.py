"""Which prompts are asked next: all in turn, or the more often the likelier it is that their answers differ."""

import json
import types
from collections import Counter

import numpy as np
import pytest

from posttrain_jax.build import curriculum
from posttrain_jax.build.groups import Group
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.rewards import score
from posttrain_jax.rewards.reward import Scored
from posttrain_jax.settings import ConfigError

OUTCOME = types.SimpleNamespace(
  has_most=True, names=("exact",), is_right=lambda one: one.total.value == 1
)


def prompts(count, **columns):
  """columns: values of each row, None where it has none."""
  rows = [{k: v[i] for k, v in columns.items() if v[i] is not None} for i in range(count)]
  return [Prompt(np.asarray([5, i]), "?", row, f"row {i}") for i, row in enumerate(rows)]


def made(how, count=8, answers=4, outcome=OUTCOME, **columns):
  return curriculum.make(how, prompts(count, **columns), seed=3, answers=answers, outcome=outcome)


def answered(order, rights, answers=4):
  """order, that has seen {prompt: how many of its answers were right}."""
  groups = []
  for i, right in rights.items():
    values = [1.0] * right + [0.0] * (answers - right)
    scored = [Scored(score.of(value), {}) for value in values]
    groups.append((i, Group(0, prompts(i + 1)[i], scored=scored)))
  return order.saw(groups, OUTCOME)


def test_in_turn_every_prompt_comes_once_an_epoch():
  order = made("none")
  first, second = order.choose(range(8), ()), order.choose(range(8, 16), ())
  assert sorted(first) == sorted(second) == [*range(8)]
  assert first != second
  assert order.choose(range(5, 11), ()) == [*first[5:], *second[:3]]
  assert answered(order, {0: 4}) == {}
  assert order.get_state() == {}


def test_a_weight_is_the_chance_that_answers_differ():
  """Of 4,000 batches of one: prompts come in proportion to 1 - p^n - (1 - p)^n."""
  order = made("pass_rate", count=3)
  answered(order, {0: 4, 1: 2, 2: 0})
  p = np.asarray([4.5, 2.5, 0.5]) / 5
  np.testing.assert_allclose(order.rates, p)
  weights = 1 - p**4 - (1 - p) ** 4
  counts = Counter(order.choose(range(n, n + 1), ())[0] for n in range(4000))
  shares = np.asarray([counts[i] for i in range(3)]) / 4000
  np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.03)


def test_a_batch_has_no_prompt_twice_as_long_as_there_are_others():
  order = made("pass_rate")
  first = order.choose(range(5), ())
  assert len({*first}) == 5
  second = order.choose(range(5, 8), {*first})
  assert sorted([*first, *second]) == [*range(8)]
  again = order.choose(range(8, 12), {*range(6)})
  assert {*again[:2]} == {6, 7}
  assert len(order.choose(range(20), ())) == 20


def test_older_answers_count_less_each_time():
  order = made("pass_rate", count=2)
  told = answered(order, {0: 0})
  assert told == {"curriculum/pass_rate": 0.5, "curriculum/share_seen": 0.5}
  told = answered(order, {0: 4})
  assert told["curriculum/pass_rate"] == pytest.approx(0.1)
  assert order.rates[0] == pytest.approx((4 + 0.5) / (4 * curriculum.MEMORY + 4 + 1))


def test_answers_without_a_score_say_nothing():
  order = made("pass_rate", count=1)
  blank = Group(0, prompts(1)[0], scored=[Scored(score.missing("-"), {})] * 4)
  order.saw([(0, blank)], OUTCOME)
  assert order.get_state() == {}
  assert order.rates[0] == 0.5


def test_its_state_goes_through_a_checkpoint_bit_by_bit():
  order, other = made("pass_rate", answers=3), made("pass_rate", answers=3)
  rng = np.random.default_rng(0)
  for _ in range(9):
    answered(order, {int(rng.integers(8)): int(rng.integers(4))}, answers=3)
  other.set_state(json.loads(json.dumps(order.get_state())))
  np.testing.assert_array_equal(other.rates, order.rates)
  assert other.choose(range(40, 44), ()) == order.choose(range(40, 44), ())
  assert other.get_state() == order.get_state()


def test_rows_may_bring_their_pass_rates():
  order = made("pass_rate", count=3, pass_rate=[0.0, 0.5, None])
  np.testing.assert_allclose(order.rates, [0.5 / 5, 0.5, 0.5])


@pytest.mark.parametrize("rate", [1.5, -0.1, "0.5", True, float("nan")])
def test_a_pass_rate_that_is_none_is_refused(rate):
  with pytest.raises(ConfigError, match="row 0 has pass_rate="):
    made("pass_rate", count=1, pass_rate=[rate])


def test_an_outcome_without_a_highest_value_says_nothing_of_right():
  endless = types.SimpleNamespace(has_most=False, names=("mine.py:length",))
  with pytest.raises(ConfigError, match=r"that of mine\.py:length has no bound"):
    made("pass_rate", outcome=endless)
