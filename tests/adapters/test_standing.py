"""Soft prompts and prefixes: the same as tokens in front, whatever is packed, cached, stacked apart or sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax import adapters, objectives, quant, rollout
from posttrain_jax.adapters import AdapterConfig, layout, peft_format
from posttrain_jax.core import sharding, tree
from posttrain_jax.models import before, decoder, partition
from posttrain_jax.objectives import Context
from posttrain_jax.rollout import engine
from tests import tiny
from tests.marks import few
from tests.models import families

KEY = jax.random.key(0)
SLOTS = 5
METHODS = ("prompt", "prefix")
# windows that end inside the prompt, rotations of two kinds, scaled embeddings, normed keys
CASES = [("llama", m) for m in METHODS] + [("gemma3", m) for m in METHODS] + [("mistral", "prompt")]
every_case = pytest.mark.parametrize(
  ("family", "method"),
  [case if case[0] == "llama" else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)


def close(actual, expected, rtol=1e-5):
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


@functools.cache
def made(family, method, seed=0, slots=SLOTS):
  """(model config, params, AdapterConfig, adapter)."""
  model, params = families.make(family)
  config = AdapterConfig(method=method, num_virtual_tokens=slots)
  return model, params, config, adapters.init(jax.random.key(seed), params, config)[1]


@functools.partial(jax.jit, static_argnames="config")
def logits(params, adapter, tokens, config, **options):
  return decoder.forward(adapters.bind(params, adapter), tokens, config, **options)


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", few(["llama", "gemma2", "gemma3"], "llama"))
def test_a_prompt_of_token_embeddings_is_those_tokens(family):
  """TEXT with the text's own length: logits behind it are those of text and tokens in one row."""
  model, params = families.make(family)
  text, tokens = families.tokens(SLOTS, seed=7), families.tokens(2, 12)
  config = AdapterConfig(
    method="prompt",
    num_virtual_tokens=SLOTS,
    prompt_tuning_init="TEXT",
    prompt_tuning_init_text="five tokens",
  )
  _, adapter = adapters.init(KEY, params, config, text_tokens=text, model=model)
  found = logits(params, adapter, tokens, model)
  whole = np.concatenate([np.tile(text, (2, 1)), tokens], axis=1)
  assert found.shape == (2, 12, families.VOCAB)
  close(found, decoder.forward(params, whole, model)[:, SLOTS:])


@pytest.mark.parametrize("family", few(["llama", "gemma2", "gemma3"], "llama"))
def test_a_prefix_of_a_texts_own_keys_and_values_is_that_text(family):
  model, params = families.make(family)
  text, tokens = families.tokens(SLOTS, seed=7), families.tokens(2, 12)
  cache = decoder.empty_cache(model, 1, 16, jnp.float32)
  _, cache = decoder.step(params, text[None], model, cache)
  node = made(family, "prefix")[3]["layers"]["self_attn"]["prefix"]
  k = cache.k[:, 0, 0].transpose(0, 3, 1, 2)[:, :SLOTS].reshape(node.k.shape)
  v = cache.v[:, 0, 0].transpose(0, 2, 1, 3)[:, :SLOTS].reshape(node.v.shape)
  adapter = tree.unflatten({before.PREFIX: node.replace(k=k, v=v)})
  found = logits(params, adapter, tokens, model)
  whole = np.concatenate([np.tile(text, (2, 1)), tokens], axis=1)
  close(found, decoder.forward(params, whole, model)[:, SLOTS:])


@every_case
def test_every_packed_document_sees_it(family, method):
  model, params, _, adapter = made(family, method)
  one, two = families.tokens(9, seed=1), families.tokens(6, seed=2)
  row = np.concatenate([one, two, np.zeros(3, np.int32)])[None]
  segments = np.asarray([[1] * 9 + [2] * 6 + [0] * 3])
  positions = np.asarray([[*range(9), *range(6), 0, 0, 0]])
  found = logits(params, adapter, row, model, positions=positions, segment_ids=segments)
  close(found[0, :9], logits(params, adapter, one[None], model)[0])
  close(found[0, 9:15], logits(params, adapter, two[None], model)[0])
  assert np.abs(found[0, :9] - logits(params, {}, one[None], model)[0]).max() > 0.1


@pytest.mark.parametrize(("family", "method"), few(CASES, ("llama", "prompt")))
def test_generation_is_the_argmax_of_the_full_forward_pass(family, method):
  """Ragged prompts in two batches, layers apart; the cache begins with what is bound."""
  model, params, _, adapter = made(family, method)
  bound = adapters.bind(params, adapter)
  prompts = [families.tokens(n, seed=n).tolist() for n in (11, 3, 17)]
  ready = engine.prepare(bound, model)
  assert isinstance(ready.layers_apart["layers"], tuple)
  found = engine.generate(ready, model, prompts, max_new_tokens=12, batch_size=2)
  for prompt, drawn, logps in zip(prompts, found.tokens, found.logps):
    text = np.zeros((1, 32), np.int32)
    text[0, : len(prompt) + 12] = [*prompt, *drawn]
    at = slice(len(prompt) - 1, len(prompt) + 11)
    expected = jax.nn.log_softmax(logits(params, adapter, text, model)[0, at])
    np.testing.assert_array_equal(drawn, expected.argmax(axis=1))
    np.testing.assert_allclose(logps, expected.max(axis=1), rtol=1e-3, atol=1e-4)
  streamed = rollout.stream(ready, model, prompts[0], max_new_tokens=12)
  assert list(streamed) == found.tokens[0]


@pytest.mark.slow
def test_a_prompt_and_a_prefix_stand_together():
  model, params, _, prompt = made("gemma3", "prompt")
  prefix = made("gemma3", "prefix", seed=3, slots=4)[3]
  bound = adapters.bind(adapters.bind(params, prefix), prompt)
  tokens = families.tokens(2, 9)
  full = decoder.forward(bound, tokens, model)
  cache = decoder.start(bound, model, 2, 32, jnp.float32)
  assert cache.lengths.tolist() == [before.slots(bound)] * 2 == [SLOTS + 4] * 2
  x, _ = decoder.step(bound, tokens, model, cache)
  close(decoder.logits(bound, x, model), full)
  assert np.abs(full - logits(params, prompt, tokens, model)).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_they_work_under_adapters_and_over_stored_bases(method):
  model = families.config("llama", hidden_size=64, intermediate_size=64, head_dim=16)
  params = quant.quantize_params(families.params(model))
  _, standing = adapters.init(KEY, params, AdapterConfig(method=method, num_virtual_tokens=3))
  _, lora = adapters.init(KEY, params, AdapterConfig(r=2, init_lora_weights="gaussian"))
  lora = jax.tree.map(lambda x: x + 0.1, lora)
  tokens = families.tokens(2, 9)
  one = adapters.bind(adapters.bind(params, standing), lora)
  other = adapters.bind(adapters.bind(params, lora), standing)
  expected = decoder.forward(one, tokens, model)
  close(decoder.forward(other, tokens, model), expected)
  merged = adapters.merge(one)  # what has a weight is merged, the rest stays bound
  assert tree.flatten(merged).keys() - tree.flatten(params).keys() == tree.flatten(standing).keys()
  close(decoder.forward(merged, tokens, model), expected, 2e-5)
  everything = adapters.init(KEY, one, AdapterConfig(r=2, target_modules=".*"))[1]
  assert set(everything) == {"embed_tokens", "layers", "lm_head"}  # they are no module


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_computation_in_bfloat16_stays_one(method):
  model, params, _, adapter = made("llama", method)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  bound = adapters.bind(low, adapter)
  tokens = families.tokens(2, 9)
  assert decoder.hidden(bound, tokens, model).dtype == jnp.bfloat16
  cache = decoder.start(bound, model, 2, 32, jnp.bfloat16)
  x, cache = decoder.step(bound, tokens, model, cache)
  assert x.dtype == cache.k.dtype == jnp.bfloat16
  exact = logits(params, adapter, tokens, model)
  np.testing.assert_allclose(
    decoder.forward(bound, tokens, model), exact, atol=0.1 * float(jnp.abs(exact).max())
  )


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [dict(data=2, fsdp=4), dict(fsdp=4, tensor=2)])
def test_the_gradient_is_the_same_on_eight_devices_and_with_recomputation(method, shape):
  model, batch = tiny.config(), tiny.batch()
  params = decoder.init(KEY, model, std=tiny.STD)
  config = AdapterConfig(method=method, num_virtual_tokens=SLOTS)
  _, adapter = adapters.init(KEY, params, config)

  def gradient(adapter, params, remat):
    trained, fixed = tree.partition(adapter)
    objective = objectives.Sft(model, remat=remat)

    @jax.jit
    @jax.grad
    def run(trained, params, fixed):
      context = Context(params, fixed)
      totals = objective.totals(trained, context, batch, KEY, memory=None, training=True)
      return objective.loss(trained, context, batch, totals, KEY, training=True)[0]

    return run(trained, params, fixed)

  expected = gradient(adapter, params, "none")
  for leaf in jax.tree.leaves(expected):
    assert leaf.any()
  jax.tree.map(close, gradient(adapter, params, "names"), expected)
  mesh = sharding.mesh(**shape)
  with jax.set_mesh(mesh):
    placed = layout.laid_out(params, mesh)
    found = gradient(layout.laid_out(adapter, mesh), placed, "none")
  jax.tree.map(functools.partial(close, rtol=2e-5), jax.device_get(found), expected)


def test_specs():
  prompt, prefix = made("llama", "prompt")[3], made("llama", "prefix")[3]
  assert prompt["prompt"]["embeddings"].partition_specs(P()).embeddings == P()
  rules = partition.RULES
  spec = sharding.spec_for(before.PREFIX, rules)
  node = prefix["layers"]["self_attn"]["prefix"].partition_specs(spec)
  assert node.k == node.v == P(None, None, "tensor")  # with the heads of keys


# --- starts, counts, files --------------------------------------------------------------------------------------------


def test_starts():
  params = families.make("llama")[1]
  start = lambda **options: (
    adapters.init(
      KEY,
      params,
      AdapterConfig(method="prompt", num_virtual_tokens=600, **options),
      **(dict(text_tokens=[5, 9, 7]) if "prompt_tuning_init_text" in options else {}),
    )[1]["prompt"]["embeddings"].embeddings
  )
  drawn = np.asarray(start())
  assert abs(drawn.mean()) < 0.03
  assert drawn.std() == pytest.approx(1, rel=0.02)
  table = np.asarray(params["embed_tokens"]["weight"])
  sampled = np.asarray(start(prompt_tuning_init="SAMPLE_VOCAB"))
  rows = [int(np.flatnonzero((table == row).all(axis=1))[0]) for row in sampled]
  assert len(set(rows)) > 80  # of 96
  text = start(prompt_tuning_init="TEXT", prompt_tuning_init_text="over and over")
  np.testing.assert_array_equal(text, table[[5, 9, 7] * 200])
  node = made("llama", "prefix", slots=600)[3]["layers"]["self_attn"]["prefix"]
  assert np.std(node.k) == pytest.approx(1, rel=0.01)
  assert np.std(node.v) == pytest.approx(1, rel=0.01)
  assert (node.k != node.v).all()


def test_counts_are_pefts():
  model, params, _, prompt = made("llama", "prompt")
  assert adapters.count(prompt) == SLOTS * model.hidden_size
  _, _, _, prefix = made("llama", "prefix")
  width = model.num_kv_heads * model.head_dim
  assert adapters.count(prefix) == SLOTS * model.num_layers * 2 * width
  total = tree.size(params) + SLOTS * model.hidden_size
  assert f"all params: {total:,}" in adapters.summary(params, prompt)


@every_case
def test_files_hold_the_same_numbers(family, method, tmp_path):
  model, params, config, adapter = made(family, method)
  peft_format.save(tmp_path / "a", adapter, config, model)
  again, found = peft_format.load(tmp_path / "a", params, model)
  assert found == config
  jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_the_record_remembers_a_text_that_peft_would_want_a_tokenizer_for(tmp_path):
  model, params = families.make("llama")
  config = AdapterConfig(
    method="prompt", prompt_tuning_init="TEXT", prompt_tuning_init_text="be brief"
  )
  _, adapter = adapters.init(KEY, params, config, text_tokens=[4])
  peft_format.save(tmp_path / "a", adapter, config, model)
  assert '"prompt_tuning_init": "RANDOM"' in (tmp_path / "a/adapter_config.json").read_text()
  assert peft_format.load(tmp_path / "a", params, model)[1] == config


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(tmp_path):
  model, params, config, adapter = made("llama", "prompt")
  bound = adapters.bind(params, adapter)
  for options, message in (
    (dict(num_virtual_tokens=0), "num_virtual_tokens=0: write a number from 1"),
    (dict(prompt_tuning_init="text"), "prompt_tuning_init='text': write one of RANDOM"),
    (dict(prompt_tuning_init="TEXT"), "TEXT goes with a text"),
    (dict(prompt_tuning_init_text="x"), "TEXT goes with a text"),
    (dict(target_modules=("q_proj",)), "'prompt' has no such option"),
  ):
    with pytest.raises(ValueError, match=message):
      AdapterConfig(method="prompt", **options)
  with pytest.raises(ValueError, match="prompt/embeddings already"):
    adapters.bind(bound, adapter)
  with pytest.raises(ValueError, match="no room for a soft prompt"):
    decoder.hidden(bound, families.tokens(1, 8), model, attention_group=4)
  text = AdapterConfig(method="prompt", prompt_tuning_init="TEXT", prompt_tuning_init_text="x")
  with pytest.raises(ValueError, match="needs text_tokens"):
    adapters.init(KEY, params, text)
  with pytest.raises(ValueError, match="text_tokens are for prompt_tuning_init='TEXT'"):
    adapters.init(KEY, params, config, text_tokens=[1])
  with pytest.raises(ValueError, match="text_tokens are for method='prompt'"):
    adapters.init(KEY, params, AdapterConfig(), text_tokens=[1])
  gemma = families.make("gemma2")[1]
  with pytest.raises(ValueError, match="Gemma scales its embeddings"):
    adapters.init(KEY, gemma, text, text_tokens=[1])
  prompts = [families.tokens(110).tolist()]
  with pytest.raises(ValueError, match="110 tokens and 5 of a soft prompt or prefix"):
    engine.generate(bound, model, prompts, max_new_tokens=14)
  peft_format.save(tmp_path / "a", adapter, config, model)
  other = families.config("llama", hidden_size=64)
  (tmp_path / "a" / "posttrain.json").unlink()
  with pytest.raises(ValueError, match=r"shape \(5, 32\), expected \(5, 64\)"):
    peft_format.load(tmp_path / "a", families.params(other), other)
