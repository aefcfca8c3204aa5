"""Weights of the engine in fewer bits: the products they give, and what an answer made with them says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax import adapters
from posttrain_jax.adapters import layout
from posttrain_jax.core import tree, weight
from posttrain_jax.core.weight import linear, linear32
from posttrain_jax.models import decoder
from posttrain_jax.quant import int8
from posttrain_jax.rollout import engine, storage
from posttrain_jax.rollout.sampling import Sampling
from tests.marks import few
from tests.models import families

MATRIX = np.random.default_rng(3).standard_t(3, (48, 40)).astype(np.float32)
KINDS = ["auto", "bfloat16", "int8"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_stored_matrix(kind):
  w = storage.matrix(jnp.asarray(MATRIX), kind)
  stored = np.asarray(w.dense(jnp.float32), np.float64)
  assert w.shape == MATRIX.shape
  for rows in (1, 2, 17):
    x = np.random.default_rng(rows).standard_t(2, (rows, 48)).astype(np.float32)
    found, size = np.asarray(jax.jit(linear)(x, w)), np.abs(x) @ np.abs(stored)
    bits = {
      "auto": 0.0,
      "bfloat16": np.abs(x) * 2**-16,
      "int8": np.abs(x).max(1, keepdims=True) / 2**15,
    }
    error = np.broadcast_to(bits[kind], x.shape) @ np.abs(stored) * 1.01 + 1e-6 * size
    assert np.all(np.abs(found - x.astype(np.float64) @ stored) <= error)
    assert linear(jnp.asarray(x[None]), w).shape == (1, rows, 40)


@pytest.mark.parametrize(("kind", "error"), [("auto", 0), ("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_a_stored_matrix_is_as_near_as_its_bits(kind, error):
  w = np.asarray(storage.matrix(jnp.asarray(MATRIX), kind).dense(jnp.float32))
  size = np.abs(MATRIX) if kind == "bfloat16" else np.abs(MATRIX).max(axis=0)
  assert np.all(np.abs(w - MATRIX) <= size * error * (1 + 1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_does_not_become_a_number(kind):
  """Of sizes at which XLA:CPU's maximum drops a NaN among numbers."""
  matrix = np.random.default_rng(0).normal(size=(576, 96)).astype(np.float32)
  x = np.random.default_rng(1).normal(size=(16, 576)).astype(np.float32)
  x[1, 7] = np.nan
  x[2, 7] = np.inf
  found = np.asarray(linear(jnp.asarray(x), storage.matrix(jnp.asarray(matrix), kind)))
  assert np.isfinite(np.delete(found, (1, 2), axis=0)).all()
  assert not np.isfinite(found[1:3]).any()
  spoilt = matrix.copy()
  spoilt[5, 2] = np.nan
  found = np.asarray(linear(jnp.ones((1, 576)), storage.matrix(jnp.asarray(spoilt), kind)))[0]
  assert np.isnan(found[2])
  assert np.isfinite(np.delete(found, 2)).all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_logits_are_not_rounded_to_the_dtype_of_the_computation(kind):
  w, x = storage.matrix(jnp.asarray(MATRIX), kind), jnp.ones((2, 48), jnp.bfloat16)
  found = np.asarray(linear32(x, w))
  assert found.dtype == np.float32
  assert np.any(found != np.asarray(linear(x, w), np.float32))


def test_an_int8_base_is_kept_as_it_is():
  base = int8.quantize(MATRIX)
  kept = storage.matrix(base, "int8")
  np.testing.assert_array_equal(np.asarray(kept.codes).T, base.codes)
  np.testing.assert_allclose(kept.dense(), base.dense(), rtol=1e-6)


def test_specs_are_turned_with_the_matrix():
  kept = storage.matrix(jnp.asarray(MATRIX)[None], "int8")
  specs = kept.partition_specs(P(None, "fsdp", "tensor"))
  assert specs.codes == P(None, "tensor", "fsdp")
  assert specs.step == P(None, "tensor")


@pytest.mark.parametrize("kind", few(["bfloat16", "int8"], "int8"))
def test_an_answer_has_the_log_probabilities_of_the_stored_weights(kind):
  """A tied head and an adapter that is bound are among them."""
  config, params = families.make("gemma3")
  prompts = [families.tokens(n, seed=n).tolist() for n in (9, 4)]
  kept = storage.store(params, config, kind)
  found = engine.generate(
    engine.prepare(params, config, kind), config, prompts, max_new_tokens=6, sampling=Sampling()
  )
  for prompt, tokens, logps in zip(prompts, found.tokens, found.logps):
    text = jnp.asarray([[*prompt, *tokens]])
    full = jax.nn.log_softmax(jax.jit(decoder.forward, static_argnums=2)(kept, text, config)[0])
    expected = [full[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)]
    np.testing.assert_allclose(logps, expected, atol=1e-3)
  exact = jax.jit(decoder.forward, static_argnums=2)(params, text, config)
  assert np.any(np.asarray(jax.nn.log_softmax(exact[0])) != np.asarray(full))


def test_the_base_under_a_bound_adapter_is_stored():
  config, params = families.make("llama3")
  lora = adapters.AdapterConfig(method="lora", r=2, target_modules=["up_proj"])
  bound = adapters.bind(*adapters.init(jax.random.key(0), params, lora))
  kept = storage.store(bound, config, "int8")["layers"]["mlp"]["up_proj"]["weight"]
  assert isinstance(kept.base, storage.Turned8)
  x = jax.random.normal(jax.random.key(1), (3, config.hidden_size))
  one = jax.tree.map(lambda leaf: leaf[0], kept)
  assert linear(x, one).shape == (3, config.intermediate_size)


@pytest.mark.parametrize("rows", [1, 3])
def test_activations_in_bfloat16_are_used_as_they_are(rows):
  w = storage.matrix(jnp.asarray(MATRIX), "bfloat16")
  x = jax.random.normal(jax.random.key(rows), (rows, 48), jnp.bfloat16)
  exact = np.asarray(x, np.float64) @ np.asarray(w.dense(), np.float64)
  np.testing.assert_allclose(linear32(x, w), exact, rtol=1e-5, atol=1e-5)


def test_layers_that_are_apart():
  """They serve as they are, and are too late to be stored otherwise."""
  config, params = families.make("llama3")
  apart = decoder.unstack(params, config)
  assert engine.prepare(apart, config).layers_apart is apart
  with pytest.raises(ValueError, match="store the parameters first"):
    engine.prepare(apart, config, "int8")


def test_a_storage_that_there_is_not():
  config, params = families.make("llama3")
  with pytest.raises(
    ValueError, match="storage='int4': weights are stored as auto, bfloat16, int8"
  ):
    storage.store(params, config, "int4")


# a base in bfloat16 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_a_base_in_bfloat16_is_written_with_as_it_is_trained(rows):
  """One rounding of the operand, not two halves of it; one row is as good as several."""
  frozen = weight.bits(jnp.asarray(MATRIX)[None])
  turned = storage.matrix(frozen, "auto")
  assert turned.stored.dtype == weight.BITS  # a scan moves it
  x = jax.random.normal(jax.random.key(rows), (rows, 48))
  found, trained = linear(x, weight.layer(turned, 0)), linear(x, weight.layer(frozen, 0))
  np.testing.assert_allclose(found, trained, rtol=1e-5, atol=1e-5)
  halves = linear(x, storage.matrix(jnp.asarray(MATRIX), "bfloat16"))
  assert np.max(np.abs(np.asarray(halves) - np.asarray(trained))) > 1e-3


@pytest.fixture(scope="module")
def in_bfloat16():
  """(config, params frozen in bfloat16, with an adapter bound) of a model whose head is tied."""
  config, params = families.make("gemma3")
  half = {path: leaf.astype(jnp.bfloat16) for path, leaf in tree.items(params)}
  params = tree.unflatten((path, layout.frozen(path, leaf)) for path, leaf in half.items())
  lora = adapters.AdapterConfig(method="lora", r=2, target_modules=["up_proj", "q_proj"])
  return config, adapters.bind(*adapters.init(jax.random.key(0), params, lora))


def test_answers_of_a_base_in_bfloat16_are_those_of_a_plain_decode(in_bfloat16):
  """But for some 2^-8 of a logit, where a plain decode rounds the weights of attention too."""
  config, params = in_bfloat16
  prompt = families.tokens(9).tolist()
  found = engine.generate(
    params, config, [prompt], max_new_tokens=8, sampling=Sampling(), dtype=jnp.float32
  )
  text = jnp.asarray([[*prompt, *found.tokens[0]]])
  full = jax.jit(lambda params: decoder.forward(params, text, config, dtype=jnp.float32))(params)
  expected = jax.nn.log_softmax(full[0, len(prompt) - 1 : -1])
  expected = np.take_along_axis(np.asarray(expected), np.asarray(found.tokens[0])[:, None], 1)
  np.testing.assert_allclose(found.logps[0], expected[:, 0], atol=0.05)
  assert np.mean(np.abs(found.logps[0] - expected[:, 0])) < 0.01


def test_no_matrix_is_widened_or_turned_from_bits_in_the_loop_over_tokens(in_bfloat16):
  config, params = in_bfloat16
  ready = engine.prepare(params, config)
  assert ready.stacked["layers"]["mlp"]["up_proj"]["weight"].base.stored.dtype == weight.BITS
  apart = ready.layers_apart
  assert apart["embed_tokens"]["weight"].stored.dtype == weight.BITS
  turned = [apart["lm_head"]["weight"]]
  for layer in apart["layers"]:
    linear_weights = (leaf for path, leaf in tree.items(layer) if tree.turned(path))
    turned += [weight.unadapted(leaf) for leaf in linear_weights]
  assert {type(w) for w in turned} == {storage.Turned}
  assert {w.stored.dtype for w in turned} == {jnp.dtype(jnp.bfloat16)}
