"""Nodes of VeRA, AdaLoRA and (IA)3 over one weight, as in `cases`, and `moved`, which takes a tree from its start."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters import adalora, ia3, vera
from posttrain_jax.core import tree
from posttrain_jax.core.weight import Adapted, Shared, Transposed
from posttrain_jax.quant import nf4

IN, OUT = 64, 24


def _normal(key, *shape):
  return jax.random.normal(key, shape)


def _vera(key, **fields):
  """Its pair larger than the weight on both sides."""
  a, b, gain, scale = jax.random.split(key, 4)
  pair = Shared(vera.Projections(_normal(a, IN + 9, 5), _normal(b, 5, OUT + 7)))
  return vera.VeRA(_normal(gain, OUT), _normal(scale, 5), pair=pair, **fields)


def _adalora(key, **fields):
  a, b, e = jax.random.split(key, 3)
  values = _normal(e, 4) * jnp.asarray([1.0, 0.0, 1.0, 1.0])
  return adalora.AdaLoRA(
    _normal(a, IN, 4), _normal(b, 4, OUT), values, jnp.float32(0.7), jnp.ones(4), **fields
  )


def vera_case(key):
  return _normal(key, IN, OUT), _vera(key)


def vera_on_nf4(key):
  return nf4.quantize(_normal(key, IN, OUT)), _vera(key)


def vera_of_a_layer_that_is_left_out(key):
  return _normal(key, IN, OUT), _vera(key, mask=jnp.float32(0))


def adalora_case(key):
  return _normal(key, IN, OUT), _adalora(key)


def adalora_on_nf4(key):
  return nf4.quantize(_normal(key, IN, OUT)), _adalora(key)


def adalora_over_vera(key):
  return Adapted(_normal(key, IN, OUT), _vera(key)), _adalora(key)


def ia3_case(key):
  return _normal(key, IN, OUT), ia3.IA3(_normal(key, OUT))


def ia3_of_a_feedforward_module(key):
  return _normal(key, IN, OUT), ia3.IA3(_normal(key, IN), feedforward=True)


def ia3_on_nf4(key):
  return nf4.quantize(_normal(key, IN, OUT)), ia3.IA3(_normal(key, IN), feedforward=True)


def ia3_over_ia3(key):
  inner, outer = jax.random.split(key)
  return Adapted(_normal(key, IN, OUT), ia3.IA3(_normal(inner, OUT))), ia3.IA3(_normal(outer, OUT))


def ia3_on_a_tied_head(key):
  return Transposed(_normal(key, OUT, IN)), ia3.IA3(_normal(key, OUT))


KINDS = [
  vera_case,
  vera_on_nf4,
  vera_of_a_layer_that_is_left_out,
  adalora_case,
  adalora_on_nf4,
  adalora_over_vera,
  ia3_case,
  ia3_of_a_feedforward_module,
  ia3_on_nf4,
  ia3_over_ia3,
  ia3_on_a_tied_head,
]


def moved(adapter: Any, seed: int = 0, size: float = 0.3) -> Any:
  """adapter with noise on all that trains."""
  draw = np.random.default_rng(seed)
  trained, fixed = tree.partition(adapter)
  noisy = jax.tree.map(
    lambda x: x + jnp.asarray(size * draw.standard_normal(x.shape), x.dtype), trained
  )
  return tree.combine(noisy, fixed)
