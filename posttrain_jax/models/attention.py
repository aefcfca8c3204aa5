"""Attention that knows causality, packed segments, sliding windows and soft-caps.

One function, `attend`; an accelerator kernel replaces its body, never its contract.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from posttrain_jax.core import sharding, struct

Array = jax.Array
NEGATIVE = -2.0e38  # finite, so that a row that may see nothing stays free of NaN
# Queries and keys of a tile, by the platform that a program is compiled for.  On a CPU core a tile of 64 x 64 stays in
# its cache (2 rows of 1,024, nine heads of 64, both ways: 120 ms; 140 with 128 x 128, 190 with rows of scores).
BLOCKS = {"cpu": 64, "default": 512}

EVERYONE = -1  # the segment of keys that every document of the row sees: a soft prompt


@struct.dataclass
class Places:
  """Where tokens stand, [batch, time] each.  Segment 0 is padding: nothing sees it.  `EVERYONE` is seen by all."""

  positions: Array  # counted within a document and what stands before it
  segments: Array  # equal within a document
  # of queries: one more segment that they see, 0 for none: documents that begin alike (the two answers of a pair) share
  # that beginning, which is a segment of its own and is computed once
  prefixes: Array | None = None


def visible(queries: Places, keys: Places, window: Array | int | None = None) -> Array:
  """[batch, time, keys]: True where a query may look: same document, not later, not `window` or more before.

  Padding sees nothing.
  """
  distance = queries.positions[:, :, None] - keys.positions[:, None, :]
  which = keys.segments[:, None, :]
  same = (queries.segments[:, :, None] == which) | (which == EVERYONE)
  if queries.prefixes is not None:
    same |= queries.prefixes[:, :, None] == which
  seen = same & (which != 0) & (queries.segments != 0)[:, :, None] & (distance >= 0)
  return seen if window is None else seen & (distance < window)


def attend(
  q: Array,
  k: Array,
  v: Array,
  queries: Places,
  keys: Places,
  window: Array | int | None = None,
  *,
  scale: float,
  softcap: float | None = None,
) -> Array:
  """softmax(cap(scale q k^T)) v over the keys that are `visible`, heads of queries sharing keys in groups.

  Tile by tile of queries and keys, of which those are left out that nobody sees into: another document, the other
  answer, what is later or behind the window.  So time follows the documents of a row and memory its length.  The
  running maximum and sum of Dao et al. 2022 (FlashAttention), sections 3.1 and B.4; the backward pass computes a tile's
  weights again from each query's log-sum.  A query that sees nothing gives 0.

  Args:
    q: [batch, time, heads, head_dim].
    k, v: [batch, keys, kv_heads, head_dim]; heads is a multiple of kv_heads.
    queries, keys: where they stand.
    window: how many positions back a query sees, its own among them; None for all.
    scale: multiplies the scores.
    softcap: cap * tanh(score / cap) (Gemma 2), None for none.

  Returns:
    [batch, time, heads, head_dim] in q's dtype; scores and softmax in float32.
  """
  batch, time, heads, dim = q.shape
  # [batch, kv_heads, groups, time, dim]: plain batched products, twice as fast as the grouped einsum on XLA:CPU
  folded = (q * scale).reshape(batch, time, k.shape[2], -1, dim).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  out = _attend(folded, k, v, (queries, keys, window), softcap)
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
  queries: Places,
  keys: Places,
  window: Array | int | None = None,
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
    q, k, v, window: as for `attend`, keys being the same tokens as queries.
    queries, keys: the same places.
  """
  del keys
  heads = q.shape[2]
  if k.shape[2] % 2:
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
  out = []
  for late in (False, True):
    halves = [jnp.split(x, [x.shape[2] // 2], axis=2) for x in (q, k, v)]
    grouped = [_groups(half[late], group, late) for half in halves]
    places = _grouped_places(queries, group, late)
    attended = attend(*grouped, places, places, window, scale=scale, softcap=softcap)
    out.append(_ungrouped(attended, q.shape[:2], group, late))
  return jnp.concatenate(out, axis=2)


def _grouped_places(places, group, late):
  """[batch * groups, group]; what is in one row of them and in two groups of the authors' is in two segments."""
  number = (jnp.arange(places.segments.shape[1]) + (group - group // 2 if late else 0)) // group
  segments = jnp.where(places.segments == 0, 0, places.segments * (number[-1] + 1) + number)
  return Places(_groups(places.positions, group, late), _groups(segments, group, late))


def _groups(x, group, late):
  """[batch, time, ...] -> [batch * groups, group, ...]: filled up with zeros; late groups begin half a group later."""
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % group), *[(0, 0)] * (x.ndim - 2)])
  x = jnp.roll(x, -(group // 2), axis=1) if late else x
  return x.reshape(-1, group, *x.shape[2:])


def _ungrouped(x, lead, group, late):
  batch, time = lead
  x = x.reshape(batch, -1, *x.shape[2:])
  return (jnp.roll(x, group // 2, axis=1) if late else x)[:, :time]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, where, softcap):
  """[batch, kv_heads, groups, time, dim]; k, v: [batch, kv_heads, keys, dim]."""
  return _attend_forward(q, k, v, where, softcap)[0]


def _attend_forward(q, k, v, where, softcap):
  out, normaliser = _on_platform(_forward, softcap)(q, k, v, where)
  out = checkpoint_name(out, "context")
  return out, (q, k, v, where, out, checkpoint_name(normaliser, "normaliser"))


def _attend_backward(softcap, kept, gradient):
  return *_on_platform(_backward, softcap)(*kept, gradient), None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_platform(run, softcap):
  by_platform = {name: functools.partial(run, softcap, size) for name, size in BLOCKS.items()}
  return functools.partial(jax.lax.platform_dependent, **by_platform)


def _forward(softcap, size, q, k, v, where):
  """(result, log of the sum of exp(score) of each query), `_attend`'s."""
  tiles = _Tiles.of(q, k, where, softcap, size)
  q, k, v = tiles.padded(q, k, v)

  def block(_, i):
    rows = tiles.rows(q, i)

    def read(n, so_far):
      most, total, out = so_far
      j = tiles.order[i, n]
      scores = tiles.scores(rows, tiles.columns(k, j), i, j)[0]
      higher = jnp.maximum(most, jnp.max(scores, axis=-1, keepdims=True))
      weights, kept = jnp.exp(scores - higher), jnp.exp(most - higher)
      total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
      read_out = _products("bkqs,bksd->bkqd", _folded(weights.astype(v.dtype)), tiles.columns(v, j))
      return higher, total, out * kept + read_out.reshape(out.shape)

    shape = (*q.shape[:3], tiles.height)
    zeros = jnp.zeros((*shape, 1))
    start = (zeros + NEGATIVE, zeros, jnp.zeros((*shape, q.shape[-1])))
    most, total, out = jax.lax.fori_loop(0, tiles.count[i], read, start)
    # what sees nothing gives 0, and its normaliser makes each weight 0 in the backward pass
    nothing = most == NEGATIVE
    out = jnp.where(nothing, 0.0, out / jnp.where(nothing, 1.0, total)).astype(v.dtype)
    return None, (out, jnp.where(nothing, -NEGATIVE, most + jnp.log(total)))

  _, blocks = jax.lax.scan(block, None, jnp.arange(len(tiles.count)))
  return tiles.joined(blocks[0]), tiles.joined(blocks[1])


def _backward(softcap, size, q, k, v, where, out, normaliser, gradient):
  """(dq, dk, dv)."""
  dtypes = q.dtype, k.dtype, v.dtype
  tiles = _Tiles.of(q, k, where, softcap, size)
  along = jnp.sum(out.astype(jnp.float32) * gradient, axis=-1, keepdims=True)
  q, k, v, gradient, normaliser, along = tiles.padded(q, k, v, gradient, normaliser, along)

  def block(so_far, i):
    rows, slopes = tiles.rows(q, i), tiles.rows(gradient, i)
    norm, mean = (tiles.cut(x, i) for x in (normaliser, along))

    def read(n, so_far):
      dq, dk, dv = so_far
      j = tiles.order[i, n]
      columns, values = tiles.columns(k, j), tiles.columns(v, j)
      scores, chain = tiles.scores(rows, columns, i, j)
      weights = jnp.exp(scores - norm)
      change = _products("bkqd,bksd->bkqs", slopes, values).reshape(scores.shape)
      slope = _folded((weights * (change - mean) * chain).astype(dtypes[0]))
      dq += _products("bkqs,bksd->bkqd", slope, columns)
      dk = tiles.add(dk, _products("bkqs,bkqd->bksd", slope, rows), j)
      weights = _folded(weights.astype(dtypes[2]))
      return dq, dk, tiles.add(dv, _products("bkqs,bkqd->bksd", weights, slopes), j)

    zeros = jnp.zeros(rows.shape)
    dq, dk, dv = jax.lax.fori_loop(0, tiles.count[i], read, (zeros, *so_far))
    return (dk, dv), dq.reshape(*q.shape[:3], -1, q.shape[-1])

  start = (jnp.zeros(k.shape), jnp.zeros(v.shape))
  (dk, dv), blocks = jax.lax.scan(block, start, jnp.arange(len(tiles.count)))
  found = (tiles.joined(blocks), dk[:, :, : tiles.keys], dv[:, :, : tiles.keys])
  return tuple(x.astype(dtype) for x, dtype in zip(found, dtypes))


@dataclasses.dataclass(frozen=True)
class _Tiles:
  """How scores are cut: [batch, kv_heads, groups, height, width] at once, and which parts there are."""

  queries: Places
  places: Places  # of keys
  window: Any
  softcap: float | None
  time: int
  keys: int
  height: int  # queries of a tile
  width: int  # keys of one
  order: (
    Array  # [blocks of queries, blocks of keys]: first those that some query of the block sees into
  )
  count: Array  # [blocks of queries]: how many those are

  @classmethod
  def of(cls, q, k, where, softcap, size):
    queries, keys, window = where
    height, width = _even(q.shape[3], size), _even(k.shape[2], size)
    queries = jax.tree.map(lambda x: _padded(x, 1, height), queries)
    keys = jax.tree.map(lambda x: _padded(x, 1, width), keys)
    seen = _seen(queries, keys, window, height, width)
    order, count = jnp.argsort(~seen, axis=1, stable=True), jnp.sum(seen, axis=1)
    return cls(queries, keys, window, softcap, q.shape[3], k.shape[2], height, width, order, count)

  def padded(self, q, k, v, *of_queries):
    more = (_padded(x, 3, self.height) for x in of_queries)
    return _padded(q, 3, self.height), _padded(k, 2, self.width), _padded(v, 2, self.width), *more

  def cut(self, x, i):
    """Block i of queries, of what [batch, kv_heads, groups, time, ...] tells of them."""
    return jax.lax.dynamic_slice_in_dim(x, i * self.height, self.height, 3)

  def rows(self, x, i):
    return _folded(self.cut(x, i))

  def columns(self, x, j):
    return jax.lax.dynamic_slice_in_dim(x, j * self.width, self.width, 2)

  def add(self, x, part, j):
    return jax.lax.dynamic_update_slice_in_dim(x, self.columns(x, j) + part, j * self.width, 2)

  def joined(self, blocks):
    """[blocks, batch, kv_heads, groups, height, ...] -> [batch, kv_heads, groups, time, ...]."""
    x = jnp.moveaxis(blocks, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])[:, :, :, : self.time]

  def scores(self, rows, columns, i, j):
    """(scores of a tile, NEGATIVE where a query may not look; d score / d (scale q k^T))."""
    scores = _products("bkqd,bksd->bkqs", rows, columns)
    scores = scores.reshape(*scores.shape[:2], -1, self.height, self.width)
    chain = 1.0
    if self.softcap is not None:
      squashed = jnp.tanh(scores / self.softcap)
      scores, chain = self.softcap * squashed, 1.0 - jnp.square(squashed)
    part = lambda x, n, size: jax.lax.dynamic_slice_in_dim(x, n * size, size, 1)
    queries = jax.tree.map(lambda x: part(x, i, self.height), self.queries)
    keys = jax.tree.map(lambda x: part(x, j, self.width), self.places)
    seen = visible(queries, keys, self.window)
    return jnp.where(seen[:, None, None], scores, NEGATIVE), chain


def _seen(queries, keys, window, height, width):
  """[blocks of queries, blocks of keys]: False where no query of any row sees a key, as far as bounds tell."""
  in_blocks = lambda places, size: jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size), places)
  queries, keys = in_blocks(queries, height), in_blocks(keys, width)
  large = jnp.iinfo(jnp.int32).max
  counts = keys.segments != 0
  own = jnp.where(keys.segments > 0, keys.segments, large)  # of a document
  first, last = jnp.min(own, axis=-1)[:, None], jnp.max(keys.segments, axis=-1)[:, None]
  least, most = (
    reduce(jnp.where(counts, keys.positions, other), axis=-1)[:, None]
    for reduce, other in ((jnp.min, large), (jnp.max, -1))
  )

  def overlap(segments):
    """Where some key may be of one of these segments, of a block of queries each."""
    low = jnp.min(jnp.where(segments > 0, segments, large), axis=-1)[:, :, None]
    high = jnp.max(segments, axis=-1)[:, :, None]
    return (low <= last) & (first <= high), high

  same, high = overlap(queries.segments)
  # where one document alone may be in both blocks, some of its keys must not be later than all of its queries
  only = lambda places, which, reduce, other: reduce(
    jnp.where(places.segments == which[..., None], places.positions, other), axis=-1
  )
  latest = only(queries, high[..., 0], jnp.max, -1)[:, :, None]
  earliest = only(keys, first[:, 0], jnp.min, large)[:, None]
  same &= (first < high) | (earliest <= latest)
  if queries.prefixes is not None:
    same |= overlap(queries.prefixes)[0]
  same |= jnp.any(keys.segments == EVERYONE, axis=-1)[:, None]
  same &= jnp.any(queries.segments != 0, axis=-1)[:, :, None]
  of_queries = lambda reduce, other: reduce(
    jnp.where(queries.segments != 0, queries.positions, other), axis=-1
  )[:, :, None]
  same &= of_queries(jnp.max, -1) >= least
  if window is not None:
    same &= of_queries(jnp.min, large) - most < window
  return jnp.any(same, axis=0)


def _even(length, size):
  """Of blocks that are as equal as eights allow, none above size."""
  blocks = -(-length // size)
  return -(-length // (8 * blocks)) * 8


def _padded(x, axis, size):
  """x with zeros behind it along the axis, to a multiple of size."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % size)
  return jnp.pad(x, widths)


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
