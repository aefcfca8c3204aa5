"""A few draws of `make compose`, chosen so that together they meet most values of every axis."""

import pytest

from tests.compose import check, check_online, draws, folders, online
from tests.compose.run import ROOT
from tests.marks import slow

SEEDS = (slow(61), 77)
ONLINE = (slow(3), slow(5))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_drawn_together_works_together(seed, tmp_path):
  shared = folders.make(ROOT / ".cache" / "compose")
  d = draws.draw(seed)
  result = check.check(d, shared, tmp_path)
  assert result["outcome"] == check.PASSED, f"make compose DRAW={seed}\n{draws.shown(d)}\n{result}"


@pytest.mark.parametrize("seed", ONLINE)
def test_what_is_drawn_of_online_learning_works_together(seed, tmp_path):
  shared = folders.make(ROOT / ".cache" / "compose")
  d = online.draw(seed)
  result = check_online.check(d, shared, tmp_path)
  shown = f"make compose ONLINE=1 DRAW={seed}\n{draws.shown(d)}\n{result}"
  assert result["outcome"] == check.PASSED, shown


@pytest.mark.parametrize("draw", [draws.draw, online.draw])
def test_a_seed_is_one_draw_and_seeds_differ(draw):
  drawn = [draw(seed) for seed in range(50)]
  assert drawn == [draw(seed) for seed in range(50)]
  assert len({str(d) for d in drawn}) == 50
