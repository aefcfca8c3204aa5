"""The programs of the engine, on rows that write: a prompt read in pieces, a row copied, a window of tokens drawn.

The programs are few: one for each size of a piece, one that draws, one that copies and one that admits.  How a row
draws, when it ends and how many tokens it has are data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.adapters import stacked
from posttrain_jax.core import bits, struct, weight
from posttrain_jax.core.sharding import constrain, pinned
from posttrain_jax.models import decoder
from posttrain_jax.models.cache import Cache
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout import sampling
from posttrain_jax.rollout import seats as seats_lib
from posttrain_jax.rollout.seats import Seats

Array = jax.Array
Params = Any


@struct.dataclass
class Plan:
  """What each row was asked for, [rows] each; `identity` is (seed, number, sample): [rows, 3]."""

  how: sampling.Rows
  least: Array
  most: Array
  stops: Array  # [rows, MOST_STOPS], -1 where there is none
  identity: Array
  row: Array  # of the parameters' rows
  tops: Array  # whether it wants the most likely tokens told


@struct.dataclass
class Slots:
  """Rows under way: what each has read, the token that it reads next, how many it has drawn."""

  cache: Cache
  text: Array  # [rows, slots]: the tokens that are in the cache or about to be
  begins: Array  # [rows]: slots before the first token
  last: Array
  drawn: Array
  live: Array
  plan: Plan


@struct.dataclass
class Pieces:
  """A piece of each of some prompts, [pieces] each: of the row `index` the tokens from `start` on.

  index: the number of rows and more where a piece only fills the batch, each another.
  """

  index: Array
  row: Array  # of the parameters' rows
  start: Array
  counts: Array
  tokens: Array  # [pieces, size]


@struct.dataclass
class Allowed:
  """What a grammar allows next: of rows that have one, the tokens whose bits are set."""

  has: Array  # [rows]
  words: Array  # [rows, words], `core.bits`


@struct.dataclass
class Drawn:
  """What a window drew: [rows, steps] each, of a row the first `counts` entries."""

  tokens: Array
  logps: Array
  counts: Array  # [rows]
  live: Array  # [rows], after the window
  kept: Array | None
  top: tuple[Array, Array] | None


def laid(slots: Slots, pin: Callable[[Any, str], Any] = pinned) -> Slots:
  """On a mesh the rows over data and fsdp, their heads over tensor: so each program leaves them to the next."""
  by_row = lambda x: pin(x, "batch" + " -" * (x.ndim - 1))
  of_cache = lambda x: pin(x, "- - batch heads - -")
  cache = Cache(of_cache(slots.cache.k), of_cache(slots.cache.v), by_row(slots.cache.lengths))
  others = jax.tree.map(by_row, dataclasses.replace(slots, cache=None))
  return dataclasses.replace(others, cache=cache)


def empty(config: ModelConfig, rows: int, slots: int, dtype: Any, plan: Plan) -> Slots:
  """Slots that hold nothing and are not live."""
  none = jnp.zeros(rows, jnp.int32)
  return laid(
    Slots(
      cache=decoder.empty_cache(config, rows, slots, dtype),
      text=jnp.zeros((rows, slots), jnp.int32),
      begins=none,
      last=none,
      drawn=none,
      live=jnp.zeros(rows, bool),
      plan=jax.tree.map(jnp.asarray, plan),
    )
  )


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("slots",))
def begin(params: Params, slots: Slots, index: Array, row: Array, config: ModelConfig) -> Slots:
  """The row of that index with what is bound to stand before the tokens, and nothing else."""
  dtype = slots.cache.k.dtype
  one = decoder.start(weight.take_rows(params, row[None]), config, 1, slots.cache.slots, dtype)
  return laid(
    dataclasses.replace(
      slots,
      cache=slots.cache.with_row(index, one),
      begins=slots.begins.at[index].set(one.lengths[0]),
    )
  )


@functools.partial(jax.jit, donate_argnames=("slots",))
def begin_bare(slots: Slots, index: Array) -> Slots:
  """The row of that index with nothing before its tokens."""
  return laid(dataclasses.replace(slots, begins=slots.begins.at[index].set(0)))


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames=("slots",))
def read(params: Params, slots: Slots, pieces: Pieces, config: ModelConfig, dtype: Any) -> Slots:
  """The rows of `pieces` after reading them."""
  return _read(params, slots, pieces, config, dtype)[0]


def _read(
  params: Params, slots: Slots, pieces: Pieces, config: ModelConfig, dtype: Any
) -> tuple[Slots, Array]:
  """(slots, hidden states [pieces, size, embed]) after reading them."""
  index = pieces.index
  take = lambda x, axis: jnp.take(x, index, axis=axis, mode="clip")
  lengths = take(slots.begins, 0) + pieces.start
  some = Cache(take(slots.cache.k, 2), take(slots.cache.v, 2), lengths)
  rows = stacked.taken(params, pieces.row)
  x, some = decoder.step(rows, pieces.tokens, config, some, counts=pieces.counts, dtype=dtype)
  put = lambda x, part: x.at[:, :, index].set(part, mode="drop", unique_indices=True)
  cache = Cache(put(slots.cache.k, some.k), put(slots.cache.v, some.v), slots.cache.lengths)
  return laid(dataclasses.replace(slots, cache=cache)), x


@functools.partial(jax.jit, static_argnames=("config", "dtype", "top"), donate_argnames=("slots",))
def score(
  params: Params,
  slots: Slots,
  pieces: Pieces,
  following: Array,
  config: ModelConfig,
  dtype: Any,
  top: int,
) -> tuple[Slots, Array, tuple[Array, Array] | None]:
  """(`read`, log-probabilities of the tokens that follow, the `top` most likely instead of each).

  following: [pieces, size], the token behind each.  The log-probabilities are the model's own, at temperature 1.
  """
  slots, x = _read(params, slots, pieces, config, dtype)
  logits = constrain(
    decoder.logits(weight.take_rows(params, pieces.row), x, config), "batch - vocab"
  )
  count, size = following.shape
  flat = logits.reshape(count * size, -1)
  logps = sampling.logp_of(following.reshape(-1), flat).reshape(count, size)
  best = sampling.most_likely(flat, top) if top else None
  shaped = lambda x: x.reshape(count, size, top)
  everywhere = lambda x: pinned(x, "- " * x.ndim)
  said = logps, None if best is None else jax.tree.map(shaped, best)
  return slots, *jax.tree.map(everywhere, said)


@functools.partial(jax.jit, donate_argnames=("slots",))
def reserve(slots: Slots, chosen: Array, lengths: Array) -> Slots:
  """The chosen rows are to have read `lengths` tokens, and are not live before they have.

  A window writes behind every row's length, for those that are not live what nobody reads.
  """
  kept = jnp.where(chosen, slots.begins + lengths, slots.cache.lengths)
  return laid(dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, lengths=kept)))


@functools.partial(jax.jit, donate_argnames=("slots",))
def clear(slots: Slots, index: Array) -> Slots:
  """The row of that index with zeros for keys and values."""
  zeros = jax.tree.map(jnp.zeros_like, slots.cache.row(index))
  return laid(dataclasses.replace(slots, cache=slots.cache.with_row(index, zeros)))


@functools.partial(jax.jit, donate_argnames=("slots",))
def copy(slots: Slots, source: Array, target: Array) -> Slots:
  """The row `target` holds what the row `source` holds."""
  return laid(
    dataclasses.replace(
      slots,
      cache=slots.cache.with_row(target, slots.cache.row(source)),
      begins=slots.begins.at[target].set(slots.begins[source]),
    )
  )


@functools.partial(jax.jit, donate_argnames=("slots",))
def admit(
  slots: Slots, chosen: Array, lengths: Array, text: Array, last: Array, plan: Plan
) -> Slots:
  """The chosen rows live, having read `lengths` tokens behind what stands before them; `last` is read next."""
  pick = lambda new, old: jnp.where(chosen.reshape(-1, *[1] * (old.ndim - 1)), new, old)
  cache = dataclasses.replace(
    slots.cache, lengths=pick(slots.begins + lengths, slots.cache.lengths)
  )
  return laid(
    dataclasses.replace(
      slots,
      cache=cache,
      text=pick(text, slots.text),
      last=pick(last, slots.last),
      drawn=pick(0, slots.drawn),
      live=slots.live | chosen,
      plan=jax.tree.map(pick, plan, slots.plan),
    )
  )


@functools.partial(jax.jit, donate_argnames=("slots",))
def end(slots: Slots, chosen: Array) -> Slots:
  """The chosen rows are not live."""
  return laid(dataclasses.replace(slots, live=slots.live & ~chosen))


@functools.partial(
  jax.jit,
  static_argnames=("config", "steps", "dtype", "keeps", "top", "of_model"),
  donate_argnames=("slots",),
)
def window(
  params: Params,
  slots: Slots,
  most: Array,
  enough: Array,
  config: ModelConfig,
  steps: int,
  dtype: Any,
  keeps: bool,
  top: int,
  allowed: Allowed | None = None,
  of_model: bool = False,
  seats: Seats = (),
) -> tuple[Slots, Drawn]:
  """`most` tokens of every live row, at most `steps`; fewer where `enough` rows have ended, or all.

  keeps: what the filters kept is told, and log-probabilities are those among the kept.
  of_model: log-probabilities are the model's own at temperature 1, and not those of the request's temperature.
  seats: the rows' adapters, where the layers are apart.
  """
  rows = slots.live.shape[0]
  params = seats_lib.bound(stacked.taken(params, slots.plan.row), seats, slots.live)
  lived, before = slots.live, slots.drawn
  words = bits.words(config.vocab_size)
  empty = Drawn(
    tokens=jnp.zeros((rows, steps), jnp.int32),
    logps=jnp.zeros((rows, steps), jnp.float32),
    counts=jnp.zeros(rows, jnp.int32),
    live=slots.live,
    kept=jnp.zeros((rows, steps, words), jnp.uint32) if keeps else None,
    top=None
    if not top
    else (jnp.zeros((rows, steps, top), jnp.int32), jnp.zeros((rows, steps, top), jnp.float32)),
  )

  def going(carry: tuple[Array, Slots, Drawn]) -> Array:
    step, slots, _ = carry
    ended = jnp.sum(lived & ~slots.live)
    return (step < most) & jnp.any(slots.live) & (ended < enough)

  def body(carry: tuple[Array, Slots, Drawn]) -> tuple[Array, Slots, Drawn]:
    step, slots, drawn = carry
    slots, token, new = _draw(params, slots, config, dtype, keeps, top, allowed, of_model)
    put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part[:, None], step, 1)
    kept = None if drawn.kept is None else put(drawn.kept, new["kept"])
    best = None if drawn.top is None else tuple(map(put, drawn.top, new["top"]))
    drawn = dataclasses.replace(
      drawn,
      tokens=put(drawn.tokens, token),
      logps=put(drawn.logps, new["logp"]),
      kept=kept,
      top=best,
    )
    return step + 1, slots, drawn

  _, slots, drawn = jax.lax.while_loop(going, body, (jnp.int32(0), slots, empty))
  drawn = dataclasses.replace(drawn, counts=slots.drawn - before, live=slots.live)
  everywhere = lambda x: pinned(x, "- " * x.ndim)  # every host reads it
  return laid(slots), jax.tree.map(everywhere, drawn)


def _draw(
  params: Params,
  slots: Slots,
  config: ModelConfig,
  dtype: Any,
  keeps: bool,
  top: int,
  allowed: Allowed | None,
  of_model: bool,
) -> tuple[Slots, Array, dict[str, Any]]:
  """(slots, token [rows], {"logp": ...}) after one more token of every live row."""
  plan, live = slots.plan, slots.live
  counts = live.astype(jnp.int32)
  x, cache = decoder.step(
    params, slots.last[:, None], config, slots.cache, counts=counts, dtype=dtype
  )
  logits = constrain(decoder.logits(params, x[:, 0], config), "batch vocab")
  held = cache.lengths - slots.begins
  changed = sampling.penalised(logits, slots.text, held, slots.drawn, plan.how)
  early = (slots.drawn < plan.least)[:, None]
  stop = jnp.where(early, plan.stops, -1)
  stop = jnp.where(stop < 0, config.vocab_size, stop)  # outside: dropped
  every = jnp.arange(live.shape[0])
  held_off = lambda x: x.at[every[:, None], stop].set(sampling.REMOVED, mode="drop")
  changed = held_off(changed)
  if allowed is not None:
    changed = sampling.masked(changed, allowed.has, allowed.words)
  keys = jax.vmap(sampling.key)(plan.identity, slots.drawn)
  token, filtered = sampling.sample(keys, changed, plan.how)
  heat = jnp.where(plan.how.temperature == 0, 1.0, plan.how.temperature)[:, None]
  seen = filtered if keeps else logits if of_model else held_off(logits) / heat
  new = {"logp": sampling.logp_of(token, seen)}
  if keeps:
    new["kept"] = bits.pack(filtered > sampling.REMOVED)
  if top:
    none = lambda x: (
      jnp.zeros((*live.shape, top), jnp.int32),
      jnp.zeros((*live.shape, top), jnp.float32),
    )
    wanted = jnp.any(live & plan.tops)
    new["top"] = jax.lax.cond(wanted, lambda x: sampling.most_likely(x, top), none, seen)
  drawn = slots.drawn + counts
  ended = jnp.any(token[:, None] == plan.stops, axis=1) | (drawn >= plan.most)
  place = jnp.where(live, held, slots.text.shape[1])
  slots = dataclasses.replace(
    slots,
    cache=cache,
    text=slots.text.at[every, place].set(token, mode="drop"),
    last=jnp.where(live, token, slots.last),
    drawn=drawn,
    live=live & ~ended,
  )
  return slots, token, new
