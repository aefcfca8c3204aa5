"""One weight with its adapter node, of every kind: a new adapter type joins `ADAPTERS` and inherits the tests.

Also `trained`, which moves an adapter away from its start, where most of them change nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters import dora, lora
from posttrain_jax.core import tree
from posttrain_jax.core.weight import Adapted, Transposed
from posttrain_jax.quant import nf4

IN, OUT = 64, 24  # NF4 wants a multiple of 64


def _matrix(key, *shape):
  return jax.random.normal(key, shape)


def _node(key, rows, columns, rank=4, scale=1.7, **fields):
  a, b = jax.random.split(key)
  return lora.LoRA(_matrix(a, rows, rank), _matrix(b, rank, columns), jnp.float32(scale), **fields)


def lora_case(key):
  """(base, node): [IN, OUT] each."""
  return _matrix(key, IN, OUT), _node(key, IN, OUT)


def lora_with_masked_ranks(key):
  return _matrix(key, IN, OUT), _node(key, IN, OUT, mask=jnp.asarray([1.0, 0.0, 1.0, 0.0]))


def lora_on_nf4(key):
  return nf4.quantize(_matrix(key, IN, OUT)), _node(key, IN, OUT)


def lora_over_lora(key):
  inner, outer = jax.random.split(key)
  return Adapted(_matrix(key, IN, OUT), _node(inner, IN, OUT, rank=2)), _node(outer, IN, OUT)


def lora_on_a_tied_head(key):
  return Transposed(_matrix(key, OUT, IN)), _node(key, IN, OUT)


def _dora(key, base, lora_node):
  """Its magnitudes away from the column norms."""
  node = dora.over(lora_node, base)
  factors = jax.random.uniform(jax.random.fold_in(key, 7), (OUT,), minval=0.5, maxval=2)
  return base, dataclasses.replace(node, magnitude=node.magnitude * factors)


def dora_case(key):
  return _dora(key, *lora_case(key))


def dora_with_masked_ranks(key):
  return _dora(key, *lora_with_masked_ranks(key))


def dora_on_nf4(key):
  return _dora(key, *lora_on_nf4(key))


def dora_over_lora(key):
  return _dora(key, *lora_over_lora(key))


def dora_on_a_tied_head(key):
  return _dora(key, *lora_on_a_tied_head(key))


LORAS = [
  lora_case,
  lora_with_masked_ranks,
  lora_on_nf4,
  lora_over_lora,
  lora_on_a_tied_head,
]
DORAS = [
  dora_case,
  dora_with_masked_ranks,
  dora_on_nf4,
  dora_over_lora,
  dora_on_a_tied_head,
]
ADAPTERS = [*LORAS, *DORAS]


def trained(adapter: Any, seed: int = 0) -> Any:
  """adapter with noise on all that trains; what a mask hides stays as it is."""
  draw = np.random.default_rng(seed)

  def move(node: lora.LoRA) -> lora.LoRA:
    mask = 1.0 if node.mask is None else node.mask[..., None]
    a = node.a + 0.3 * draw.standard_normal(node.a.shape) * np.swapaxes(
      mask + 0 * node.b[..., :1], -1, -2
    )
    b = node.b + 0.3 * draw.standard_normal(node.b.shape) * mask
    moved = dataclasses.replace(node, a=jnp.asarray(a, jnp.float32), b=jnp.asarray(b, jnp.float32))
    if not isinstance(node, dora.DoRA):
      return moved
    # a layer without ranks has no magnitude to train
    used = mask if node.mask is None else np.max(mask, axis=-2)
    factors = 1 + 0.3 * used * draw.uniform(-1, 1, node.magnitude.shape)
    return dataclasses.replace(moved, magnitude=jnp.asarray(node.magnitude * factors, jnp.float32))

  return tree.unflatten((path, move(node)) for path, node in tree.items(adapter))
