"""What a reward said once of the same answers is not asked again."""

import random

import pytest

from posttrain_jax.rewards import score
from posttrain_jax.rewards.ledger import Ledger
from posttrain_jax.rewards.overlapped import Overlapped
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.verifier import Answer, Context

GROUPS = {
  number: [Answer("?", text, {"gold": "b"}, [1, 2], number) for text in texts]
  for number, texts in enumerate([("a", "bb"), ("lost", "c"), ("off", "off")])
}


class Dice:
  """Says another number each time, to the answers that it has counted."""

  def __init__(self):
    self.asked = []

  def scores(self, answers, context):
    self.asked += [answer.completion for answer in answers]
    context.columns["\ud83d"] = {i: random.random() for i in range(len(answers))}
    context.metrics.setdefault("thrown", []).append(random.random())
    return [self.score(answer.completion) for answer in answers]

  def score(self, text):
    if text == "off":
      return score.not_applicable()
    return score.missing(f"no: \ud83d{random.random()}") if text == "lost" else random.random()


def scored(path, reward, groups, identity="dice"):
  with Ledger(path) as ledger, Overlapped(reward, ledger, identity) as scores:
    for number, answers in groups.items():
      scores.put(number, answers)
    return scores.result()


def alone(dice):
  return lambda prompt, completion, example: dice.scores([Answer("", completion, {})], Context())[0]


def test_what_another_process_has_scored_is_not_scored_again(tmp_path):
  dice = Dice()
  reward = Reward([Part("dice", alone(dice))])
  others = scored(tmp_path / "scores-1", reward, GROUPS)
  asked = len(dice.asked)
  paths = [tmp_path / "scores", tmp_path / "scores-1"]
  with Ledger(paths[0], paths) as ledger, Overlapped(reward, ledger, "dice") as scores:
    for number, answers in GROUPS.items():
      scores.put(number, answers)
    assert scores.result() == others
  assert len(dice.asked) == asked
  assert len(paths[0].read_text().splitlines()) == 1  # which is what a new file begins with


def test_a_list_that_was_scored_is_not_scored_again(tmp_path):
  """With what is missing, what does not apply, what was logged, and how often it was asked again."""
  dice = Dice()
  reward = Reward([Part("dice", dice)], retries=1)
  first = scored(tmp_path / "scores", reward, GROUPS)
  assert dice.asked.count("lost") == 2
  asked = len(dice.asked)
  assert scored(tmp_path / "scores", reward, GROUPS) == first
  assert len(dice.asked) == asked
  assert first.retried == 1
  assert not first.answers[4].parts["dice"].applies


def test_a_list_of_which_some_is_new_is_scored_whole(tmp_path):
  dice = Dice()
  reward = Reward([Part("dice", dice)], retries=0)
  scored(tmp_path / "scores", reward, {0: GROUPS[0]})
  again = scored(tmp_path / "scores", reward, GROUPS)
  assert dice.asked == ["a", "bb", "a", "bb", "lost", "c", "off", "off"]
  assert scored(tmp_path / "scores", reward, GROUPS) == again  # the later of the two


@pytest.mark.parametrize("cut", [0, 10])
def test_groups_that_were_scored_one_by_one_are_known_one_by_one(tmp_path, cut):
  """But for the line that a kill cut short."""
  dice, path = Dice(), tmp_path / "scores"
  reward = Reward([Part("dice", alone(dice))], retries=0)
  one = scored(path, reward, {1: GROUPS[1]})
  other = scored(path, reward, {0: GROUPS[0]})
  path.write_bytes(path.read_bytes()[: -cut or None])
  every = scored(path, reward, GROUPS)
  assert dice.asked == ["lost", "c", "a", "bb", *(["a", "bb"] if cut else []), "off", "off"]
  assert every.answers[2:4] == one.answers
  assert (every.answers[:2] == other.answers) == (not cut)


@pytest.mark.parametrize(
  ("identity", "changes"),
  [
    ("other", {}),
    ("dice", {"completion": "other"}),
    ("dice", {"prompt": "other"}),
    ("dice", {"example": {"gold": "other"}}),
    ("dice", {"tokens": [1, 3]}),
  ],
)
def test_another_reward_or_answer_is_scored(tmp_path, identity, changes):
  dice = Dice()
  reward = Reward([Part("dice", alone(dice))])
  scored(tmp_path / "scores", reward, {0: GROUPS[0]})
  first, second = GROUPS[0]
  changed = Answer(**{**vars(first), **changes})
  scored(tmp_path / "scores", reward, {0: [changed, second]}, identity)
  assert len(dice.asked) == 4


def test_a_line_that_lacks_something_is_named(tmp_path):
  path = tmp_path / "scores"
  scored(path, Reward([Part("dice", Dice())]), {0: GROUPS[0]})
  path.write_bytes(path.read_bytes().replace(b'"sizes"', b'"other"'))
  with pytest.raises(ValueError, match=r"scores:2 has no 'sizes': remove the file"):
    Ledger(path)
