"""Log-probabilities of given tokens, without a `[tokens, vocab]` array.

The one place where hidden states meet the head in training: SFT, preference, RL and evaluation all come here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import bits, sharding, struct, zigzag
from posttrain_jax.core.weight import linear32

Array = jax.Array
Options = tuple[float | None, float, bool, bool]  # softcap, temperature, entropy, collision
CHUNK = 512  # tokens whose logits exist at once, on each device


@struct.dataclass
class Scores:
  """What one pass over the vocabulary tells of each token; all [...] as labels, float32, 0 where the mask is False."""

  logp: Array  # natural log-probability of the label; differentiable
  correct: Array  # 1 where the label is the most likely token; not differentiable
  entropy: Array  # of the distribution, in nats; not differentiable; 0 unless asked for
  # log of the sum of squared probabilities; not differentiable; 0 unless asked for
  log_collision: Array


def token_logps(
  hidden: Array,
  head: Any,
  labels: Array,
  *,
  mask: Array | None = None,
  softcap: float | None = None,
  temperature: float = 1.0,
  kept: Array | None = None,
) -> Array:
  """log softmax(softcap(hidden @ head) / temperature)[label], [...] float32; arguments as `score`'s."""
  return score(
    hidden, head, labels, mask=mask, softcap=softcap, temperature=temperature, kept=kept
  ).logp


def score(
  hidden: Array,
  head: Any,
  labels: Array,
  *,
  mask: Array | None = None,
  softcap: float | None = None,
  temperature: float = 1.0,
  entropy: bool = False,
  collision: bool = False,
  kept: Array | None = None,
) -> Scores:
  """`Scores` of labels under softmax(softcap * tanh(hidden @ head / softcap) / temperature).

  Products accumulate in float32 and the softmax is float32.  Without a mesh only tokens whose mask is True are computed
  at all.  While the head is not differentiated, the forward pass keeps d logp / d hidden (one row a token: it does not
  depend on what comes after), so a training step makes two products with the head, not the three of a recomputation,
  and no gradient of the head exists.

  Args:
    hidden: [..., embed].
    head: [embed, vocab], any weight.
    labels: [...] token ids.
    mask: [...] bool, True where the score is wanted; default everywhere.
    softcap: final-logit soft-cap (Gemma 2); None for none.
    temperature: divides the logits, after the soft-cap.
    entropy, collision: whether to compute them: one more pass over the logits each.
    kept: [..., words(vocab)] of `core.bits`: the softmax is over these tokens alone, as where a filter (top-k, top-p)
      drew from them.  A label that is not among them has -inf.
  """
  hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
  mask = jnp.ones(labels.shape, bool) if mask is None else jnp.asarray(mask, bool)
  options = (softcap, temperature, entropy, collision)
  if sharding.active():
    time = labels.shape[1]
    hidden, labels, mask, kept = jax.tree.map(zigzag.parts, (hidden, labels, mask, kept))
    scores = _score(hidden, head, labels, mask, kept, options)
    return jax.tree.map(lambda x: zigzag.joined(x, time), scores)
  flat_rows = lambda x: x.reshape(1, -1, x.shape[-1])
  flat = _score(
    flat_rows(hidden),
    head,
    labels.reshape(1, -1),
    mask.reshape(1, -1),
    None if kept is None else flat_rows(kept),
    options,
  )
  return jax.tree.map(lambda x: x.reshape(labels.shape), flat)


def kl_divergence(
  hidden: Array,
  head: Any,
  other_hidden: Array,
  other_head: Any,
  *,
  mask: Array | None = None,
  softcap: float | None = None,
) -> Array:
  """KL(p || q) = sum_v p_v (log p_v - log q_v) of next-token distributions, nats; 0 where the mask is False.

  p is the softmax of hidden @ head and q that of other_hidden @ other_head; both over one vocabulary, soft-capped
  alike.  Exact over the vocabulary, CHUNK tokens at a time; not differentiable.

  Args:
    hidden, other_hidden: [..., embed], [..., other embed].
    head, other_head: [embed, vocab], any weight.
    mask: [...] bool; default everywhere.
  """
  hidden, other_hidden = jnp.asarray(hidden), jnp.asarray(other_hidden)
  shape = hidden.shape[:-1]
  mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask, bool)

  def one(hidden: Array, other: Array, mask: Array) -> Array:
    logits = lambda x, head: jax.nn.log_softmax(logits_of(linear32(x, head), softcap, 1.0)[0])
    log_p, log_q = logits(hidden, head), logits(other, other_head)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * mask

  flat = lambda x: x.reshape(1, -1, *x.shape[len(shape) :])
  split, join = flat, lambda x: x.reshape(shape)
  if sharding.active():
    split, join = zigzag.parts, lambda x: zigzag.joined(x, shape[1])
  hidden, other_hidden, mask = split(hidden), split(other_hidden), split(mask)
  return jax.lax.stop_gradient(join(in_chunks(one, (hidden, other_hidden, mask), mask)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _score(
  hidden: Array, head: Any, labels: Array, mask: Array, kept: Array | None, options: Options
) -> Scores:
  return _forward(hidden, head, labels, mask, kept, options, with_gradient=False)[0]


def _score_fwd(
  hidden: Any, head: Any, labels: Any, mask: Any, kept: Any, options: Options
) -> tuple[Scores, tuple[Array | None, Any]]:
  """(Scores, (d logp / d hidden, None), or (None, the inputs) where the head is trained)."""
  is_primal = lambda p: isinstance(p, jax.custom_derivatives.CustomVJPPrimal)
  value = lambda primals: jax.tree.map(lambda p: p.value, primals, is_leaf=is_primal)
  trained = any(p.perturbed for p in jax.tree.leaves(head, is_leaf=is_primal))
  hidden, head, labels, mask, kept = (value(x) for x in (hidden, head, labels, mask, kept))
  if trained:
    scores, _ = _forward(hidden, head, labels, mask, kept, options, with_gradient=False)
    return scores, (None, (hidden, head, labels, mask, kept))
  scores, slope = _forward(hidden, head, labels, mask, kept, options, with_gradient=True)
  return scores, (slope, None)


def _score_bwd(
  options: Options, residuals: tuple[Array | None, Any], cotangents: Scores
) -> tuple[Any, Any, None, None, None]:
  slope, inputs = residuals
  g = cotangents.logp
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None, None
  if slope is not None:
    return (slope * g[..., None].astype(slope.dtype)), None, None, None, None
  hidden, head, labels, mask, kept = inputs
  floats, rebuild = floating(head)
  logps = lambda hidden, floats: _recomputed(hidden, rebuild(floats), labels, mask, kept, options)
  d_hidden, d_floats = jax.vjp(logps, hidden, floats)[1](g)
  d_head = rebuild(d_floats, others=None)
  return d_hidden, d_head, None, None, None


_score.defvjp(_score_fwd, _score_bwd, symbolic_zeros=True)


def floating(head: Any) -> tuple[list[Array], Callable[..., Any]]:
  """The differentiable leaves of head, and a function that puts others in their place."""
  leaves, structure = jax.tree.flatten(head)
  where = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

  def rebuild(floats: Sequence[Array], others: Sequence[Array] | None = leaves) -> Any:
    new: list[Any] = [None] * len(leaves) if others is None else list(others)
    for i, leaf in zip(where, floats):
      new[i] = leaf
    return jax.tree.unflatten(structure, new)

  return [leaves[i] for i in where], rebuild


def _forward(
  hidden: Array,
  head: Any,
  labels: Array,
  mask: Array,
  kept: Array | None,
  options: Options,
  with_gradient: bool,
) -> tuple[Scores, Array | None]:
  """(Scores, d logp / d hidden or None) over [batch, tokens], a chunk of tokens at a time."""
  one = lambda hidden, labels, mask, *kept: _chunk(
    hidden, head, labels, mask, *(kept or (None,)), options, with_gradient
  )
  return in_chunks(one, (hidden, labels, mask, *_given(kept)), mask)


def _given(kept: Array | None) -> tuple[Array, ...]:
  return () if kept is None else (kept,)


def in_chunks(
  one: Callable[..., Any], arrays: Sequence[Array], mask: Array, most: int | None = None
) -> Any:
  """What `one` makes of [batch, chunk, ...] parts of the arrays, [batch, tokens, ...] each, joined.

  It is 0 where `one` was not called: without a mesh wanted tokens go first, and the loop ends with the last of them.

  Args:
    most: tokens of a part on each device; None: CHUNK.
  """
  batch, tokens = mask.shape
  chunk = chunk_length(batch, tokens, most)
  compact = not sharding.active() and batch == 1
  if compact:
    order = jnp.argsort(~mask[0], stable=True)
    arrays, mask = jax.tree.map(lambda x: x[:, order], (arrays, mask))
  padding = -tokens % chunk
  arrays = [jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in arrays]
  chunks = (tokens + padding) // chunk
  if compact:
    chunks = (jnp.sum(mask) + chunk - 1) // chunk
  parts = lambda i: [jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1) for x in arrays]
  whole = lambda x: jnp.zeros((batch, tokens + padding, *x.shape[2:]), x.dtype)
  start = jax.tree.map(whole, jax.eval_shape(lambda: one(*parts(0))))
  update = lambda i: lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i * chunk, 1)
  body = lambda i, joined: jax.tree.map(update(i), joined, one(*parts(i)))
  joined = jax.tree.map(lambda x: x[:, :tokens], jax.lax.fori_loop(0, chunks, body, start))
  if compact:
    places = jnp.argsort(order)  # a gather: XLA:CPU scatters row by row
    joined = jax.tree.map(lambda x: x[:, places], joined)
  return joined


def chunk_length(batch: int, tokens: int, most: int | None = None) -> int:
  """How much of the token axis makes `most` tokens on a device (CHUNK where not said), and at least one."""
  most = CHUNK if most is None else most
  shards = sharding.size(sharding.ACTIVATIONS["parts"])
  return max(1, min(most * shards // batch, tokens))


def _chunk(
  hidden: Array,
  head: Any,
  labels: Array,
  mask: Array,
  kept: Array | None,
  options: Options,
  with_gradient: bool,
) -> tuple[Scores, Array | None]:
  """`_forward` of one chunk, whose logits exist at once."""
  softcap, temperature, entropy, collision = options
  # the transpose of the product that makes the logits, whatever the head is
  products, transposed = jax.vjp(lambda x: linear32(x, head), hidden)
  logits, chain = logits_of(products, softcap, temperature)
  logits = _among(logits, kept, mask)
  top = jnp.max(logits, axis=-1)
  raised = _materialised(jnp.exp(logits - top[..., None]))
  total = jnp.sum(raised, axis=-1)
  normaliser = top + jnp.log(total)
  target = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  wanted = mask.astype(jnp.float32)
  entropies = jnp.zeros_like(target)
  if entropy:
    p = raised / total[..., None]
    # not normaliser - sum(p * logits), where large logits cancel; what is not kept has p 0
    entropies = jnp.sum(jnp.where(p > 0, p * (normaliser[..., None] - logits), 0.0), axis=-1)
  collisions = jnp.zeros_like(target)
  if collision:
    collisions = jnp.log(jnp.sum(raised**2, axis=-1)) - 2 * jnp.log(total)
  scores = Scores(
    (target - normaliser) * wanted,
    (target >= top) * wanted,
    entropies * wanted,
    collisions * wanted,
  )
  if not with_gradient:
    return scores, None
  p = raised / total[..., None]
  is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
  d_logits = (is_label - p) * chain * wanted[..., None]
  return scores, transposed(d_logits.astype(products.dtype))[0]


def _materialised(x: Array) -> Array:
  """x as an array of its own on CPU, where exp fused into a sum measured over twice as slow as apart."""
  return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


def logits_of(products: Array, softcap: float | None, temperature: float) -> tuple[Array, Array]:
  """(logits, d logits / d products), both float32."""
  z = products.astype(jnp.float32)
  chain = jnp.float32(1.0 / temperature)
  if softcap is not None:
    squashed = jnp.tanh(z / softcap)
    z, chain = softcap * squashed, chain * (1.0 - squashed**2)
  return sharding.constrain(z / temperature, "parts - vocab"), chain


def _among(logits: Array, kept: Array | None, mask: Array) -> Array:
  """logits, of what is not kept -inf where the mask says that there is a label."""
  if kept is None:
    return logits
  return jnp.where(bits.unpack(kept, logits.shape[-1]) | ~mask[..., None], logits, -jnp.inf)


def _recomputed(
  hidden: Array, head: Any, labels: Array, mask: Array, kept: Array | None, options: Options
) -> Array:
  """logp alone, by a scan whose backward pass computes each chunk's logits again: for a head that is trained."""
  softcap, temperature, *_ = options
  batch, tokens, _ = hidden.shape
  chunk = chunk_length(batch, tokens)
  padding = -tokens % chunk
  pad = lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
  split = lambda x: jnp.moveaxis(pad(x).reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(_: None, parts: tuple[Array, Array, Array, Array | None]) -> tuple[None, Array]:
    hidden, labels, mask, kept = parts
    logits = _among(logits_of(linear32(hidden, head), softcap, temperature)[0], kept, mask)
    logps = jax.nn.log_softmax(logits, axis=-1)
    target = jnp.take_along_axis(logps, labels[..., None], axis=-1)[..., 0]
    return None, target * mask

  _, logps = jax.lax.scan(one, None, jax.tree.map(split, (hidden, labels, mask, kept)))
  return jnp.moveaxis(logps, 0, 1).reshape(batch, -1)[:, :tokens]
