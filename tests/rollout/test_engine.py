"""Generation: what the full forward pass says, whatever the batch, the padding and the bucket."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from posttrain_jax import adapters
from posttrain_jax.core import sharding, weight
from posttrain_jax.models import decoder
from posttrain_jax.rollout import dialogue, engine, piecewise, programs, requests
from posttrain_jax.rollout.requests import Request
from posttrain_jax.rollout.sampling import GREEDY, Sampling
from tests import tiny
from tests.marks import few, slow
from tests.models import families

LENGTHS = (11, 3, 17, 8, 5)
PROMPTS = [families.tokens(n, seed=n).tolist() for n in LENGTHS]
NEW = 20
BATCH = 3  # five prompts in two batches, one row of them filling up
CHOICES = Sampling(temperature=1.5, top_k=30, top_p=0.95)
FAMILIES = ["llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe"]


@pytest.fixture(scope="module")
def llama():
  config, params = families.make("llama3")
  return engine.prepare(params, config), config


def with_positions(llama, count):
  """The same weights as a model that has so many positions."""
  params, config = llama
  return params, dataclasses.replace(config, max_length=count)


def test_a_model_in_bfloat16_keeps_bits_and_writes_by_what_training_computes():
  config, params = families.make("llama3")
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  ready = engine.prepare(params, config)
  for dtype, bits in ((jnp.float32, weight.BITS), (jnp.bfloat16, weight.BITS)):
    kept = engine.Engine(ready, config, rows=2, length=32, dtype=dtype)._slots.cache.k.dtype
    assert kept == (bits if jax.default_backend() == "cpu" else jnp.bfloat16)
  found = engine.generate(
    ready, config, PROMPTS[:2], max_new_tokens=NEW, batch_size=2, dtype=jnp.float32, **sampled(3)
  )
  for prompt, tokens, logps in zip(PROMPTS, found.tokens, found.logps):
    whole = jnp.asarray([[*prompt, *tokens]])
    logits = decoder.forward(ready.stacked, whole, config, dtype=jnp.float32)[0]
    every = jax.nn.log_softmax(logits / CHOICES.temperature)[len(prompt) - 1 : -1]
    assert every[np.arange(NEW), np.asarray(tokens)] == pytest.approx(logps, abs=0.02)


def generate(llama, prompts=PROMPTS, **options):
  """The texts of one prompt after another; the same shapes in every test, so few programs compile."""
  return engine.generate(*llama, prompts, **dict(max_new_tokens=NEW, batch_size=BATCH) | options)


def sampled(seed, **options):
  return dict(sampling=CHOICES, seed=seed) | options


def full_logps(config, params, prompt, tokens, temperature=1.0):
  """[new, vocab]: the log-distribution of each new token by one forward pass without a cache."""
  padded = np.zeros((1, 48), np.int32)  # one shape, compiled once; what is behind changes nothing
  text = [*prompt, *tokens]
  padded[0, : len(text)] = text
  logits = jax.jit(decoder.forward, static_argnums=2)(params, padded, config)[0]
  return jax.nn.log_softmax(logits / temperature)[len(prompt) - 1 : len(text) - 1]


@pytest.mark.parametrize("name", few(FAMILIES, "llama3", "gemma3", "mixtral"))
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
  together, alone = generate(llama, **sampled(3)), generate(llama, **sampled(3, batch_size=2))
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
  run = lambda seed: generate(llama, [PROMPTS[0]], samples=3, **sampled(seed)).tokens
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


def counting(monkeypatch):
  """[(tokens read, rows)] of the prompts' pieces from here on."""
  read, seen = programs.read, []

  def counted(params, held, pieces, *rest):
    seen.append(int(pieces.counts.sum()))
    return read(params, held, pieces, *rest)

  counted._cache_size = read._cache_size
  monkeypatch.setattr(programs, "read", counted)
  return seen


def test_what_prompts_share_is_read_once(llama, monkeypatch):
  """The answers to one prompt, and prompts that begin alike: to the end of the last piece that all have."""
  begins = (PROMPTS[0] * 20)[:64]
  prompts = [begins + prompt for prompt in PROMPTS[:4]]
  alone = [generate(llama, [prompt]) for prompt in prompts]
  seen = counting(monkeypatch)
  together = generate(llama, prompts, samples=2, batch_size=8)
  assert sum(seen) == 64 + sum(len(prompt) - 1 for prompt in PROMPTS[:4])
  assert together.tokens == [one.tokens[0] for one in alone for _ in range(2)]
  for logps, one in zip(together.logps[::2], alone):
    np.testing.assert_allclose(logps, one.logps[0], rtol=2e-4, atol=2e-5)


def test_a_row_that_waits_for_another_is_no_source_yet(llama):
  """The third row is to have what the second has, which is to have what the first reads."""
  prompt = (PROMPTS[0] * 20)[:64]
  engine_ = engine.Engine(*llama, rows=3, length=100)
  readings = {
    2: piecewise.Reading(2, 0, prompt, 64, source=1),
    1: piecewise.Reading(1, 0, prompt, 64, source=0),
    0: piecewise.Reading(0, 0, prompt, 0),
  }
  engine_._readings = readings
  engine_._read()
  held = np.asarray(engine_._slots.cache.k)[:, 0, :, :, :, :64]
  assert np.abs(held[:, 0]).min() > 0
  np.testing.assert_array_equal(held[:, 1], held[:, 0])
  np.testing.assert_array_equal(held[:, 2], held[:, 0])


def asked(seed=0, count=9, **options):
  """Requests of unlike lengths, each with its own way of drawing."""
  rng = np.random.default_rng(seed)
  hows = [Sampling(1.3), Sampling(1.0, top_k=20), Sampling(0.8, top_p=0.9), GREEDY]
  return [
    Request(
      PROMPTS[i % 5],
      int(rng.integers(1, NEW)),
      sampling=hows[i % 4],
      stop_tokens=(5, 6, 7),
      seed=11,
      number=i,
      **options,
    )
    for i in range(count)
  ]


def written(llama, requests, **options):
  engine_ = engine.Engine(*llama, **dict(rows=3, length=48, window=4) | options)
  answers = dict(engine_.run(requests))
  return [answers[i] for i in range(len(requests))]


@pytest.mark.parametrize(
  "options", [dict(window=7), slow(dict(rows=3, length=100)), slow(dict(rows=5))]
)
def test_a_text_is_the_same_in_any_slot_order_and_window(llama, options):
  """Bit by bit where the program is the same, up to rounding where the number of rows is another."""
  requests = asked()
  plain = written(llama, requests)
  order = np.random.default_rng(1).permutation(len(requests))
  other = written(llama, [requests[i] for i in order], **options)
  for place, i in enumerate(order):
    assert other[place].tokens == plain[i].tokens
    assert other[place].ended == plain[i].ended
    if "rows" in options:
      np.testing.assert_allclose(other[place].logps, plain[i].logps, rtol=1e-4, atol=1e-5)
    else:
      np.testing.assert_array_equal(other[place].logps, plain[i].logps)


def test_a_text_does_not_depend_on_what_is_read_beside_its_prompt(llama):
  """Bit by bit: two pieces of 64 tokens that are read together are another program than one."""
  prompts = [families.tokens(70, seed=seed).tolist() for seed in range(3)]
  requests = [Request(prompt, 4, number=i) for i, prompt in enumerate(prompts)]
  beside = written(llama, requests, length=80)
  for request, answer in zip(requests, beside):
    (alone,) = written(llama, [request], length=80)
    assert alone.tokens == answer.tokens
    np.testing.assert_array_equal(alone.logps, answer.logps)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
  order=st.permutations(range(9)),
  window=st.sampled_from([1, 4, 9]),
  most=st.integers(1, 4),
  seed=st.integers(0, 3),
)
def test_a_text_is_the_same_in_any_order_of_refill(llama, order, window, most, seed):
  """Also where requests come in while others are written, and windows end early."""
  requests = asked(seed)
  plain = written(llama, requests)
  engine_ = engine.Engine(*llama, rows=3, length=48, window=window)
  left, places, answers = list(order), {}, {}
  while left or not engine_.is_idle:
    for place in left[:most]:
      places[engine_.submit(requests[place])] = place
    left = left[most:]
    for told in engine_.advance(most):
      if told.answer is not None:
        answers[places[told.ticket]] = told.answer
  for place, answer in enumerate(plain):
    assert answers[place].tokens == answer.tokens
    np.testing.assert_array_equal(answers[place].logps, answer.logps)


@pytest.mark.parametrize("family", few(["llama3", "gemma3"], "llama3"))
def test_a_window_reads_no_further_than_the_longest_row_that_is_live(llama, family):
  """What lies behind is NaN here, and would reach every row of a program that read it and hid it."""
  params, config = llama if family == "llama3" else families.make(family)[::-1]
  engine_ = engine.Engine(*with_positions((params, config), 300), rows=2, length=300, window=4)
  ask = Request(PROMPTS[0], 9)
  ((_, plain),) = engine_.run([ask])
  held = engine_._slots.cache
  assert held.k.shape[1] == 3  # blocks, of which the text needs the first
  spoilt = dataclasses.replace(
    held,
    k=held.k.at[:, 1:].set(jnp.nan),
    v=held.v.at[:, 1:].set(jnp.nan),
    lengths=held.lengths.at[1].set(290),  # of a row that was long and is not live
  )
  engine_._slots = dataclasses.replace(engine_._slots, cache=spoilt)
  ((_, answer),) = engine_.run([ask])
  assert answer.tokens == plain.tokens
  np.testing.assert_array_equal(answer.logps, plain.logps)


def test_a_long_answer_holds_up_no_one(llama):
  """Twelve short answers pass through one row while the other two write long ones."""
  long = [Request(PROMPTS[0], 40, number=i, sampling=Sampling(), seed=2) for i in range(2)]
  short = [Request(PROMPTS[1], 3, number=i, sampling=Sampling(), seed=3) for i in range(12)]
  engine_ = engine.Engine(*llama, rows=3, length=64, window=4)
  done = [place for place, _ in engine_.run([*long, *short])]
  assert set(done[:12]) == set(range(2, 14))
  assert set(done[12:]) == {0, 1}


def test_more_may_be_submitted_while_others_are_written(llama):
  engine_ = engine.Engine(*llama, rows=2, length=48, window=4)
  requests = asked(count=4)
  tickets = [engine_.submit(request) for request in requests[:2]]
  seen = {}
  for ticket, answer in engine_.answers():
    seen[ticket] = answer
    if len(tickets) < 4:
      tickets.append(engine_.submit(requests[len(tickets)]))
  expected = written(llama, requests)
  assert [seen[ticket].tokens for ticket in tickets] == [answer.tokens for answer in expected]


def of_one_window(engine_, count=3):
  """{ticket: number of tokens} of requests that all end in the first window."""
  return {engine_.submit(Request(PROMPTS[i], i + 1, number=i)): i + 1 for i in range(count)}


def lengths(answers):
  return {ticket: len(answer.tokens) for ticket, answer in answers}


def test_answers_that_nobody_took_come_to_whoever_asks_next(llama):
  engine_ = engine.Engine(*llama, rows=3, length=48, window=4)
  submitted = of_one_window(engine_)
  seen = {}
  while not engine_.is_idle:
    seen |= lengths([next(engine_.answers())])
  assert seen == submitted
  submitted = of_one_window(engine_)
  seen = lengths([next(engine_.answers())])
  seen |= lengths((progress.ticket, progress.answer) for progress in engine_.advance())
  assert seen == submitted
  assert engine_.is_idle


def test_a_run_that_is_left_or_not_alone_gives_every_answer_once(llama):
  engine_ = engine.Engine(*llama, rows=3, length=48, window=4)
  requests = asked()
  plain = [answer.tokens for answer in written(llama, requests)]
  submitted = of_one_window(engine_)
  for _ in engine_.run(requests):  # left, with rows under way
    break
  first, second = engine_.run(requests), engine_.run(requests[:4])
  given = [next(first), next(second), *engine_.run([]), next(first)]
  assert lengths(engine_.answers()) == submitted
  of_first = dict([given[0], given[2], *first])
  of_second = dict([given[1], *second])
  assert [of_first[i].tokens for i in range(9)] == plain
  assert [of_second[i].tokens for i in range(4)] == plain[:4]
  assert engine_.is_idle


def test_what_advance_brings_a_run_is_told_that_run_too(llama):
  engine_ = engine.Engine(*llama, rows=3, length=48, window=4)
  requests = asked()
  running = engine_.run(requests)
  given = dict([next(running)])
  while any(progress.tokens for progress in engine_.advance()):
    pass
  given |= dict(running)
  assert [given[i].tokens for i in range(9)] == [a.tokens for a in written(llama, requests)]


def test_a_row_of_nan_that_is_dropped_serves_the_next_text_as_a_fresh_one(llama):
  params, config = llama
  spoilt = jax.tree.map(lambda x: x * np.nan, params)
  engine_ = engine.Engine(spoilt, config, rows=1, length=48, window=4)
  ticket = engine_.submit(Request(PROMPTS[0], 20))
  for _ in range(3):  # further than the piece that the next prompt is read in
    engine_.advance()
  engine_.drop(ticket)
  engine_.load(params)
  ((_, answer),) = engine_.run([Request(PROMPTS[1], 5)])
  assert np.isfinite(answer.logps).all()


def test_what_is_dropped_leaves_its_row_to_others(llama):
  engine_ = engine.Engine(*llama, rows=1, length=64, window=4)
  endless, waiting, next_one = (
    engine_.submit(Request(PROMPTS[i], 40 if i < 2 else 5)) for i in range(3)
  )
  assert engine_.advance()[0].answer is None
  engine_.drop(endless)
  engine_.drop(waiting)
  ((ticket, answer),) = engine_.answers()
  assert ticket == next_one
  assert answer.tokens == generate(llama, [PROMPTS[2]], max_new_tokens=5).tokens[0]


class Numbers:
  """A tokenizer whose text has each token's number, "<17><4>", and nothing else."""

  def __call__(self, text, add_special_tokens):
    return {"input_ids": [int(n) for n in re.findall(r"<(\d+)>", text)]}

  def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces):
    return "".join(f"<{token}>" for token in tokens)


NUMBERS = Numbers()
words = functools.partial(requests.text_of, NUMBERS)


def test_a_stop_string_ends_the_text_with_its_token(llama):
  free = generate(llama, [PROMPTS[0]]).tokens[0]
  end = f"<{free[7]}><{free[8]}>"
  first = next(n for n in range(1, NEW + 1) if end in words(free[:n]))
  request = Request(PROMPTS[0], NEW, stop_strings=(end, "<1000>"))
  beside = Request(PROMPTS[1], NEW)
  answers = written(llama, [request, beside], tokenizer=NUMBERS)
  assert (answers[0].tokens, answers[0].ended) == (free[:first], "stop_string")
  assert answers[0].finished
  assert len(answers[0].logps) == first
  assert answers[1].tokens == generate(llama, [PROMPTS[1]]).tokens[0]


def test_a_request_may_bring_the_tokenizer_that_its_stop_strings_are_looked_for_with(llama):
  free = generate(llama, [PROMPTS[0]]).tokens[0]
  end, other = f"<{free[7]}>", tiny.tokenizer()
  request = Request(PROMPTS[0], NEW, stop_strings=(end,), tokenizer=NUMBERS)
  letters = dataclasses.replace(request, stop_strings=("never",), tokenizer=None)
  first, second = written(llama, [request, letters], tokenizer=other)
  assert (first.tokens, first.ended) == (free[: free.index(free[7]) + 1], "stop_string")
  assert second.tokens == free


def test_so_many_tokens_come_before_a_stop_string():
  """Of what is written before, only what a later token completes counts."""
  tokens = [1, 2, 3, 1, 2, 3]
  end = lambda string, least, read=0: requests.string_end(tokens, read, least, [string], NUMBERS)
  assert [end("<2>", least) for least in range(6)] == [2, 2, 5, 5, 5, None]
  assert [end("<2><3>", least) for least in range(6)] == [3, 3, 3, 6, 6, 6]
  assert end("<2>", 2, read=3) == 5
  assert end("<9>", 0) is None


@pytest.mark.parametrize(
  ("string", "is_made"),
  [
    ("end", True),
    ("ab\nc", True),
    ("\x00never\ud800", False),
    ("<|im_end|>", False),
    (" of", True),
    ("é", True),
    ("日本 🙂", True),
  ],
)
def test_a_stop_string_that_the_tokenizer_cannot_make_is_refused(string, is_made):
  """A special token is no text; bytes make every letter."""
  tokenizer = tiny.tokenizer()
  if is_made:
    requests.check_strings([string], tokenizer)
  else:
    with pytest.raises(ValueError, match="cannot make the stop string"):
      requests.check_strings(["end", string], tokenizer)


def test_so_many_tokens_come_before_a_stop(llama):
  free = generate(llama, [PROMPTS[0]]).tokens[0]
  stops = tuple(set(free[:3]))
  (answer,) = written(llama, [Request(PROMPTS[0], NEW, min_new_tokens=6, stop_tokens=stops)])
  assert not set(answer.tokens[:6]) & set(stops)
  assert len(answer.tokens) >= 6
  (answer,) = written(llama, [Request(PROMPTS[0], NEW, stop_tokens=stops)])
  assert len(answer.tokens) == 1


@pytest.mark.parametrize("records_kept", few([False, True], False))
def test_a_stop_token_that_is_held_off_has_no_share_of_the_probability(llama, records_kept):
  params, config = llama
  stops, how = (3, 50, 81), Sampling(1.3)
  request = Request(PROMPTS[0], 6, min_new_tokens=4, sampling=how, stop_tokens=stops, seed=2)
  (answer,) = written(llama, [request], records_kept=records_kept)
  full = np.array(full_logps(config, params.stacked, PROMPTS[0], answer.tokens, how.temperature))
  full[:4, list(stops)] = -np.inf
  full -= np.logaddexp.reduce(full, axis=1, keepdims=True)
  places = np.arange(len(answer.tokens))
  np.testing.assert_allclose(answer.logps, full[places, answer.tokens], rtol=1e-3, atol=1e-4)
  if records_kept:
    bits = np.unpackbits(answer.kept.view(np.uint8), axis=1, bitorder="little")
    np.testing.assert_array_equal(bits[:, : full.shape[1]] > 0, np.isfinite(full))


def test_a_penalty_is_refused_where_what_is_kept_is_recorded(llama):
  how = Sampling(1.0, top_k=3, repetition_penalty=1.2)
  with pytest.raises(ValueError, match=r"repetition_penalty=1\.2 with records_kept"):
    written(llama, [Request(PROMPTS[0], 3, sampling=how)], records_kept=True)


def test_other_weights_need_no_other_program(llama):
  params, config = llama
  moved = jax.tree.map(lambda x: x * 1.1, params)
  engine_ = engine.Engine(params, config, rows=3, length=64, window=4)
  engine_.warm_up()
  before = dict(engine_.run(asked()))
  engine_.load(moved)
  after = dict(engine_.run(asked()))
  assert {i: a.tokens for i, a in after.items()} != {i: a.tokens for i, a in before.items()}
  expected = written((moved, config), asked(), length=64)
  assert [after[i].tokens for i in range(9)] == [answer.tokens for answer in expected]


def test_what_is_not_finite_is_told_once_and_stays_with_its_text(llama, caplog):
  """A row that wrote with weights of NaN serves the next text as a fresh one does."""
  params, config = llama
  spoilt = jax.tree.map(lambda x: x * np.nan, params)
  engine_ = engine.Engine(spoilt, config, rows=1, length=48, window=4)
  for _ in range(2):
    ((_, bad),) = engine_.run([Request(PROMPTS[0], 9)])
    assert np.isnan(bad.logps).all()
  assert caplog.messages == [engine.OVERFLOW]
  engine_.load(params)
  ((_, good),) = engine_.run([Request(PROMPTS[1], 9)])
  ((_, fresh),) = engine.Engine(*llama, rows=1, length=48, window=4).run([Request(PROMPTS[1], 9)])
  assert good.tokens == fresh.tokens
  np.testing.assert_array_equal(good.logps, fresh.logps)
  assert len(caplog.messages) == 1


def test_a_program_after_the_warm_up_is_told_and_an_error_under_test(llama, monkeypatch, caplog):
  engine_ = engine.Engine(*with_positions(llama, 200), rows=2, length=50, window=4)
  assert set(engine_.warm_up()) >= set(engine_.compiled)
  engine_.grow(200)
  with pytest.raises(engine.CompilationError, match=r"compiled after the warm-up: .* slots"):
    dict(engine_.run([Request(PROMPTS[0], 3)]))
  monkeypatch.setattr(engine.Engine, "is_strict", False)
  dict(engine_.run([Request(PROMPTS[0], 3)]))
  assert "compiled after the warm-up: window of 4 tokens, 2 rows of" in caplog.text


def needs(engine_, lengths, **options):
  """Writes texts behind prompts of those lengths, many at once and one alone, cut, dropped and of NaN."""
  prompts = [families.tokens(n, seed=n + i).tolist() for i, n in enumerate(lengths)]
  requests = [Request(prompt, 2, number=i, **options) for i, prompt in enumerate(prompts)]
  dict(engine_.run(requests))
  for request in requests:
    dict(engine_.run([request]))
  dropped = engine_.submit(requests[0])
  engine_.advance(1)
  engine_.drop(dropped)
  weights = engine_._ready
  engine_.load(jax.tree.map(lambda x: x * np.nan, weights))
  dict(engine_.run(requests[:1]))
  engine_.load(weights)
  dict(engine_.run(requests[:1]))


@pytest.mark.parametrize(
  ("rows", "length", "lengths"),
  [
    (3, 64, (2, 17, 40, 60)),
    slow(16, 64, (12,) * 16),
    slow(1, 64, (2, 17, 40)),
    slow(16, 400, (3, 20, 20, 60, 70, 130, 130, 200, 300, 390, 12, 12, 12, 12, 12, 12, 12, 12)),
  ],
)
def test_no_text_needs_a_program_that_the_warm_up_left_out(llama, rows, length, lengths):
  """They are errors under test, see conftest.py."""
  engine_ = engine.Engine(*with_positions(llama, 400), rows=rows, length=length, window=4)
  assert len(engine_.warm_up()) <= 5 + 2 * len(piecewise.PIECES)
  needs(engine_, lengths)


@pytest.mark.slow
def test_what_is_bound_before_the_tokens_is_warmed_up_too(llama):
  config, params = families.make("llama3")
  soft = adapters.AdapterConfig(method="prefix", num_virtual_tokens=4)
  base, node = adapters.init(jax.random.key(0), params, soft)
  engine_ = engine.Engine(adapters.bind(base, node), config, rows=3, length=64, window=4)
  assert "beginning of a row" in engine_.warm_up()
  needs(engine_, (2, 17, 40, 50))


def test_on_a_mesh_how_a_program_tells_where_its_rows_lie_is_no_other_program(llama, monkeypatch):
  """An axis of one device, which XLA names or not as it comes; a prompt goes on in its row right behind a window."""
  begun = families.tokens(16, seed=0).tolist()
  mesh = sharding.mesh(tensor=2, devices=jax.devices()[:2])
  names = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  told = lambda x: jax.device_put(x, names) if x.ndim > 1 else x

  class Window:
    _cache_size = programs.window._cache_size

    def __call__(self, *args):
      slots, drawn = window(*args)
      return dataclasses.replace(slots, text=told(slots.text)), drawn

  window = programs.window
  monkeypatch.setattr(programs, "window", Window())
  with jax.set_mesh(mesh):
    params, config = llama
    engine_ = engine.Engine(params.stacked, config, rows=1, length=64, window=4, pieces=(16,))
    engine_.warm_up()
    for seed in range(3):
      dict(engine_.run([Request([*begun, *families.tokens(9, seed=seed).tolist()], 2)]))


def test_prompts_that_are_known_need_fewer_programs(llama):
  engine_ = engine.Engine(*with_positions(llama, 200), rows=3, length=200, window=4)
  reading = [name for name in engine_.warm_up([12, 10]) if "piece of" in name]
  assert reading == [f"1 piece of 16 tokens, 3 rows of {engine_._slots.cache.slots} slots"]
  needs(engine_, (12, 10))


def test_an_engine_that_writes_is_not_warmed_up(llama):
  engine_ = engine.Engine(*llama, rows=2, length=64, window=4)
  engine_.submit(Request(PROMPTS[0], 20))
  engine_.advance()
  with pytest.raises(ValueError, match="1 rows are under way"):
    engine_.warm_up()


def test_the_kept_tokens_and_the_most_likely_are_recorded(llama):
  params, config = llama
  how = Sampling(0.7, top_k=4)
  (answer,) = written(
    llama, [Request(PROMPTS[0], 8, sampling=how, seed=3)], records_kept=True, top=3
  )
  logps = full_logps(config, params.stacked, PROMPTS[0], answer.tokens, 0.7)
  bits = np.unpackbits(answer.kept.view(np.uint8), axis=1, bitorder="little")
  assert bits.sum(axis=1).tolist() == [4] * 8
  for place, row in enumerate(np.asarray(logps)):
    kept = np.argsort(-row)[:4]
    assert set(np.flatnonzero(bits[place])) == set(kept)
    among = row[kept] - np.logaddexp.reduce(row[kept])
    np.testing.assert_array_equal(answer.top[0][place], kept[:3])
    np.testing.assert_allclose(answer.top[1][place], among[:3], rtol=1e-3, atol=1e-4)
    drawn = among[list(kept).index(answer.tokens[place])]
    np.testing.assert_allclose(answer.logps[place], drawn, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("request_", "message"),
  [
    (Request([], 3), "prompt 0 is empty"),
    (Request([1, 10**6], 3), "prompt 0 holds ids outside 0.."),
    (Request([1], 0), "max_new_tokens must be at least 1, found 0"),
    (Request([1], 3, min_new_tokens=4), "min_new_tokens must be from 0 to max_new_tokens=3"),
    (
      Request([1] * 40, 20),
      "prompt 0 has 40 tokens; with max_new_tokens=20 .* the engine's length=48 ",
    ),
    (Request([1], 3, row=1), "asks for row 1, the parameters have 1"),
    (Request([1], 3, stop_tokens=range(65)), "65 stop tokens: a request has 64 at most"),
    (Request([1], 3, stop_tokens=(5, 9999, -5)), r"stop_tokens .9999, -5., which are none of"),
    (Request([1], 3, stop_strings=("a",)), "needs an engine with tokenizer="),
    (Request([1], 3, stop_strings="ab"), r"stop_strings='ab': write several, as \('ab',\)"),
    (Request([1], 3, stop_tokens=5), r"stop_tokens=5: write several, as \(5,\)"),
    (Request([1], 3, stop_tokens=("a",)), "they are token ids, texts are stop_strings"),
    (Request([1], 3, stop_strings=(5,)), "they are texts, ids are stop_tokens"),
    (Request("hello", 3), r"prompt 0 is the text 'hello': give its token ids, tokenizer\("),
    (Request(None, 3), "prompt 0 is None: give a list of token ids"),
    (Request([5, 1.5], 3), "prompt 0 holds 1.5 at place 1: token ids are whole numbers"),
    (Request(np.ones((2, 2), int), 3), r"prompt 0 holds \[1, 1\] at place 0"),
    (Request([1], 2.5), "max_new_tokens=2.5: write a whole number"),
    (Request([1], 3, sampling=0.7), r"sampling=0.7: write Sampling\(temperature="),
    (Request([1], 3, seed=2**32), "seed=4294967296: write a whole number from 0 to 4294967295"),
    (Request([1], 3, number=-1), "number=-1: write a whole number from 0"),
    (Request([1], 3, sample=2**32 + 1), "sample=4294967297: .* would draw what another draws"),
  ],
)
def test_what_cannot_be_answered_is_refused(llama, request_, message):
  engine_ = engine.Engine(*llama, rows=2, length=48)
  with pytest.raises(ValueError, match=message):
    engine_.submit(request_)
  assert engine_.is_idle


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(length=10**5), "length=100000 is more than the 128 positions of the model "),
    (dict(length=1), "length=1: write at least 2 "),
    (dict(length=48.0), "length=48.0: write a whole number"),
    (dict(rows=0), "rows=0: write at least 1 "),
    (dict(rows=1.5), "rows=1.5: write a whole number"),
    (dict(window=0), "window=0: write at least 1 "),
    (dict(top=-1), "top=-1: write at least 0 "),
    (dict(top=97), "top=97 is more than the 96 of the vocabulary "),
  ],
)
def test_an_engine_that_could_not_write_is_refused(llama, options, message):
  with pytest.raises(ValueError, match=message):
    engine.Engine(*llama, **dict(rows=2, length=48) | options)


def test_an_engine_does_not_grow_beyond_the_model(llama):
  engine_ = engine.Engine(*llama, rows=1, length=40)
  with pytest.raises(ValueError, match="length=129 is more than the 128 positions"):
    engine_.grow(129)
  assert engine_.length == 40


def test_weights_of_another_model_are_refused_and_leave_the_engine_as_it_was(llama):
  params, config = llama
  engine_ = engine.Engine(params, config, rows=2, length=48)
  another = decoder.init(jax.random.key(0), dataclasses.replace(config, hidden_size=16))
  cases = {
    r"it reads embed_tokens/weight, here are \['x'\]": {"x": 1},
    "embed_tokens/weight, here are a NoneType": None,
    r"embed_tokens/weight has the shape \(96, 16\), this model's has \(96, 32\)": another,
  }
  for message, weights in cases.items():
    for form in (weights, engine.Ready(weights, weights)):
      with pytest.raises(ValueError, match=message):
        engine_.load(form)
  engine_.submit(Request(PROMPTS[0], 3))
  assert len(list(engine_.answers())) == 1


@pytest.mark.parametrize("where", ["nowhere", "one_device", "another_mesh"])
def test_weights_that_lie_elsewhere_come_onto_the_mesh(llama, where):
  config, params = families.make("llama3")
  other = jax.sharding.NamedSharding(sharding.mesh(fsdp=8), jax.sharding.PartitionSpec())
  lie = {"nowhere": None, "one_device": jax.devices()[1], "another_mesh": other}[where]
  params = jax.tree.map(lambda x: jax.device_put(x, lie), params)
  with jax.set_mesh(sharding.mesh(fsdp=4, tensor=2)):
    ready = engine.prepare(params, config)
  moved = ready.stacked["layers"]["mlp"]["up_proj"]["weight"]
  assert moved.sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor")
  kept = params["layers"]["mlp"]["up_proj"]["weight"]
  np.testing.assert_array_equal(np.asarray(moved), np.asarray(kept))


def test_streaming_gives_the_tokens_of_generate(llama):
  free = generate(llama, **sampled(5)).tokens[0]
  options = sampled(5, max_new_tokens=NEW, stop_tokens=(free[7],))
  expected = free[: 1 + free.index(free[7])]
  assert list(dialogue.stream(*llama, PROMPTS[0], **options)) == expected
  assert list(dialogue.stream(*llama, PROMPTS[0], **sampled(5), max_new_tokens=NEW)) == free


def test_a_dialogue_reads_what_is_new_alone_and_compiles_once(llama, monkeypatch):
  """Ten turns, each beginning with all that was said, of which nothing is read twice."""
  monkeypatch.setattr(dialogue, "LENGTH", 250)
  seen = counting(monkeypatch)
  talk = dialogue.Dialogue(*llama, stop_tokens=(1,))
  said, compiled, read = [], [], 0
  for turn in range(10):
    said += [5 + (turn * i) % 40 for i in range(4 + turn)]
    before = len(seen)
    drawn = list(talk.stream(said, max_new_tokens=4))
    read += sum(seen[before:])
    compiled.append(len(talk._engine.compiled))
    assert drawn == generate(llama, [said], stop_tokens=(1,), max_new_tokens=4).tokens[0]
    said += drawn
  assert compiled[-1] == compiled[2]
  # the last token of a prompt is read by the window that draws
  asked = sum(4 + turn for turn in range(10))
  # and the last token of each answer, which was drawn and not read
  assert read == asked - 10 + 9


def test_a_dialogue_whose_past_changes_reads_it_anew(llama):
  """Another system message, a turn taken back, an answer cut short, a prompt said again."""
  talk = dialogue.Dialogue(*llama)
  first = PROMPTS[0]
  stream = talk.stream(first, max_new_tokens=NEW)
  cut = [next(stream), next(stream)]
  stream.close()
  for prompt in ([*first, *cut, 7], first, [9, *first], first[:2], [*first[:2], 11, 12]):
    assert list(talk.stream(prompt, max_new_tokens=NEW)) == generate(llama, [prompt]).tokens[0]


@pytest.mark.slow
def test_a_dialogue_grows(llama, monkeypatch):
  monkeypatch.setattr(dialogue, "LENGTH", 16)
  talk = dialogue.Dialogue(*llama)
  for length in (3, 11, 100, 12):
    prompt = [3 + i % 50 for i in range(length)]
    assert list(talk.stream(prompt, max_new_tokens=NEW)) == generate(llama, [prompt]).tokens[0]


def test_a_lower_limit_cuts_the_same_text(llama):
  longer, shorter = generate(llama).tokens, generate(llama, max_new_tokens=NEW - 3).tokens
  assert shorter == [tokens[:-3] for tokens in longer]
  assert generate(llama, []).tokens == []


def test_the_cache_is_updated_in_place(llama):
  """The compiled window writes into the cache it was given and holds no second one."""
  params, config = with_positions(llama, 2000)
  engine_ = engine.Engine(params, config, rows=4, length=2000)
  held = engine_._slots
  cache = 2 * np.prod(held.cache.k.shape) * 4  # keys and values
  lowered = programs.window.lower(
    params.layers_apart, held, jnp.int32(4), jnp.int32(4), config, 4, None, False, 0
  )
  memory = lowered.compile().memory_analysis()
  assert memory.alias_size_in_bytes > cache
  assert memory.temp_size_in_bytes < cache / 8


def test_the_cache_takes_the_dtype_asked_for_and_logps_stay_float32(llama):
  kept = engine.Engine(*llama, rows=1, length=40, cache_dtype=jnp.bfloat16)._slots
  assert kept.cache.k.dtype == kept.cache.v.dtype == jnp.bfloat16
  half = written(llama, [Request(PROMPTS[0], 5)], cache_dtype=jnp.bfloat16)[0]
  assert half.logps.dtype == np.float32
  whole = written(llama, [Request(PROMPTS[0], 5)])[0]
  np.testing.assert_allclose(half.logps[0], whole.logps[0], atol=0.05)


def test_few_shapes_compile():
  sizes = [engine.bucket(n) for n in range(1, 5000)]
  assert all(n <= size <= max(32, 1.5 * n) for n, size in enumerate(sizes, 1))
  assert len(set(sizes)) < 20


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
  ],
)
def test_what_cannot_be_generated_is_refused(llama, prompts, options, message):
  with pytest.raises(ValueError, match=message):
    generate(llama, prompts, **options)
