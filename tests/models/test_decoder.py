"""The decoder: goldens of transformers, and everything that must change nothing."""

import dataclasses
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core import sharding, tree, weight
from posttrain_jax.models import attention, decoder, partition, rotary
from posttrain_jax.models import cache as cache_lib
from posttrain_jax.models.config import Rope
from tests.marks import few, slow
from tests.models import families, golden
from tests.models.families import FAMILIES, LONGEST, WINDOW

TOLERANCE = dict(rtol=1e-4, atol=3e-5)  # logits have a standard deviation of 1.5
# One of each kind of layer, rotation, norm and head; what costs a compilation more runs over these.
FEW = ["llama3", "qwen2_sliding", "gemma3"]

positions_of = lambda tokens: np.broadcast_to(
  np.arange(tokens.shape[1], dtype=np.int32), tokens.shape
)


@pytest.fixture(scope="module")
def run():
  """name -> (params, tokens, positions, segments) -> logits, compiled once a family and shape."""
  compiled = {}

  def call(name, tokens, positions=None, segments=None, params=None):
    config, own = families.make(name)
    if name not in compiled:
      compiled[name] = jax.jit(
        lambda p, t, i, s: decoder.forward(p, t, config, positions=i, segment_ids=s)
      )
    positions = positions_of(tokens) if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    return np.asarray(
      compiled[name](own if params is None else params, tokens, positions, segments)
    )

  return call


def three_rows():
  """Tokens, positions, segments: two documents packed with padding behind, and each of them alone."""
  long, short = 23, 17
  tokens = np.zeros((3, LONGEST), np.int32)
  positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
  a, b = families.tokens(long, seed=1), families.tokens(short, seed=2)
  for row, start, text, segment in [
    (0, 0, a, 1),
    (0, long, b, 2),
    (1, 0, a, 1),
    (2, 0, b, 7),  # the number itself means nothing
  ]:
    place = slice(start, start + len(text))
    tokens[row, place], segments[row, place] = text, segment
    positions[row, place] = np.arange(len(text))
  return tokens, positions, segments, long, short


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(run, name):
  expected = json.loads(golden.PATH.read_text())[name]
  # Three rows, as in the next test, so that one compilation serves both.
  tokens = families.tokens(1, LONGEST).repeat(3, axis=0)
  found = run(name, tokens)[0, list(golden.POSITIONS), : golden.ENTRIES]
  np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_equal_documents_alone_and_padding_is_inert(run, name):
  tokens, positions, segments, long, short = three_rows()
  found = run(name, tokens, positions, segments)
  assert np.isfinite(found).all()
  np.testing.assert_allclose(found[0, :long], found[1, :long], **TOLERANCE)
  np.testing.assert_allclose(found[0, long : long + short], found[2, :short], **TOLERANCE)
  noisy = np.where(segments == 0, 5, tokens)
  again = run(name, noisy, np.where(segments == 0, 9, positions), segments)
  np.testing.assert_array_equal(again[segments > 0], found[segments > 0])


@pytest.mark.parametrize("name", FEW)
def test_rows_do_not_see_each_other_nor_what_comes_later(run, name):
  tokens = families.tokens(3, LONGEST)
  found = run(name, tokens)
  order = [2, 0, 1]
  np.testing.assert_allclose(run(name, tokens[order]), found[order], **TOLERANCE)
  changed = tokens.copy()
  changed[0, 20] = (changed[0, 20] + 1) % families.VOCAB
  again = run(name, changed)
  np.testing.assert_array_equal(again[0, :20], found[0, :20])
  np.testing.assert_array_equal(again[1:], found[1:])
  assert np.abs(again[0, 20:22] - found[0, 20:22]).max() > 0.1


def test_a_window_counts_the_query_itself(run):
  """Three layers of window 7 reach back 3 * 6 tokens, and not one more."""
  tokens = families.tokens(3, LONGEST)
  found = run("mistral", tokens)
  changed = tokens.copy()
  changed[:, 4] = (changed[:, 4] + 1) % families.VOCAB
  moved = np.abs(run("mistral", changed) - found).max(axis=(0, 2))
  last = 4 + 3 * (WINDOW - 1)
  assert (moved[4 : last + 1] > 0).all()
  assert (moved[last + 1 :] == 0).all()


def test_left_out_positions_and_segments_are_one_document_a_row():
  config, params = families.make("llama")
  tokens = families.tokens(3, LONGEST)
  ones = np.ones_like(tokens)
  plain = jax.jit(lambda p, t: decoder.forward(p, t, config))(params, tokens)
  said = jax.jit(
    lambda p, t, i, s: decoder.forward(p, t, config, positions=i, segment_ids=s)
  )(params, tokens, positions_of(tokens), ones)  # fmt: skip
  np.testing.assert_allclose(plain, said, **TOLERANCE)


def test_embeddings_stand_in_for_tokens():
  config, params = families.make("gemma2")
  tokens = families.tokens(2, 9)
  scaled = params["embed_tokens"]["weight"][tokens] * 32**0.5
  run = jax.jit(lambda p, t, e: decoder.hidden(p, t, config, embeddings=e))
  np.testing.assert_allclose(run(params, None, scaled), run(params, tokens, None), **TOLERANCE)


def test_bfloat16_computation_of_float32_parameters(run):
  config, params = families.make("qwen3")
  tokens = families.tokens(3, LONGEST)
  half = jax.jit(lambda p, t: decoder.forward(p, t, config, dtype=jnp.bfloat16))(params, tokens)
  assert half.dtype == jnp.float32
  exact = run("qwen3", tokens)
  drift = np.sqrt(np.mean((half - exact) ** 2)) / exact.std()
  assert 1e-4 < drift < 0.05


def test_the_head_is_the_transposed_embedding_where_tied_and_capped_where_asked():
  config, params = families.make("gemma2")
  assert decoder.head(params).base is params["embed_tokens"]["weight"]
  x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
  raw = x @ np.asarray(params["embed_tokens"]["weight"]).T
  np.testing.assert_allclose(
    decoder.logits(params, x, config), 3.0 * np.tanh(raw / 3.0), **TOLERANCE
  )
  config, params = families.make("llama")
  np.testing.assert_allclose(
    decoder.logits(params, x, config), x @ params["lm_head"]["weight"], **TOLERANCE
  )


# --- rotary embedding ------------------------------------------------------------------------------------------------


def test_rope_frequencies():
  found = rotary.inverse_frequencies(Rope(theta=10_000.0), 8)
  np.testing.assert_allclose(found, [1, 0.1, 0.01, 0.001], rtol=1e-6)
  slowed = rotary.inverse_frequencies(Rope(theta=10_000.0, kind="linear", factor=4.0), 8)
  np.testing.assert_allclose(slowed, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)


def test_llama3_rope_keeps_short_waves_slows_long_ones_and_blends_between():
  """Llama 3.1: theta 500,000, factor 8, 1 and 4 turns in 8,192 tokens."""
  rope = Rope(5e5, "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
  found = rotary.inverse_frequencies(rope, 128).astype(np.float64)
  plain = 5e5 ** (-np.arange(64) / 64)
  turns = 8192 * plain / (2 * np.pi)
  np.testing.assert_allclose(found[turns > 4], plain[turns > 4], rtol=1e-6)
  np.testing.assert_allclose(found[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
  between = (turns >= 1) & (turns <= 4)
  assert between.sum() == 6
  weight = (turns[between] - 1) / 3
  np.testing.assert_allclose(
    found[between], plain[between] * (weight + (1 - weight) / 8), rtol=1e-6
  )
  assert (np.diff(found) < 0).all()
  # By hand, i = 31: 5e5 ** -0.484375 = 1.73605e-3 makes 2.26344 turns, so 0.42115 + 0.57885 / 8 of it stays.
  assert found[31] == pytest.approx(8.5675e-4, rel=1e-4)


# --- reading in steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "apart"),
  [*(slow(name, False) for name in FEW[1:]), (FEW[0], False), ("qwen2_sliding", True)],
)
def test_prefill_and_decode_of_ragged_rows_equal_forward(run, name, apart):
  config, params = families.make(name)
  lengths, new = (16, 11, 2), 4
  prompt, rows = max(lengths), len(lengths)
  tokens = families.tokens(rows, prompt + new)  # of a row its prompt, then what follows it

  @jax.jit
  def step(params, tokens, cache, counts):
    x, cache = decoder.step(params, tokens, config, cache, counts=counts)
    return decoder.logits(params, x, config), cache

  weights = decoder.unstack(params, config) if apart else params
  cache = decoder.empty_cache(config, rows, 32, jnp.float32)
  read, cache = step(weights, tokens[:, :prompt], cache, np.asarray(lengths))
  drawn = []
  for i in range(new):
    next_token = np.stack([tokens[row, n + i] for row, n in enumerate(lengths)])[:, None]
    out, cache = step(weights, next_token, cache, np.asarray([1, 1, int(i % 2 == 0)]))
    drawn.append(out)
    if i % 2:  # the last row read nothing: it goes on where it was
      assert cache.lengths.tolist() == [lengths[0] + i + 1, lengths[1] + i + 1, 2 + (i + 1) // 2]
  alone = np.zeros((rows, LONGEST), np.int32)
  for row, n in enumerate(lengths):
    alone[row, : n + new] = tokens[row, : n + new]
  alone[2, 3] = tokens[2, 4]  # it skipped the second
  expected = run(name, alone)  # what follows a row's text cannot reach it
  for row, n in enumerate(lengths):
    np.testing.assert_allclose(read[row, :n], expected[row, :n], **TOLERANCE)
    times = range(new) if row < 2 else (0, 2)
    for place, i in enumerate(times):
      np.testing.assert_allclose(drawn[i][row, 0], expected[row, n + place], **TOLERANCE)


def test_attention_reads_block_by_block(monkeypatch):
  """Two blocks and a part of the third, in a cache of four, with a window that leaves the first out."""
  monkeypatch.setattr(cache_lib, "BLOCK", 16)
  config = families.config("qwen2_sliding", sliding_window=10)
  params = families.params(config)
  tokens = families.tokens(2, 40)
  cache = decoder.empty_cache(config, 2, 64, jnp.float32)
  assert cache.k.shape[1] == 4
  pieces = []
  for start in range(0, 40, 8):
    x, cache = decoder.step(params, tokens[:, start : start + 8], config, cache)
    pieces.append(decoder.logits(params, x, config))
  expected = decoder.forward(params, tokens, config)
  np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, **TOLERANCE)


@pytest.mark.parametrize("heads", [1, 3])
def test_a_cache_of_bits_is_one_of_rounded_numbers(heads):
  """A group of one head is widened, exactly; others are multiplied in bfloat16, which rounds the softmax."""
  rng = np.random.default_rng(heads)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  q, k, v = draw(2, 1, 2 * heads, 8), draw(2, 20, 2, 8), draw(2, 20, 2, 8)
  rounded = lambda x: jax.lax.reduce_precision(x, 8, 7)
  q = rounded(q)
  looked = []
  for dtype in (weight.BITS, jnp.float32):
    shape = (1, 1, 2, 2)
    keys, values = jnp.zeros((*shape, 8, 32), dtype), jnp.zeros((*shape, 32, 8), dtype)
    at = jnp.zeros(2, jnp.int32)
    keys, values = cache_lib.written(keys, values, rounded(k), rounded(v), 0, at)
    assert keys.dtype == dtype
    places = jnp.full((2, 1), 19)
    looked.append(attention.attend_cached(q, keys, values, 0, places, 20, None, scale=1.0))
  np.testing.assert_allclose(looked[0], looked[1], atol=1e-6 if heads == 1 else 0.02)
  assert (heads == 1) == np.allclose(looked[0], looked[1], atol=1e-6)


def test_a_step_in_bfloat16_keeps_the_caches_type():
  config, params = families.make("llama")
  cache = decoder.empty_cache(config, 2, 16, jnp.bfloat16)
  x, after = jax.jit(lambda p, t, c: decoder.step(p, t, config, c))(
    params, families.tokens(2, 3), cache
  )
  assert x.dtype == jnp.float32
  assert after.k.dtype == after.v.dtype == jnp.bfloat16
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)


# --- the layers and their gradient -----------------------------------------------------------------------------------


def summed(config, **options):
  """params, tokens -> a scalar with a gradient everywhere."""
  return lambda p, t: jnp.mean(jnp.sin(decoder.forward(p, t, config, **options)))


def test_layers_apart_equal_layers_stacked(run):
  config, params = families.make("gemma2")
  tokens = families.tokens(3, LONGEST)
  found = run("gemma2", tokens, params=decoder.unstack(params, config))
  np.testing.assert_allclose(found, run("gemma2", tokens), **TOLERANCE)


@pytest.fixture(scope="module")
def plain_gradient():
  config, params = families.make("qwen3")
  return jax.jit(jax.grad(summed(config)))(params, families.tokens(4, 16))


@pytest.mark.parametrize("remat", few(sorted(decoder.REMAT.keys() - {"none"}), "names"))
def test_remat_changes_no_gradient(plain_gradient, remat):
  config, params = families.make("qwen3")
  found = jax.jit(jax.grad(summed(config, remat=remat)))(params, families.tokens(4, 16))
  for path, leaf in tree.items(found):
    expected = tree.get(plain_gradient, path)
    assert np.abs(expected).max() > 0, path
    np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-6, err_msg=path)


def test_remat_keeps_less():
  """Bytes that the backward pass waits for, from the shapes alone."""
  config, _ = families.make("qwen3")
  tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)

  def kept(remat):
    pull = lambda p, t: jax.vjp(lambda p: summed(config, remat=remat)(p, t), p)[1]
    return tree.nbytes(jax.eval_shape(pull, decoder.abstract(config), tokens))

  full, names, dots, none = (kept(remat) for remat in ("full", "names", "dots", "none"))
  assert full < names < none / 2
  assert full < dots < none / 2


def test_an_unknown_remat_is_refused():
  config, params = families.make("llama")
  with pytest.raises(KeyError, match="some"):
    decoder.hidden(params, families.tokens(1, 4), config, remat="some")


# --- declaration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_declared_once_and_covered(name):
  config = families.config(name)
  abstract = decoder.abstract(config, jnp.bfloat16)
  fresh = jax.eval_shape(lambda key: decoder.init(key, config, jnp.bfloat16), jax.random.key(0))
  assert tree.flatten(abstract) == tree.flatten(fresh)
  for path, spec in tree.items(decoder.specs(config)):
    assert tree.get(abstract, path).shape == spec.shape
    assert len(spec.axes.split()) == len(spec.shape), path
    assert len(sharding.spec_for(path, partition.RULES)) <= len(spec.shape), path


def test_fresh_norms_are_neutral_biases_zero_and_matrices_drawn():
  config = families.config("llama_biased")
  fresh = jax.jit(lambda key: decoder.init(key, config, std=0.05))(jax.random.key(0))
  for path, leaf in tree.items(fresh):
    if path.endswith("norm/weight"):
      assert (leaf == 1).all(), path
    elif path.endswith("bias"):
      assert (leaf == 0).all(), path
    else:
      assert np.std(leaf) == pytest.approx(0.05, rel=0.1), path
      assert np.abs(np.mean(leaf)) < 0.005, path
  gemma = dict(tree.items(decoder.specs(families.config("gemma2"))))
  assert {s.init for path, s in gemma.items() if path.endswith("norm/weight")} == {"zeros"}


def test_every_rule_is_used():
  configs = [families.config(name) for name in FAMILIES]
  configs.append(dataclasses.replace(configs[0], scores=1))  # a reward model
  paths = {path for config in configs for path in tree.flatten(decoder.specs(config))}
  for i, (pattern, _) in enumerate(partition.DECODER):
    alone = [p for p in paths if _covered([partition.DECODER[i]], p)]
    before = [p for p in alone if _covered(partition.DECODER[:i], p)]
    assert set(alone) - set(before), pattern


def _covered(rules, path):
  try:
    sharding.spec_for(path, rules)
  except KeyError:
    return False
  return True


def test_parameter_counts_are_the_published_ones():
  smollm2 = dataclasses.replace(
    families.config("llama"),
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    tied=True,
  )
  assert tree.size(decoder.abstract(smollm2)) == 134_515_008
  llama3_8b = dataclasses.replace(
    families.config("llama"),
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
  )
  assert tree.size(decoder.abstract(llama3_8b)) == 8_030_261_248


# --- eight devices ---------------------------------------------------------------------------------------------------


def spread(mesh, params):
  """params, arrays or abstract, where `partition.RULES` puts them."""

  def place(path, leaf):
    where = sharding.named(mesh, sharding.spec_for(path, partition.RULES), leaf.shape)
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.device_put(leaf, where)

  return tree.unflatten((path, place(path, leaf)) for path, leaf in tree.items(params))


def test_the_gradient_on_eight_devices_equals_one(plain_gradient):
  config, params = families.make("qwen3")
  mesh = sharding.mesh(fsdp=4, tensor=2)
  params = spread(mesh, params)
  query = params["layers"]["self_attn"]["q_proj"]["weight"]
  assert query.addressable_shards[0].data.size * 8 == query.size
  with jax.set_mesh(mesh):
    found = jax.jit(jax.grad(summed(config)))(params, families.tokens(4, 16))
  for path, leaf in tree.items(found):
    want = np.asarray(tree.get(plain_gradient, path))
    np.testing.assert_allclose(leaf, want, rtol=1e-3, atol=1e-5 * np.abs(want).max(), err_msg=path)


@pytest.mark.parametrize(
  "name", few(["llama3", "gemma3"], "llama3")
)  # one key head, which two do not divide
def test_logits_on_eight_devices_equal_one(run, name):
  config, params = families.make(name)
  tokens, positions, segments, *_ = three_rows()
  mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    found = jax.jit(
      lambda p, t, i, s: decoder.forward(p, t, config, positions=i, segment_ids=s)
    )(spread(mesh, params), *(x.repeat(4, axis=0) for x in (tokens, positions, segments)))  # fmt: skip
  used = segments > 0
  expected = run(name, tokens, positions, segments)
  np.testing.assert_allclose(np.asarray(found)[::4][used], expected[used], **TOLERANCE)


def test_a_sharded_forward_never_gathers_whole_activations():
  """Without `constrain`, fsdp was seen to compute every row on every device."""
  config, _ = families.make("llama")
  mesh = sharding.mesh(fsdp=8)
  params = spread(mesh, decoder.abstract(config))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  tokens = jax.ShapeDtypeStruct((16, 24), jnp.int32, sharding=rows)
  with jax.set_mesh(mesh):
    compiled = jax.jit(lambda p, t: decoder.hidden(p, t, config)).lower(params, tokens).compile()
  text = compiled.as_text()
  assert "f32[2,24,32]" in text or "f32[48,32]" in text  # two rows a device
  assert "f32[16,24,32]" not in text
  assert "f32[384,32]" not in text


def test_slices_of_a_stack_are_its_layers():
  config, params = families.make("llama")
  apart = decoder.unstack(params, config)
  assert len(apart["layers"]) == config.num_layers
  for i, layer in enumerate(apart["layers"]):
    expected = jax.tree.map(operator.itemgetter(i), params["layers"])
    jax.tree.map(np.testing.assert_array_equal, layer, expected)
