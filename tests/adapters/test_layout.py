"""Parameters and adapters on eight devices and on one: the same values, where the rules say."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import AdapterConfig, layout
from posttrain_jax.core import memory, sharding, tree
from posttrain_jax.models import partition
from tests.marks import few
from tests.models import families

KEY = jax.random.key(0)
METHODS = ("lora", "dora", "pissa", "vera", "adalora", "ia3", "prompt", "prefix")
Q, DOWN = "layers/self_attn/q_proj/weight", "layers/mlp/down_proj/weight"


def mesh():
  return sharding.mesh(data=2, fsdp=2, tensor=2)


def adapter(method):
  config = AdapterConfig(method=method, modules_to_save=("norm",) if method == "lora" else ())
  return adapters.init(KEY, families.make("llama")[1], config)[1]


def same(placed, given):
  assert jax.tree.structure(placed) == jax.tree.structure(given)
  jax.tree.map(np.testing.assert_array_equal, placed, given)


@pytest.mark.parametrize("storage", ["dense", "int8", "nf4"])
def test_parameters_lie_as_the_rules_say(storage):
  params = families.params(families.config("llama", hidden_size=64, intermediate_size=128))
  params = params if storage == "dense" else quant.quantize_params(params, storage=storage)
  placed = layout.laid_out(params, mesh())
  same(placed, params)
  for path in (Q, DOWN):
    (first, *_) = jax.tree.leaves(tree.get(placed, path))
    assert first.sharding.spec == sharding.spec_for(path, partition.RULES)
  assert placed["norm"]["weight"].sharding.is_fully_replicated


@pytest.mark.parametrize("method", few(METHODS, "lora", "adalora", "prefix"))
def test_an_adapter_lies_as_its_base(method):
  node_tree = adapter(method)
  placed = layout.laid_out(node_tree, mesh())
  same(placed, node_tree)
  if method in ("lora", "dora", "pissa", "adalora"):
    node = tree.get(placed, DOWN)
    assert node.a.sharding.spec == P(None, ("tensor", "fsdp"), None)
    assert node.b.sharding.spec == P(None, None, "fsdp")
  shapes = layout.abstract(jax.eval_shape(lambda x: x, node_tree), mesh())
  jax.tree.map(lambda x, y: assert_lies_as(x, y), placed, shapes)


def assert_lies_as(array, shape):
  assert (array.shape, array.dtype, array.sharding) == (shape.shape, shape.dtype, shape.sharding)


def test_a_process_gives_the_shards_that_are_its_own_and_never_the_whole(monkeypatch):
  """What is asked of the host's array is the slices of this process's devices."""
  make, asked = jax.make_array_from_callback, []

  def recorded(shape, where, callback):
    def slices(index):
      asked.append(callback(index).shape)
      return callback(index)

    return make(shape, where, slices)

  monkeypatch.setattr(jax, "make_array_from_callback", recorded)
  whole = np.arange(2 * 64 * 32, dtype=np.float32).reshape(2, 64, 32)
  np.testing.assert_array_equal(layout.place(Q, whole, mesh=mesh()), whole)
  assert set(asked) == {(2, 32, 16)}


def test_on_one_device_nothing_is_copied_and_numpy_becomes_jax():
  params = families.make("llama")[1]
  placed = layout.laid_out(params)
  assert all(leaf is tree.get(params, path) for path, leaf in tree.items(placed))
  host = layout.place(Q, np.ones((2, 4, 4), np.float32))
  assert isinstance(host, jax.Array)
  assert host.sharding == SingleDeviceSharding(jax.local_devices()[0])


@pytest.mark.parametrize("on_mesh", [True, False], ids=["mesh", "one"])
def test_offloaded_layers_lie_in_the_hosts_memory_in_the_same_layout(on_mesh):
  where = mesh() if on_mesh else None
  params = families.make("llama")[1]
  placed = layout.laid_out(params, where, on_host=True)
  same(placed, params)
  shapes = layout.abstract(jax.eval_shape(lambda x: x, params), where, on_host=True)
  for path, leaf in tree.items(placed):
    kind = memory.KIND if path.startswith("layers/") else "device"
    assert leaf.sharding.memory_kind == kind, path
    assert tree.get(shapes, path).sharding.memory_kind == kind, path
    assert leaf.sharding.spec == tree.get(shapes, path).sharding.spec if on_mesh else True


def test_shapes_for_another_device_are_of_that_device():
  shapes = jax.eval_shape(lambda x: x, families.make("llama")[1])
  other = jax.devices()[3]
  found = {leaf.sharding for leaf in jax.tree.leaves(layout.abstract(shapes, device=other))}
  assert found == {SingleDeviceSharding(other)} == {layout.replicated(None, device=other)}
  assert layout.replicated(mesh()).is_fully_replicated


def test_a_path_that_no_rule_covers_is_an_error():
  with pytest.raises(KeyError, match="no sharding rule covers 'layers/extra'"):
    layout.laid_out({"layers": {"extra": np.ones(3)}}, mesh())
