"""Attention against loops in float64 that do one query, one head and one key at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models import attention
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
    seen = seen if len(seen) else np.arange(k.shape[1])
    scores = [scale * q[b, t, h] @ k[b, s, h // per_key_head] for s in seen]
    if softcap is not None:
      scores = [softcap * math.tanh(score / softcap) for score in scores]
    if not mask[b, t].any():
      scores = [0.0] * len(seen)
    weights = np.exp(np.array(scores) - max(scores))
    weights /= weights.sum()
    out[b, t, h] = sum(w * v[b, s, h // per_key_head] for w, s in zip(weights, seen))
  return out


def packed_rows(time):
  """(positions, segments) of one row with two documents and padding, and one with a single document."""
  first = time // 2 + 1
  positions = np.zeros((2, time), np.int32)
  segments = np.zeros((2, time), np.int32)
  positions[0, :first], segments[0, :first] = np.arange(first), 1
  positions[0, first : time - 2], segments[0, first : time - 2] = np.arange(time - 2 - first), 2
  positions[1], segments[1] = np.arange(time), 1
  return positions, segments


def drawn(time, heads=6, kv_heads=2, dim=4, dtype=np.float32):
  draw = np.random.default_rng(0)
  shapes = [(2, time, heads, dim), (2, time, kv_heads, dim), (2, time, kv_heads, dim)]
  return [jnp.asarray((2 * draw.standard_normal(shape)).astype(dtype)) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_visible_is_the_loop(window):
  positions, segments = packed_rows(12)
  found = attention.visible(positions, positions, segments, segments, window)
  expected = [
    [[may_look(p[i], p[j], s[i], s[j], window) for j in range(12)] for i in range(12)]
    for p, s in zip(positions, segments)
  ]
  np.testing.assert_array_equal(found, expected)


def test_visible_of_a_cache_with_empty_slots():
  """Two queries behind three tokens, one of them padding, in a cache of eight."""
  keys = np.array([[0, 0, 1, 2, 3, 0, 0, 0]])
  segments = np.array([[0, 1, 1, 1, 1, 0, 0, 0]])
  found = attention.visible(np.array([[2, 3]]), keys, np.ones((1, 2), int), segments, window=3)
  np.testing.assert_array_equal(found[0].astype(int), [[0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0]])  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (4, 1)])
def test_attend_is_the_loop(softcap, window, heads, kv_heads):
  q, k, v = drawn(11, heads, kv_heads)
  positions, segments = packed_rows(11)
  mask = np.asarray(attention.visible(positions, positions, segments, segments, window))
  found = attend(q, k, v, mask, scale=0.7, softcap=softcap)
  expected = naive(q, k, v, mask, 0.7, softcap)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_more_keys_than_queries():
  q, k, v = drawn(9)
  mask = np.random.default_rng(1).random((2, 2, 9)) < 0.5
  found = attend(q[:, :2], k, v, mask, scale=0.5)
  np.testing.assert_allclose(found, naive(q[:, :2], k, v, mask, 0.5, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", few([False, True], True))
@pytest.mark.parametrize("softcap", few([None, 1.5], 1.5))
@pytest.mark.parametrize("behind", [0, 5])
def test_blocks_of_queries_change_nothing(monkeypatch, softcap, causal, behind):
  """Values and gradients of 22 queries in blocks of 4 and spans of 8, some of `behind` keys more before them."""
  q, k, v = drawn(22 + behind)
  q = q[:, behind:]
  positions, segments = packed_rows(22 + behind)
  mask = attention.visible(positions[:, behind:], positions, segments[:, behind:], segments, 7)

  def run(q, k, v):
    out = naive_attention(q, k, v, mask, 0.7, softcap)
    return jnp.sum(jnp.sin(out)), out

  def found(q, k, v):
    out = attention.attend(q, k, v, mask, scale=0.7, softcap=softcap, causal=causal)
    return jnp.sum(jnp.sin(out)), out

  (_, plain), plain_gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(q, k, v)
  monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
  monkeypatch.setattr(attention, "MOST_SPANS", 3)
  (_, split), gradients = jax.jit(jax.value_and_grad(found, (0, 1, 2), has_aux=True))(q, k, v)
  np.testing.assert_allclose(split, plain, rtol=1e-5, atol=1e-6)
  for one, expected in zip(gradients, plain_gradients):
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)


def naive_attention(q, k, v, mask, scale, softcap):
  """The formula as it stands, differentiated by jax."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
  scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(mask[:, None], scores, attention.NEGATIVE)
  return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def test_a_causal_row_is_not_compared_with_what_comes_later(monkeypatch):
  """Half of the products of a long row are left out."""
  monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
  q, k, v = drawn(128)
  positions = np.broadcast_to(np.arange(128), (2, 128))
  mask = attention.visible(positions, positions, np.ones((2, 128)), np.ones((2, 128)))

  def work(causal):
    run = lambda q, k, v: attention.attend(q, k, v, mask, scale=1.0, causal=causal)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8 if causal else 128)
    return jax.jit(run).lower(q, k, v).compile().cost_analysis()["flops"]

  assert work(True) < 0.6 * work(False)


def test_a_query_that_sees_nothing_gets_the_mean_and_finite_gradients():
  q, k, v = drawn(5)
  nothing = np.zeros((2, 5, 5), bool)
  run = jax.jit(lambda q, k, v: attention.attend(q, k, v, nothing, scale=1.0, softcap=2.0))
  mean = jnp.repeat(v.mean(axis=1, keepdims=True), 3, axis=2)  # each key head serves three
  np.testing.assert_allclose(run(q, k, v), jnp.broadcast_to(mean, q.shape), rtol=1e-5, atol=1e-6)
  gradients = jax.jit(jax.grad(lambda *x: run(*x).sum(), (0, 1, 2)))(q, k, v)
  assert all(np.isfinite(g).all() for g in gradients)


def test_large_scores_in_bfloat16_stay_finite_and_keep_their_type():
  q, k, v = drawn(6, dtype=jnp.bfloat16)
  positions, segments = packed_rows(6)
  mask = np.asarray(attention.visible(positions, positions, segments, segments))
  found = attend(q * 100, k * 100, v, mask, scale=1.0)
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
