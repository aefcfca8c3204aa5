"""How LoRA starts: beside its base, or with a part of the base that is taken out of it (PiSSA, OLoRA, LoftQ).

What is taken out is a product of two factors, kept in the node (`lora.Start`): the base of a run is made again from the
original and those factors, never from a second decomposition, and the result is exported for the original.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters import dora, lora
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.core import weight
from posttrain_jax.core.product import exact

Array = jax.Array
Store = Callable[[Array], Any]  # a matrix -> the weight that it is kept as
Pair = tuple[Array, Array]
OVERSAMPLING = 8  # columns of the random subspace beyond the rank, of which the best are kept


def init(
  key: Array, base: Any, modules: Sequence[str], config: AdapterConfig, store: Store | None = None
) -> tuple[Any, lora.LoRA]:
  """(base, node) for LoRA in all its kinds; the base is changed where the config says so.

  Args:
    base: the original.
    store: how the changed base is kept, a function of one layer's matrix; None: as the original is.

  Raises:
    ValueError: a rank above the matrix, or a base that has nothing to take out.
  """
  if config.changes_base:
    base, node = _take_out(key, base, modules, config, store)
  else:
    base, node = lora.init(key, base, modules, config)
  return base, (dora.over(node, base) if config.use_dora else node)


def rebuild(base: Any, node: lora.LoRA, store: Store | None = None) -> Any:
  """The base that node was made beside, from the original."""
  if node.start is None:
    return base
  store = store or functools.partial(weight.like, base=base)
  pair = node.start.taken or (node.start.a, node.start.b)
  lead = node.a.shape[:-2]
  if not lead:
    return store(_residual(base, *pair, node.scale))
  residual = lambda at: _residual(weight.layer(base, at), pair[0][at], pair[1][at], node.scale[at])
  return _stacked([store(residual(at)) for at in np.ndindex(lead)], lead)


def _take_out(key, base, modules, config, store):
  """(the base without its start, a LoRA that holds it)."""
  check_start(base, modules, config, store)
  rows, columns = weight.shape(base)[-2:]
  lead = weight.shape(base)[:-2]
  store = store or functools.partial(weight.like, base=base)
  pairs, taken, scales = [], [], []
  for at, module in zip(np.ndindex(lead), modules):
    rank = lora.rank_of(module, config, rows, columns)
    scale = config.scale(module) if rank else 0.0
    module_key = jax.random.fold_in(key, zlib.crc32(module.encode()))
    w = _wide(weight.layer(base, at) if lead else base)
    pair, out = _factors(module_key, w, rank, scale, config, store) if rank else _nothing(w)
    pairs.append(pair)
    taken.append(out)
    scales.append(scale)
  node = lora.join(pairs, scales, lead, dropout=config.lora_dropout)
  out = lora.join(taken, scales, lead) if config.init_lora_weights == "loftq" else None
  # copies: a step donates what trains and what is carried, and a buffer can be given away once
  start = lora.Start(jnp.copy(node.a), jnp.copy(node.b), out and (out.a, out.b))
  node = dataclasses.replace(node, start=start)
  return rebuild(base, node, store), node


def check_start(
  base: Any, modules: Sequence[str], config: AdapterConfig, store: Store | None
) -> None:
  """Raises ValueError where the base cannot give these modules the start that the config asks for."""
  name, how = modules[0], config.init_lora_weights
  for module in modules:
    lora.rank_of(module, config, *weight.shape(base)[-2:])
  if name == "embed_tokens" or isinstance(base, weight.Transposed):
    why = "it would be a table's" if name == "embed_tokens" else "that is the embedding"
    raise ValueError(
      f"init_lora_weights={how!r} takes its start out of a linear layer's matrix; for {name!r} {why}: "
      f"write exclude_modules={name!r}, or init_lora_weights=True"
    )
  if how == "loftq" and store is None:
    if isinstance(base, weight.Weight):
      cure = "the base given is quantised already: give the original"
    elif not name.startswith("layers."):
      cure = f"{name!r} is stored as it is: write exclude_modules={name!r}"
    else:
      cure = "this base is stored as it is: write base=nf4, fp4 or int8, or adapter=pissa"
    raise ValueError(
      f"init_lora_weights='loftq' starts from what quantising a matrix loses, and {cure}"
    )


def _nothing(w):
  empty = jnp.zeros((w.shape[0], 0)), jnp.zeros((0, w.shape[1]))
  return empty, empty


def _factors(key, w, rank, scale, config, store) -> tuple[Pair, Pair]:
  """(the factors of one module, those that are taken out of its base): the same but for LoftQ."""
  if config.init_lora_weights == "loftq":
    return loftq(w, rank, scale, config.loftq_iter, store)
  if config.init_lora_weights == "olora":
    pair = olora(w, rank)
  else:
    pair = pissa(w, rank, scale, iterations=config.pissa_iterations, key=key)
  return pair, pair


@functools.partial(jax.jit, static_argnames=("rank", "iterations"))
def pissa(w: Array, rank: int, scale: Any, *, iterations: int = 0, key: Any = None) -> Pair:
  """a = U sqrt(S / scale), b = sqrt(S / scale) V of the largest singular values: scale a b is w's best of that rank.

  Meng et al. 2024, eq. 2 and 3.  With iterations the values are found in a random subspace that so many products with
  w w.T have turned to them (Halko et al. 2011, algorithm 4.4), drawn from key; 0: by an exact decomposition.
  """
  if iterations:
    size = min(rank + OVERSAMPLING, *w.shape)
    basis = jnp.linalg.qr(exact(w, jax.random.normal(key, (w.shape[1], size))))[0]
    turn = lambda _, basis: jnp.linalg.qr(exact(w, jnp.linalg.qr(exact(w.T, basis))[0]))[0]
    basis = jax.lax.fori_loop(0, iterations, turn, basis)
    left, values, right = jnp.linalg.svd(exact(basis.T, w), full_matrices=False)
    left = exact(basis, left)
  else:
    left, values, right = jnp.linalg.svd(w, full_matrices=False)
  root = jnp.sqrt(values[:rank] / scale)
  return left[:, :rank] * root, root[:, None] * right[:rank]


@functools.partial(jax.jit, static_argnames="rank")
def olora(w: Array, rank: int) -> Pair:
  """w.T = Q R: b = Q.T and a = R.T, their first `rank`; as in PEFT the base loses scale a b.  Buyukakyuz 2024."""
  q, r = jnp.linalg.qr(w.T)
  return r[:rank].T, q[:, :rank].T


def loftq(w: Array, rank: int, scale: Any, iterations: int, store: Store) -> tuple[Pair, Pair]:
  """(a, b) of rank `rank` nearest to w - Q in turn with Q = store(w - a b); and a b of the turn before, by scale.

  Li et al. 2024, algorithm 1; PEFT's, which does not divide a b by scale: Q + scale a b is w but for what rank and
  storage cannot hold where lora_alpha = r, and away from it by (scale - 1) a b elsewhere.
  """
  a, b = jnp.zeros((w.shape[0], rank)), jnp.zeros((rank, w.shape[1]))
  for _ in range(iterations):
    taken = a / scale, b
    kept = weight.dense(store(_residual(w, *taken, scale)), jnp.float32)
    a, b = pissa(w - kept, rank, 1.0)
  return (a, b), taken


@jax.jit
def _wide(w):
  return weight.dense(w, jnp.float32)


@jax.jit
def _residual(w, a, b, scale):
  """w - scale a b, in w's dtype."""
  dense = weight.dense(w)
  return (dense.astype(jnp.float32) - scale * exact(a, b)).astype(dense.dtype)


def _stacked(matrices, lead):
  stack = lambda *leaves: jnp.stack(leaves).reshape(*lead, *leaves[0].shape)
  return jax.tree.map(stack, *matrices)
