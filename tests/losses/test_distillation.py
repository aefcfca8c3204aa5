"""Divergences from a teacher: closed forms in float64, and chunks that know nothing of one another."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.losses import distillation
from posttrain_jax.losses.distillation import Likeliest, Loss, Options, Whole

LOSSES = (Loss("forward_kl"), Loss("reverse_kl"), Loss("jsd", 0.1), Loss("jsd", 0.8))
TOKENS, EMBED, TEACHER_EMBED, VOCAB = 7, 6, 9, 40


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plainly(loss, log_p, log_q):
  p, q = np.exp(log_p), np.exp(log_q)
  kl = lambda a, b: (a * (np.log(a) - np.log(b))).sum(-1)
  if loss.name == "forward_kl":
    return kl(p, q)
  if loss.name == "reverse_kl":
    return kl(q, p)
  m = loss.beta * p + (1 - loss.beta) * q
  return loss.beta * kl(p, m) + (1 - loss.beta) * kl(q, m)


def slope(loss, log_p, log_q):
  """d divergence / d the student's logits, by hand: q (g - sum q g) with g the derivative by q."""
  p, q = np.exp(log_p), np.exp(log_q)
  if loss.name == "forward_kl":
    return q - p
  if loss.name == "reverse_kl":
    g = log_q - log_p
  else:
    g = (1 - loss.beta) * (log_q - np.log(loss.beta * p + (1 - loss.beta) * q))
  return q * (g - (q * g).sum(-1, keepdims=True))


def made(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  mask = np.ones(TOKENS, bool)
  mask[[0, 4]] = False
  return dict(
    hidden=normal(TOKENS, EMBED),
    head=normal(EMBED, VOCAB),
    teacher=normal(TOKENS, TEACHER_EMBED),
    teacher_head=normal(TEACHER_EMBED, VOCAB),
    labels=jnp.asarray(rng.integers(0, VOCAB, TOKENS)),
    mask=jnp.asarray(mask),
  )


def doubles(x, *, temperature=1.0, softcap=None):
  product = lambda a, b: np.asarray(a, np.float64) @ np.asarray(b, np.float64)
  cap = lambda z: z if softcap is None else softcap * np.tanh(z / softcap)
  p = log_softmax(cap(product(x["teacher"], x["teacher_head"])) / temperature)
  q = log_softmax(cap(product(x["hidden"], x["head"])) / temperature)
  return p, q


def compared(x, options, hidden=None, head=None, teacher=None):
  return distillation.compared(
    x["hidden"] if hidden is None else hidden,
    x["head"] if head is None else head,
    Whole(x["teacher"]) if teacher is None else teacher,
    x["teacher_head"] if teacher is None else None,
    x["labels"],
    mask=x["mask"],
    options=options,
  )


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_divergence_and_its_slope_are_the_formulas_in_float64(loss):
  with jax.enable_x64(True):
    rng = np.random.default_rng(3)
    log_p, log_q = log_softmax(rng.normal(size=(5, 11)) * 3), log_softmax(rng.normal(size=(5, 11)))
    found = loss(jnp.asarray(log_p), jnp.asarray(log_q))
    np.testing.assert_allclose(found, plainly(loss, log_p, log_q), rtol=1e-12)
    of_logits = lambda z: loss(jnp.asarray(log_p), jax.nn.log_softmax(z)).sum()
    np.testing.assert_allclose(
      jax.grad(of_logits)(jnp.asarray(log_q)), slope(loss, log_p, log_q), rtol=1e-9, atol=1e-15
    )


def test_the_mixture_goes_over_into_both_divergences():
  with jax.enable_x64(True):
    rng = np.random.default_rng(4)
    p, q = (jnp.asarray(log_softmax(rng.normal(size=9))) for _ in range(2))
    at = lambda beta: distillation.jensen_shannon(p, q, beta=beta)
    assert float(at(1e-7) / 1e-7) == pytest.approx(float(distillation.forward_kl(p, q)), rel=1e-5)
    near = float(at(1 - 1e-7) / 1e-7)
    assert near == pytest.approx(float(distillation.reverse_kl(p, q)), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("chunk", [3, 256])
def test_chunks_of_hidden_states_have_the_divergence_of_whole_logits(loss, chunk, monkeypatch):
  monkeypatch.setattr(distillation, "CHUNK", chunk)
  x, how = made(), dict(temperature=1.7, softcap=4.0)
  options = Options(loss, softcap=4.0, teacher_softcap=4.0, temperature=1.7)
  log_p, log_q = doubles(x, **how)
  mask = np.asarray(x["mask"])
  weights = np.linspace(0.5, 2, TOKENS)
  total = lambda h: jnp.sum(compared(x, options, hidden=h).divergence * weights)
  found = jax.jit(lambda: compared(x, options))()
  np.testing.assert_allclose(
    found.divergence, np.where(mask, plainly(loss, log_p, log_q), 0), rtol=2e-4, atol=1e-6
  )
  target = np.take_along_axis(log_q, np.asarray(x["labels"])[:, None], -1)[:, 0]
  np.testing.assert_allclose(found.nll, np.where(mask, -target, 0), rtol=1e-4, atol=1e-6)
  same = mask & (log_p.argmax(-1) == log_q.argmax(-1))
  np.testing.assert_array_equal(found.agrees, same.astype(np.float32))
  right = mask & (log_q.argmax(-1) == np.asarray(x["labels"]))
  np.testing.assert_array_equal(found.correct, right.astype(np.float32))
  z = np.asarray(x["hidden"], np.float64) @ np.asarray(x["head"], np.float64)
  chain = (1 - np.tanh(z / 4) ** 2) / 1.7
  d_logits = slope(loss, log_p, log_q) * chain * (weights * mask)[:, None]
  wanted = d_logits @ np.asarray(x["head"], np.float64).T
  np.testing.assert_allclose(jax.jit(jax.grad(total))(x["hidden"]), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("of", ["whole", "likeliest"])
def test_a_trained_head_has_the_gradient_of_whole_logits(of, monkeypatch):
  monkeypatch.setattr(distillation, "CHUNK", 3)
  x, loss = made(1), Loss("jsd", 0.3)
  teacher = None
  if of == "likeliest":
    teacher = distillation.likeliest(x["teacher"], x["teacher_head"], k=4, mask=x["mask"])

  def plain(hidden, head):
    log_q = jax.nn.log_softmax(hidden @ head)
    log_p = jax.nn.log_softmax(x["teacher"] @ x["teacher_head"])
    if teacher is not None:
      coarse = lambda logps, rest: jnp.concatenate([logps, rest[..., None]], -1)
      among = lambda logps: jnp.take_along_axis(logps, teacher.ids, -1)
      merged = lambda logps: coarse(
        among(logps), jnp.log1p(-jnp.sum(jnp.exp(among(logps)), axis=-1))
      )
      log_p, log_q = merged(log_p), merged(log_q)
    return jnp.sum(loss(log_p, log_q) * x["mask"])

  ours = lambda h, w: jnp.sum(compared(x, Options(loss), h, w, teacher).divergence)
  found = jax.jit(jax.grad(ours, (0, 1)))(x["hidden"], x["head"])
  wanted = jax.jit(jax.grad(plain, (0, 1)))(x["hidden"], x["head"])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, wanted)
  frozen = jax.jit(jax.grad(lambda h: ours(h, x["head"])))(x["hidden"])
  np.testing.assert_allclose(frozen, wanted[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_likeliest_tokens_and_the_rest_say_less_than_all_and_no_more(loss):
  x, values = made(2), []
  mask = np.asarray(x["mask"])
  for k in (1, 4, 16, VOCAB - 1):
    teacher = distillation.likeliest(x["teacher"], x["teacher_head"], k=k, mask=x["mask"])
    assert teacher.ids.shape == (TOKENS, k)
    np.testing.assert_allclose(np.exp(teacher.logps[mask]).sum(-1), 1, rtol=1e-6)
    values.append(np.asarray(compared(x, Options(loss), teacher=teacher).divergence)[mask])
  whole = np.asarray(compared(x, Options(loss)).divergence)[mask]
  assert all((a <= b * (1 + 1e-5) + 1e-6).all() for a, b in zip(values, [*values[1:], whole]))
  np.testing.assert_allclose(values[-1], whole, rtol=1e-4)  # the rest is one token
  assert (values[0] < whole - 1e-3).any()


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(loss):
  x = made(5)
  x |= dict(teacher=x["hidden"], teacher_head=x["head"])
  ways = [None, distillation.likeliest(x["hidden"], x["head"], k=3, mask=x["mask"])]
  for teacher in ways:
    of = lambda h, teacher=teacher: jnp.sum(
      compared(x, Options(loss), hidden=h, teacher=teacher).divergence
    )
    value, gradient = jax.value_and_grad(of)(x["hidden"])
    assert abs(float(value)) < 1e-6
    assert float(jnp.abs(gradient).max()) < 1e-6


def test_tokens_that_one_model_alone_has_are_left_out():
  x = made(6)
  padded = jnp.pad(x["teacher_head"], ((0, 0), (0, 5)), constant_values=9.0)
  options = Options(Loss("reverse_kl"), vocab=VOCAB)
  found = compared({**x, "teacher_head": padded}, options).divergence
  np.testing.assert_allclose(found, compared(x, options).divergence, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_what_is_impossible_for_both_counts_nothing(loss):
  gone = jnp.asarray([-jnp.inf, np.log(0.25), np.log(0.75)], jnp.float32)
  there = jnp.asarray([-jnp.inf, np.log(0.5), np.log(0.5)], jnp.float32)
  value, gradient = jax.value_and_grad(lambda q: loss(gone, q))(there)
  assert float(value) == pytest.approx(float(loss(gone[1:], there[1:])), rel=1e-6)
  assert np.isfinite(np.asarray(gradient)).all()


def test_the_mass_of_the_likeliest_is_the_students():
  x = made(7)
  teacher: Likeliest = distillation.likeliest(x["teacher"], x["teacher_head"], k=5, mask=x["mask"])
  _, log_q = doubles(x)
  wanted = np.take_along_axis(np.exp(log_q), np.asarray(teacher.ids), -1).sum(-1)
  found = compared(x, Options(Loss("forward_kl")), teacher=teacher).mass
  np.testing.assert_allclose(found, np.where(x["mask"], wanted, 0), rtol=1e-4)


@pytest.mark.parametrize("of", ["whole", "likeliest"])
@pytest.mark.parametrize("trained", [False, True])
def test_logits_of_a_chunk_exist_at_once(of, trained):
  """Of either model, forward and backward: nothing in the compiled program has tokens times vocabulary."""
  tokens, vocab = 1000, 977
  floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  whole = numbers(jnp.int32, tokens), numbers(jnp.bool_, tokens)
  if of == "whole":
    teacher, teacher_head = Whole(floats(tokens, 9)), floats(9, vocab)
  else:
    teacher, teacher_head = Likeliest(numbers(jnp.int32, tokens, 4), floats(tokens, 5)), None

  def loss(hidden, head, teacher, teacher_head, labels, mask):
    told = distillation.compared(
      hidden, head, teacher, teacher_head, labels, mask=mask, options=Options(Loss("jsd"))
    )
    return told.divergence.sum()

  wanted = jax.grad(loss, (0, 1) if trained else 0)
  args = (floats(tokens, 6), floats(6, vocab), teacher, teacher_head, *whole)
  text = jax.jit(wanted).lower(*args).compile().as_text()
  found = [
    [int(n) for n in dims.split(",") if n] for dims in re.findall(rf"\[([\d,]*){vocab}\]", text)
  ]
  assert found
  assert max(int(np.prod(dims)) for dims in found) <= distillation.CHUNK


def numbers(dtype, *shape):
  return jax.ShapeDtypeStruct(shape, dtype)
