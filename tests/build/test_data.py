"""config.data: what rows become before they are batches."""

import math

import ml_collections
import numpy as np
import pytest

from posttrain_jax.build import data
from tests.objectives import batches

NAN = math.nan
SCORES = [(1.0, 0.0, 0.5, NAN), (2.0, 2.0), (0.1 + 0.2, 0.3, 0.3), (NAN, 3.0), (4.0, 1.0, 1.0)]
# by hand: mean of a group's scores, deviation by n - 1, one answer against the mean of the others
CENTRED = [(0.5, -0.5, 0.0, 0.0), (0, 0), (0, 0, 0), (0, 0), (2.0, -1.0, -1.0)]
DEVIATIONS = [0.5, 0.0, 0.0, 0.0, math.sqrt(3)]


def given(how, scores=SCORES):
  """The groups, each with its advantages."""
  sizes = tuple(map(len, scores))
  each = iter(scores)
  groups = batches.groups(len(scores), sizes, score=lambda rng, n: next(each))
  config = ml_collections.ConfigDict({"objective": {"advantage": how}})
  return data.with_advantages(config, groups)


def divided(by):
  return [tuple(x / (d + 1e-4) for x in row) for row, d in zip(CENTRED, by)]


@pytest.mark.parametrize(
  ("how", "expected"),
  [
    ("none", CENTRED),
    ("group", divided(DEVIATIONS)),
    ("batch", divided([np.nanstd(np.concatenate(SCORES), ddof=1)] * 5)),
    ("leave_one_out", [(0.75, -0.75, 0, 0), (0, 0), (0, 0, 0), (0, 0), (3.0, -1.5, -1.5)]),
  ],
)
def test_advantages_of_ragged_groups(how, expected):
  """One with an answer that has no score, two that agree, one within rounding, one with a single score."""
  for group, wanted, deviation in zip(given(how), expected, DEVIATIONS, strict=True):
    assert group.values["advantage"] == pytest.approx(wanted, rel=1e-5)
    assert group.values["deviation"] == pytest.approx((deviation,) * group.count, rel=1e-6)


def test_a_group_of_one_answer_is_refused():
  with pytest.raises(ValueError, match="over others to its prompt"):
    given("group", [(1.0, 0.0), (1.0,)])
