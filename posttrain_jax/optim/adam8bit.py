"""AdamW with both moments in 8 bits: blocks of 256, dynamic maps (Dettmers et al. 2022, arXiv 2110.02861)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from posttrain_jax.core import struct
from posttrain_jax.core.leaf import Leaf
from posttrain_jax.optim import paths
from posttrain_jax.quant import blockwise

Array = jax.Array
BLOCK = 256
MIN_SIZE = 4096  # elements below which a tensor's moments stay in float32, as in bitsandbytes
SEMANTICS = ("cuda", "cpu")


@struct.dataclass
class Blockwise(Leaf):
  """map[codes] * absmax of the block, with codes: the parameter's shape, uint8; absmax: [..., blocks], float32.

  Blocks run over each matrix of a stack apart, flattened as we store it ([in, out]).  Rows that are whole numbers of
  blocks are not flattened: the blocks are the same ones, and a sharded row keeps its shards.
  """

  codes: Array
  absmax: Array
  signed: bool = struct.field(pytree_node=False)
  stacked: bool = struct.field(pytree_node=False)

  def value(self) -> Array:
    codes = _flat(self.codes, self.stacked)
    flat = blockwise.dequantize(codes, self.absmax, block_size=BLOCK, signed=self.signed)
    return flat.reshape(self.codes.shape)

  def stored(self, x: Array, *, keep_sign: bool = False) -> Blockwise:
    """x in the codes nearest to it; keep_sign: a negative value that would become 0 takes the code below."""
    flat = _flat(x, self.stacked)
    codes, absmax = blockwise.quantize(flat, block_size=BLOCK, signed=self.signed)
    if keep_sign:
      codes -= ((flat < 0) & (codes == _ZERO)).astype(codes.dtype)
    return dataclasses.replace(self, codes=codes.reshape(x.shape), absmax=absmax)

  def partition_specs(self, spec: PartitionSpec) -> Blockwise:
    rows = _by_rows(self.codes.shape)
    return dataclasses.replace(self, codes=spec, absmax=spec if rows else PartitionSpec())


_ZERO = 127  # the code of 0 in the signed map


def _by_rows(shape):
  return shape[-1] % BLOCK == 0


def _flat(x, stacked):
  return x if _by_rows(x.shape) else x.reshape(*x.shape[:stacked], -1)


def zeros(
  shape: tuple[int, ...], *, signed: bool, stacked: bool, min_size: float = MIN_SIZE
) -> Any:
  """A moment of zeros: `Blockwise`, or a float32 array where one layer's tensor has fewer than min_size elements."""
  if math.prod(shape[stacked:]) < min_size:
    return jnp.zeros(shape, jnp.float32)
  flat = jax.eval_shape(lambda x: _flat(x, stacked), jax.ShapeDtypeStruct(shape, jnp.uint8)).shape
  absmax = jnp.zeros((*flat[:-1], -(-flat[-1] // BLOCK)), jnp.float32)
  # bitsandbytes starts from code 0 too: times an absmax of 0 it is 0
  return Blockwise(jnp.zeros(shape, jnp.uint8), absmax, signed, stacked)


def value(moment: Any) -> Array:
  return moment.value() if isinstance(moment, Blockwise) else moment


def stored(moment: Any, x: Array, *, keep_sign: bool = False) -> Any:
  """x stored as `moment` is."""
  return moment.stored(x, keep_sign=keep_sign) if isinstance(moment, Blockwise) else x


class State(NamedTuple):
  count: Array
  mu: Any  # each leaf a `Blockwise` or float32
  nu: Any


def adamw(
  rate: Callable[[Any], Any],
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  mask: Callable[[Any], Any],
  min_size: int = MIN_SIZE,
  in_float32: Callable[[str], bool] = lambda path: False,
  semantics: str = "cuda",
) -> optax.GradientTransformation:
  """p - lr m^ / (sqrt(v^) + eps), then (1 - lr decay) of that; m and v are used before they are rounded to 8 bits.

  bitsandbytes 0.50's two kernels disagree, and `semantics` chooses.  "cuda": the decay comes after the update, a
  negative m that would round to 0 takes the code below, and where a gradient is not finite both moments become 0 and
  the parameter stays.  "cpu": the decay comes before, codes are the nearest, and nothing is done for such a gradient.

  Args:
    mask: parameters -> tree of booleans: which ones decay.
    min_size: elements (of one layer) from which on a tensor's moments take 8 bits.
    in_float32: path of a parameter -> whether its moments stay in float32 (embeddings, say).
  """
  if semantics not in SEMANTICS:
    raise ValueError(f"semantics={semantics!r}: known are {', '.join(SEMANTICS)}")
  cuda = semantics == "cuda"

  def init(params):
    def moments(signed):
      def one(path, p):
        least = math.inf if in_float32(paths.module(path)) else min_size
        return zeros(p.shape, signed=signed, stacked=paths.stacked(path), min_size=least)

      return jax.tree_util.tree_map_with_path(one, params)

    return State(jnp.zeros((), jnp.int32), moments(True), moments(False))

  def update(updates, state, params=None):
    count, lr = state.count + 1, rate(state.count)

    def one(g, p, decays, mu, nu):
      direction, mu, nu, finite = adam(g, mu, nu, count, b1=b1, b2=b2, eps=eps, semantics=semantics)
      kept = 1 - lr * weight_decay * decays
      after = kept if cuda else 1.0  # the factor on the step that the decay has
      change = -lr * direction * after + (kept - 1) * p.astype(jnp.float32)
      return jnp.where(finite, change, 0) if cuda else change, mu, nu

    decays = mask(params)
    changes, mu, nu = paths.unzip(one, 3, updates, params, decays, state.mu, state.nu)
    return changes, State(count, mu, nu)

  return optax.GradientTransformation(init, update)


def adam(
  g: Array,
  mu: Any,
  nu: Any,
  count: Array,
  *,
  b1: float,
  b2: float,
  eps: float,
  semantics: str = "cuda",
) -> tuple[Array, Any, Any, Array]:
  """(m^ / (sqrt(v^) + eps), moments stored as they came, where g is finite) after update number count (from 1).

  A stack is gone through layer by layer, so that one layer's moments are in float32 at a time: all at once, they took
  temporaries from 17 to 40 GiB on each of four chips that share Llama-3-8B.
  """
  if isinstance(mu, Blockwise) and mu.stacked:
    alone = lambda moment, stacked: dataclasses.replace(moment, stacked=stacked)
    one = lambda layer: adam(
      layer[0],
      alone(layer[1], False),
      alone(layer[2], False),
      count,
      b1=b1,
      b2=b2,
      eps=eps,
      semantics=semantics,
    )
    direction, mu, nu, finite = jax.lax.map(one, (g, mu, nu))
    return direction, alone(mu, True), alone(nu, True), finite
  g = g.astype(jnp.float32)
  cuda = semantics == "cuda"
  m = b1 * value(mu) + (1 - b1) * g
  v = b2 * value(nu) + (1 - b2) * g * g
  finite = jnp.isfinite(g)
  if cuda:
    m, v = jnp.where(finite, m, 0), jnp.where(finite, v, 0)
  correction = jnp.sqrt(left(b2, count))
  direction = correction / left(b1, count) * m / (jnp.sqrt(v) + correction * eps)
  return direction, stored(mu, m, keep_sign=cuda), stored(nu, v), finite


def left(b: float, count: Array) -> Array:
  """1 - b^count, to a float32 step: 1 - 0.999 in float32 arithmetic is off by 1.3e-5 of its value."""
  log = math.log(b) if b else -math.inf
  return -jnp.expm1(count * np.float32(log))
