"""No two seeds draw the same: what a key of JAX cannot hold is refused wherever a seed is given."""

import jax
import numpy as np
import pytest

from posttrain_jax.core import seeds
from posttrain_jax.evals import judge
from posttrain_jax.evals.samples import Plan
from posttrain_jax.merge import recipe
from posttrain_jax.rollout.sampling import GREEDY
from posttrain_jax.train import step

MERGE = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1.0}}]}
TAKERS = {
  "samples": lambda seed: Plan(1, 1, GREEDY, seed),
  "best_of": lambda seed: judge.check_best_of("sql", 2, seed),
  "merge": lambda seed: recipe.read(MERGE | {"random_seed": seed}),
  "step": lambda seed: step.Jitted(None, seed, None),
}


@pytest.mark.parametrize("taker", TAKERS.values(), ids=TAKERS)
def test_a_seed_that_would_repeat_another_is_refused(taker):
  for seed in (0, seeds.LARGEST):
    taker(seed)
  for seed in (-1, seeds.LARGEST + 1, 2**70, 1.5, "3"):
    with pytest.raises(ValueError, match=r"seed=.*: write a whole number from 0 to 4294967295"):
      taker(seed)


def test_the_bound_is_that_of_a_key():
  of = lambda seed: np.asarray(jax.random.key_data(jax.random.key(seed))).tolist()
  assert of(seeds.LARGEST) == of(-1) != of(0)
  assert of(seeds.LARGEST + 1) == of(0)
