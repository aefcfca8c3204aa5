"""Which answers are kept, and pass@k."""

import itertools
import statistics

import pytest

from posttrain_jax.evals import keeping
from posttrain_jax.evals.samples import Drawn, Sample
from posttrain_jax.rewards import score
from posttrain_jax.rewards.reward import Scored


def sample(number, value, *, tokens=None, text=None, finished=True):
  given = score.missing("no idea") if value is None else score.Score(value)
  text = f"x{number}" if text is None else text
  drawn = Drawn(0, number, [number] if tokens is None else tokens, text, finished)
  return Sample(drawn, Scored(given, {"part": given}))


@pytest.mark.parametrize(("count", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 4, 2)])
def test_pass_at_k_is_the_mean_over_all_ways_to_draw_k(count, right, k):
  ways = itertools.combinations([1] * right + [0] * (count - right), k)
  assert keeping.pass_at(k, count, right) == pytest.approx(statistics.fmean(map(any, ways)))


def test_missing_scores_are_in_no_mean():
  groups = [[sample(0, 1.0), sample(1, None)], [sample(0, 0.0), sample(1, 1.0)]]
  told = keeping.summary(groups, [], keeping.from_on(1.0))
  assert told.passes == {1: 0.75, 2: 1.0}  # two answers of the first prompt are not known
  assert (told.scored, told.mean) == (3, pytest.approx(2 / 3))
  assert told.missing == {("part", "no idea"): 1}


@pytest.mark.parametrize(
  ("rule", "kept"),
  [
    ("all", [0, 1, 2, 3, 4, 5]),
    ("best", [1]),
    ("top:2", [1, 2]),
    ("above:0", [1, 2]),
    ("all_right", [1]),
  ],
)
def test_rules(rule, kept):
  group = [
    sample(0, 0.0),
    sample(1, 1.0),
    sample(2, 0.5),
    sample(3, None),
    sample(4, -1.0),
    sample(5, 2.0, finished=False),
    sample(6, 3.0, text=" "),
    sample(7, 1.0, tokens=[1]),
  ]
  result = keeping.kept(keeping.parse(rule), group, keeping.from_on(1.0))
  assert [s.drawn.sample for s in result.samples] == kept
  assert result.left_out.total() == len(group) - len(kept)
  few = keeping.kept(keeping.parse(rule, 1), group, keeping.from_on(1.0))
  assert len(few.samples) == 1
  assert few.samples[0].drawn.sample == (5 if rule == "all" else 1)  # the best


@pytest.mark.parametrize("rule", ["all", "all_right"])
def test_a_copy_that_has_a_score_stands_for_one_that_has_none(rule):
  group = [sample(0, None, tokens=[7]), sample(1, 1.0, tokens=[7]), sample(2, None)]
  result = keeping.kept(keeping.parse(rule), group, keeping.from_on(1.0))
  assert [s.drawn.sample for s in result.samples] == ([1, 2] if rule == "all" else [1])
  assert result.left_out[keeping.SAME] == 1


@pytest.mark.parametrize(
  "text", ["right", "top", "top:0", "top:1.5", "above:", "above:nan", "best:2", "top:inf", ""]
)
def test_rules_that_there_are_not(text):
  with pytest.raises(ValueError, match=r"write best, all_right, all, pairs, top:K or above:X"):
    keeping.parse(text)


def test_a_cap_below_0():
  with pytest.raises(ValueError, match="--per_prompt=-1"):
    keeping.parse("best", -1)


PAIRED = {
  "the best right over the worst wrong that ended": (
    [
      sample(0, 0.2),
      sample(1, 1.0),
      sample(2, 0.1),
      sample(3, 0.0, finished=False),
      sample(4, 1.0),
    ],
    (1, 2),
  ),
  "what was cut, where nothing else is wrong": (
    [sample(0, 1.0), sample(1, 0.0, finished=False)],
    (0, 1),
  ),
  "the expected answer where none is right": ([sample(0, 0.0), sample(1, 0.5)], (None, 0)),
  "no wrong one": ([sample(0, 1.0), sample(1, 1.0)], keeping.NO_WRONG),
  "one text that was scored twice": (
    [sample(0, 1.0, text="x"), sample(1, 0.0, text="x")],
    keeping.NO_BETTER,
  ),
  "another text beside it": (
    [sample(0, 1.0, text="x"), sample(1, 0.0, text="x"), sample(2, 0.5)],
    (0, 2),
  ),
  "missing is not wrong": ([sample(0, 1.0), sample(1, None)], keeping.NO_WRONG),
  "nothing known": ([sample(0, None), sample(1, 0.0, text=" ")], keeping.NO_SCORES),
}


@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_is_right_over_wrong(name):
  group, expected = PAIRED[name]
  pair, why = keeping.paired(group, keeping.from_on(1.0), has_gold=True)
  if isinstance(expected, str):
    assert (pair, why) == (None, expected)
    return
  chosen = None if pair.chosen is None else pair.chosen.drawn.sample
  assert (chosen, pair.rejected.drawn.sample) == expected


def test_a_pair_without_an_expected_answer_or_a_bar():
  group = [sample(0, 0.1), sample(1, 0.5), sample(2, 0.3)]
  for right in (None, keeping.from_on(1.0)):
    pair, _ = keeping.paired(group, right, has_gold=False)
    assert (pair.chosen.drawn.sample, pair.rejected.drawn.sample) == (1, 0)
    assert keeping.paired(group[:1], right, has_gold=False) == (None, keeping.NO_BETTER)
    cut = [sample(0, 0.4), sample(1, 0.9, finished=False), sample(2, 0.2, finished=False)]
    pair, _ = keeping.paired(cut, right, has_gold=False)  # what ended is not held against itself
    assert (pair.chosen.drawn.sample, pair.rejected.drawn.sample) == (0, 2)
  with_gold, _ = keeping.paired(group, None, has_gold=True)  # nothing says that it is better
  assert with_gold.chosen.drawn.sample == 1


def test_pairs_are_told():
  right, wrong = sample(0, 1.0), sample(1, 0.0)
  groups = [[right, wrong], [wrong], [right]]
  some = [keeping.paired(group, keeping.from_on(1.0), has_gold=True) for group in groups]
  told = keeping.summary(groups, some, keeping.from_on(1.0))
  assert (told.kept, told.gold, told.left_out) == (2, 1, {keeping.NO_WRONG: 1})
  assert "2 pairs, in 1 the expected answer for want of a right one" in str(told)
  assert "no pair of 1 prompts without a wrong answer" in str(told)
