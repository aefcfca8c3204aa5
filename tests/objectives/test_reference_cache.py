"""Log-probabilities under the reference, computed once, are those that each step would compute."""

import jax
import numpy as np
import pytest

from posttrain_jax.core import sharding
from posttrain_jax.objectives import Preference, Scorer, reference_cache
from tests import tiny
from tests.objectives import batches, bigram
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


@pytest.mark.parametrize("shape", [None, dict(data=2, fsdp=4)])
def test_every_example_of_many_batches_has_its_own(shape, tmp_path, monkeypatch):
  """More rows than one batch holds, of two lengths, the last batch part empty; on a mesh likewise."""
  monkeypatch.setattr(Scorer, "hidden", bigram.hidden)
  monkeypatch.setattr(reference_cache, "TOKENS", 512)
  params = bigram.params(0)
  examples = [*batches.pairs(9, seed=1), *batches.groups(10, (12,), seed=2)]
  mesh = None if shape is None else sharding.mesh(**shape)
  scored = reference_cache.scored(
    examples, Preference(tiny.config()), params, cache=tmp_path, mesh=mesh, say=lambda _: None
  )
  for example, one in zip(examples, scored):
    expected = np.asarray(bigram.of_answers([example]).logps(params)).sum(1)
    sums = [one.ref_logps[one.answer == i].sum() for i in range(one.count)]
    np.testing.assert_allclose(sums, expected, rtol=1e-4)
