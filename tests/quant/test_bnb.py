"""What bitsandbytes' files hold of one matrix returns bit for bit, and says its own kind and shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.quant import bnb
from tests.marks import few
from tests.quant.types import TYPES

ROWS, OUT = 128, 6
W = np.random.default_rng(0).normal(size=(2, ROWS, OUT)).astype(np.float32)  # two layers


def stored(weight, *at):
  """{part: array} as a file holds it, each of the shape and dtype that is announced."""
  tensors = {}
  for part, (shape, dtype, make) in bnb.write(weight, at).items():
    tensors[part] = make()
    assert (tensors[part].shape, str(tensors[part].dtype)) == (shape, dtype), part
  return tensors


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("kind", few(TYPES, TYPES[0], TYPES[4]), ids=str)
def test_a_matrix_returns_and_says_its_shape(kind, layer):
  weight = kind.quantize(jnp.asarray(W if layer is not None else W[1]))
  tensors = stored(weight, *(() if layer is None else (layer,)))
  assert bnb.storage(tensors) == kind.name.split("_")[0]
  assert bnb.shape(tensors) == (OUT, ROWS)
  found = bnb.read("q.weight", tensors, (OUT, ROWS))
  np.testing.assert_array_equal(
    found.dense(jnp.float32), kind.quantize(jnp.asarray(W[1])).dense(jnp.float32)
  )
  expected = jax.tree.leaves(kind.quantize(jnp.asarray(W[1])))
  for leaf, own in zip(jax.tree.leaves(found), expected, strict=True):
    assert leaf.dtype == own.dtype
    np.testing.assert_array_equal(np.reshape(leaf, own.shape), own)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_shape_that_was_not_asked_for_is_refused(kind):
  tensors = stored(kind.quantize(jnp.asarray(W[0])))
  with pytest.raises(ValueError, match=r"q\.weight: .*the config asks for"):
    bnb.read("q.weight", tensors, (OUT, 2 * ROWS))


def test_a_plain_weight_is_dense_and_stands_alone():
  assert bnb.storage({"": 1}) == "dense"
  assert bnb.parts("q.weight", {"q.weight"}) == {"": "q.weight"}
  assert bnb.parts("q.weight", {"q.weight", "q.weight.absmax", "k.SCB"}) == {
    "": "q.weight",
    "absmax": "q.weight.absmax",
  }
