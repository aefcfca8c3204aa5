"""Generation: what the full forward pass says, whatever the batch, the padding and the bucket."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models import decoder
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.sampling import GREEDY, Sampling
from tests.marks import few
from tests.models import families

LENGTHS = (11, 3, 17, 8, 5)
PROMPTS = [families.tokens(n, seed=n).tolist() for n in LENGTHS]
NEW = 20
BATCH = 3  # five prompts in two batches, one row of them filling up
CHOICES = Sampling(temperature=1.5, top_k=30, top_p=0.95)
FAMILIES = ["llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]


@pytest.fixture(scope="module")
def llama():
  config, params = families.make("llama3")
  return engine.prepare(params, config), config


def generate(llama, prompts=PROMPTS, **options):
  """The texts of one prompt after another; the same shapes in every test, so few programs compile."""
  return engine.generate(*llama, prompts, **dict(max_new_tokens=NEW, batch_size=BATCH) | options)


def sampled(seed, **options):
  return dict(sampling=CHOICES, key=jax.random.key(seed)) | options


def full_logps(config, params, prompt, tokens, temperature=1.0):
  """[new, vocab]: the log-distribution of each new token by one forward pass without a cache."""
  padded = np.zeros((1, 48), np.int32)  # one shape, compiled once; what is behind changes nothing
  text = [*prompt, *tokens]
  padded[0, : len(text)] = text
  logits = jax.jit(decoder.forward, static_argnums=2)(params, padded, config)[0]
  return jax.nn.log_softmax(logits / temperature)[len(prompt) - 1 : len(text) - 1]


@pytest.mark.parametrize("name", few(FAMILIES, "llama3", "gemma3"))
def test_greedy_is_the_argmax_of_the_full_forward_pass(name):
  config, params = families.make(name)
  # compiles sooner; all other tests decode with layers apart
  stacked = engine.Ready(params, params)
  found = generate((stacked, config), PROMPTS[:3])
  for prompt, tokens, logps in zip(PROMPTS, found.tokens, found.logps):
    assert len(tokens) == NEW
    expected = full_logps(config, params, prompt, tokens)
    np.testing.assert_array_equal(tokens, expected.argmax(axis=1))
    np.testing.assert_allclose(logps, expected.max(axis=1), rtol=1e-3, atol=1e-4)
  assert found.finished == [False] * 3


def test_layers_apart_and_stacked_say_the_same(llama):
  params, config = llama
  stacked = engine.Ready(params.stacked, params.stacked)
  assert isinstance(params.layers_apart["layers"], tuple)
  assert generate(llama).tokens == generate((stacked, config)).tokens


def test_a_text_does_not_depend_on_its_batch(llama):
  together, alone = generate(llama, **sampled(3)), generate(llama, **sampled(3, batch_size=1))
  assert together.tokens == alone.tokens
  for a, b in zip(together.logps, alone.logps):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_sampled_logps_are_those_training_would_compute(llama):
  params, config = llama
  found = generate(llama, **sampled(1))
  for prompt, tokens, logps in zip(PROMPTS, found.tokens, found.logps):
    reference = full_logps(config, params.stacked, prompt, tokens, CHOICES.temperature)
    expected = reference[np.arange(NEW), tokens]
    np.testing.assert_allclose(logps, expected, rtol=1e-3, atol=1e-4)


def test_equal_keys_draw_equal_texts_and_rows_differ(llama):
  run = lambda seed: generate(llama, [PROMPTS[0]] * 3, **sampled(seed)).tokens
  first = run(0)
  assert first == run(0) != run(1)
  assert len(set(map(tuple, first))) == 3


def test_a_text_ends_with_its_first_stop_token(llama):
  free = generate(llama).tokens
  stops = (free[0][4], free[2][9])
  found = generate(llama, stop_tokens=stops)
  for tokens, logps, finished, unstopped in zip(found.tokens, found.logps, found.finished, free):
    ends = [i for i, token in enumerate(unstopped) if token in stops]
    assert finished == bool(ends)
    assert tokens == (unstopped[: ends[0] + 1] if ends else unstopped)
    assert len(logps) == len(tokens)
  assert any(found.finished)
  assert not all(found.finished)


@pytest.mark.slow
def test_a_beginning_that_all_rows_share_is_read_once(llama):
  params, _ = llama
  begins = PROMPTS[0] * 20
  prompts = [begins[:37] + prompt for prompt in PROMPTS[:4]]
  assert engine._shared_length(params.stacked, prompts) == 32
  # the last token of a prompt is never shared: its logits draw the first
  assert engine._shared_length(params.stacked, [begins[:33], begins[:33]]) == 32
  assert engine._shared_length(params.stacked, [begins[:32], begins[:33]]) == 16
  assert engine._shared_length(params.stacked, [begins[:40]]) == 0
  together = generate(llama, prompts)
  alone = [generate(llama, [prompt]) for prompt in prompts]
  assert together.tokens == [one.tokens[0] for one in alone]
  for logps, one in zip(together.logps, alone):
    np.testing.assert_allclose(logps, one.logps[0], rtol=2e-4, atol=2e-5)


def test_decoding_ends_when_every_row_has(llama):
  params, config = llama
  free = generate(llama, PROMPTS[:3]).tokens
  stops = {tokens[3] for tokens in free}
  keys = engine._row_keys(None, GREEDY, 3)
  state = engine._start(
    params.stacked, PROMPTS[:3], keys, np.zeros(3, bool), NEW, list(stops), config, GREEDY, None
  )
  state = engine._decode(params.layers_apart, state, NEW, config, GREEDY, None)
  first = [next(i for i, token in enumerate(tokens) if token in stops) for tokens in free]
  assert int(state.count) == 1 + max(first) < NEW


def test_streaming_gives_the_tokens_of_generate(llama):
  free = generate(llama, **sampled(5)).tokens[0]
  options = sampled(5, max_new_tokens=NEW, stop_tokens=(free[7],))
  expected = free[: 1 + free.index(free[7])]
  assert list(engine.stream(*llama, PROMPTS[0], **options)) == expected
  assert list(engine.stream(*llama, PROMPTS[0], **sampled(5), max_new_tokens=NEW)) == free


def test_a_dialogue_reads_what_is_new_alone_and_compiles_once(llama, monkeypatch):
  """Ten turns, each beginning with all that was said: two programs, whatever their lengths."""
  monkeypatch.setattr(engine, "SLOTS", 256)
  monkeypatch.setattr(engine, "CHUNKS", (16, 8))
  programs = engine._extend._cache_size, engine._decode._cache_size
  read = []
  step = engine._extend

  def counted(params, cache, start, tokens, count, *rest):
    read.append(count)
    return step(params, cache, start, tokens, count, *rest)

  monkeypatch.setattr(engine, "_extend", counted)
  dialogue = engine.Dialogue(*llama, stop_tokens=(1,))
  said = []
  for turn in range(10):
    said += [5 + (turn * i) % 40 for i in range(4 + turn)]
    whole = generate(llama, [said], stop_tokens=(1,), max_new_tokens=4).tokens[0]
    now = [size() for size in programs]
    drawn = list(dialogue.stream(said, max_new_tokens=4))
    assert drawn == whole
    after = [size() for size in programs]
    # one program a piece's size, one that decodes: compiled in the first turn that needs them
    assert sum(after) - sum(now) <= {0: 2, 1: 0}.get(turn, 1)
    said += drawn
  asked = sum(4 + turn for turn in range(10))
  assert (
    sum(read) == asked + 9
  )  # and the last token of each answer before, which was drawn and not read


def test_a_dialogue_whose_past_changes_reads_it_anew(llama):
  """Another system message, a turn taken back, an answer cut short, a prompt said again."""
  dialogue = engine.Dialogue(*llama)
  first = PROMPTS[0]
  stream = dialogue.stream(first, max_new_tokens=NEW)
  cut = [next(stream), next(stream)]
  stream.close()
  for prompt in ([*first, *cut, 7], first, [9, *first], first[:2], [*first[:2], 11, 12]):
    assert list(dialogue.stream(prompt, max_new_tokens=NEW)) == generate(llama, [prompt]).tokens[0]


@pytest.mark.slow
def test_a_dialogue_grows(llama, monkeypatch):
  monkeypatch.setattr(engine, "SLOTS", 16)
  monkeypatch.setattr(engine, "CHUNKS", (8, 4))
  dialogue = engine.Dialogue(*llama)
  for length in (3, 11, 30, 12):
    prompt = [3 + i % 50 for i in range(length)]
    assert list(dialogue.stream(prompt, max_new_tokens=NEW)) == generate(llama, [prompt]).tokens[0]


def test_a_lower_limit_cuts_the_same_text(llama):
  longer, shorter = generate(llama).tokens, generate(llama, max_new_tokens=NEW - 3).tokens
  assert shorter == [tokens[:-3] for tokens in longer]
  assert generate(llama, []).tokens == []


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


def test_the_cache_takes_the_dtype_asked_for_and_logps_stay_float32(llama):
  params, config = llama
  start = lambda dtype: jax.eval_shape(
    lambda keys: engine._start(
      params.stacked, PROMPTS[:1], keys, np.zeros(1, bool), NEW, (), config, GREEDY, dtype
    ),
    engine._row_keys(None, GREEDY, 1),
  )
  assert (start(None).cache.k.dtype, start(None).logps.dtype) == (jnp.float32, jnp.float32)
  half = start(jnp.bfloat16)
  assert (half.cache.k.dtype, half.logps.dtype) == (jnp.bfloat16, jnp.float32)


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
  with pytest.raises(ValueError, match=message):
    generate(llama, prompts, **options)
