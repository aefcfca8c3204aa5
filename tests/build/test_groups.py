"""What is told of groups of scored answers: what agrees, what is right, and their table."""

import numpy as np
import pyarrow.parquet
import pytest

from posttrain_jax.build import groups as groups_lib
from posttrain_jax.build.groups import Group
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.rollout.requests import Answer as Written
from posttrain_jax.rollout.requests import Request
from posttrain_jax.runs import completions

REWARD = Reward(
  [
    Part("number", lambda p, c, e: e["number"], range=(0, 1)),
    Part("length", lambda p, c, e: e["length"], range=(-1, 0), untested=True),
  ],
  retries=0,
)
OUTCOME = REWARD.outcome()


def group(*scores, number=0):
  """Of answers with these scores of number and length."""
  rows = [Answer("?", "!", {"number": n, "length": x}, group=number) for n, x in scores]
  prompt = Prompt(np.asarray([5], np.int32), "?", {}, "row")
  written = {
    i: Written(Request([5], 4), [7], np.zeros(1, np.float32), "stop_token", None)
    for i in range(len(rows))
  }
  return Group(number, prompt, written, ["!"] * len(rows), REWARD.score(rows).answers)


def test_wrong_answers_that_differ_in_length_alone_agree():
  wrong, both = group((0, -0.5), (0, 0)), group((0, 0), (1, -0.875))
  assert wrong.is_dead(OUTCOME)
  assert not wrong.is_dead(REWARD)
  assert not both.is_dead(OUTCOME)


def test_what_cannot_be_learned_from_does_not_differ():
  """An answer whose reward is missing is left out, and answers of one reward teach nothing whatever their outcome."""
  assert group((0, 0), (1, None), (0, -1)).is_dead(OUTCOME)
  assert group((0, 0), (1, -1)).is_dead(OUTCOME)
  assert groups_lib.pass_rate([group((1, None))], OUTCOME) == 0


def test_groups_that_agree_are_told_by_the_ends_of_the_outcome():
  every = [group((0, -1), (0, -1)), group((1, -1), (1, 0)), group((0, 0), (1, 0)), group((1, None))]
  told = groups_lib.metrics(every, OUTCOME)
  ends = ("frac_groups_dead", "frac_groups_all_worst", "frac_groups_all_best")
  assert [told[name] for name in ends] == [0.75, 0.25, 0.25]
  by_total = groups_lib.metrics(every, REWARD)
  assert [by_total[name] for name in ends] == [0.5, 0.25, 0]
  free = Reward([Part("number", REWARD.parts[0].verifier)])  # 0 and 1 where it has no bound
  assert [groups_lib.metrics(every, free)[name] for name in ends] == [0.75, 0.25, 0.25]


def test_right_answers_are_counted_by_the_outcome_and_missing_ones_are_no_trials():
  every = [group((1, 0), (1, -0.25), (1, -0.875), (1, -1)), group(*[(1, None)] * 3, (1, 0))]
  assert groups_lib.passed(every, OUTCOME) == {"pass@1": 1.0, "pass@4": 1.0}
  assert groups_lib.passed(every[1:], OUTCOME) == {"pass@1": 1.0}  # one of four has a score
  half = [group((0, 0), (1, None)), group((0, 0), (1, -1))]
  assert groups_lib.passed(half, OUTCOME) == {"pass@1": 0.25, "pass@2": 1.0}
  free = Reward([Part("number", REWARD.parts[0].verifier)])
  assert groups_lib.passed(half, free) == {}


def test_the_table_has_advantages_and_what_functions_log(tmp_path):
  """Of any names and types: what is none of one type is text, and no column of ours is overwritten."""
  used, other = group((1, 0), (0, -1), number=3), group((0, 0), (0, 0), number=4)
  used.advantages = np.asarray([0.5, -0.5], np.float32)
  used.columns = {"said": ["a", 1], "reward": [7, 8]}
  completions.write(tmp_path, 1, groups_lib.table(1, [used, other], [used], OUTCOME))
  rows = pyarrow.parquet.read_table(completions.table(tmp_path, 1)).to_pylist()
  columns = {name: [row[name] for row in rows] for name in rows[0]}
  assert columns["advantage"] == [0.5, -0.5, None, None]
  assert columns["outcome"] == [1, 0, 0, 0]
  assert columns["reward"] == [1, -1, 0, 0]
  assert columns["logged/reward"] == [7, 8, None, None]
  assert columns["said"] == ["a", "1", None, None]


@pytest.mark.parametrize("first", [0, 1])
def test_an_outcome_that_is_a_gate_or_part_alone_is_as_it_was_scored(first):
  names = ("number", "length")
  np.testing.assert_allclose(
    group((1, -0.5)).outcomes(REWARD.outcome(names[first])), [(1, -0.5)[first]]
  )
