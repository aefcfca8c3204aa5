"""From logits to a token: repetition penalty, temperature, top-k, top-p, min-p, in the order of transformers.

Pure functions of logits [rows, vocab] in float32.  How a row draws is data, so that one program serves every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import bits, struct

Array = jax.Array
REMOVED = -np.inf  # the logit of a token that a filter took out
BLOCK = 256  # about the root of a vocabulary
# of a temperature, and of a repetition penalty: logits of some thousands stay finite in float32 and apart
LEAST, MOST = 1e-3, 1e3
MOST_K = 2**31 - 1  # of an int32
PENALTY, MOST_BIAS = 2.0, 100.0  # OpenAI's bounds
BIASED = 300  # tokens of a request that have a bias


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn; what is off by default keeps every token.

  temperature: 0 takes the most likely token; any other is from LEAST to MOST.
  top_k: the k highest, 0 for all.
  top_p: the smallest set of highest ones that holds at least p of the mass (Holtzman et al. 2020), 1 for all.
  min_p: those at least that part as likely as the most likely one (Nguyen et al. 2024), 0 for all.
  repetition_penalty: divides the positive logits of what the text holds already and multiplies the negative ones
    (Keskar et al. 2019, section 4.1), 1 for none.
  presence_penalty: taken from the logits of tokens that the answer holds already, from -PENALTY to PENALTY, 0 for none.
  frequency_penalty: the same, once for each time that the answer holds the token.
  bias: (token id, what is added to its logit, from -MOST_BIAS to MOST_BIAS), at most BIASED of them.

  >>> Sampling(temperature=-1.0)
  Traceback (most recent call last):
  ValueError: temperature must be 0 (greedy), or from 0.001 to 1000, found -1.0
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  bias: tuple[tuple[int, float], ...] = ()

  def __post_init__(self) -> None:
    if self.temperature != 0 and not LEAST <= self.temperature <= MOST:
      raise ValueError(
        f"temperature must be 0 (greedy), or from {LEAST:g} to {MOST:g}, found {self.temperature}"
      )
    if self.top_k % 1 or not 0 <= self.top_k <= MOST_K:
      raise ValueError(
        f"top_k must be 0 (off) or the number of tokens to keep, at most {MOST_K}, found {self.top_k}"
      )
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p must be above 0 and at most 1 (off), found {self.top_p}")
    if not 0 <= self.min_p <= 1:
      raise ValueError(f"min_p must be from 0 (off) to 1, found {self.min_p}")
    if not LEAST <= self.repetition_penalty <= MOST:
      raise ValueError(
        f"repetition_penalty must be from {LEAST:g} to {MOST:g}, 1 for none, found {self.repetition_penalty}"
      )
    for name in ("presence_penalty", "frequency_penalty"):
      if not abs(getattr(self, name)) <= PENALTY:
        raise ValueError(
          f"{name} must be from -{PENALTY:g} to {PENALTY:g}, 0 for none, found {getattr(self, name)}"
        )
    if len(self.bias) > BIASED:
      raise ValueError(f"{len(self.bias)} tokens have a bias: a request may name {BIASED}")
    for token, value in self.bias:
      if not abs(value) <= MOST_BIAS:
        raise ValueError(
          f"the bias of token {token} must be from -{MOST_BIAS:g} to {MOST_BIAS:g}, found {value}"
        )

  @property
  def is_whole(self) -> bool:
    """Whether a token is drawn from the whole softmax at this temperature, as training computes it."""
    filters = (self.top_k, self.top_p, self.min_p) == (0, 1.0, 0.0)
    return filters and not self.is_penalised

  @property
  def is_penalised(self) -> bool:
    """Whether logits are changed before they are filtered."""
    penalties = (self.presence_penalty, self.frequency_penalty)
    return self.repetition_penalty != 1 or any(penalties) or bool(self.bias)


GREEDY = Sampling(temperature=0.0)


@struct.dataclass
class Rows:
  """The `Sampling` of each row, as data: one program draws for all."""

  temperature: Array  # [rows], as the others
  top_k: Array
  top_p: Array
  min_p: Array
  repetition_penalty: Array
  presence_penalty: Array
  frequency_penalty: Array
  biased: Array  # [rows, BIASED] ids, beyond the vocabulary where there is none
  bias: Array  # [rows, BIASED]

  @staticmethod
  def of(samplings: Sequence[Sampling]) -> Rows:
    of = lambda name, dtype: jnp.asarray([getattr(s, name) for s in samplings], dtype)
    biased = np.full((len(samplings), BIASED), MOST_K, np.int32)
    bias = np.zeros((len(samplings), BIASED), np.float32)
    for row, one in enumerate(samplings):
      for place, (token, value) in enumerate(one.bias):
        biased[row, place], bias[row, place] = token, value
    return Rows(
      temperature=of("temperature", jnp.float32),
      top_k=of("top_k", jnp.int32),
      top_p=of("top_p", jnp.float32),
      min_p=of("min_p", jnp.float32),
      repetition_penalty=of("repetition_penalty", jnp.float32),
      presence_penalty=of("presence_penalty", jnp.float32),
      frequency_penalty=of("frequency_penalty", jnp.float32),
      biased=jnp.asarray(biased),
      bias=jnp.asarray(bias),
    )


def filtered(logits: Array, how: Rows) -> Array:
  """logits, those outside top-k, then top-p, then min-p at -inf, in the order of transformers.

  The most likely token always stays, and tokens equal to the last one kept are kept too.  A filter that no row uses
  takes no time.
  """
  vocab = logits.shape[-1]
  k = jnp.where((how.top_k > 0) & (how.top_k < vocab), how.top_k, vocab)[:, None]
  logits = _where_asked(k < vocab, lambda x: _keep(x, jnp.ones_like(x), k.astype(x.dtype)), logits)
  p = how.top_p[:, None]
  logits = _where_asked(p < 1, lambda x: _keep(x, jax.nn.softmax(x), p), logits)
  least = jnp.log(how.min_p)[:, None]  # -inf where it is off
  far = lambda x: x < jnp.max(x, axis=-1, keepdims=True) + least
  return _where_asked(how.min_p[:, None] > 0, lambda x: jnp.where(far(x), REMOVED, x), logits)


def penalised(logits: Array, text: Array, lengths: Array, drawn: Array, how: Rows) -> Array:
  """logits with each row's bias, then the penalties on what its text holds, in vLLM's order.

  Args:
    text: [rows, slots], of a row the first `lengths` tokens: a prompt, and behind it the `drawn` of its answer.
  """
  rows = jnp.arange(text.shape[0])[:, None]
  place = jnp.arange(text.shape[1])
  beyond = logits.shape[1]

  def biased(logits: Array) -> Array:
    return logits.at[rows, how.biased].add(how.bias, mode="drop")

  def repeated(logits: Array) -> Array:
    old = jnp.take_along_axis(logits, text, axis=1)
    penalty = how.repetition_penalty[:, None]
    new = jnp.where(old > 0, old / penalty, old * penalty)
    held = place < lengths[:, None]
    return logits.at[rows, jnp.where(held, text, beyond)].set(new, mode="drop")

  def counted(logits: Array) -> Array:
    of_answer = (place < lengths[:, None]) & (place >= (lengths - drawn)[:, None])
    counts = jnp.zeros_like(logits).at[rows, jnp.where(of_answer, text, beyond)].add(1, mode="drop")
    return logits - how.frequency_penalty[:, None] * counts - presence * (counts > 0)

  presence = how.presence_penalty[:, None]
  logits = _where_asked(jnp.any(how.bias != 0, axis=1, keepdims=True), biased, logits)
  logits = _where_asked(how.repetition_penalty[:, None] != 1, repeated, logits)
  return _where_asked((presence != 0) | (how.frequency_penalty[:, None] != 0), counted, logits)


def masked(logits: Array, has: Array, words: Array) -> Array:
  """logits, of rows that have a grammar those whose bit is not set at -inf; has: [rows], words: `core.bits`."""
  kept = lambda x: jnp.where(bits.unpack(words, x.shape[-1]), x, REMOVED)
  return _where_asked(has[:, None], kept, logits)


def most_likely(logits: Array, count: int) -> tuple[Array, Array]:
  """(ids, log-probabilities) of each row's most likely tokens: [rows, count], the lower id first among equals."""
  values, ids = jax.lax.top_k(logits, count)
  total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  return ids.astype(jnp.int32), values - total


def key(identity: Array, place: Array) -> Array:
  """Of the token at a place of an answer, whose identity is (seed, number of the prompt, sample): [3] integers."""
  key = jax.random.key(identity[0])
  for number in (identity[1], identity[2], place):
    key = jax.random.fold_in(key, number)
  return key


def sample(keys: Array, logits: Array, how: Rows) -> tuple[Array, Array]:
  """(token [rows], the logits [rows, vocab] that it was drawn by); row i draws with keys[i] alone.

  They are divided by the row's temperature (greedy: by 1), and REMOVED where a filter took one out.
  """
  scaled = logits / jnp.where(how.temperature == 0, 1.0, how.temperature)[:, None]
  kept = filtered(scaled, how)
  best = first_highest(logits)
  token = jnp.where(how.temperature == 0, best, _draw(keys, kept))
  return token.astype(jnp.int32), kept


def first_highest(logits: Array) -> Array:
  """[rows]: the argmax, as two plain reductions; the one over pairs takes 4 ms for 16 rows of 49152 on two cores."""
  top = jnp.max(logits, axis=-1, keepdims=True)
  places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
  return jnp.min(jnp.where(logits >= top, places, logits.shape[-1] - 1), axis=-1)


def logp_of(token: Array, logits: Array) -> Array:
  """[rows]: the log-probability of each row's token under softmax(logits), float32."""
  logit = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  return logit - jax.nn.logsumexp(logits, axis=-1)


def _where_asked(asked: Array, change: Callable[[Array], Array], logits: Array) -> Array:
  """change(logits) in the rows that ask for it: [rows, 1]; computed where one does."""
  return jax.lax.cond(jnp.any(asked), lambda x: jnp.where(asked, change(x), x), lambda x: x, logits)


def _keep(logits: Array, mass: Array, target: Array) -> Array:
  """logits, those at -inf that are not in the smallest set of highest ones whose mass reaches target.

  The lowest of the set is found by bisection over the bits of a float: 32 passes over 16 rows of 49152 take 12 ms on
  two cores, where a sort takes 465 ms and `lax.top_k` with a mask 190 ms.
  """
  cast = jax.lax.bitcast_convert_type(logits, jnp.int32)
  order = jnp.where(cast < 0, cast ^ 0x7FFFFFFF, cast)  # integers in the order of the floats

  def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = bounds
    middle = (low & high) + ((low ^ high) >> 1)  # the mean; low + high would overflow
    reached = jnp.sum(jnp.where(order >= middle, mass, 0), axis=-1, keepdims=True) >= target
    return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

  lowest = jnp.full((logits.shape[0], 1), -(2**31), jnp.int32)
  above = jnp.max(order, axis=-1, keepdims=True) + 1
  lowest, _ = jax.lax.fori_loop(0, 32, halve, (lowest, above))
  return jnp.where(order < lowest, REMOVED, logits)


def _draw(keys: Array, logits: Array) -> Array:
  """A token of each row with probability softmax(logits), by inverting the cumulative sum, block by block.

  One uniform number a row; a Gumbel one for each token (`jax.random.categorical`) takes 59 ms for 16 rows of 49152.
  """
  batch, vocab = logits.shape
  padded = jnp.pad(logits, ((0, 0), (0, -vocab % BLOCK)), constant_values=REMOVED)
  weights = jnp.exp(padded - jnp.max(logits, axis=-1, keepdims=True)).reshape(batch, -1, BLOCK)
  sums = jnp.sum(weights, axis=-1)
  left = jax.vmap(jax.random.uniform)(keys)[:, None] * jnp.sum(sums, axis=-1, keepdims=True)
  block, left = _invert(sums, left)
  within = jnp.take_along_axis(weights, block[:, :, None], axis=1)[:, 0]
  token = (block * BLOCK + _invert(within, left)[0])[:, 0]
  # Rounding of the sums can point just behind the last token that was kept (once in 1e7 draws).
  drawn = jnp.take_along_axis(padded, token[:, None], axis=-1)[:, 0]
  return jnp.where(drawn == REMOVED, first_highest(logits), token)


def _invert(weights: Array, left: Array) -> tuple[Array, Array]:
  """([batch, 1] the entry whose share of the row holds `left`, what is left of it before that entry)."""
  ends = jnp.cumsum(weights, axis=-1)
  entry = jnp.sum(ends <= left, axis=-1, keepdims=True)
  entry = jnp.minimum(entry, weights.shape[-1] - 1)
  return entry, left - jnp.take_along_axis(ends - weights, entry, axis=-1)
