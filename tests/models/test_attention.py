"""Attention against loops in float64 that do one query, one head and one key at a time."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models import attention
from posttrain_jax.models.attention import EVERYONE, Places
from tests.marks import few

attend = jax.jit(attention.attend, static_argnames=("scale", "softcap"))


def may_look(q_position, k_position, q_segment, k_segment, window):
  if k_segment == 0 or q_segment != k_segment or k_position > q_position:
    return False
  return window is None or k_position > q_position - window


def naive(q, k, v, mask, scale, softcap):
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros_like(q)
  batch, time, heads, _ = q.shape
  per_key_head = heads // k.shape[2]
  for b, t, h in np.ndindex(batch, time, heads):
    seen = np.flatnonzero(mask[b, t])
    if not len(seen):
      continue
    scores = [scale * q[b, t, h] @ k[b, s, h // per_key_head] for s in seen]
    if softcap is not None:
      scores = [softcap * math.tanh(score / softcap) for score in scores]
    weights = np.exp(np.array(scores) - max(scores))
    weights /= weights.sum()
    out[b, t, h] = sum(w * v[b, s, h // per_key_head] for w, s in zip(weights, seen))
  return out


def packed_rows(time):
  """The places of one row with two documents and padding, and of one with a single document."""
  first = time // 2 + 1
  positions = np.zeros((2, time), np.int32)
  segments = np.zeros((2, time), np.int32)
  positions[0, :first], segments[0, :first] = np.arange(first), 1
  positions[0, first : time - 2], segments[0, first : time - 2] = np.arange(time - 2 - first), 2
  positions[1], segments[1] = np.arange(time), 1
  return Places(positions, segments)


def behind_first(places, count):
  return jax.tree.map(lambda x: x[:, count:], places)


def drawn(time, heads=6, kv_heads=2, dim=4, dtype=np.float32):
  draw = np.random.default_rng(0)
  shapes = [(2, time, heads, dim), (2, time, kv_heads, dim), (2, time, kv_heads, dim)]
  return [jnp.asarray((2 * draw.standard_normal(shape)).astype(dtype)) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_visible_is_the_loop(window):
  places = packed_rows(12)
  found = attention.visible(places, places, window)
  expected = [
    [[may_look(p[i], p[j], s[i], s[j], window) for j in range(12)] for i in range(12)]
    for p, s in zip(places.positions, places.segments)
  ]
  np.testing.assert_array_equal(found, expected)


def test_visible_of_a_cache_with_empty_slots():
  """Two queries behind three tokens, one of them padding, in a cache of eight."""
  keys = Places(np.array([[0, 0, 1, 2, 3, 0, 0, 0]]), np.array([[0, 1, 1, 1, 1, 0, 0, 0]]))
  found = attention.visible(Places(np.array([[2, 3]]), np.ones((1, 2), int)), keys, window=3)
  np.testing.assert_array_equal(found[0].astype(int), [[0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0]])  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (4, 1)])
def test_attend_is_the_loop(softcap, window, heads, kv_heads):
  q, k, v = drawn(11, heads, kv_heads)
  places = packed_rows(11)
  mask = np.asarray(attention.visible(places, places, window))
  found = attend(q, k, v, places, places, window, scale=0.7, softcap=softcap)
  np.testing.assert_allclose(found, naive(q, k, v, mask, 0.7, softcap), rtol=1e-5, atol=1e-6)


def pairs_that_share(time):
  """Rows of [prompt, answer, answer], twice, behind two slots that everyone sees, and padding."""
  cuts = np.sort(np.random.default_rng(time).choice(np.arange(3, time - 2), (2, 5), replace=False))
  positions, segments, prefixes = np.zeros((3, 2, time), np.int32)
  for row, inner in enumerate(cuts):
    segments[row, :2], positions[row, :2] = EVERYONE, [0, 1]
    ends = [2, *inner, time - 2]
    for number, (start, end) in enumerate(itertools.pairwise(ends), 1):
      is_answer, prompt = number % 3 != 1, number - (number - 1) % 3
      before = ends[prompt] - ends[prompt - 1] if is_answer else 0
      segments[row, start:end] = number
      positions[row, start:end] = 2 + before + np.arange(end - start)
      prefixes[row, start:end] = prompt if is_answer else 0
  return Places(positions, segments, prefixes)


@pytest.mark.parametrize("softcap", few([None, 1.5], 1.5))
@pytest.mark.parametrize("behind", [0, 5])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", [packed_rows, pairs_that_share])
@pytest.mark.parametrize("tiled", [False, True])
def test_parts_change_nothing(monkeypatch, softcap, behind, window, rows, tiled):
  """Values and gradients of 22 queries in blocks of 8, some of `behind` keys more before them."""
  q, k, v = drawn(22 + behind)
  keys = rows(22 + behind)
  q, queries = q[:, behind:], behind_first(keys, behind)
  mask = attention.visible(queries, keys, window)

  def run(q, k, v):
    out = naive_attention(q, k, v, mask, 0.7, softcap)
    return jnp.sum(jnp.sin(out)), out

  def found(q, k, v):
    out = attention.attend(q, k, v, queries, keys, window, scale=0.7, softcap=softcap)
    return jnp.sum(jnp.sin(out)), out

  (_, plain), plain_gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(q, k, v)
  monkeypatch.setattr(attention, "SHORT_ROW", 0 if tiled else 99)
  monkeypatch.setattr(attention, "SHORT", 8)
  monkeypatch.setattr(attention, "TILES", {"default": (8, 16)})
  (_, split), gradients = jax.jit(jax.value_and_grad(found, (0, 1, 2), has_aux=True))(q, k, v)
  np.testing.assert_allclose(split, plain, rtol=1e-5, atol=5e-6)
  for one, expected in zip(gradients, plain_gradients):
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)


def naive_attention(q, k, v, mask, scale, softcap):
  """The formula as it stands, differentiated by jax."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
  scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(mask[:, None], scores, attention.NEGATIVE)
  out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
  return jnp.where(jnp.any(mask, axis=-1)[..., None, None], out, 0)


def tiles_seen(queries, keys, window, size):
  """(whether a tile is computed, whether some query of it sees a key), [tiles, tiles] each."""
  computed = np.asarray(attention.seen(queries, keys, window, size, size))
  mask = np.asarray(attention.visible(queries, keys, window)).any(axis=0)
  needed = mask.reshape(len(mask) // size, size, -1, size).any(axis=(1, 3))
  return computed, needed


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("time", [32, 64])
@pytest.mark.parametrize("rows", [packed_rows, pairs_that_share])
def test_no_tile_is_left_out_that_somebody_sees_into(rows, time, window):
  places = rows(time)
  computed, needed = tiles_seen(places, places, window, 4)
  assert (computed | ~needed).all()


def test_what_nobody_sees_into_is_left_out():
  """Of a row of documents, of a pair's other answer, of what comes later and of what a window hides."""
  documents = np.repeat(np.arange(1, 5), 16)[None]
  row = Places(np.tile(np.arange(16), 4)[None], documents)
  computed, needed = tiles_seen(row, row, None, 4)
  np.testing.assert_array_equal(computed, needed)
  assert computed.sum() == 4 * (4 * 5 // 2)
  long = Places(np.arange(64)[None], np.ones((1, 64), int))
  np.testing.assert_array_equal(*tiles_seen(long, long, None, 4))
  computed, needed = tiles_seen(long, long, 9, 4)
  np.testing.assert_array_equal(computed, needed)
  assert computed.sum() < 64
  pair = Places(
    np.array([[*range(16), *range(16, 32), *range(16, 32)]]),
    np.repeat([1, 2, 3], 16)[None],
    np.repeat([0, 1, 1], 16)[None],
  )
  computed, needed = tiles_seen(pair, pair, None, 4)
  np.testing.assert_array_equal(computed, needed)
  assert not computed[8:, 4:8].any()  # the second answer and the first
  padded = Places(np.zeros((1, 64), int), np.zeros((1, 64), int))
  assert not tiles_seen(padded, padded, None, 4)[0].any()


def test_a_query_that_sees_nothing_gets_zero_and_gives_no_gradient():
  q, k, v = drawn(5)
  nothing = Places(np.zeros((2, 5), int), np.zeros((2, 5), int))
  some = Places(np.broadcast_to(np.arange(5), (2, 5)), np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def run(q, k, v, places):
    out = attention.attend(q, k, v, places, places, scale=1.0, softcap=2.0)
    return out.sum(), out

  for places in (nothing, some):
    hidden = places.segments == 0
    (_, out), gradients = run(q, k, v, places)
    assert not np.asarray(out)[hidden].any()
    assert all(np.isfinite(g).all() and not np.asarray(g)[hidden].any() for g in gradients)


def test_large_scores_in_bfloat16_stay_finite_and_keep_their_type():
  q, k, v = drawn(6, dtype=jnp.bfloat16)
  places = packed_rows(6)
  mask = np.asarray(attention.visible(places, places))
  found = attend(q * 100, k * 100, v, places, places, scale=1.0)
  assert found.dtype == jnp.bfloat16
  expected = naive(q * 100, k * 100, v, mask, 1.0, None)
  np.testing.assert_allclose(found.astype(np.float32), expected, rtol=0.02, atol=0.02)


def test_rotate_is_a_complex_product():
  """Component i and i + half of a head are one complex number, turned by the angle."""
  x = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)
  angles = np.random.default_rng(1).uniform(-9, 9, (2, 3, 3))
  found = np.asarray(attention.rotate(jnp.asarray(x), jnp.cos(angles), jnp.sin(angles)))
  turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[:, :, None]
  np.testing.assert_allclose(found[..., :3] + 1j * found[..., 3:], turned, rtol=1e-4, atol=1e-5)
