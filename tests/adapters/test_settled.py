"""A base and its adapter as text is written with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import AdapterConfig, layout
from posttrain_jax.core import tree, weight
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models import decoder
from tests.adapters.kinds import moved
from tests.models import families

KEY = jax.random.key(0)
OPTIONS = {
  "lora": dict(r=4),
  "dora": dict(method="dora", r=4),
  "dora_some": dict(method="dora", r=4, layers_to_transform=1),
  "dora_embedding": dict(method="dora", r=4, target_modules=("embed_tokens", "down_proj")),
  "pissa": dict(method="pissa", r=4),
  "vera": dict(method="vera", r=5),
  "adalora": dict(method="adalora", init_r=4, target_r=2),
  "ia3": dict(method="ia3", target_modules=("k_proj", "v_proj", "down_proj")),
  "replaced": dict(r=4, modules_to_save=("lm_head", "norm")),
  "prefix": dict(method="prefix", num_virtual_tokens=3),
}


def made(name, dtype, family="llama", size=0.1):
  """(params, adapter moved from its start, config), the base as `layout` has it."""
  config, params = families.make(family)
  params = layout.laid_out(jax.tree.map(lambda x: x.astype(dtype), params))
  params, adapter = adapters.init(KEY, params, AdapterConfig(**OPTIONS[name]), model=config)
  return params, moved(adapter, size=size), config


def logits(params, config):
  ids = np.random.default_rng(0).integers(1, config.vocab_size, (2, 12))
  return np.asarray(decoder.forward(params, jnp.asarray(ids), config, dtype=jnp.float32))


def close(actual, expected, of_largest=1e-4):
  np.testing.assert_allclose(actual, expected, atol=of_largest * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_computes_what_the_bound_tree_does(name, dtype):
  params, adapter, config = made(name, dtype)
  close(
    logits(adapters.settled(params, adapter), config),
    logits(adapters.bind(params, adapter), config),
    0.06 if (name, dtype) == ("dora_embedding", "bfloat16") else 1e-4,  # rows are rounded twice
  )


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize(
  ("dtype", "storage"), [("float32", "nf4"), ("bfloat16", "nf4"), ("bfloat16", "int8")]
)
def test_a_quantised_base_becomes_plain_numbers_on_a_cpu(name, dtype, storage):
  config, params = families.make("llama")
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  options = dict(block_size=32, exclude=["down_proj"]) if storage == "nf4" else {}
  params = layout.laid_out(quant.quantize_params(params, storage=storage, **options))
  params, adapter = adapters.init(KEY, params, AdapterConfig(**OPTIONS[name]))
  adapter = moved(adapter, size=0.1)
  settled = adapters.settled(params, adapter)
  rounded = 0.06 if dtype == "bfloat16" else 1e-4
  close(logits(settled, config), logits(adapters.bind(params, adapter), config), rounded)
  kinds = {type(weight.unadapted(leaf)) for path, leaf in tree.items(settled) if tree.turned(path)}
  assert kinds <= {weight.Bfloat16, type(jnp.zeros(1))}


def test_a_family_of_experts_and_an_adapter_over_another_one():
  config, params = families.make("qwen3_moe")
  params = layout.laid_out(jax.tree.map(lambda x: x.astype("bfloat16"), params))
  for method in ("lora", "dora"):
    params, adapter = adapters.init(KEY, params, AdapterConfig(**OPTIONS[method]), model=config)
    below = adapters.bind(params, moved(adapter, size=0.1))
    _, above = adapters.init(KEY, params, AdapterConfig(r=2), model=config)
    above = moved(above, seed=1, size=0.1)
    close(
      logits(adapters.settled(below, above), config), logits(adapters.bind(below, above), config)
    )


def test_a_float32_matrix_is_merged_unless_it_will_be_rounded():
  params, adapter, _ = made("lora", "float32")
  is_bound = lambda tree_: {
    isinstance(leaf, Adapted) for path, leaf in tree.items(tree_) if path in at
  }
  at = [path for path, _ in tree.items(adapter)]
  assert is_bound(adapters.settled(params, adapter)) == {False}
  assert is_bound(adapters.settled(params, adapter, rounded=True)) == {True}


def test_a_small_change_reaches_what_writes_in_bfloat16_whole():
  """Merged, a large part of it would be rounded away."""
  params, adapter, config = made("lora", "bfloat16", size=0.0)
  b = lambda leaf: leaf.replace(b=3e-4 * jnp.sign(jax.random.normal(KEY, leaf.b.shape)))
  adapter = tree.unflatten((path, b(leaf)) for path, leaf in tree.items(adapter))
  before = logits(params, config)
  true = logits(adapters.bind(params, adapter), config) - before

  def reaches(some):
    return float(((logits(some, config) - before) * true).sum() / (true * true).sum())

  assert abs(reaches(adapters.settled(params, adapter)) - 1) < 0.02
  assert abs(reaches(adapters.merge(params, adapter)) - 1) > 0.1  # else this test could not fail
