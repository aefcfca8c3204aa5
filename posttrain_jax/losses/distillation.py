"""Divergences of a student from its teacher, token by token, without a `[tokens, vocab]` array of either.

`forward_kl`, `reverse_kl` and `jensen_shannon` are the formulas, on log-probabilities over one last axis; `compared`
computes them where hidden states meet the heads, CHUNK tokens at a time.  A teacher is there with its hidden states
and head, or with its most likely tokens (`likeliest`), computed once: all others are then one category, so that the
divergence is that of the coarser distributions, which is never above the whole one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posttrain_jax.core import sharding, struct, zigzag
from posttrain_jax.core.weight import linear32
from posttrain_jax.losses import logprob

Array = jax.Array
CHUNK = 256  # tokens whose logits, both models', exist at once on each device


def forward_kl(teacher: Array, student: Array) -> Array:
  """KL(p || q) = sum_v p (log p - log q): the student covers all that the teacher might say.

  Args:
    teacher, student: log p and log q, [..., categories], each of sum 1.  Nats; Hinton et al. 2015 (arXiv 1503.02531).

  >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
  >>> round(float(forward_kl(p, q)), 4), round(float(reverse_kl(p, q)), 4)
  (0.1438, 0.1308)
  """
  return jnp.sum(_weighed(teacher, teacher, student), axis=-1)


def reverse_kl(teacher: Array, student: Array) -> Array:
  """KL(q || p) = sum_v q (log q - log p): the student says only what the teacher would.

  Gu et al. 2023 (MiniLLM, arXiv 2306.08543); arguments as `forward_kl`'s.
  """
  return jnp.sum(_weighed(student, student, teacher), axis=-1)


def jensen_shannon(teacher: Array, student: Array, *, beta: float) -> Array:
  """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

  Agarwal et al. 2023 (GKD, arXiv 2306.13649), eq. 1, as TRL has it between its special cases: here 0 and 1 give 0, and
  the KLs have functions of their own.  Divided by beta it tends to the forward KL, by 1 - beta to the reverse.

  Args:
    beta: share of the teacher in the mixture, within 0 and 1.
  """
  possible = (teacher > -jnp.inf) | (student > -jnp.inf)  # to one of them
  part = lambda logps, share: jnp.where(possible, logps, 0.0) + jnp.log(share)
  mixture = jnp.where(possible, jnp.logaddexp(part(teacher, beta), part(student, 1 - beta)), 0.0)
  of = lambda logps: jnp.sum(_weighed(logps, logps, mixture), axis=-1)
  return beta * of(teacher) + (1 - beta) * of(student)


def _weighed(weight: Array, a: Array, b: Array) -> Array:
  """exp(weight) (a - b), 0 with a gradient of 0 where the weight is."""
  there = jnp.exp(weight) > 0
  difference = jnp.where(there, a, 0.0) - jnp.where(there, b, 0.0)
  return jnp.where(there, jnp.exp(jnp.where(there, weight, 0.0)) * difference, 0.0)


class Loss(NamedTuple):
  """A divergence by its name in `LOSSES`; beta is the Jensen-Shannon one's."""

  name: str
  beta: float = 0.5

  def __call__(self, teacher: Array, student: Array) -> Array:
    return LOSSES[self.name](teacher, student, self.beta)


LOSSES: Mapping[str, Callable[[Array, Array, float], Array]] = {
  "forward_kl": lambda teacher, student, _: forward_kl(teacher, student),
  "reverse_kl": lambda teacher, student, _: reverse_kl(teacher, student),
  "jsd": lambda teacher, student, beta: jensen_shannon(teacher, student, beta=beta),
}


@struct.dataclass
class Likeliest:
  """A teacher's k most likely tokens after each position: ids [..., k], their log-probabilities, and that of the rest.

  logps: [..., k + 1], the last one of all other tokens together; float32.
  """

  ids: Array
  logps: Array


@struct.dataclass
class Whole:
  """A teacher's hidden states [..., its embed]; its head stands beside."""

  hidden: Array


@struct.dataclass
class Compared:
  """What one pass tells of each token; all [...], float32, 0 where the mask is False."""

  divergence: Array  # differentiable with respect to the student alone
  nll: Array  # -log q(label); not differentiable, as all that follows
  correct: Array  # 1 where the label is the student's most likely token
  agrees: Array  # 1 where the most likely token of both is the same
  mass: Array  # what the student gives to the teacher's most likely tokens; 1 where all are there


class Options(NamedTuple):
  """loss: which divergence.  softcap, teacher_softcap: of each model's logits; None for none.

  temperature: divides the logits of both, after the soft-caps.  vocab: the tokens that both models know; None: all.
  """

  loss: Loss
  softcap: float | None = None
  teacher_softcap: float | None = None
  temperature: float = 1.0
  vocab: int | None = None


def compared(
  hidden: Array,
  head: Any,
  teacher: Whole | Likeliest,
  teacher_head: Any,
  labels: Array,
  *,
  mask: Array,
  options: Options,
) -> Compared:
  """`Compared` of softmax(hidden @ head) with what the teacher says at the same places.

  Products accumulate in float32 and softmaxes are float32.  While the head is not differentiated the forward pass
  keeps d divergence / d hidden, one row a token, as `logprob.score` does; a trained head has its logits computed again.

  Args:
    hidden: [..., embed] of the student.
    head: [embed, vocab], any weight.
    teacher_head: [its embed, vocab], any weight; None beside `Likeliest`.
    labels: [...] token ids.
    mask: [...] bool, True where the divergence is wanted.
  """
  arrays = (jnp.asarray(hidden), teacher, jnp.asarray(labels), jnp.asarray(mask, bool))
  shape = arrays[2].shape
  if sharding.active():
    parts = jax.tree.map(zigzag.parts, arrays)
    result = _compared(parts[0], head, *parts[1:], teacher_head, options)
    return jax.tree.map(lambda x: zigzag.joined(x, shape[1]), result)
  flat = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[len(shape) :]), arrays)
  result = _compared(flat[0], head, *flat[1:], teacher_head, options)
  return jax.tree.map(lambda x: x.reshape(shape), result)


def likeliest(
  hidden: Array,
  head: Any,
  *,
  k: int,
  mask: Array,
  softcap: float | None = None,
  temperature: float = 1.0,
  vocab: int | None = None,
) -> Likeliest:
  """A teacher's k most likely tokens at each position, most likely first; 0 where the mask is False."""
  shape = mask.shape

  def one(hidden: Array, mask: Array) -> tuple[Array, Array]:
    logits = _logits(hidden, head, softcap, temperature, vocab)
    _, ids = jax.lax.top_k(logits, k)
    wanted = mask[..., None]
    return jnp.where(wanted, ids, 0), jnp.where(wanted, _coarser(logits, ids), 0.0)

  split, join = (
    lambda x: x.reshape(1, -1, *x.shape[len(shape) :]),
    lambda x: x.reshape(*shape, x.shape[-1]),
  )
  if sharding.active():
    split, join = zigzag.parts, lambda x: zigzag.joined(x, shape[1])
  parts = (split(jnp.asarray(hidden)), split(jnp.asarray(mask, bool)))
  ids, logps = logprob.in_chunks(one, parts, parts[1], CHUNK)
  return jax.lax.stop_gradient(Likeliest(join(ids), join(logps)))


def _logits(
  hidden: Array, head: Any, softcap: float | None, temperature: float, vocab: int | None
) -> Array:
  """float32, of the first `vocab` tokens."""
  logits, _ = logprob.logits_of(linear32(hidden, head), softcap, temperature)
  return logits if vocab is None else logits[..., :vocab]


def _coarser(logits: Array, ids: Array) -> Array:
  """[..., k + 1]: log-probabilities of the tokens `ids`, and of all others together.

  The others are summed by themselves: 1 less the mass of the ids would cancel where they hold nearly all of it.
  """
  among = jnp.take_along_axis(logits, ids, axis=-1)
  # compared: devices that share a batch would gather the indices of a scatter; 32 of 49,152 take a CPU as long
  is_among = jnp.any(jnp.arange(logits.shape[-1])[:, None] == ids[..., None, :], axis=-1)
  others = jnp.where(is_among, -jnp.inf, logits)
  rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
  unnormalised = jnp.concatenate([among, rest], axis=-1)
  return jax.nn.log_softmax(unnormalised, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _compared(
  hidden: Array,
  head: Any,
  teacher: Whole | Likeliest,
  labels: Array,
  mask: Array,
  teacher_head: Any,
  options: Options,
) -> Compared:
  one = lambda *parts: _chunk(parts[0], head, *parts[1:], teacher_head, options)
  return _chunked(one, (hidden, teacher, labels, mask))


def _chunked(one: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
  """`logprob.in_chunks` of a tuple of trees of arrays, whose last is the mask."""
  leaves, structure = jax.tree.flatten(arrays)
  flat = lambda *leaves: one(*jax.tree.unflatten(structure, leaves))
  return logprob.in_chunks(flat, leaves, arrays[-1], CHUNK)


def _chunk(
  hidden: Array,
  head: Any,
  teacher: Whole | Likeliest,
  labels: Array,
  mask: Array,
  teacher_head: Any,
  options: Options,
) -> Compared:
  """`Compared` of one chunk, whose logits exist at once; differentiable."""
  logits = _logits(hidden, head, options.softcap, options.temperature, options.vocab)
  match teacher:
    case Whole():
      theirs = (options.teacher_softcap, options.temperature, options.vocab)
      log_p = jax.nn.log_softmax(_logits(teacher.hidden, teacher_head, *theirs), axis=-1)
      log_q, first = jax.nn.log_softmax(logits, axis=-1), jnp.argmax(log_p, axis=-1)
      mass = jnp.ones(mask.shape, jnp.float32)
    case Likeliest():
      log_p, log_q, first = teacher.logps, _coarser(logits, teacher.ids), teacher.ids[..., 0]
      mass = -jnp.expm1(log_q[..., -1])
  target = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  top = jnp.max(logits, axis=-1)
  stop, wanted = jax.lax.stop_gradient, mask.astype(jnp.float32)
  told = Compared(
    jnp.where(mask, options.loss(stop(log_p), log_q), 0.0),
    (jax.nn.logsumexp(logits, axis=-1) - target) * wanted,
    (target >= top) * wanted,
    (jnp.take_along_axis(logits, first[..., None], axis=-1)[..., 0] >= top) * wanted,
    mass * wanted,
  )
  rest = ("nll", "correct", "agrees", "mass")
  return dataclasses.replace(told, **{name: stop(getattr(told, name)) for name in rest})


def _fwd(
  hidden: Any, head: Any, teacher: Any, labels: Any, mask: Any, teacher_head: Any, options: Options
) -> tuple[Compared, tuple[Any, Any]]:
  """(Compared, (d divergence / d hidden, None), or (None, the inputs) where the head is trained)."""
  is_primal = lambda p: isinstance(p, jax.custom_derivatives.CustomVJPPrimal)
  value = lambda primals: jax.tree.map(lambda p: p.value, primals, is_leaf=is_primal)
  trained = any(p.perturbed for p in jax.tree.leaves(head, is_leaf=is_primal))
  inputs = tuple(map(value, (hidden, head, teacher, labels, mask, teacher_head)))
  hidden, head, teacher, labels, mask, teacher_head = inputs
  if trained:
    return _compared(*inputs, options), (None, inputs)

  def one(hidden: Array, *rest: Any) -> tuple[Compared, Array]:
    def total(hidden: Array) -> tuple[Array, Compared]:
      told = _chunk(hidden, head, *rest, teacher_head, options)
      return jnp.sum(told.divergence), told  # tokens know nothing of one another

    slope, told = jax.grad(total, has_aux=True)(hidden)
    return told, slope

  told, slope = _chunked(one, (hidden, teacher, labels, mask))
  return told, (slope, None)


def _bwd(
  options: Options, residuals: tuple[Any, Any], cotangents: Compared
) -> tuple[Any, Any, None, None, None, None]:
  slope, inputs = residuals
  g = cotangents.divergence
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None, None, None
  if slope is not None:
    return slope * g[..., None].astype(slope.dtype), None, None, None, None, None
  hidden, head, teacher, labels, mask, teacher_head = inputs
  floats, rebuild = logprob.floating(head)
  again = lambda hidden, floats: _recomputed(
    hidden, rebuild(floats), teacher, labels, mask, teacher_head, options
  )
  d_hidden, d_floats = jax.vjp(again, hidden, floats)[1](g)
  return d_hidden, rebuild(d_floats, others=None), None, None, None, None


_compared.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _recomputed(
  hidden: Array,
  head: Any,
  teacher: Whole | Likeliest,
  labels: Array,
  mask: Array,
  teacher_head: Any,
  options: Options,
) -> Array:
  """The divergence alone, by a scan whose backward pass computes each chunk's logits again."""
  batch, tokens = mask.shape
  chunk = logprob.chunk_length(batch, tokens, CHUNK)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, -tokens % chunk)) + ((0, 0),) * (x.ndim - 2))
  split = lambda x: jnp.moveaxis(pad(x).reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(_: None, parts: tuple[Any, ...]) -> tuple[None, Array]:
    return None, _chunk(parts[0], head, *parts[1:], teacher_head, options).divergence

  _, values = jax.lax.scan(one, None, jax.tree.map(split, (hidden, teacher, labels, mask)))
  return jnp.moveaxis(values, 0, 1).reshape(batch, -1)[:, :tokens]
