"""Trees of parameters: paths, surgery, the split into trained and fixed."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from posttrain_jax.core import tree
from posttrain_jax.core.leaf import Leaf
from posttrain_jax.core.weight import Transposed

TREE = {"embed": {"weight": 1}, "layers": {"q_proj": {"weight": 2, "bias": 3}}}


@struct.dataclass
class Node(Leaf):
  """Two trained fields, one fixed, one that is no array."""

  a: jax.Array
  b: jax.Array
  scale: jax.Array
  rate: float = struct.field(pytree_node=False, default=0.5)
  TRAINED = ("a", "b")


def node():
  return Node(jnp.ones(2), jnp.zeros(3), jnp.array(4.0), rate=0.25)


def test_doctests():
  assert doctest.testmod(tree).failed == 0


def test_flatten_and_unflatten_are_inverse():
  flat = tree.flatten(TREE)
  assert flat == {"embed/weight": 1, "layers/q_proj/weight": 2, "layers/q_proj/bias": 3}
  assert list(flat) == ["embed/weight", "layers/q_proj/weight", "layers/q_proj/bias"]
  assert tree.unflatten(flat) == TREE
  assert tree.unflatten(iter(flat.items())) == TREE


def test_a_weight_is_a_leaf():
  weight = Transposed(jnp.ones((2, 3)))
  assert dict(tree.items({"a": weight})) == {"a": weight}


def test_get_gives_leaves_and_branches_and_names_the_nearest():
  assert tree.get(TREE, "embed/weight") == 1
  assert tree.get(TREE, "layers/q_proj") == {"weight": 2, "bias": 3}
  with pytest.raises(KeyError, match=r"no parameter matches 'layers/q_prj/bias'; .*'layers/q_proj/bias'"):  # fmt: skip
    tree.get(TREE, "layers/q_prj/bias")
  with pytest.raises(KeyError, match="no parameter matches 'embed/weight/x'"):
    tree.get(TREE, "embed/weight/x")


def test_put_copies_the_way_and_nothing_else():
  changed = tree.put(TREE, "layers/q_proj/bias", 9)
  assert tree.get(changed, "layers/q_proj/bias") == 9
  assert tree.get(TREE, "layers/q_proj/bias") == 3
  assert changed["embed"] is TREE["embed"]
  assert tree.put({}, "a/b/c", 1) == {"a": {"b": {"c": 1}}}


def test_map_weights_applies_the_first_rule_that_matches():
  found = tree.map_weights(TREE, [(r".*/bias", lambda x: -x), (r"layers/.*", lambda x: 10 * x)])
  assert tree.flatten(found) == {
    "embed/weight": 1,
    "layers/q_proj/weight": 20,
    "layers/q_proj/bias": -3,
  }


@pytest.mark.parametrize("pattern", ["q_prj", "layers", "weight"])  # parts of paths match nothing
def test_map_weights_refuses_a_pattern_that_matches_nothing(pattern):
  with pytest.raises(ValueError, match=f"no parameter matches '{pattern}'; names look like "):
    tree.map_weights(TREE, [(r".*", abs), (pattern, abs)])


def test_partition_splits_by_declaration_and_combine_joins():
  fixed_weight = Transposed(jnp.ones((2, 3)))
  whole = {"x": {"node": node()}, "plain": jnp.ones(4), "base": fixed_weight}
  trained, fixed = tree.partition(whole)
  assert trained["x"]["node"].scale is None
  assert fixed["x"]["node"].a is None
  assert fixed["x"]["node"].b is None
  assert trained["base"] is None
  assert fixed["plain"] is None
  assert fixed["base"].base is fixed_weight.base
  sizes = sorted(x.size for x in jax.tree.leaves(trained))
  assert sizes == [2, 3, 4]
  joined = tree.combine(trained, fixed)
  assert jax.tree.structure(joined) == jax.tree.structure(whole)
  jax.tree.map(np.testing.assert_array_equal, joined, whole)
  assert joined["x"]["node"].rate == 0.25


def test_combine_takes_what_was_trained_since():
  whole = {"node": node(), "plain": jnp.ones(4)}
  trained, fixed = tree.partition(whole)
  moved = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t))(trained)
  joined = tree.combine(moved, fixed)
  np.testing.assert_array_equal(joined["node"].a, [2, 2])
  np.testing.assert_array_equal(joined["plain"], np.full(4, 2.0))
  assert joined["node"].scale == 4.0


def test_gradients_pass_through_the_split():
  trained, fixed = tree.partition({"node": node()})
  total = lambda t: (lambda n: n.scale * n.a.sum() + n.b.sum())(tree.combine(t, fixed)["node"])
  gradient = jax.grad(total)(trained)
  np.testing.assert_array_equal(gradient["node"].a, [4, 4])
  np.testing.assert_array_equal(gradient["node"].b, [1, 1, 1])
  assert gradient["node"].scale is None


def test_expand_names_every_layer():
  assert tree.expand("layers/mlp/up_proj/weight", (2,)) == [
    "layers.0.mlp.up_proj",
    "layers.1.mlp.up_proj",
  ]
  assert tree.expand("layers/self_attn/q_proj", (1,)) == ["layers.0.self_attn.q_proj"]
  assert tree.expand("lm_head/weight", (5,)) == ["lm_head"]


def test_size_is_logical_and_nbytes_is_stored():
  params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": Transposed(jnp.ones((4, 5)))}
  assert tree.size(params) == 26
  assert tree.nbytes(params) == 2 * 6 + 4 * 20
  assert tree.size({"huge": jax.ShapeDtypeStruct((2**20, 2**20), jnp.int8)}) == 2**40
  assert tree.nbytes({"huge": jax.ShapeDtypeStruct((2**20, 2**20), jnp.int8)}) == 2**40
