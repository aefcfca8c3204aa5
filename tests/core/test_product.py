"""Products of float32 are told to be float32: left to themselves, a GPU rounds them to TF32 and a TPU to bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import Precision

from posttrain_jax.adapters import inits
from posttrain_jax.core import product
from posttrain_jax.models import decoder
from posttrain_jax.objectives import Sft
from posttrain_jax.optim import chain, galore
from posttrain_jax.train import state as state_lib
from posttrain_jax.train import step
from tests import tiny
from tests.adapters import cases
from tests.models import families

PRODUCTS = ("dot_general", "ragged_dot_general", "ragged_dot")


def products(jaxpr):
  """(dtypes of the operands, precision) of all products, those of inner programs too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in PRODUCTS:
      kinds = [var.aval.dtype for var in equation.invars[:2]]
      yield kinds, equation.params["precision"]
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from products(inner)


def rounded(function, *arguments):
  """(products that an accelerator would round, all products of float32)."""
  found = [
    p
    for k, p in products(jax.make_jaxpr(function)(*arguments).jaxpr)
    if set(k) == {np.dtype("float32")}
  ]
  loose = [p for p in found if p not in (Precision.HIGHEST, (Precision.HIGHEST,) * 2)]
  return len(loose), len(found)


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_a_training_step_rounds_no_product(kind):
  model, trainable, context = tiny.setup(kind)
  optimizer, _ = chain.chain("adamw", lr=0.01, steps=10)
  state = state_lib.start(trainable, optimizer)
  loose, found = rounded(step.make(Sft(model), optimizer), state, context, tiny.batch())
  assert found > 20
  assert loose == 0


def test_a_mixture_of_experts_rounds_no_product():
  config = families.config("qwen3_moe")
  params = decoder.abstract(config)
  loss = lambda params, tokens: decoder.forward(params, tokens, config).sum()
  loose, found = rounded(jax.grad(loss), params, np.zeros((2, 8), np.int32))
  assert found > 10
  assert loose == 0


@pytest.mark.parametrize("case", cases.ADAPTERS, ids=lambda case: case.__name__)
def test_an_adapter_multiplies_and_is_merged_without_rounding(case):
  base, node = case(jax.random.key(0))
  assert rounded(lambda node: node.dense(base), node)[0] == 0
  rows = jnp.ones((3, cases.IN))
  assert rounded(jax.grad(lambda node: node.apply(rows, base).sum()), node)[0] == 0


def test_what_an_adapter_begins_with_and_a_subspace_are_not_rounded():
  matrix = jnp.ones((12, 8))
  pissa = lambda w, key: inits.pissa(w, 2, 1.0, iterations=2, key=key)
  assert rounded(pissa, matrix, jax.random.key(0)) == (0, 5)
  low = galore.Subspace(jnp.ones((12, 2)), None)
  assert rounded(lambda g: low.back(low.project(g)), matrix) == (0, 2)


def test_products_of_less_than_float32_are_left_as_they_are():
  narrow = jnp.ones((2, 4), jnp.bfloat16)
  assert product.precision(narrow, narrow) is None
  assert product.precision(narrow, jnp.ones((4, 4))) is None
