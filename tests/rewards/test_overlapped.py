"""Scores that are made while others are written are those of one call; and the alarm of a second score."""

import random
import threading

import numpy as np
import pytest

from posttrain_jax.rewards import alarm, overlapped, score
from posttrain_jax.rewards.overlapped import Overlapped
from posttrain_jax.rewards.reward import Part, Reward, together
from posttrain_jax.rewards.verifier import Answer


def length(prompt, completion, example):
  return float("nan") if completion == "nan" else float(len(completion))


class Listed:
  """A verifier that is given a list: how many answers it was called with."""

  def __init__(self):
    self.calls = []

  def scores(self, answers, context):
    self.calls.append(len(answers))
    context.columns["place"] = dict(enumerate(range(len(answers))))
    context.metrics.setdefault("calls", []).append(1.0)
    return [score.of(float(len(answer.completion))) for answer in answers]


GROUPS = [
  [Answer("?", text, {}, group=number) for text in texts]
  for number, texts in enumerate([("a", "bb"), ("nan", "cccc"), ("d", "dd"), ("eeeee", "")])
]
WHOLE = [answer for group in GROUPS for answer in group]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_groups_come_changes_nothing(seed):
  reward = Reward([Part("length", length)], retries=2)
  wanted = reward.score(WHOLE)
  order = random.Random(seed).sample(range(len(GROUPS)), len(GROUPS))
  with Overlapped(reward) as scores:
    for number in order:
      scores.put(number, GROUPS[number])
    assert scores.result() == wanted
  assert wanted.retried == 2
  assert sum(wanted.missing.values()) == 1


def test_answers_are_scored_while_others_are_written():
  scored = threading.Event()

  def says(prompt, completion, example):
    scored.set()
    return 1.0

  with Overlapped(Reward([Part("says", says)])) as scores:
    scores.put(0, GROUPS[0])
    assert scored.wait(10)  # nobody has asked for the result
    scores.put(1, GROUPS[1])
    assert len(scores.result().answers) == 4


def test_what_has_waited_is_scored_some_groups_at_a_time():
  """So that no more than those are paid for again after a kill."""
  started, sizes = threading.Event(), []

  class Counting(Reward):
    def score(self, answers, **how):
      assert started.wait(10)
      sizes.append(len(answers))
      return super().score(answers, **how)

  with Overlapped(Counting([Part("length", length)])) as scores:
    for number in range(3 * overlapped.GROUPS):
      scores.put(number, [Answer("?", "a" * number, {}, group=number)])
    started.set()
    values = [one.total.value for one in scores.result().answers]
  assert values == [*range(3 * overlapped.GROUPS)]
  assert max(sizes) == overlapped.GROUPS


def test_a_verifier_that_is_given_a_list_has_it_whole():
  listed = Listed()
  reward = Reward([Part("listed", listed), Part("length", length, range=(0, 9))])
  assert not reward.is_per_answer
  with Overlapped(reward) as scores:
    for number in (2, 0, 3, 1):
      scores.put(number, GROUPS[number])
    result = scores.result()
  assert listed.calls == [len(WHOLE)]
  assert result.columns == {"place": [*range(8)]}
  assert [one.parts["listed"].value for one in result.answers] == [len(a.completion) for a in WHOLE]


def test_what_a_verifier_cannot_do_is_raised_where_the_result_is_asked_for():
  class Wrong:
    def scores(self, answers, context):
      return []

  with Overlapped(Reward([Part("wrong", Wrong())])) as scores:
    scores.put(0, GROUPS[0])
    with pytest.raises(ValueError, match="returned 0 scores for 2"):
      scores.result()


def test_the_metrics_of_several_rounds_are_those_of_all_their_answers():
  listed = Listed()
  reward = Reward([Part("length", length), Part("listed", listed)], retries=1)
  several = together([reward.score(GROUPS[0]), reward.score([*GROUPS[1], *GROUPS[2]])])
  whole = reward.score([*GROUPS[0], *GROUPS[1], *GROUPS[2]])
  assert several.answers == whole.answers
  assert several.metrics == whole.metrics
  assert several.metrics["rewards/length/mean"] == pytest.approx((1 + 2 + 4 + 1 + 2) / 5)
  assert several.missing == whole.missing
  assert several.columns["place"] == [0, 1, 0, 1, 2, 3]


NOISE = np.random.default_rng(0).normal(0, 1, (200, 2))


@pytest.mark.parametrize(
  ("rewards", "others", "speaks"),
  [
    ((0.0, 0.4), (0.6, 0.3), True),
    ((0.0, 0.4), (0.6, 0.6), False),  # the reward alone rises
    ((0.0, 0.4), (0.3, 0.6), False),  # both rise
    ((0.4, 0.0), (0.6, 0.3), False),  # both fall
  ],
)
def test_the_alarm_is_of_a_reward_that_rises_while_the_other_falls(rewards, others, speaks):
  watch, said = alarm.Watch(), []
  for batch in range(40):
    late = min(max((batch - 10) / 20, 0), 1)
    at = lambda ends, late=late, noise=0.0: ends[0] + late * (ends[1] - ends[0]) + noise
    noise = 0.02 * NOISE[batch]
    said.append(watch.add(at(rewards, noise=noise[0]), at(others, noise=noise[1])))
  assert any(said) == speaks
  if speaks:
    assert "while the held-out score fell from 0" in next(filter(None, said))


def test_batches_that_vary_are_seldom_an_alarm():
  watch = alarm.Watch()
  assert not any(watch.add(reward, other) for reward, other in NOISE)


def test_a_watch_goes_on_from_what_it_has_seen():
  whole, parts = alarm.Watch(), alarm.Watch()
  for batch in range(30):
    said = whole.add(batch, -batch)
    if batch == 12:
      parts = alarm.Watch([tuple(pair) for pair in parts.history])
    assert parts.add(batch, -batch) == said
