"""A few draws of `make compose`, chosen so that together they meet most values of every axis."""

import pytest

from tests.compose import check, draws, folders
from tests.compose.run import ROOT
from tests.marks import slow

SEEDS = (slow(61), 77)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_drawn_together_works_together(seed, tmp_path):
  shared = folders.make(ROOT / ".cache" / "compose")
  d = draws.draw(seed)
  result = check.check(d, shared, tmp_path)
  assert result["outcome"] == check.PASSED, f"make compose DRAW={seed}\n{draws.shown(d)}\n{result}"


def test_a_seed_is_one_draw_and_seeds_differ():
  drawn = [draws.draw(seed) for seed in range(50)]
  assert drawn == [draws.draw(seed) for seed in range(50)]
  assert len({str(d) for d in drawn}) == 50
