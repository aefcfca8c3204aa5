"""Attention that knows causality, packed segments, sliding windows and soft-caps.

One function, `attend`; an accelerator kernel replaces its body, never its contract.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from posttrain_jax.core import product, sharding, struct
from posttrain_jax.models import across, cache

Array = jax.Array
NEGATIVE = -2.0e38  # finite, so that a row that may see nothing stays free of NaN
# Rows of as many tokens and fewer are cut into SHORT queries at a time, whose later keys are left out; longer ones into
# tiles of queries by keys, by the platform that a program is compiled for.  Smaller tiles stay in the cache of a CPU
# core but are too little work for two (a row of 2,048, nine heads of 64, both ways: 185 ms with 64 x 64, 160).
SHORT_ROW, SHORT = 512, 128
TILES = {"cpu": (256, 256), "default": (512, 512)}

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
  windows: tuple[int, ...] = (),
  scale: float,
  softcap: float | None = None,
  dtype: Any = None,
) -> Array:
  """softmax(cap(scale q k^T)) v over the keys that are `visible`, heads of queries sharing keys in groups.

  A long row is computed in tiles of queries and keys, of which those are left out that nobody sees into: another
  document, the other answer, what is later or behind the window.  So time follows the documents of a row and memory its
  length.  The running maximum and sum of Dao et al. 2022 (FlashAttention), sections 3.1 and B.4; the backward pass
  computes weights again from each query's log-sum.  A query that sees nothing gives 0.  On a mesh see `across`.

  Args:
    q: [batch, time, heads, head_dim].
    k, v: [batch, keys, kv_heads, head_dim]; heads is a multiple of kv_heads.
    queries, keys: where they stand; the last keys are the queries, in their order, and none sees a later one (over a
      `context` axis they may stand in any order).
    window: how many positions back a query sees, its own among them; None for all.
    windows: for `backends` that have to know what a traced window may be; not read here.
    scale: multiplies the scores.
    softcap: cap * tanh(score / cap) (Gemma 2), None for none.
    dtype: of the result; None: q's.

  Returns:
    [batch, time, heads, head_dim]; scores and softmax in float32.
  """
  del windows
  batch, time, heads, dim = q.shape
  dtype = dtype or q.dtype
  k, v = across.repeated(q, k, v)
  # [batch, kv_heads, groups, time, dim]: plain batched products, twice as fast as the grouped einsum on XLA:CPU
  folded = (q * scale).reshape(batch, time, k.shape[2], -1, dim).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  out = _attend(folded, k, v, (queries, keys, window), softcap, dtype)
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
  dtype: Any = None,
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
    dtype: of the result; None: q's.

  Returns:
    [rows, time, heads, head_dim]; scores and softmax in float32.
  """
  rows, time, heads, dim = q.shape
  kv_heads, block = k.shape[3], k.shape[5]
  groups = heads // kv_heads
  folded = (q * scale).reshape(rows, time, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
  # XLA:CPU has no product of one row in bfloat16
  part_of = functools.partial(cache.numbers, wide=groups * time == 1)
  folded = folded.reshape(rows, kv_heads, groups * time, dim)
  places = jnp.tile(positions, (1, groups))[:, None, :, None]  # as the queries are folded
  first = 0 if window is None else jnp.maximum(jnp.min(positions) - window + 1, 0) // block

  def read(number, so_far):
    most, total, out = so_far
    part = lambda x: part_of(
      jax.lax.dynamic_slice(x, (layer, number, 0, 0, 0, 0), (1, 1, *x.shape[2:])).reshape(
        x.shape[2:]
      )
    )
    keys, values = part(k), part(v)
    scores = _products("rkqd,rkds->rkqs", folded.astype(keys.dtype), keys)
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
    out = out * kept + _products("rkqs,rksd->rkqd", weights.astype(values.dtype), values)
    return higher, total, out

  zeros = jnp.zeros((rows, kv_heads, groups * time, 1))
  start = (zeros + NEGATIVE, zeros, jnp.zeros((rows, kv_heads, groups * time, dim)))
  _, total, out = jax.lax.fori_loop(first, (end + block - 1) // block, read, start)
  out = (out / total).astype(dtype or q.dtype).reshape(rows, kv_heads, groups, time, dim)
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
  dtype: Any = None,
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
    attended = attend(*grouped, places, places, window, scale=scale, softcap=softcap, dtype=dtype)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, where, softcap, dtype):
  """[batch, kv_heads, groups, time, dim]; k, v: [batch, kv_heads, keys, dim]."""
  return _attend_forward(q, k, v, where, softcap, dtype)[0]


def _attend_forward(q, k, v, where, softcap, dtype):
  lies = across.layout(q, k)

  def run(q, k, v, where):
    k, v = lies.gathered(k, v)
    return _by_length(q, lies.is_cut, _forward, softcap)(q, k, v, where)

  inputs = (lies.queries, lies.keys, lies.keys, lies.where())
  outputs = (lies.queries, lies.queries)
  out, normaliser = across.mapped(run, inputs, outputs)(q, k, v, where)
  out = checkpoint_name(out.astype(dtype), "context")
  return out, (q, k, v, where, out, checkpoint_name(normaliser, "normaliser"))


def _attend_backward(softcap, dtype, kept, gradient):
  del dtype
  lies = across.layout(*kept[:2])

  def run(q, k, v, where, *along):
    k, v = lies.gathered(k, v)
    dq, *slopes = _by_length(q, lies.is_cut, _backward, softcap)(q, k, v, where, *along)
    return dq, *lies.added(*slopes)

  inputs = (lies.queries, lies.keys, lies.keys)
  more = (lies.where(), *[lies.queries] * 3)
  return *across.mapped(run, (*inputs, *more), inputs)(*kept, gradient), None


_attend.defvjp(_attend_forward, _attend_backward)


def _by_length(q, is_cut, run, softcap):
  if q.shape[3] <= SHORT_ROW and not is_cut:
    return functools.partial(run, softcap, _Spans)
  tiled = {
    name: functools.partial(run, softcap, functools.partial(_Tiles, *size))
    for name, size in TILES.items()
  }
  return functools.partial(jax.lax.platform_dependent, **tiled)


def _forward(softcap, cut, q, k, v, where):
  """(result, log of the sum of exp(score) of each query), `_attend`'s."""
  parts = cut(q, k, where)

  def block(i):
    rows = parts.rows(q, i)

    def read(so_far, j):
      most, total, out = so_far
      scores, _ = _scores(rows, parts.columns(k, j), parts.visible(i, j), softcap)
      higher = jnp.maximum(most, jnp.max(scores, axis=-1, keepdims=True))
      weights, kept = jnp.exp(scores - higher), jnp.exp(most - higher)
      total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
      values = _products("bkqs,bksd->bkqd", _folded(weights.astype(v.dtype)), parts.columns(v, j))
      return higher, total, out * kept + values.reshape(out.shape)

    zeros = jnp.zeros((*rows.shape[:4], 1))
    most, total, out = parts.over_keys(i, read, (zeros + NEGATIVE, zeros, jnp.zeros(rows.shape)))
    # what sees nothing gives 0, and its normaliser makes each weight 0 in the backward pass
    nothing = most == NEGATIVE
    out = jnp.where(nothing, 0.0, out / jnp.where(nothing, 1.0, total))
    return out, jnp.where(nothing, -NEGATIVE, most + jnp.log(total))

  return parts.over_queries(lambda so_far, i: (so_far, block(i)), None)[1]


def _backward(softcap, cut, q, k, v, where, out, normaliser, gradient):
  """(dq, dk, dv)."""
  parts = cut(q, k, where)
  along = jnp.sum(out.astype(jnp.float32) * gradient, axis=-1, keepdims=True)

  def block(so_far, i):
    rows, slopes, norm, mean = (parts.rows(x, i) for x in (q, gradient, normaliser, along))

    def read(so_far, j):
      dq, dk, dv = so_far
      columns, values = parts.columns(k, j), parts.columns(v, j)
      scores, chain = _scores(rows, columns, parts.visible(i, j), softcap)
      weights = jnp.exp(scores - norm)
      change = _products("bkqd,bksd->bkqs", _folded(slopes.astype(v.dtype)), values).reshape(
        scores.shape
      )
      slope = _folded((weights * (change - mean) * chain).astype(q.dtype))
      dq += _products("bkqs,bksd->bkqd", slope, columns).reshape(dq.shape)
      dk = parts.add(dk, _products("bkqs,bkqd->bksd", slope, _folded(rows)), j)
      weights = _folded(weights.astype(v.dtype))
      return (
        dq,
        dk,
        parts.add(dv, _products("bkqs,bkqd->bksd", weights, _folded(slopes.astype(v.dtype))), j),
      )

    dq, *so_far = parts.over_keys(i, read, (jnp.zeros(rows.shape), *so_far))
    return tuple(so_far), (dq,)

  start = (jnp.zeros(k.shape), jnp.zeros(v.shape))
  (dk, dv), (dq,) = parts.over_queries(block, start)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _scores(rows, columns, seen, softcap):
  """(scores of some queries and keys, NEGATIVE where a query may not look; d score / d (scale q k^T))."""
  scores = _products("bkqd,bksd->bkqs", _folded(rows), columns)
  scores = scores.reshape(*rows.shape[:4], -1)
  chain = 1.0
  if softcap is not None:
    squashed = jnp.tanh(scores / softcap)
    scores, chain = softcap * squashed, 1.0 - jnp.square(squashed)
  return jnp.where(seen[:, None, None], scores, NEGATIVE), chain


class _Spans:
  """A short row: a few blocks of queries, each compared at once with all keys up to its end."""

  def __init__(self, q, k, where):
    self.where, self.later = where, k.shape[2] - q.shape[3]
    size = _even(q.shape[3], SHORT)
    self.blocks = [
      slice(start, min(start + size, q.shape[3])) for start in range(0, q.shape[3], size)
    ]

  def rows(self, x, i):
    return x[:, :, :, i]

  def columns(self, x, j):
    return x[:, :, j]

  def add(self, x, part, j):
    return x.at[:, :, j].add(part)

  def visible(self, i, j):
    queries, keys, window = self.where
    part = lambda places, where: jax.tree.map(lambda x: x[:, where], places)
    return visible(part(queries, i), part(keys, j), window)

  def over_keys(self, i, read, start):
    return read(start, slice(0, i.stop + self.later))

  def over_queries(self, block, start):
    results = []
    for i in self.blocks:
      start, result = block(start, i)
      results.append(result)
    return start, tuple(jnp.concatenate(each, axis=3) for each in zip(*results))


class _Tiles:
  """A long row: tiles of queries by keys, of which those are computed that `seen` tells."""

  def __init__(self, height, width, q, k, where):
    queries, keys, self.window = where
    self.time, self.keys = q.shape[3], k.shape[2]
    self.height, self.width = _even(self.time, height), _even(self.keys, width)
    self.queries = jax.tree.map(lambda x: _padded(x, 1, self.height), queries)
    self.places = jax.tree.map(lambda x: _padded(x, 1, self.width), keys)
    computed = seen(self.queries, self.places, self.window, self.height, self.width)
    # first those keys that some query of the block sees
    self.order, self.count = jnp.argsort(~computed, axis=1, stable=True), jnp.sum(computed, axis=1)

  def rows(self, x, i):
    return _slice(_padded(x, 3, self.height), 3, i, self.height)

  def columns(self, x, j):
    return _slice(_padded(x, 2, self.width), 2, j, self.width)

  def add(self, x, part, j):
    return jax.lax.dynamic_update_slice_in_dim(x, self.columns(x, j) + part, j * self.width, 2)

  def visible(self, i, j):
    queries = jax.tree.map(lambda x: _slice(x, 1, i, self.height), self.queries)
    keys = jax.tree.map(lambda x: _slice(x, 1, j, self.width), self.places)
    return visible(queries, keys, self.window)

  def over_keys(self, i, read, start):
    return jax.lax.fori_loop(
      0, self.count[i], lambda n, so_far: read(so_far, self.order[i, n]), start
    )

  def over_queries(self, block, start):
    padded = jax.tree.map(lambda x: _padded(x, 2, self.width), start)
    end, results = jax.lax.scan(block, padded, jnp.arange(len(self.count)))
    joined = lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[-1])
    return (
      jax.tree.map(lambda x: x[:, :, : self.keys], end),
      jax.tree.map(lambda x: joined(x)[:, :, :, : self.time], results),
    )


def _slice(x, axis, number, size):
  return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)


def seen(queries, keys, window, height, width):
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


def _products(subscripts: str, x: Array, y: Array) -> Array:
  return jnp.einsum(
    subscripts, x, y, precision=product.precision(x, y), preferred_element_type=jnp.float32
  )


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotary embedding of x: [batch, time, heads, head_dim] by cos, sin: [batch, time, head_dim / 2] (halves layout)."""
  first, second = jnp.split(x, 2, axis=-1)
  cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
  x = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return sharding.constrain(x, "batch time heads head_dim")
