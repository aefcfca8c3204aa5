"""Log-probabilities under the reference, computed once, are those that each step would compute."""

import jax
import numpy as np
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy

from posttrain_jax.core import sharding
from posttrain_jax.objectives import Preference, Scorer, reference_cache
from tests import tiny
from tests.marks import slow
from tests.objectives import batches, bigram
from tests.objectives.batches import assert_same, batch, gradient, setup, whole


@pytest.mark.parametrize("name", ["dpo", slow("kto"), slow("grpo")])
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


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_several_examples_of_a_row_are_scored_as_each_alone(name, tmp_path):
  objective, _, context, examples = setup(name)
  how = dict(scorer=objective, params=context.base, say=lambda _: None)
  alone = reference_cache.scored(examples, cache=tmp_path / "alone", **how)
  together = reference_cache.scored(examples, cache=tmp_path / "together", length=40, **how)
  for one, other in zip(alone, together):
    np.testing.assert_allclose(one.ref_logps, other.ref_logps, rtol=1e-5, atol=1e-5)
    assert np.any(one.ref_logps != 0)


def flipped(path):
  data = bytearray(path.read_bytes())
  data[-9] ^= 1
  path.write_bytes(bytes(data))


def overwritten(value):
  def damage(path):
    with safetensors.safe_open(path, "np") as file:
      flat, written = file.get_tensor("logps").copy(), file.metadata()
    flat[np.argmax(np.abs(flat))] = value
    safetensors_numpy.save_file({"logps": flat}, path, written)

  return damage


DAMAGES = {
  "a bit": flipped,
  "a zero": overwritten(0.0),
  "a NaN": overwritten(np.nan),
  "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
  "garbage": lambda path: path.write_bytes(b"garbage"),
  "empty": lambda path: path.write_bytes(b""),
}


def test_a_damaged_file_is_made_again_and_said(tmp_path):
  objective, _, context, examples = setup("dpo")
  said = []
  how = dict(scorer=objective, params=context.base, cache=tmp_path, say=said.append)
  good = reference_cache.scored(examples, **how)
  (path,) = tmp_path.iterdir()
  for name, damage in DAMAGES.items():
    damage(path)
    said.clear()
    again = reference_cache.scored(examples, **how)
    assert "made again" in said[0], name
    assert str(path) in said[0], name
    np.testing.assert_array_equal(again[1].ref_logps, good[1].ref_logps)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_reference_that_is_not_finite_is_refused(tmp_path):
  objective, _, context, examples = setup("dpo")
  broken = jax.tree.map(lambda x: x * np.nan, context.base)
  how = dict(scorer=objective, params=broken, cache=tmp_path, say=lambda _: None)
  with pytest.raises(ValueError, match=r"log-probabilities of .* are not finite"):
    reference_cache.scored(examples, **how)
  assert not list(tmp_path.iterdir())


def test_two_layers_that_change_places_are_another_model(tmp_path):
  """What one sum of each matrix would not see."""
  objective, _, context, examples = setup("dpo")
  said = []
  how = dict(scorer=objective, cache=tmp_path, say=said.append)
  reference_cache.scored(examples, params=context.base, **how)
  layers = jax.tree.map(lambda x: x[::-1], context.base["layers"])
  reference_cache.scored(examples, params={**context.base, "layers": layers}, **how)
  assert "computing" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [None, dict(data=2, fsdp=4)])
def test_every_example_of_many_batches_has_its_own(shape, tmp_path, monkeypatch):
  """More rows than one batch holds, of two lengths, the last batch part empty; on a mesh likewise."""
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
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
