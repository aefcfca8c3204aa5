"""Where moments lie on a mesh: beside the parameters they belong to, those of an adapter's factors among them."""

import functools

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, layout
from posttrain_jax.core import sharding, tree
from posttrain_jax.models import decoder
from posttrain_jax.optim import layout as optimizer_layout
from tests.optim import cases

# of the seven matrices of a layer; a rank of 8 is GaLore's in `cases.made`
METHODS = {
  "full": None,
  "lora": AdapterConfig(r=8),
  "dora": AdapterConfig(method="dora", r=8),
  "vera": AdapterConfig(method="vera", r=8),
  "adalora": AdapterConfig(method="adalora", init_r=8, target_r=8),
  "ia3": AdapterConfig(method="ia3"),
}
# parameters in all, and those that the rules shard: of the adapters both factors and the vectors of outputs, not e and
# lambda_d, which have one number a rank; of the base 9 matrices (7 a layer and both ends) and the biases of q, k and v
PARAMETERS = {
  "full": (15, 12),
  "lora": (14, 14),
  "dora": (21, 21),
  "vera": (14, 7),
  "adalora": (21, 14),
  "ia3": (7, 7),
}
# moments of a parameter's own size, for each parameter
MOMENTS = {"adamw": 2, "lion": 1, "sgd": 1, "adafactor": 1, "adamw8bit": 2}


@functools.cache
def abstract(method):
  """What trains of a tiny qwen2, as shapes on a mesh of eight devices."""
  mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
  params, config = decoder.abstract(cases.MODEL), METHODS[method]
  if config is None:
    return mesh, layout.abstract(params, mesh)
  made = jax.eval_shape(lambda p: adapters.init(jax.random.key(0), p, config)[1], params)
  return mesh, tree.partition(layout.abstract(made, mesh))[0]


def spread(where):
  return sum(not each.is_fully_replicated for each in jax.tree.leaves(where))


def laid_out(name, method):
  """(shardings of the parameters, of the state)."""
  mesh, params = abstract(method)
  state = jax.eval_shape(cases.made(name).init, params)
  where = optimizer_layout.shardings(state, params, NamedSharding(mesh, P()))
  assert jax.tree.structure(where) == jax.tree.structure(jax.tree.map(lambda _: 0, state))
  return jax.tree.map(lambda x: x.sharding, params), where


@pytest.mark.parametrize("method", METHODS)
def test_the_parameters_that_are_counted_against(method):
  where = jax.tree.map(lambda x: x.sharding, abstract(method)[1])
  assert (len(jax.tree.leaves(where)), spread(where)) == PARAMETERS[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MOMENTS)
def test_moments_lie_as_their_parameters_do(name, method):
  params, state = laid_out(name, method)
  assert spread(state) == MOMENTS[name] * PARAMETERS[method][1]
  if name == "adamw":
    (mu,) = [x.mu for x in jax.tree.leaves(state, is_leaf=_has_mu) if _has_mu(x)]
    assert jax.tree.leaves(mu) == jax.tree.leaves(params)


def _has_mu(x):
  return isinstance(x, tuple) and "mu" in getattr(x, "_fields", ())


# Adam-mini's second moments, one a block, that are sharded: an output of b and of a vector (not a's, one a rank);
# in the base those of v, o, gate, up and down and the biases; q and k have one a head, the ends one a token of 261
BLOCKS = {"full": 8, "lora": 7, "dora": 14, "vera": 7, "adalora": 7, "ia3": 7}


@pytest.mark.parametrize("method", METHODS)
def test_adam_minis_blocks_lie_as_the_outputs_that_they_are_of(method):
  state = laid_out("adam_mini", method)[1]
  assert spread(state) == PARAMETERS[method][1] + BLOCKS[method]


# a subspace of a matrix keeps one of its sides, that of a factor is [rank, rank]; vectors have plain moments
GALORE = {"full": 3 * 7 + 2 * 5, "lora": 2 * 14, "dora": 2 * 21, "adalora": 2 * 14}


@pytest.mark.parametrize("method", GALORE)
@pytest.mark.parametrize("name", ["galore", "galore8bit"])
def test_galores_subspaces_and_moments_lie_along_the_sides_that_they_keep(name, method):
  assert spread(laid_out(name, method)[1]) == GALORE[method]
