"""Inputs that once were read as something else, or ended in Python's own words, and some more of each kind."""

import pytest

from tests.fuzz import inputs, run

SEEDS: dict[str, tuple[int, ...]] = {
  "rows": (0, 1, 2, 3),
  "adapters": (16, 21, 24, 63),
  "overrides": (11, 14, 47, 98, 120, 130, 134),
  "templates": (1, 7, 36, 91, 138),
  "recipes": (7, 50),
  "checkpoints": (5, 6, 18, 25, 27, 42, 49, 82, 99),
  "rewards": (193, 237, 7104, 7105, 7115),
  "verifiers": (7000,),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return inputs.Base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
  ("kind", "seed"), [(kind, s) for kind, some in SEEDS.items() for s in some]
)
def test_a_spoiled_input_is_read_right_or_refused_in_a_sentence(kind, seed, base, tmp_path):
  result = run.outcome(inputs.KINDS[kind](seed, base, tmp_path))
  assert result["outcome"] != run.FAILED, result["why"]
