"""Log-probabilities under the reference, computed once, are those that each step would compute."""

import jax
import numpy as np
import pytest

from posttrain_jax.objectives import (
  reference_cache,
)
from tests.objectives.batches import assert_same, batch, gradient, setup, whole


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo"])
def test_a_cached_reference_is_the_base(name, tmp_path):
  objective, trainable, context, examples = setup(name)
  said = []
  how = dict(scorer=objective, params=context.base, cache=tmp_path, say=said.append)
  cached = reference_cache.scored(examples, **how)
  again = reference_cache.scored(examples, **how)
  assert "computing" in said[0]
  assert "read from" in said[1]
  np.testing.assert_array_equal(cached[0].ref_logps, again[0].ref_logps)
  grads, metrics = gradient(objective, trainable, context, batch(cached))
  assert_same(grads, whole(name)[0])
  assert metrics == pytest.approx(whole(name)[1], rel=1e-5, abs=1e-6)
  other = jax.tree.map(lambda x: x * 1.01, context.base)
  reference_cache.scored(examples, **{**how, "params": other})
  assert "computing" in said[2]
