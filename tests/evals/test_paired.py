"""Statistics of two models on the same items, beside scipy, brute force, and simulated truths."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from posttrain_jax.evals import paired

DRAWS = 1_000


def test_the_exact_test_is_the_binomial_of_what_changed():
  for lost, gained in ((0, 0), (3, 0), (9, 1), (5, 5), (14, 30)):
    n = lost + gained
    tail = sum(math.comb(n, i) for i in range(min(lost, gained) + 1)) / 2**n
    assert paired.mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


def test_the_score_statistic_is_of_the_likeliest_shares_by_search():
  """(gained - lost - n d) over the root of n (p + q - d^2), p and q maximising the likelihood with p - q = d."""
  for gained, lost, n, d in (
    (3, 9, 60, 0.05),
    (0, 0, 40, -0.1),
    (12, 2, 50, 0.3),
    (5, 5, 100, -0.02),
  ):

    def unlikely(q, gained=gained, lost=lost, n=n, d=d):
      terms = ((gained, q + d), (lost, q), (n - gained - lost, 1 - 2 * q - d))
      return -sum(count * math.log(max(share, 1e-300)) for count, share in terms if count)

    ends = (max(0.0, -d), (1 - d) / 2)
    q = optimize.minimize_scalar(
      unlikely, bounds=ends, method="bounded", options={"xatol": 1e-12}
    ).x
    expected = (gained - lost - n * d) / math.sqrt(n * (2 * q + d - d * d))
    assert float(paired.score_statistic(gained, lost, n, d)) == pytest.approx(expected, rel=1e-4)


def test_the_ends_of_the_score_interval_have_the_statistic_of_its_level():
  for gained, lost, n in ((3, 9, 60), (12, 2, 50), (0, 4, 30), (5, 5, 100)):
    low, high = paired.score_interval(gained, lost, n, z=1.96)
    assert float(paired.score_statistic(gained, lost, n, low)) == pytest.approx(1.96, rel=1e-6)
    assert float(paired.score_statistic(gained, lost, n, high)) == pytest.approx(-1.96, rel=1e-6)


def test_an_interval_of_right_and_wrong_holds_the_truth_in_95_of_100():
  """Without groups, 200 items, over shares of losses and gains from rare to common."""
  rng = np.random.default_rng(0)
  for gains, losses in ((0.02, 0.02), (0.05, 0.15), (0.2, 0.1)):
    counts = rng.multinomial(200, (gains, losses, 1 - gains - losses), size=20 * DRAWS)
    gained, lost = counts[:, 0], counts[:, 1]
    # the truth is in the interval where its statistic is within -z and z
    z = paired.score_statistic(gained, lost, 200, gains - losses)
    assert 0.93 <= np.mean(np.abs(z) <= stats.norm.ppf(0.975)) <= 0.97


def clustered(rng, groups, of, between):
  """[draws, groups, of] differences of standard deviation 1 within a group, and `between` of the groups' means."""
  return rng.normal(size=(DRAWS, groups, of)) + between * rng.normal(size=(DRAWS, groups, 1))


@pytest.mark.parametrize(("groups", "of", "between"), [(100, 1, 0.0), (30, 5, 1.0), (12, 8, 0.5)])
def test_an_interval_of_means_holds_the_truth_in_95_of_100_with_groups(groups, of, between):
  rng = np.random.default_rng(1)
  labels = np.repeat(np.arange(groups), of)
  held = 0
  for values in clustered(rng, groups, of, between).reshape(DRAWS, -1):
    found = paired.difference(np.zeros_like(values), values, groups=labels)
    held += found.low <= 0 <= found.high
  assert 0.93 <= held / DRAWS <= 0.97


def test_an_interval_of_bits_per_byte_holds_the_truth_in_95_of_100():
  """Items of unequal size, whose bits differ with it."""
  rng = np.random.default_rng(2)
  held = 0
  for _ in range(DRAWS):
    size = rng.uniform(100, 900, 60)
    moved = size * (-0.03 + rng.normal(0, 0.05, 60))
    found = paired.difference(np.zeros(60), moved, sizes=size)
    held += found.low <= -0.03 <= found.high
  assert 0.93 <= held / DRAWS <= 0.97


def test_an_interval_of_right_and_wrong_in_groups_holds_the_truth_in_95_of_100():
  rng = np.random.default_rng(3)
  groups, of, held = 40, 5, 0
  labels = np.repeat(np.arange(groups), of)
  for _ in range(400):
    share = np.repeat(rng.beta(2, 6, groups), of)  # of losses, alike in a group; its mean is 1/4
    after = (rng.uniform(size=groups * of) > share).astype(float)
    found = paired.difference(np.ones(groups * of), after, groups=labels)
    held += found.low <= -0.25 <= found.high
  assert 0.93 <= held / (400) <= 0.97


def test_groups_widen_the_interval_by_what_their_items_have_in_common():
  rng = np.random.default_rng(4)
  values = np.repeat(rng.normal(size=20), 10)  # ten times the same
  labels = np.repeat(np.arange(20), 10)
  alone = paired.difference(np.zeros(20), values[::10])
  together = paired.difference(np.zeros(200), values, groups=labels)
  assert together.error == pytest.approx(alone.error, rel=1e-12)
  assert paired.difference(np.zeros(200), values).error < 0.4 * together.error


def test_nothing_that_changed_is_no_certainty():
  same = paired.difference([1.0] * 50, [1.0] * 50)
  z = stats.norm.ppf(0.975)
  assert same.low == pytest.approx(-(z**2) / (50 + z**2), rel=1e-6)
  assert same.high == pytest.approx(-same.low, rel=1e-9)
  assert same.p_value == 1
  assert same.p_of_drop() == 1
  grouped = paired.difference([1.0] * 50, [1.0] * 50, groups=[i // 5 for i in range(50)])
  assert grouped.low < same.low, "ten facts, and not fifty"


def test_two_items_could_show_no_drop_at_all():
  """More than all of them cannot become wrong."""
  assert paired.difference([1, 0], [1, 0]).visible(0.05, 0.004) is None
  assert 0.05 < paired.difference([1, 0] * 40, [1, 0] * 40).visible(0.05, 0.004) < 1


def test_one_group_says_nothing():
  one = paired.difference([1.0, 1.0], [0.0, 0.0], groups=["a", "a"])
  assert (one.low, one.high, one.p_of_drop(), one.visible()) == (None, None, 1.0, None)


def test_p_of_a_drop_is_scipys_where_scipy_has_the_test():
  rng = np.random.default_rng(5)
  before, after = rng.normal(size=(2, 40))
  found = paired.difference(before, after)
  expected = stats.ttest_rel(after, before, alternative="less")
  assert found.p_of_drop() == pytest.approx(expected.pvalue, rel=1e-10)
  assert found.p_value == pytest.approx(stats.ttest_rel(after, before).pvalue, rel=1e-10)
  ends = stats.ttest_rel(after, before).confidence_interval(0.95)
  assert (found.low, found.high) == pytest.approx((ends.low, ends.high), rel=1e-10)
  right = paired.difference([1] * 12 + [0] * 28, [1] * 3 + [0] * 36 + [1])
  exact = stats.binomtest(1, 10, alternative="less").pvalue
  assert (right.lost, right.gained) == (9, 1)
  assert right.p_of_drop() == pytest.approx(exact, rel=1e-12)
  assert right.p_of_drop(0.05) > right.p_of_drop(), "within the tolerance less is wrong with it"


def test_the_drop_that_could_be_seen_is_seen_in_80_of_100():
  rng = np.random.default_rng(6)
  visible = np.mean(
    [paired.difference(np.zeros(100), rng.normal(size=100)).visible(alpha=0.05) for _ in range(50)]
  )
  seen = [
    paired.difference(np.zeros(100), rng.normal(-visible, 1, 100)).p_of_drop() < 0.05
    for _ in range(DRAWS)
  ]
  assert 0.77 <= np.mean(seen) <= 0.83


def test_holms_p_is_wrong_in_one_of_twenty_families_at_most():
  rng = np.random.default_rng(7)
  wrong = np.mean([min(paired.holm(rng.uniform(size=12).tolist())) < 0.05 for _ in range(4_000)])
  assert 0.035 < wrong < 0.06
  assert paired.holm([]) == []


def test_pass_at_k_is_the_share_of_all_draws_of_k():
  for n, c, k in itertools.product((1, 4, 6), range(7), (1, 2, 3, 6)):
    if c <= n and k <= n:
      draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
      assert paired.pass_at(n, c, k) == pytest.approx(np.mean([any(d) for d in draws]), abs=1e-12)
      assert paired.pass_every(n, c, k) == pytest.approx(
        np.mean([all(d) for d in draws]), abs=1e-12
      )
  with pytest.raises(ValueError, match="write k from 1 to the answers drawn"):
    paired.pass_at(4, 2, 5)
