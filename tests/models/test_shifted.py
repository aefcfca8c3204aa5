"""Shifted sparse attention against a loop over queries, heads and keys; segments that several documents see."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models import attention, decoder
from posttrain_jax.models.attention import Places
from tests.marks import slow
from tests.models import families


def groups_of(time, group):
  """[2, time]: the group of each token, for the first half of the heads and for the second.

  Chen et al. 2023, Algorithm 1, with the half groups at the ends of the row apart.
  """
  plain, late = np.zeros(time, int), np.zeros(time, int)
  for t in range(time):
    plain[t] = t // group
    late[t] = 0 if t < group // 2 else 1 + (t - group // 2) // group
  return np.stack([plain, late])


def naive(q, k, v, positions, segments, group, window, scale, softcap):
  """float64, one query, head and key at a time; a query that sees nothing (padding) is left out."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros_like(q)
  batch, time, heads, _ = q.shape
  numbers = groups_of(time, group)
  for b, t, h in np.ndindex(batch, time, heads):
    number = numbers[int(h >= heads // 2)]
    seen = [
      s
      for s in range(time)
      if number[s] == number[t]
      and segments[b, s] == segments[b, t] > 0
      and 0 <= positions[b, t] - positions[b, s] < (window or time)
    ]
    if not seen:
      continue
    kv = h // (heads // k.shape[2])
    scores = np.array([scale * q[b, t, h] @ k[b, s, kv] for s in seen])
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    out[b, t, h] = (weights / weights.sum()) @ v[b, seen, kv]
  return out


def packed(time):
  """Rows of two documents and padding, of one document, of three."""
  cuts = [(0, time // 2 + 1, time - 2), (0, time), (0, 3, 9, time)]
  positions, segments = np.zeros((2, 3, time), np.int32)
  for row, ends in enumerate(cuts):
    for number, (start, end) in enumerate(itertools.pairwise(ends), 1):
      positions[row, start:end], segments[row, start:end] = np.arange(end - start), number
  return positions, segments


@pytest.mark.parametrize(
  ("time", "group", "heads", "kv_heads", "softcap"),
  [(16, 4, 4, 2, None), slow(19, 6, 9, 3, 1.5), slow(18, 5, 4, 1, None), slow(13, 40, 3, 3, 1.5)],
)
def test_shifted_attention_is_the_loop(time, group, heads, kv_heads, softcap):
  draw = np.random.default_rng(0)
  shapes = [(3, time, heads, 4), (3, time, kv_heads, 4), (3, time, kv_heads, 4)]
  q, k, v = (jnp.asarray(2 * draw.standard_normal(s), jnp.float32) for s in shapes)
  positions, segments = packed(time)
  for window in (None, 3):
    places = Places(jnp.asarray(positions), jnp.asarray(segments))
    found = attention.attend_shifted(
      q, k, v, places, places, window, group=group, scale=0.7, softcap=softcap
    )
    expected = naive(q, k, v, positions, segments, group, window, 0.7, softcap)
    real = segments > 0
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-6)


def test_no_token_sees_a_later_one_and_half_the_heads_cross_groups():
  """The gradient of a token's output reaches its group of either half, and nothing behind it."""
  time, group = 16, 4
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, time, 2, 4)), jnp.float32)
  row = Places(jnp.arange(time)[None], jnp.ones((1, time), int))
  attend = lambda k, t, h: attention.attend_shifted(x, k, k, row, row, group=group, scale=1.0)[
    0, t, h
  ]
  reached = lambda t, h: np.flatnonzero(
    np.abs(jax.jacobian(attend)(x, t, h)).sum((0, 1, 3, 4)) > 0
  ).tolist()
  assert reached(5, 0) == [4, 5]
  assert reached(5, 1) == [2, 3, 4, 5]
  assert reached(1, 1) == [0, 1]  # one wrapped group would reach 14 and 15
  assert reached(15, 1) == [14, 15]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2_sliding"])
def test_the_decoder_with_one_group_for_all_is_full_attention_in_half_the_heads(family):
  """A group of twice the row: both halves see the whole row."""
  config, params = families.make(family)
  tokens = families.tokens(2, 12)
  run = jax.jit(lambda group: decoder.forward(params, tokens, config), static_argnums=0)
  shifted = decoder.forward(params, tokens, config, attention_group=24)
  np.testing.assert_allclose(shifted, run(0), rtol=1e-4, atol=1e-4)
  sparse = decoder.forward(params, tokens, config, attention_group=4)
  assert np.abs(sparse - shifted).max() > 0.1
  np.testing.assert_allclose(sparse[:, :2], shifted[:, :2], rtol=1e-4, atol=1e-4)  # one half group


def test_packed_documents_stay_apart_under_shifted_attention():
  """What one document says changes nothing in another, and a document that fills groups is as if alone."""
  config, params = families.make("llama")
  run = jax.jit(
    lambda tokens, **packing: decoder.forward(params, tokens, config, attention_group=8, **packing)
  )
  positions = jnp.asarray([[*range(16), *range(8)]])
  segments = jnp.asarray([[1] * 16 + [2] * 8])
  row, other = families.tokens(1, 24), families.tokens(1, 24, seed=1)
  changed = row.copy()
  changed[:, 16:] = other[:, 16:]
  found = run(row, positions=positions, segment_ids=segments)
  again = run(changed, positions=positions, segment_ids=segments)
  np.testing.assert_allclose(found[:, :16], again[:, :16], rtol=1e-5, atol=1e-5)
  alone = run(row[:, :16])
  np.testing.assert_allclose(found[:, :16], alone, rtol=1e-4, atol=1e-5)


# --- segments that several documents see ------------------------------------------------------------------------------


def test_everyone_is_seen_by_every_document_and_not_from_before():
  which = jnp.asarray([[attention.EVERYONE, attention.EVERYONE, 0, 1, 2]])
  row = Places(jnp.asarray([[0, 1, 0, 2, 2]]), which)
  found = attention.visible(row, row)[0].astype(int).tolist()
  assert found[0] == [1, 0, 0, 0, 0]
  assert found[1] == [1, 1, 0, 0, 0]
  assert found[3] == [1, 1, 0, 1, 0]
  assert found[4] == [1, 1, 0, 0, 1]
  near = attention.visible(row, row, 2)[0].astype(int).tolist()
  assert near[3] == [0, 1, 0, 1, 0]  # a window ends inside it


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_two_answers_share_the_prompt_that_is_computed_once(family):
  """[prompt, answer, answer, prompt, answer] in one row: logits of every answer as in a row of its own."""
  config, params = families.make(family)
  first, one, two = (families.tokens(n, seed=n) for n in (7, 5, 4))
  second, three = families.tokens(6, seed=20), families.tokens(3, seed=21)
  parts = [first, one, two, second, three]
  row = np.concatenate([*parts, [0, 0]])[None]
  lengths = [*map(len, parts), 2]
  spread = lambda values: np.repeat([*values, 0], lengths)[None]
  inside = np.concatenate([np.arange(n) for n in lengths])[None]
  positions = inside + spread([0, 7, 7, 0, 6])
  found = decoder.forward(
    params,
    row,
    config,
    positions=positions,
    segment_ids=spread([1, 2, 3, 4, 5]),
    prefix_ids=spread([0, 1, 1, 0, 4]),
  )[0]
  ends = np.cumsum([len(p) for p in parts])
  for prompt, answer, end in (
    (first, one, ends[1]),
    (first, two, ends[2]),
    (second, three, ends[4]),
  ):
    alone = decoder.forward(params, np.concatenate([prompt, answer])[None], config)[0]
    np.testing.assert_allclose(
      found[end - len(answer) : end], alone[len(prompt) :], rtol=1e-4, atol=1e-4
    )
