"""Operators over trees: layer by layer, as files store tensors, whatever the order; and what does not fit."""

import inspect
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from posttrain_jax import merge
from posttrain_jax.core import sharding, tree
from posttrain_jax.merge import averages, task_vectors
from posttrain_jax.quant import nf4
from tests.marks import few
from tests.models import families

KEY = jax.random.key(1)
PATH = "layers/mlp/up_proj/weight"
# a matrix, a vector and what stands outside the layers: every shape is compiled once an operator
SOME = (
  "embed_tokens/weight",
  PATH,
  "layers/self_attn/q_proj/bias",
  "norm/weight",
  "lm_head/weight",
)

# (operator over trees, the same over arrays, options)
BASED = {
  "task_arithmetic": dict(weights=[1, -0.5], lambda_=0.7),
  "ties": dict(density=0.4, weights=[1, 2]),
  "dare": dict(density=0.4, key=KEY),
  "della": dict(density=0.5, key=KEY, election=None),
  "breadcrumbs": dict(density=0.5, gamma=0.1),
  "model_stock": dict(filter_wise=True),
  "sce": dict(density=0.5),
}
FREE = {"linear": dict(weights=[1, 3]), "multislerp": dict(weights=[1, 3]), "karcher": {}}
PAIRED = {"slerp": dict(t=0.3), "nuslerp": dict(weights=[1, 2], along="in")}


@pytest.fixture(scope="module")
def params():
  """base, first, second: three models of one family."""
  base = families.make("qwen2_sliding")[1]
  base = tree.unflatten((path, x) for path, x in tree.items(base) if path in SOME)
  moved = []
  for seed in (1, 2):
    rng = np.random.default_rng(seed)
    near = lambda x, rng=rng: x + jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype)
    moved.append(tree.unflatten((path, near(x)) for path, x in tree.items(base)))
  return base, *moved


def merged(name, base, first, second):
  if name in BASED:
    return getattr(merge, name)([first, second], base=base, **BASED[name])
  if name in FREE:
    return getattr(merge, name)([first, second], **FREE[name])
  return getattr(merge, name)(first, second, **PAIRED[name])


def _entries(params):
  for path, leaf in tree.items(params):
    turn = (
      (lambda x: x.T)
      if path.endswith("_proj/weight") or path == "lm_head/weight"
      else (lambda x: x)
    )
    name = path.replace("/", ".")
    if not path.startswith("layers/"):
      yield name, turn(np.asarray(leaf))
      continue
    for i, layer in enumerate(np.asarray(leaf)):
      yield name.replace("layers.", f"layers.{i}."), turn(layer)


def over_files(name, base, first, second):
  base, first, second = (dict(_entries(p)) for p in (base, first, second))
  result = {}
  for at in base:
    options = {**BASED, **FREE, **PAIRED}[name]
    if "key" in options:
      options = options | {"key": jax.random.fold_in(KEY, zlib.crc32(at.encode()))}
    if name in BASED:
      result[at] = getattr(task_vectors, name)([first[at], second[at]], base=base[at], **options)
    elif name in FREE:
      result[at] = getattr(averages, name)([first[at], second[at]], **options)
    else:
      result[at] = getattr(averages, name)(first[at], second[at], **options)
  return result


# one without draws, one with, one without a base, and a path between two
@pytest.mark.parametrize(
  "name", few([*BASED, *FREE, *PAIRED], "task_arithmetic", "dare", "linear", "slerp")
)
def test_a_merge_of_trees_is_a_merge_of_their_files(name, params):
  found = merged(name, *params)
  assert list(tree.flatten(found)) == list(tree.flatten(params[0]))
  expected = over_files(name, *params)
  for at, tensor in _entries(found):
    np.testing.assert_array_equal(tensor, expected[at], err_msg=at)


def reverse(branch):
  return (
    {k: reverse(v) for k, v in reversed(branch.items())} if isinstance(branch, dict) else branch
  )


@pytest.mark.parametrize("name", ["dare", "della"])
def test_neither_order_nor_company_changes_a_draw(name, params):
  whole = tree.flatten(merged(name, *params))
  turned = tree.flatten(merged(name, *map(reverse, params)))
  assert list(turned) != list(whole)
  for path, leaf in whole.items():
    np.testing.assert_array_equal(turned[path], leaf)
  alone = merged(name, *({"layers": {"mlp": p["layers"]["mlp"]}} for p in params))
  np.testing.assert_array_equal(tree.get(alone, PATH), whole[PATH])
  first, second = whole[PATH][0], whole[PATH][1]
  untouched = tree.get(params[0], PATH)
  assert ((first == untouched[0]) != (second == untouched[1])).any()  # each layer draws its own


def test_names_have_no_model_before_them():
  own, filed = (merge.tensor_key(KEY, f"{at}layers.0.mlp.up_proj.weight") for at in ("", "model."))
  assert (jax.random.key_data(own) == jax.random.key_data(filed)).all()
  other = merge.tensor_key(KEY, "layers.1.mlp.up_proj.weight")
  assert (jax.random.key_data(own) != jax.random.key_data(other)).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ties", "dare", "della", "breadcrumbs", "sce", "karcher"])
def test_a_merge_on_a_mesh_lies_where_the_models_do(name, params):
  mesh = sharding.mesh(fsdp=8)
  lay = lambda x: jax.device_put(
    x, NamedSharding(mesh, Spec(None, "fsdp") if x.ndim > 2 else Spec())
  )
  found = merged(name, *(jax.tree.map(lay, p) for p in params))
  expected = tree.flatten(merged(name, *params))
  for path, leaf in tree.items(found):
    assert leaf.sharding.is_equivalent_to(lay(expected[path]).sharding, leaf.ndim), path
    np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_merge_lies_where_its_base_does():
  mesh = sharding.mesh(fsdp=8)
  whole, parts = (NamedSharding(mesh, spec) for spec in (Spec(), Spec("fsdp")))
  ones = jnp.ones((16, 4))
  for first, second in ((whole, parts), (parts, whole)):
    base, model = jax.device_put(ones, first), jax.device_put(ones, second)
    found = merge.task_arithmetic([model], base=base)
    assert found.sharding.is_equivalent_to(first, 2)


def test_arrays_are_trees_of_one_leaf():
  a, b = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  np.testing.assert_array_equal(merge.slerp(a, b, t=0.5), averages.slerp(a, b, t=0.5))
  found = merge.ties([a, b], base=np.zeros_like(a), density=0.5)
  np.testing.assert_array_equal(
    found, task_vectors.ties([a, b], base=np.zeros_like(a), density=0.5)
  )


def test_trees_inside_jit(params):
  base, first, second = params
  inside = jax.jit(lambda t: merge.interpolate(base, first, t=t))(0.25)
  outside = merge.interpolate(base, first, t=0.25)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), inside, outside)
  del second


def test_base_may_be_left_out_and_dtype_chosen(params):
  base, first, second = params
  own = merge.multislerp([first, second], base=base)
  free = merge.multislerp([first, second], base=None)
  assert np.abs(tree.get(own, PATH) - tree.get(free, PATH)).max() > 1e-4
  half = merge.linear([first, second], dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_help_shows_the_operators_options():
  for name in (*BASED, *FREE, *PAIRED, "soup", "interpolate"):
    operator = getattr(merge, name)
    assert "dtype" in inspect.signature(operator).parameters
    assert operator.__name__ == name
    assert operator.__doc__


# --- layers ----------------------------------------------------------------------------------------------------------


def test_passthrough_stacks_layers(params):
  base, first, second = params
  found = merge.passthrough([(first, 0, 2), (second, 1, 3), (base, 0, 1)])
  expected = np.concatenate(
    [tree.get(first, PATH)[0:2], tree.get(second, PATH)[1:3], tree.get(base, PATH)[0:1]]
  )
  np.testing.assert_array_equal(tree.get(found, PATH), expected)
  np.testing.assert_array_equal(found["embed_tokens"]["weight"], first["embed_tokens"]["weight"])
  np.testing.assert_array_equal(found["norm"]["weight"], base["norm"]["weight"])
  deeper = merge.passthrough([(found, 0, 5), (base, 0, 3)])
  assert tree.get(deeper, PATH).shape[0] == 8


@pytest.mark.parametrize(
  ("slices", "said"),
  [
    (lambda p: [], "no slices"),
    (lambda p: [(p, 0, 4)], r"slices\[0\] asks for layers 0 to 4 of 3"),
    (lambda p: [(p, 0, 1), (p, 2, 2)], r"slices\[1\] asks for layers 2 to 2"),
    (lambda p: [({"norm": p["norm"]}, 0, 1)], "no leaf under 'layers/'"),
    (lambda p: [(p, 0, 1), (drop(p, "norm/weight"), 0, 1)], "norm/weight"),
    (lambda p: [(p, 0, 1), (cut(p, PATH, 1), 0, 1)], "merge models of one architecture"),
  ],
)
def test_slices_that_do_not_fit(slices, said, params):
  with pytest.raises(ValueError, match=said):
    merge.passthrough(slices(params[0]))


# --- what does not fit -----------------------------------------------------------------------------------------------


def drop(params, path):
  return tree.unflatten((p, x) for p, x in tree.items(params) if p != path)


def cut(params, path, axis):
  shorter = lambda x: jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)
  return tree.put(params, path, shorter(tree.get(params, path)))


def quantised(params):
  return tree.put(params, PATH, nf4.quantize(jnp.ones((64, 8))))


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda p: drop(p, PATH), rf"base has {PATH}, models\[1\] has not: merge models of one architecture"),
    (lambda p: tree.put(p, "score/weight", jnp.ones((2, 2))), r"models\[1\] has score/weight, base has not"),
    (lambda p: tree.put(p, "lm_head/weight", jnp.ones((2, 2))), "tied head"),
    (lambda p: cut(p, PATH, 1), rf"'{PATH}' has shape \(3, 31, 48\) in models\[1\], \(3, 32, 48\) in base"),
    (lambda p: cut(p, "embed_tokens/weight", 0), "vocabularies differ; give all models one tokenizer"),
    (lambda p: cut(p, PATH, 0), "numbers of layers differ; take as many of each with merge.passthrough"),
    (lambda p: tree.put(p, PATH, tree.get(p, PATH)[0]), "one architecture"),
    (lambda p: tree.put(p, "norm/weight", jnp.ones(32, int)), r"models\[1\] has int32 at 'norm/weight'"),
    (quantised, rf"models\[1\] has a NF4 at '{PATH}': only arrays merge; write weight.dense"),
  ],
)  # fmt: skip
def test_trees_that_do_not_fit(change, said, params):
  base, first, second = params
  base = drop(base, "lm_head/weight") if "lm_head/weight" in tree.flatten(base) else base
  first, second = (drop(p, "lm_head/weight") for p in (first, second))
  with pytest.raises(ValueError, match=said):
    merge.ties([first, change(second)], base=base)


def test_one_tree_or_several(params):
  base, first, _ = params
  with pytest.raises(ValueError, match="models is a list of trees, not one"):
    merge.ties(first, base=base)
  with pytest.raises(ValueError, match="base is one tree, not a list"):
    merge.ties([first], base=[base])
  with pytest.raises(ValueError, match="first is one tree, not a list"):
    merge.slerp([base, first], first, t=0.5)
  with pytest.raises(ValueError, match="no models"):
    merge.linear([])


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_no_number_is_not_merged_away(params, number):
  """TIES compares sizes, and a NaN is neither larger nor smaller: it went, and nothing was said."""
  spoiled = tree.put(params[1], "norm/weight", params[1]["norm"]["weight"].at[3].set(number))
  with pytest.raises(ValueError, match=r"models\[1\] holds NaN or infinity at 'norm/weight'"):
    merge.ties([params[0], spoiled], base=params[2], density=0.5)
