"""Several LoRA adapters as one: exactly, at a chosen rank, or factor by factor.

What is merged is the change that each makes to its base, Delta = scale * a b; DoRA's depends on the base.  The result
is a plain LoRA of scale 1 (lora_alpha = r), to be bound, stacked, exported or merged as any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters.bind import base as base_at
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.dora import DoRA
from posttrain_jax.adapters.lora import LoRA
from posttrain_jax.core import tree, weight
from posttrain_jax.core.product import exact

Array = jax.Array
# ([arrays of one shape], weights) -> array: an operator of `merge`, its options bound
Operator = Callable[[Sequence[Array], Sequence[float]], Array]


def concatenate(
  adapters: Sequence[Any], *, weights: Sequence[float] | None = None
) -> tuple[Any, AdapterConfig]:
  """(adapter, config) whose change is sum_i w_i Delta_i, exactly: the ranks add up.  PEFT calls it "cat".

  Args:
    adapters: trees of LoRA nodes of one base, of any ranks and targets.
    weights: one each; None for 1 each, the sum of what they do.

  Raises:
    ValueError: weights unlike adapters, a node that is no LoRA, shapes that are of different bases.
  """
  weights, nodes = _checked(adapters, weights, dora=False)
  merged = {path: _side_by_side(loras, weights) for path, loras in nodes.items()}
  return tree.unflatten(merged), _config(merged)


def compress(
  adapters: Sequence[Any],
  *,
  rank: int,
  weights: Sequence[float] | None = None,
  operator: Operator | None = None,
  params: Any = None,
) -> tuple[Any, AdapterConfig]:
  """(adapter, config) of that rank, nearest in the Frobenius norm to the merged change (Eckart and Young 1936).

  Args:
    rank: of every module that any of the adapters has, or what it can have.
    weights: one each; None for 1 each.
    operator: what makes one change of several, given the changes and the weights; None for their weighted sum, which
      is computed from the factors alone.  PEFT calls these "svd", "ties_svd" and so on.
    params: the base, which a DoRA's change depends on.

  Raises:
    ValueError: as `concatenate`; a DoRA without params; rank below 1.
  """
  if rank < 1:
    raise ValueError(f"rank={rank}: write at least 1")
  weights, nodes = _checked(adapters, weights, dora=params is not None)
  merged = {}
  for path, loras in nodes.items():
    plain = all(node is None or not isinstance(node, DoRA) for node in loras)
    if operator is None and plain:
      merged[path] = _truncated(_side_by_side(loras, weights), rank)
    else:
      base = None if params is None else base_at(params, path)
      merged[path] = _from_changes(loras, weights, operator, base, rank)
  return tree.unflatten(merged), _config(merged)


def factors(
  adapters: Sequence[Any], *, operator: Operator, weights: Sequence[float] | None = None
) -> tuple[Any, AdapterConfig]:
  """(adapter, config) whose a and b are each merged apart, as PEFT's "linear", "ties" and "dare_linear" do.

  a = operator([a_i], sgn(w_i s_i) sqrt(|w_i s_i|)), b = operator([b_i], sqrt(|w_i s_i|)): the product has terms
  a_i b_j of different adapters, so this is no average of what they do; `concatenate` is.

  Raises:
    ValueError: as `concatenate`; ranks or targets that differ.
  """
  weights, nodes = _checked(adapters, weights, dora=False)
  merged = {}
  for path, loras in nodes.items():
    ranks = [None if node is None else np.unique(node.ranks()).tolist() for node in loras]
    if any(r != ranks[0] or r is None or len(r) != 1 for r in ranks):
      raise ValueError(
        f"{path}: ranks {ranks} differ, or an adapter has no such target; factors are merged entry by entry: use"
        " concatenate, or compress to one rank"
      )
    scales = [w * np.asarray(node.scale) for w, node in zip(weights, loras)]
    merged[path] = _by_factor(loras, scales, operator)
  return tree.unflatten(merged), _config(merged)


def _checked(adapters, weights, *, dora: bool) -> tuple[list[float], dict[str, list[Any]]]:
  """(weights, {path: the node of each adapter or None}), every node a LoRA and of one base."""
  if not adapters:
    raise ValueError("there is no adapter to merge")
  weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
  if len(weights) != len(adapters):
    raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters: one each")
  flat = [tree.flatten(adapter) for adapter in adapters]
  nodes = {
    path: [one.get(path) for one in flat] for path in dict.fromkeys(p for f in flat for p in f)
  }
  for path, loras in nodes.items():
    present = [node for node in loras if node is not None]
    for node in present:
      if not isinstance(node, LoRA):
        raise ValueError(
          f"{path} is a {type(node).__name__}, whose change is no product of two factors: merge it into its base, and"
          " the models instead"
        )
      if isinstance(node, DoRA) and not dora:
        raise ValueError(
          f"{path} is a DoRA, whose change is not of low rank: compress to a rank with params, or merge the models"
        )
    shapes = {(*node.a.shape[:-1], node.b.shape[-1]) for node in present}
    if len(shapes) > 1:
      raise ValueError(f"{path}: adapters of different bases, of shapes {sorted(shapes)}")
  return weights, nodes


def _plain(node: LoRA) -> tuple[Array, Array]:
  """(scale * a, b) in float32, ranks that are masked out zero; what the start took out of the base counted off."""
  node = node.on_the_original()
  scales = node._scales()[..., None, :]
  return jnp.asarray(node.a, jnp.float32) * scales, jnp.asarray(node.b, jnp.float32)


def _side_by_side(loras: Sequence[LoRA | None], weights: Sequence[float]) -> LoRA:
  pairs = [(w, *_plain(node), node) for w, node in zip(weights, loras) if node is not None]
  a = jnp.concatenate([w * a for w, a, _, _ in pairs], axis=-1)
  b = jnp.concatenate([b for _, _, b, _ in pairs], axis=-2)
  masks = [_mask(node) for *_, node in pairs]
  mask = None if all(m.all() for m in masks) else jnp.asarray(np.concatenate(masks, axis=-1))
  return LoRA(a, b, jnp.ones(a.shape[:-2], jnp.float32), mask)


def _mask(node: LoRA) -> np.ndarray:
  node = node.on_the_original()
  shape = (*node.a.shape[:-2], node.a.shape[-1])
  return np.ones(shape, np.float32) if node.mask is None else np.asarray(node.mask, np.float32)


def _truncated(node: LoRA, rank: int) -> LoRA:
  """The best approximation of that rank, from the factors: no matrix of the base's size is made."""

  def one(a, b):
    q, r = jnp.linalg.qr(a)
    p, s = jnp.linalg.qr(b.T)
    u, values, v = jnp.linalg.svd(exact(r, s.T), full_matrices=False)
    return _halves(exact(q, u), values, exact(v, p.T), rank)

  return _layered(one, node.a, node.b)


def _from_changes(loras, weights, operator, base, rank: int) -> LoRA:
  """The same of whatever the operator makes of the changes, layer by layer."""
  present = [(w, node) for w, node in zip(weights, loras) if node is not None]
  present_weights = [w for w, _ in present]
  operator = operator or (lambda changes, weights: sum(w * x for w, x in zip(weights, changes)))

  @jax.jit
  def one(nodes, base):
    changes = [_change(node, base) for node in nodes]
    u, values, v = jnp.linalg.svd(operator(changes, present_weights), full_matrices=False)
    return _halves(u, values, v, rank)

  nodes = [node for _, node in present]
  of = lambda at: one(
    [weight.layer(node, at) for node in nodes], None if base is None else weight.layer(base, at)
  )
  lead = nodes[0].a.shape[:-2]
  return _stacked([of(at) for at in np.ndindex(lead)], lead) if lead else _joined(*one(nodes, base))


def _stacked(pairs: Sequence[tuple[Array, Array]], lead: tuple[int, ...]) -> LoRA:
  return _joined(*(jnp.stack(x).reshape(*lead, *x[0].shape) for x in zip(*pairs)))


def _change(node: LoRA, base: Any) -> Array:
  if not isinstance(node, DoRA):
    a, b = _plain(node)
    return exact(a, b)
  return node.dense(base, jnp.float32) - weight.dense(base).astype(jnp.float32)


def _halves(u: Array, values: Array, v: Array, rank: int) -> tuple[Array, Array]:
  """(u sqrt(values), sqrt(values) v) of the largest."""
  root = jnp.sqrt(values[:rank])
  return u[:, :rank] * root, root[:, None] * v[:rank]


def _layered(function, a: Array, b: Array) -> LoRA:
  """Layer after layer: two batched QR and the products behind them never end on two CPU cores (jaxlib 0.10.2)."""
  lead = a.shape[:-2]
  if not lead:
    return _joined(*jax.jit(function)(a, b))
  one_by_one = lambda a, b: jax.lax.map(lambda pair: function(*pair), (a, b))
  flat = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
  return _joined(*(x.reshape(*lead, *x.shape[1:]) for x in jax.jit(one_by_one)(*flat)))


def _joined(a: Array, b: Array) -> LoRA:
  return LoRA(a, b, jnp.ones(a.shape[:-2], jnp.float32))


def _by_factor(loras: Sequence[LoRA], scales: Sequence[np.ndarray], operator: Operator) -> LoRA:
  node = loras[0]
  lead = node.a.shape[:-2]
  if not lead:
    return _joined(*_both(loras, [float(s) for s in scales], operator))
  of = lambda at: _both(
    [dataclasses.replace(n, a=n.a[at], b=n.b[at]) for n in loras], [s[at] for s in scales], operator
  )
  return _stacked([of(at) for at in np.ndindex(lead)], lead)


def _both(nodes, scales, operator) -> tuple[Array, Array]:
  roots = [float(np.sqrt(abs(s))) for s in scales]
  signed = [float(np.copysign(root, s)) for root, s in zip(roots, scales)]
  a = operator([jnp.asarray(n.a, jnp.float32) for n in nodes], signed)
  return a, operator([jnp.asarray(n.b, jnp.float32) for n in nodes], roots)


def _config(nodes: dict[str, Any]) -> AdapterConfig:
  """A config of the largest rank; the file's patterns come from the nodes themselves."""
  rank = max(node.a.shape[-1] for node in nodes.values())
  names = sorted({path.removesuffix("/weight").rpartition("/")[2] for path in nodes})
  return AdapterConfig(r=rank, lora_alpha=float(rank), target_modules=tuple(names))
