"""Mixtures of experts: against a loop over all experts, on meshes, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import AdapterConfig, layout
from posttrain_jax.core import sharding, tree
from posttrain_jax.models import decoder, experts, hf
from posttrain_jax.models.config import from_hf
from tests.adapters import cases
from tests.marks import few
from tests.models import families


def every_expert(x, p, config):
  """The layer's MLP with each expert computed for each token, in float64."""
  to64 = lambda w: np.asarray(w, np.float64)
  x = to64(x)
  logits = x @ to64(p["gate"]["weight"])
  probabilities = np.exp(logits - logits.max(-1, keepdims=True))
  probabilities /= probabilities.sum(-1, keepdims=True)
  order = np.argsort(-probabilities, axis=-1, kind="stable")[..., : config.experts_per_token]
  weights = np.zeros_like(probabilities)
  np.put_along_axis(weights, order, np.take_along_axis(probabilities, order, -1), -1)
  if config.norm_experts:
    weights /= weights.sum(-1, keepdims=True)
  y = 0
  for e in range(config.experts):
    gate, up, down = (to64(p["experts"][f"{n}_proj"]["weight"][e]) for n in ("gate", "up", "down"))
    g = x @ gate
    y += weights[..., e : e + 1] * ((g / (1 + np.exp(-g)) * (x @ up)) @ down)
  return y


@pytest.mark.parametrize("chosen", [1, 8])
def test_a_layer_is_the_weighted_sum_over_experts(chosen):
  config = families.config("qwen3_moe", num_experts_per_tok=chosen)
  p = jax.tree.map(lambda w: w[1], families.params(config)["layers"]["mlp"])
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 32)), jnp.float32)
  valid = jnp.asarray(np.arange(9) < np.asarray([[9], [4]]))
  y, load = jax.jit(experts.mlp, static_argnums=2)(x, p, config, valid)
  np.testing.assert_allclose(y, every_expert(x, p, config) * valid[..., None], rtol=1e-4, atol=1e-4)
  assert float(load.tokens) == 13
  assert float(load.chosen.sum()) == 13 * chosen
  np.testing.assert_allclose(load.probability.sum(), 13, rtol=1e-5)


@functools.cache
def trained(base):
  """(config, base, LoRA of attention and experts away from its start)."""
  config = families.config(
    "qwen3_moe", hidden_size=64, moe_intermediate_size=64, num_hidden_layers=2
  )
  params = families.params(config)
  chosen = AdapterConfig(r=2, target_modules=("q_proj", "up_proj", "down_proj"))
  params, adapter = adapters.init(jax.random.key(0), params, chosen)
  return config, quant.quantize_params(params) if base == "nf4" else params, cases.trained(adapter)


def loss_of(config, fixed):
  def loss(trained, params, tokens):
    bound = adapters.bind(params, tree.combine(trained, fixed))
    segments = jnp.ones_like(tokens).at[:, 11:].set(0)
    x, load = decoder.hidden_and_load(bound, tokens, config, segment_ids=segments, remat="names")
    return jnp.mean(jnp.square(x * segments[..., None])), load

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


SPREAD = (
  ("dense", dict(expert=4, fsdp=2)),
  ("dense", dict(data=2, expert=2, tensor=2)),
  ("nf4", dict(fsdp=2, expert=2, tensor=2)),
  ("nf4", dict(fsdp=8)),
)


@pytest.mark.parametrize(("base", "shape"), few(SPREAD, SPREAD[1], SPREAD[2]), ids=str)
def test_experts_on_a_mesh_are_those_of_one_device(base, shape):
  config, params, adapter = trained(base)
  trainable, fixed = tree.partition(adapter)
  tokens = families.tokens(8, 14)
  (one, load_one), gradient_one = loss_of(config, fixed)(trainable, params, tokens)
  mesh = sharding.mesh(**shape)
  with jax.set_mesh(mesh):
    laid_out = lambda leaves: layout.laid_out(leaves, mesh)
    experts_at = laid_out(params)["layers"]["mlp"]["experts"]["up_proj"]["weight"]
    if shape.get("expert", 1) > 1:  # a device has whole experts, and not all of them
      leaf = jax.tree.leaves(experts_at)[0]
      share = shape["expert"] * shape.get("tensor", 1)
      assert leaf.addressable_shards[0].data.shape[1] == config.experts // share
    there, fixed = tree.partition(laid_out(adapter))
    (loss, load), gradient = loss_of(config, fixed)(there, laid_out(params), tokens)
  np.testing.assert_allclose(loss, one, rtol=1e-5)
  np.testing.assert_allclose(load.chosen, load_one.chosen)
  for x, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_one)):
    np.testing.assert_allclose(x, wanted, rtol=1e-3, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_no_device_sees_the_experts_of_another():
  config = families.config("qwen3_moe")
  mesh = sharding.mesh(expert=4, data=2)
  params = layout.abstract(decoder.abstract(config), mesh)
  tokens = jax.ShapeDtypeStruct((8, 24), jnp.int32)
  with jax.set_mesh(mesh):
    run = jax.jit(lambda p, t: decoder.hidden(p, t, config))
    text = run.lower(params, tokens).compile().as_text()
  assert "f32[2,32,24]" in text  # two experts of eight
  assert "f32[8,32,24]" not in text
  assert "reduce-scatter" in text


def test_experts_that_do_not_divide_are_refused_with_the_sizes():
  config, params = families.make("qwen3_moe")
  with jax.set_mesh(sharding.mesh(expert=8)):
    decoder.forward(params, families.tokens(8, 4), config)  # one each
  three = families.config("qwen3_moe", num_experts=6)
  with (
    jax.set_mesh(sharding.mesh(expert=4, data=2)),
    pytest.raises(ValueError, match="6 experts do not divide among expert x tensor = 4 devices"),
  ):
    decoder.forward(families.params(three), families.tokens(8, 4), three)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_quantised_folder_holds_each_expert_and_is_read_bit_for_bit(tmp_path, family):
  config = families.config(family, hidden_size=64, moe_intermediate_size=64, intermediate_size=64)
  params = quant.quantize_params(families.params(config))
  hf.save(tmp_path / "nf4", params, config)
  again, _ = hf.load(tmp_path / "nf4")
  for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(one, other)
  hf.save(tmp_path / "dense", families.params(config), config)
  quantised, _ = hf.load(tmp_path / "dense", storage="nf4")
  for one, other in zip(jax.tree.leaves(quantised), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(model_type="gpt_oss"), "'gpt_oss' is a mixture of experts that comes after mixtral and"),
    (dict(model_type="deepseek_v3"), "it needs latent attention, shared experts and a router by"),
    (dict(mlp_only_layers=[1]), "layers without experts among layers with them are not supported"),
    (dict(num_experts_per_tok=9), "num_experts_per_tok=9 of num_experts=8 experts"),
    (dict(num_experts="8"), "num_experts='8': expected a whole number"),
    (dict(model_type="mixtral", router_jitter_noise=0.1), "router_jitter_noise=0.1 is not"),
  ],
)
def test_what_is_not_computed_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    from_hf({**families.FAMILIES["qwen3_moe"], **changes})
