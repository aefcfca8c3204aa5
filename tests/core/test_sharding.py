"""Meshes, rules and what they do to a shape; eight virtual devices come from conftest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax.core import sharding

RULES = ((r"a/.*", P("fsdp")), (r"a/b", P("tensor")), (r"c", P()))


def test_a_mesh_has_all_axes_and_takes_what_is_left():
  shape = lambda **sizes: dict(sharding.mesh(**sizes).shape)
  alone = dict.fromkeys(sharding.AXES, 1)
  assert shape(data=2, context=2, tensor=2) == alone | dict(data=2, context=2, tensor=2)
  assert shape(fsdp=-1, tensor=2) == alone | dict(fsdp=4, tensor=2)
  one = sharding.mesh(devices=jax.devices()[3:4])
  assert dict(one.shape) == alone
  assert list(one.devices.flat) == jax.devices()[3:4]


@pytest.mark.parametrize(
  ("sizes", "says"),
  [
    (dict(fsdp=3), "data=1 x fsdp=3 x .*tensor=1 needs 3 devices, found 8; write -1"),
    (dict(), "needs 1 devices, found 8"),
    (dict(data=-1, tensor=3), "does not divide 8 devices"),
    (dict(data=-1, fsdp=-1), "one axis may be -1"),
    (dict(data=-1, fsdp=0), "must be 1 or more"),
    (dict(data=-2, fsdp=-4), "must be 1 or more"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, says):
  with pytest.raises(ValueError, match=says):
    sharding.mesh(**sizes)


def test_the_first_rule_that_matches_the_whole_path_decides():
  assert sharding.spec_for("a/b", RULES) == P("fsdp")
  assert sharding.spec_for("c", RULES) == P()
  with pytest.raises(KeyError, match="no sharding rule covers 'c/d'"):
    sharding.spec_for("c/d", RULES)


def test_axes_that_do_not_divide_a_dimension_are_dropped():
  mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
  fitted = lambda spec, *shape: sharding.fitted(spec, shape, mesh)
  assert fitted(P("fsdp", "tensor"), 4, 9) == P("fsdp", None)
  assert fitted(P(("data", "fsdp")), 8, 3) == P(("data", "fsdp"), None)
  assert fitted(P(("data", "fsdp")), 6, 3) == P(None, None)
  assert fitted(P(None, "tensor"), 3, 4) == P(None, "tensor")


def test_weights_are_shared_by_the_devices_of_a_row():
  mesh = sharding.mesh(fsdp=2, context=2, tensor=2)
  fitted = lambda spec, *shape: sharding.fitted(spec, shape, mesh)
  assert fitted(P("fsdp", "tensor"), 8, 4) == P(("fsdp", "context"), "tensor")
  assert fitted(P("fsdp", "tensor"), 6, 4) == P("fsdp", "tensor")
  assert fitted(P(("data", "fsdp"), None, "context"), 8, 4, 4) == P(
    ("data", "fsdp"), None, "context"
  )


def test_a_factor_lies_along_tensor_where_fsdp_does_not_divide_it_too():
  fitted = lambda spec, *shape, **sizes: sharding.fitted(spec, shape, sharding.mesh(**sizes))
  assert sharding.factors(P(None, "tensor", "fsdp")) == (("tensor", "fsdp"), "fsdp")
  assert sharding.factors(P(None, ("expert", "tensor"), "fsdp", None)) == ("fsdp", "fsdp")
  assert sharding.factors(P(None, "tensor")) == (None, "tensor")  # gathered: neither side has fsdp
  assert sharding.factors(P()) == (None, None)
  both, sizes = P(("tensor", "fsdp")), dict(fsdp=4, tensor=2)
  assert fitted(both, 16, **sizes) == P(("tensor", "fsdp"))
  assert fitted(both, 12, **sizes) == P("tensor")
  assert fitted(both, 9, **sizes) == P(None)
  assert fitted(both, 8, fsdp=2, context=2, tensor=2) == P(("tensor", "fsdp", "context"))


def test_named_places_an_array():
  mesh = sharding.mesh(fsdp=4, tensor=2)
  x = jax.device_put(np.ones((8, 6)), sharding.named(mesh, P("fsdp", "tensor"), (8, 6)))
  assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}


def test_constrain_does_nothing_without_a_mesh_and_places_with_one():
  x = jnp.ones((8, 3, 4))
  assert not sharding.active()
  assert sharding.constrain(x, "batch time embed") is x
  with jax.set_mesh(sharding.mesh(fsdp=4, tensor=2)):
    assert sharding.active()
    y = jax.jit(lambda x: sharding.constrain(x, "batch time mlp"))(x)
  assert {shard.data.shape for shard in y.addressable_shards} == {(2, 3, 2)}
  with jax.set_mesh(sharding.mesh(devices=jax.devices()[:1])):
    assert not sharding.active()


@pytest.mark.parametrize(("sizes", "rows"), [
  (dict(fsdp=4, tensor=2), "fsdp"), (dict(data=2, fsdp=4), "fsdp"), (dict(fsdp=2, context=4), ("fsdp", "context")),
])  # fmt: skip
def test_of_what_is_gathered_whole_each_device_has_a_part_of_the_gradient(sizes, rows):
  """Two constraints of the program: pinned whole, a TPU's compiler would sum the gradient whole."""
  w = jnp.ones((16, 6))
  loss = lambda w: jnp.sum(sharding.gather(w, P("fsdp", "tensor")) ** 2)
  with jax.set_mesh(sharding.mesh(**sizes)):
    pinned = [
      equation.params["sharding"].spec
      for equation in jax.make_jaxpr(jax.grad(loss))(w).eqns
      if equation.primitive.name == "sharding_constraint"
    ]
    gradient = jax.jit(jax.grad(loss))(w)
  assert pinned == [P(None, "tensor"), P(rows, "tensor")]
  np.testing.assert_array_equal(gradient, 2 * w)


def test_whole_numbers_are_gathered_too():
  with jax.set_mesh(sharding.mesh(fsdp=8)):
    found = jax.jit(lambda x: sharding.gather(x, P("fsdp")))(jnp.arange(16))
  np.testing.assert_array_equal(found, np.arange(16))


def test_an_axis_of_one_device_is_not_told():
  mesh = sharding.mesh(data=2, tensor=4)
  specs = {
    P(None, "fsdp"): P(),
    P(("data", "fsdp"), None): P("data"),
    P(("fsdp", "expert"), "tensor"): P(None, "tensor"),
    P(("data", "tensor")): P(("data", "tensor")),
  }
  with jax.set_mesh(mesh):
    for spec, alike in specs.items():
      x = jax.device_put(jnp.arange(64.0).reshape(8, 8), jax.NamedSharding(mesh, spec))
      told = sharding.told_alike({"x": x, "beside": 3})
      assert told["x"].sharding == jax.NamedSharding(mesh, alike)
      assert told["x"].sharding.is_equivalent_to(x.sharding, 2)
      np.testing.assert_array_equal(told["x"], x)
      assert told["beside"] == 3
  assert sharding.told_alike(x) is x  # without a mesh


def test_an_unknown_axis_is_named():
  with (
    jax.set_mesh(sharding.mesh(fsdp=8)),
    pytest.raises(KeyError, match="heds"),
  ):
    sharding.constrain(jnp.ones((8, 2)), "batch heds")
