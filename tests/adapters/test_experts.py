"""Adapters of a mixture of experts: an adapter for each expert's matrices, and adapters of attention alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.core import grouped, tree, weight
from posttrain_jax.models import decoder
from tests.adapters import cases
from tests.models import families

CONFIGS = {
  "lora": AdapterConfig(r=3, lora_alpha=6),
  "dora": AdapterConfig(method="dora", r=2, target_modules=("down_proj", "up_proj", "q_proj")),
  "uneven": AdapterConfig(
    r=3, rank_pattern={r"experts\.[12]\.up_proj": 2}, alpha_pattern={"gate_proj": 5}
  ),
  "some": AdapterConfig(r=2, target_modules=r".*layers\.1\.mlp\.experts\.[0-4]\.(gate|up)_proj"),
  "attention": AdapterConfig(r=2, target_modules=("q_proj", "v_proj")),
  "router": AdapterConfig(r=2, target_modules=("gate",)),
}


@functools.cache
def made(family, name):
  """(model config, base, an adapter away from its start)."""
  config, params = families.make(family)
  params, adapter = adapters.init(jax.random.key(0), params, CONFIGS[name])
  return config, params, cases.trained(adapter)


@functools.partial(jax.jit, static_argnums=2)
def logits(params, tokens, config):
  return decoder.forward(params, tokens, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_bound_is_merged_and_a_fresh_one_is_the_base(name):
  config, params, adapter = made("qwen3_moe", name)
  tokens = families.tokens(2, 12)
  bound = logits(adapters.bind(params, adapter), tokens, config)
  merged = logits(adapters.merge(params, adapter), tokens, config)
  np.testing.assert_allclose(bound, merged, rtol=0, atol=2e-4)
  base = logits(params, tokens, config)
  assert float(jnp.abs(bound - base).max()) > 1e-2
  _, fresh = adapters.init(jax.random.key(0), params, CONFIGS[name])
  np.testing.assert_allclose(logits(adapters.bind(params, fresh), tokens, config), base, atol=1e-4)


def test_gradients_are_those_of_the_merged_matrices():
  config, params, adapter = made("qwen3_moe", "lora")
  tokens = families.tokens(2, 12)
  trained, fixed = tree.partition(adapter)
  whole = lambda trained: tree.combine(trained, fixed)
  loss = lambda params: jnp.mean(jnp.square(decoder.forward(params, tokens, config)))
  bound = jax.jit(jax.grad(lambda t: loss(adapters.bind(params, whole(t)))))(trained)
  merged = jax.jit(jax.grad(lambda t: loss(adapters.merge(params, whole(t)))))(trained)
  for one, other in zip(jax.tree.leaves(bound), jax.tree.leaves(merged)):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_hold_each_expert_apart_and_are_read_again(tmp_path, family, name):
  config, params, adapter = made(family, name)
  peft_format.save(tmp_path, adapter, CONFIGS[name], config)
  again, _ = peft_format.load(tmp_path, params, config)
  wanted = tree.flatten(adapter)
  assert tree.flatten(again).keys() == wanted.keys()
  bind = lambda adapter: adapters.merge(params, adapter)
  for path, leaf in tree.items(bind(again)):
    np.testing.assert_allclose(leaf, tree.get(bind(adapter), path), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["lora", "dora", "uneven"])
def test_the_product_of_tpus_is_that_of_blocks(name):
  """Of one layer's stack under an adapter, on a quantised base; gradients too."""
  config = families.config("qwen3_moe", hidden_size=64, moe_intermediate_size=64)
  params = quant.quantize_params(families.params(config), exclude=["self_attn.*"])
  params, adapter = adapters.init(jax.random.key(0), params, CONFIGS[name])
  bound = adapters.bind(params, cases.trained(adapter))
  stack = weight.layer(bound["layers"]["mlp"]["experts"]["up_proj"]["weight"], 1)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((30, 64)), jnp.float32)
  sizes = jnp.asarray([3, 0, 9, 1, 0, 4, 8, 2])  # three rows of nobody
  of = grouped.groups(sizes, 8)
  blocks = lambda x, w: grouped.product(x, w, of)[:27]
  ragged = lambda x, w: weight.ragged(x, w, sizes)[:27]

  @functools.partial(jax.jit, static_argnums=0)
  def run(product, x, node):
    value = lambda x, a: jnp.sum(jnp.sin(product(x, stack.replace(node=node.replace(a=a)))))
    return jax.value_and_grad(value, argnums=(0, 1))(x, node.a)

  got, wanted = (run(product, x, stack.node) for product in (ragged, blocks))
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * float(jnp.abs(other).max()))


def test_dropout_is_drawn_anew_for_each_row():
  config, params = families.make("qwen3_moe")
  chosen = AdapterConfig(r=2, lora_dropout=0.5, target_modules=("up_proj",))
  _, adapter = adapters.init(jax.random.key(0), params, chosen)
  adapter, tokens = cases.trained(adapter), np.full((1, 40), 5)  # one text's rows are all alike
  layer = tree.map_weights(params, [(r"layers/self_attn/o_proj/weight", lambda w: w * 0)])
  bound = adapters.bind(layer, adapter, key=jax.random.key(1))
  x = decoder.hidden(bound, tokens, config)
  assert len(np.unique(np.asarray(x[0]), axis=0)) > 30


def test_a_quantised_base_is_read_expert_by_expert():
  config = families.config("qwen3_moe", hidden_size=64, moe_intermediate_size=64)
  params = families.params(config)
  stored = quant.quantize_params(params)
  experts = stored["layers"]["mlp"]["experts"]["up_proj"]["weight"]
  assert experts.shape == (3, 8, 64, 64)
  assert not hasattr(stored["layers"]["mlp"]["gate"]["weight"], "codes")
  one = quant.quantize("one", params["layers"]["mlp"]["experts"]["up_proj"]["weight"][1, 2], "nf4")
  np.testing.assert_array_equal(one.dense(), experts.dense()[1, 2])
  tokens = families.tokens(2, 12)
  plain = tree.unflatten(
    (path, leaf.dense() if hasattr(leaf, "codes") else leaf) for path, leaf in tree.items(stored)
  )
  np.testing.assert_allclose(
    logits(stored, tokens, config), logits(plain, tokens, config), rtol=0, atol=1e-4
  )


def test_other_methods_and_mixed_batches_refuse_experts_by_name():
  _, params, adapter = made("qwen3_moe", "lora")
  with pytest.raises(ValueError, match=r"'vera' does not adapt experts, such as 'layers.0.mlp.exp"):
    adapters.init(jax.random.key(0), params, AdapterConfig(method="vera", r=2))
  with pytest.raises(ValueError, match="do not mix adapters of experts"):
    adapters.stack([adapter])
