"""One adapter over another: a frozen one under a fresh one, every kind over every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, adalora, dora, ia3, lora, replaced, vera
from posttrain_jax.core import tree, weight
from posttrain_jax.core.weight import Adapted, Shared
from posttrain_jax.models import decoder
from tests.adapters.kinds import moved
from tests.marks import slow
from tests.models import families

KEY = jax.random.key(0)
IN, OUT, RANK = 12, 8, 3


def close(actual, expected, rtol=1e-5):
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


# --- one weight: every kind over every kind, in float64 by hand -------------------------------------------------------


def drawn(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def wide(x):
  return np.asarray(x, np.float64)


def a_lora(seed, base):
  node = lora.LoRA(drawn(seed, IN, RANK), drawn(seed + 1, RANK, OUT), jnp.float32(0.7))
  return node, lambda w: w + 0.7 * wide(node.a) @ wide(node.b)


def a_dora(seed, base):
  plain, changed = a_lora(seed, base)
  node = dora.over(plain, base)
  node = node.replace(magnitude=node.magnitude * (1.5 + 0.3 * drawn(seed + 2, OUT)))
  direction = lambda v: v / np.linalg.norm(v, axis=0)
  return node, lambda w: wide(node.magnitude) * direction(changed(w))


def a_vera(seed, base):
  pair = vera.Projections(drawn(seed, IN + 2, RANK), drawn(seed + 1, RANK, OUT + 1))
  node = vera.VeRA(drawn(seed + 2, OUT), drawn(seed + 3, RANK), pair=Shared(pair))
  a, b = wide(pair.a)[:IN], wide(pair.b)[:, :OUT]
  return node, lambda w: w + a * wide(node.lambda_d) @ b * wide(node.lambda_b)


def an_adalora(seed, base):
  a, b, e = drawn(seed, IN, RANK), drawn(seed + 1, RANK, OUT), drawn(seed + 2, RANK)
  node = adalora.AdaLoRA(a, b, e, jnp.float32(0.7), jnp.ones(RANK))
  return node, lambda w: w + 0.7 * wide(a) * wide(e) @ wide(b)


def an_ia3(seed, base):
  node = ia3.IA3(drawn(seed, OUT))
  return node, lambda w: w * wide(node.gain)


def an_ia3_of_inputs(seed, base):
  node = ia3.IA3(drawn(seed, IN), feedforward=True)
  return node, lambda w: wide(node.gain)[:, None] * w


def a_replaced(seed, base):
  node = replaced.Replaced(drawn(seed, IN, OUT))
  return node, lambda w: wide(node.value)


KINDS = [a_lora, a_dora, a_vera, an_adalora, an_ia3, an_ia3_of_inputs, a_replaced]


@pytest.mark.parametrize("outer", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("inner", KINDS, ids=lambda f: f.__name__)
def test_one_over_the_other_is_their_algebra_one_after_the_other(inner, outer):
  base = drawn(1, IN, OUT)
  below, first = inner(10, base)
  under = Adapted(base, below)
  above, second = outer(20, under)
  over = Adapted(under, above)
  expected = second(first(wide(base)))
  x = drawn(3, 5, IN)
  close(over.dense(), expected)
  close(over.apply(x), wide(x) @ expected, 3e-5)
  close(over.rows(jnp.asarray([0, 7, 11])), expected[[0, 7, 11]], 3e-5)
  assert np.abs(expected - first(wide(base))).max() > 0.1


# --- whole models -----------------------------------------------------------------------------------------------------

OPTIONS = {
  "lora": dict(method="lora", r=2),
  "dora": dict(method="dora", r=2),
  "pissa": dict(method="pissa", r=2),
  "vera": dict(method="vera", r=3),
  "adalora": dict(method="adalora", init_r=2, target_r=2),
  "ia3": dict(method="ia3"),
  "whole": dict(r=2, target_modules=("q_proj",), modules_to_save=("up_proj", "norm")),
  "prompt": dict(method="prompt", num_virtual_tokens=3),
  "prefix": dict(method="prefix", num_virtual_tokens=3),
}
FAST = (("lora", "prefix"),)
PAIRS = [  # what is frozen, what is trained over it
  ("dora", "lora"),
  ("vera", "lora"),
  ("lora", "dora"),
  ("lora", "ia3"),
  ("prompt", "lora"),
  ("lora", "adalora"),
  ("whole", "lora"),
  ("lora", "prefix"),
  ("vera", "vera"),
  ("lora", "pissa"),
]


@functools.partial(jax.jit, static_argnames="config")
def logits(bound, tokens, config):
  return decoder.forward(bound, tokens, config)


@pytest.mark.parametrize(
  ("inner", "outer"), [pair if pair in FAST else slow(*pair) for pair in PAIRS]
)
def test_a_fresh_adapter_over_a_frozen_one_trains_and_merges(inner, outer):
  model, params = families.make("llama_biased")
  tokens = families.tokens(2, 9)
  below = moved(adapters.init(KEY, params, AdapterConfig(**OPTIONS[inner]))[1], size=0.2)
  under = adapters.bind(params, below)
  base, fresh = adapters.init(jax.random.key(1), under, AdapterConfig(**OPTIONS[outer]))
  if outer != "prefix":
    close(logits(adapters.bind(base, fresh), tokens, model), logits(under, tokens, model), 2e-5)
  above = moved(fresh, seed=5, size=0.2)
  over = adapters.bind(base, above)
  found = logits(over, tokens, model)
  close(logits(adapters.merge(base, above), tokens, model), found, 1e-4)
  assert np.abs(found - logits(under, tokens, model)).max() > 0.05
  if outer != "pissa":  # one after the other; PiSSA's base is what it left of the merged one
    apart = adapters.merge(adapters.merge(params, below), above)
    close(logits(apart, tokens, model), found, 1e-4)
  merged = [leaf for _, leaf in tree.items(adapters.merge(base, above))]
  assert not any(isinstance(leaf, weight.Weight) for leaf in merged)
  trained, fixed = tree.partition(above)
  loss = lambda t: jnp.square(
    logits(adapters.bind(base, tree.combine(t, fixed)), tokens, model)
  ).mean()
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(jax.grad(loss)(trained)))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_two_of_what_stands_before_a_text_do_not_nest(method):
  params = families.make("llama")[1]
  adapter = adapters.init(KEY, params, AdapterConfig(**OPTIONS[method]))[1]
  with pytest.raises(ValueError, match="it does not nest"):
    adapters.bind(adapters.bind(params, adapter), adapter)
