"""Generation: what the full forward pass says, whatever the batch, the padding and the bucket."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models import decoder
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.sampling import GREEDY, Sampling
from tests.models import families

LENGTHS = (11, 3, 17, 8, 5)
PROMPTS = [families.tokens(n, seed=n).tolist() for n in LENGTHS]
NEW = 20
CHOICES = Sampling(temperature=1.5, top_k=30, top_p=0.95)


@pytest.fixture(scope="module")
def llama():
  config, params = families.make("llama")
  return engine.prepare(params, config), config


def full_logps(config, params, prompt, tokens, temperature=1.0):
  """[new, vocab]: the log-distribution of each new token by one forward pass without a cache."""
  padded = np.zeros((1, 48), np.int32)  # one shape, compiled once; what is behind changes nothing
  text = [*prompt, *tokens]
  padded[0, : len(text)] = text
  logits = jax.jit(decoder.forward, static_argnums=2)(params, padded, config)[0]
  return jax.nn.log_softmax(logits / temperature)[len(prompt) - 1 : len(text) - 1]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_greedy_is_the_argmax_of_the_full_forward_pass(name):
  config, params = families.make(name)
  prompts = PROMPTS[:3]
  found = engine.generate(params, config, prompts, max_new_tokens=NEW)
  for prompt, tokens, logps in zip(prompts, found.tokens, found.logps):
    assert len(tokens) == NEW
    expected = full_logps(config, params, prompt, tokens)
    np.testing.assert_array_equal(tokens, expected.argmax(axis=1))
    np.testing.assert_allclose(logps, expected.max(axis=1), rtol=1e-3, atol=1e-4)
  assert found.finished == [False] * 3


@pytest.mark.parametrize("how", [GREEDY, CHOICES], ids=["greedy", "sampled"])
def test_a_text_depends_neither_on_its_batch_nor_on_the_order_of_reading(llama, how):
  params, config = llama
  run = lambda size: engine.generate(
    params,
    config,
    PROMPTS,
    max_new_tokens=NEW,
    sampling=how,
    key=jax.random.key(3),
    batch_size=size,
  )
  together, pairs, alone = run(5), run(2), run(1)
  assert together.tokens == pairs.tokens == alone.tokens
  for a, b in zip(together.logps, pairs.logps):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_sampled_logps_are_those_training_would_compute(llama):
  params, config = llama
  found = engine.generate(
    params, config, PROMPTS, max_new_tokens=NEW, sampling=CHOICES, key=jax.random.key(1)
  )
  for prompt, tokens, logps in zip(PROMPTS, found.tokens, found.logps):
    reference = full_logps(config, params.stacked, prompt, tokens, CHOICES.temperature)
    expected = reference[np.arange(NEW), tokens]
    np.testing.assert_allclose(logps, expected, rtol=1e-3, atol=1e-4)


def test_equal_keys_draw_equal_texts_and_rows_differ(llama):
  params, config = llama
  run = lambda seed: engine.generate(
    params,
    config,
    [PROMPTS[0]] * 4,
    max_new_tokens=NEW,
    sampling=Sampling(1.5),
    key=jax.random.key(seed),
  )
  first, again, other = run(0), run(0), run(1)
  assert first.tokens == again.tokens
  assert first.tokens != other.tokens
  assert len(set(map(tuple, first.tokens))) == 4


def test_layers_apart_and_stacked_say_the_same(llama):
  params, config = llama
  stacked = engine.Ready(params.stacked, params.stacked)
  a = engine.generate(params, config, PROMPTS, max_new_tokens=NEW)
  b = engine.generate(stacked, config, PROMPTS, max_new_tokens=NEW)
  assert a.tokens == b.tokens


def test_a_text_ends_with_its_first_stop_token(llama):
  params, config = llama
  free = engine.generate(params, config, PROMPTS, max_new_tokens=NEW).tokens
  stops = (free[0][4], free[2][9])
  found = engine.generate(params, config, PROMPTS, max_new_tokens=NEW, stop_tokens=stops)
  for tokens, logps, finished, unstopped in zip(found.tokens, found.logps, found.finished, free):
    ends = [i for i, token in enumerate(unstopped) if token in stops]
    assert finished == bool(ends)
    assert tokens == (unstopped[: ends[0] + 1] if ends else unstopped)
    assert len(logps) == len(tokens)
  assert any(found.finished)
  assert not all(found.finished)


def test_decoding_ends_when_every_row_has(llama):
  params, config = llama
  (free,) = engine.generate(params, config, PROMPTS[:1], max_new_tokens=NEW).tokens
  stops = np.asarray([free[3]], np.int32)
  keys = engine._row_keys(None, GREEDY, 1)
  state = engine._start(
    params.stacked, PROMPTS[:1], keys, np.zeros(1, bool), NEW, stops, config, GREEDY, None
  )
  state = engine._decode(params.layers_apart, state, NEW, config, GREEDY, None)
  assert int(state.count) == 1 + free.index(free[3])


@pytest.mark.parametrize("how", [GREEDY, CHOICES], ids=["greedy", "sampled"])
def test_streaming_gives_the_tokens_of_generate(llama, how):
  params, config = llama
  options = dict(max_new_tokens=NEW, sampling=how, key=jax.random.key(5))
  free = engine.generate(params, config, PROMPTS[:1], **options).tokens[0]
  options["stop_tokens"] = (free[7],)
  (expected,) = engine.generate(params, config, PROMPTS[:1], **options).tokens
  assert list(engine.stream(params, config, PROMPTS[0], **options)) == expected
  assert len(expected) <= 8


def test_one_new_token_and_no_prompt_at_all(llama):
  params, config = llama
  one = engine.generate(params, config, PROMPTS, max_new_tokens=1)
  more = engine.generate(params, config, PROMPTS, max_new_tokens=NEW)
  assert one.tokens == [tokens[:1] for tokens in more.tokens]
  assert engine.generate(params, config, [], max_new_tokens=1).tokens == []


def test_the_cache_is_updated_in_place(llama):
  """The compiled loop writes into the cache it was given and holds no second one."""
  params, config = llama
  rows = 4
  keys = engine._row_keys(None, GREEDY, rows)
  state = jax.eval_shape(
    lambda: engine.State(
      cache=decoder.empty_cache(config, rows, 2048, jnp.float32),
      tokens=jnp.zeros((rows, 2048), jnp.int32),
      logps=jnp.zeros((rows, 2048)),
      lengths=jnp.zeros(rows, jnp.int32),
      stopped=jnp.zeros(rows, bool),
      count=jnp.int32(1),
      keys=keys,
      stop_tokens=jnp.zeros(0, jnp.int32),
    )
  )
  cache = 2 * np.prod(state.cache.k.shape) * 4  # keys and values
  lowered = engine._decode.lower(params.layers_apart, state, 9, config, GREEDY, None)
  memory = lowered.compile().memory_analysis()
  assert memory.alias_size_in_bytes > cache
  assert memory.temp_size_in_bytes < cache


def test_the_cache_takes_the_dtype_asked_for(llama):
  params, config = llama
  found = engine.generate(params, config, PROMPTS[:1], max_new_tokens=4, dtype=jnp.bfloat16)
  exact = engine.generate(params, config, PROMPTS[:1], max_new_tokens=4)
  assert found.logps[0].dtype == np.float32
  assert not np.array_equal(found.logps[0], exact.logps[0])


def test_few_shapes_compile():
  sizes = [engine.bucket(n) for n in range(1, 5000)]
  assert all(n <= size <= max(32, 1.5 * n) for n, size in enumerate(sizes, 1))
  assert len(set(sizes)) < 20


def test_batches_hold_each_row_once_and_have_one_size():
  for count in range(1, 12):
    lengths = np.random.default_rng(count).integers(1, 50, count).tolist()
    batches = engine._batches(lengths, 4)
    assert batches.shape[1] <= 4
    rows = batches[batches >= 0]
    assert sorted(rows) == list(range(count))
    assert [lengths[i] for i in rows] == sorted(lengths)
    assert batches.size - count < len(batches)  # less than one filling row a batch


def test_stop_tokens_come_from_all_three_places(tmp_path):
  class Tokenizer:
    eos_token_id = 7

  config = families.config("llama", eos_token_id=[2, 5])
  assert engine.stop_tokens(config) == (2, 5)
  assert engine.stop_tokens(config, Tokenizer(), tmp_path) == (2, 5, 7)
  (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[9, 2])))
  assert engine.stop_tokens(config, Tokenizer(), tmp_path) == (2, 5, 7, 9)


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([[3], []], {}, "prompt 1 is empty"),
    ([[3, families.VOCAB]], {}, r"prompt 0 holds ids outside 0\.\.95: 3\.\.96"),
    ([[3] * 120], {}, "prompt 0 has 120 tokens; with max_new_tokens=20 .* 128 positions"),
    ([[3]], dict(max_new_tokens=0), "max_new_tokens must be at least 1, found 0"),
    ([[3]], dict(batch_size=0), "batch_size must be at least 1"),
    ([[3]], dict(sampling=Sampling(1.0)), "needs a key"),
  ],
)
def test_what_cannot_be_generated_is_refused(llama, prompts, options, message):
  params, config = llama
  with pytest.raises(ValueError, match=message):
    engine.generate(params, config, prompts, **{"max_new_tokens": NEW, **options})
