"""Attention that knows causality, packed segments, sliding windows and soft-caps.

One function, `attend`; an accelerator kernel replaces its body, never its contract.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from posttrain_jax.core import sharding

Array = jax.Array
NEGATIVE = -2.0e38  # finite, so that a row that may see nothing stays free of NaN
QUERY_BLOCK = 256  # queries scored at once
MOST_SPANS = 16  # parts of a causal row, each compiled for the keys that it sees

EVERYONE = -1  # the segment of keys that every document of the row sees: a soft prompt


def visible(
  query_positions: Array,
  key_positions: Array,
  query_segments: Array,
  key_segments: Array,
  window: int | None = None,
  prefixes: Array | None = None,
) -> Array:
  """[batch, time, keys]: True where a query may look: same document, not later, not `window` or more before.

  Segment 0 is padding: nothing sees it.  Segment `EVERYONE` is seen by all.  Positions: [batch, time] and
  [batch, keys], counted within a document and what stands before it.

  Args:
    prefixes: [batch, time], one more segment that a query sees, 0 for none: documents that begin alike (the two answers
      of a pair) share that beginning, which is a segment of its own and is computed once.
  """
  distance = query_positions[:, :, None] - key_positions[:, None, :]
  keys = key_segments[:, None, :]
  same = (query_segments[:, :, None] == keys) | (keys == EVERYONE)
  if prefixes is not None:
    same |= prefixes[:, :, None] == keys
  seen = same & (keys != 0) & (distance >= 0)
  return seen if window is None else seen & (distance < window)


def attend(
  q: Array,
  k: Array,
  v: Array,
  mask: Array,
  *,
  scale: float,
  softcap: float | None = None,
  causal: bool = False,
) -> Array:
  """softmax(cap(scale q k^T) + mask) v, heads of queries sharing keys in groups.

  QUERY_BLOCK queries at a time, whose weights are computed again in the backward pass from each query's maximum and
  sum: memory grows as time, not as time squared.  Dao et al. 2022 (FlashAttention), sections 3.1 and B.4, without the
  tiles of keys.

  Args:
    q: [batch, time, heads, head_dim].
    k, v: [batch, keys, kv_heads, head_dim]; heads is a multiple of kv_heads.
    mask: [batch, time, keys], True where a query may look; a query that sees nothing gets the mean of the v it is
      compared with.
    scale: multiplies the scores.
    softcap: cap * tanh(score / cap) (Gemma 2), None for none.
    causal: the last `time` keys stand in the queries' order and the mask hides what comes after a query, so a block is
      compared with the keys up to its end only: half the work of a long row.

  Returns:
    [batch, time, heads, head_dim] in q's dtype; scores and softmax in float32.
  """
  batch, time, heads, dim = q.shape
  groups, keys = heads // k.shape[2], k.shape[1]
  # [batch, kv_heads, groups, time, dim]: plain batched products, twice as fast as the grouped einsum on XLA:CPU
  q = (q * scale).reshape(batch, time, -1, groups, dim).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  size = QUERY_BLOCK * -(-time // (QUERY_BLOCK * MOST_SPANS)) if causal else time
  out = []
  for start in range(0, time, size):
    end = min(start + size, time)
    seen = keys - (time - end) if causal else keys
    span = (q[..., start:end, :], k[..., :seen, :], v[..., :seen, :], mask[:, start:end, :seen])
    out.append(_span(*span, softcap))
  out = out[0] if len(out) == 1 else jnp.concatenate(out, axis=3)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, dim)


def attend_cached(
  q: Array,
  k: Array,
  v: Array,
  layer: Array | int,
  positions: Array,
  end: Array,
  window: Array | None,
  *,
  scale: float,
  softcap: float | None = None,
) -> Array:
  """softmax(cap(scale q k^T)) v over what a `cache.Cache` holds of each query's row, a block of slots at a time.

  Blocks are read up to `end`, so the cost follows the longest row that is read for and not the allocated slots; the
  running maximum and sum of Dao et al. 2022, section 3.1.  A block that a row sees nothing of changes its result by no
  bit, so that a row does not depend on how long its neighbours are.

  Args:
    q: [rows, time, heads, head_dim].
    k, v: as a `Cache` holds them.
    layer: which layer's.
    positions: [rows, time], of the queries; a query sees the slots up to its own.
    end: the slots that any row which counts has in use.
    window: how many slots back a query sees, its own among them; None for all.

  Returns:
    [rows, time, heads, head_dim] in q's dtype; scores and softmax in float32.
  """
  rows, time, heads, dim = q.shape
  kv_heads, block = k.shape[3], k.shape[5]
  groups = heads // kv_heads
  folded = (q * scale).reshape(rows, time, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
  folded = folded.astype(k.dtype).reshape(rows, kv_heads, groups * time, dim)
  places = jnp.tile(positions, (1, groups))[:, None, :, None]  # as the queries are folded
  first = 0 if window is None else jnp.maximum(jnp.min(positions) - window + 1, 0) // block

  def read(number, so_far):
    most, total, out = so_far
    part = lambda x: jax.lax.dynamic_slice(
      x, (layer, number, 0, 0, 0, 0), (1, 1, *x.shape[2:])
    ).reshape(x.shape[2:])
    scores = _products("rkqd,rkds->rkqs", folded, part(k))
    if softcap is not None:
      scores = softcap * jnp.tanh(scores / softcap)
    slot = number * block + jnp.arange(block)
    seen = slot <= places
    if window is not None:
      seen &= slot > places - window
    scores = jnp.where(seen, scores, NEGATIVE)
    higher = jnp.maximum(most, jnp.max(scores, axis=-1, keepdims=True))
    weights, kept = jnp.exp(scores - higher), jnp.exp(most - higher)
    total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
    out = out * kept + _products("rkqs,rksd->rkqd", weights.astype(v.dtype), part(v))
    return higher, total, out

  zeros = jnp.zeros((rows, kv_heads, groups * time, 1))
  start = (zeros + NEGATIVE, zeros, jnp.zeros((rows, kv_heads, groups * time, dim)))
  _, total, out = jax.lax.fori_loop(first, (end + block - 1) // block, read, start)
  out = (out / total).astype(q.dtype).reshape(rows, kv_heads, groups, time, dim)
  return out.transpose(0, 3, 1, 2, 4).reshape(rows, time, heads, dim)


def attend_shifted(
  q: Array,
  k: Array,
  v: Array,
  masks: tuple[Array, Array],
  *,
  group: int,
  scale: float,
  softcap: float | None = None,
) -> Array:
  """`attend` within groups of `group` tokens, the second half of the heads with groups that start half a group later.

  Shifted sparse attention, in training only.  Chen et al. 2023 (LongLoRA), section 3.2.  The half groups left over at
  the two ends of the row are groups of their own, as in the authors' code: one wrapped group would let the first tokens
  see the last.

  Args:
    q, k, v: as for `attend`, keys being the same tokens as queries.
    masks: of `shifted_masks`.
  """
  heads = q.shape[2]
  if k.shape[2] % 2:
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
  out = []
  for late, mask in enumerate(masks):
    halves = [jnp.split(x, [x.shape[2] // 2], axis=2) for x in (q, k, v)]
    grouped = [_groups(half[late], group, late) for half in halves]
    attended = attend(*grouped, mask, scale=scale, softcap=softcap)
    out.append(_ungrouped(attended, q.shape[:2], group, late))
  return jnp.concatenate(out, axis=2)


def shifted_masks(
  positions: Array, segments: Array, group: int, window: int | None = None
) -> tuple[Array, Array]:
  """What `attend_shifted` lets a query see, for either half of the heads: [batch * groups, group, group] each."""
  half_masks = []
  for late in (False, True):
    places = jnp.arange(positions.shape[1]) + (group - group // 2 if late else 0)
    number = _groups(jnp.broadcast_to(places // group, positions.shape), group, late)
    where, which = (_groups(x, group, late) for x in (positions, segments))
    mask = visible(where, where, which, which, window)
    half_masks.append(mask & (number[:, :, None] == number[:, None, :]))
  return half_masks[0], half_masks[1]


def _groups(x, group, late):
  """[batch, time, ...] -> [batch * groups, group, ...]: filled up with zeros; late groups begin half a group later."""
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % group), *[(0, 0)] * (x.ndim - 2)])
  x = jnp.roll(x, -(group // 2), axis=1) if late else x
  return x.reshape(-1, group, *x.shape[2:])


def _ungrouped(x, lead, group, late):
  batch, time = lead
  x = x.reshape(batch, -1, *x.shape[2:])
  return (jnp.roll(x, group // 2, axis=1) if late else x)[:, :time]


def _span(q, k, v, mask, softcap):
  """Attention of any number of queries: [batch, kv_heads, groups, time, dim], a block after the other."""
  time = q.shape[3]
  if time <= QUERY_BLOCK:
    return _block(q, k, v, mask, softcap)
  padding = -time % QUERY_BLOCK
  q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
  mask = jnp.pad(mask, ((0, 0), (0, padding), (0, 0)))
  q = jnp.moveaxis(q.reshape(*q.shape[:3], -1, QUERY_BLOCK, q.shape[-1]), 3, 0)
  mask = jnp.moveaxis(mask.reshape(mask.shape[0], -1, QUERY_BLOCK, mask.shape[-1]), 1, 0)
  _, out = jax.lax.scan(
    lambda _, one: (None, _block(one[0], k, v, one[1], softcap)), None, (q, mask)
  )
  out = jnp.moveaxis(out, 0, 3)
  return out.reshape(*out.shape[:3], -1, out.shape[-1])[:, :, :, :time]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _block(q, k, v, mask, softcap):
  """[batch, kv_heads, groups, time, dim] of a block of queries; k, v: [batch, kv_heads, keys, dim]."""
  return _block_forward(q, k, v, mask, softcap)[0]


def _block_forward(q, k, v, mask, softcap):
  scores = _scores(q, k, mask, softcap)
  most = checkpoint_name(jnp.max(scores, axis=-1, keepdims=True), "maximum")
  weights = jnp.exp(scores - most)
  total = checkpoint_name(jnp.sum(weights, axis=-1, keepdims=True), "sum")
  out = _products("bkqs,bksd->bkqd", _folded(weights.astype(v.dtype)), v).reshape(q.shape)
  out = checkpoint_name((out / total).astype(v.dtype), "context")
  return out, (q, k, v, mask, out, most, total)


def _block_backward(softcap, kept, gradient):
  q, k, v, mask, out, most, total = kept
  scores = _scores(q, k, mask, softcap)
  weights = jnp.exp(scores - most) / total
  folded = _folded(gradient)
  along = jnp.sum(out.astype(jnp.float32) * gradient, axis=-1, keepdims=True)
  slope = weights * (_products("bkqd,bksd->bkqs", folded, v).reshape(scores.shape) - along)
  if softcap is not None:  # d cap tanh(x / cap) / dx; a masked score is far outside the cap
    slope *= 1.0 - jnp.square(jnp.clip(scores / softcap, -1.0, 1.0))
  slope = jnp.where(mask[:, None, None], slope, 0.0)
  slope, weights = _folded(slope.astype(q.dtype)), _folded(weights.astype(v.dtype))
  dq = _products("bkqs,bksd->bkqd", slope, k).reshape(q.shape).astype(q.dtype)
  dk = _products("bkqs,bkqd->bksd", slope, _folded(q)).astype(k.dtype)
  dv = _products("bkqs,bkqd->bksd", weights, folded).astype(v.dtype)
  return dq, dk, dv, None


_block.defvjp(_block_forward, _block_backward)


def _scores(q, k, mask, softcap):
  """[batch, kv_heads, groups, time, keys] in float32, NEGATIVE where a query may not look."""
  scores = _products("bkqd,bksd->bkqs", _folded(q), k).reshape(*q.shape[:4], -1)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  return jnp.where(mask[:, None, None], scores, NEGATIVE)


def _folded(x):
  """[batch, kv_heads, groups, time, n] -> [batch, kv_heads, groups * time, n]: one product for a group's queries."""
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


_products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotary embedding of x: [batch, time, heads, head_dim] by cos, sin: [batch, time, head_dim / 2] (halves layout)."""
  first, second = jnp.split(x, 2, axis=-1)
  cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
  x = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return sharding.constrain(x, "batch time heads head_dim")
