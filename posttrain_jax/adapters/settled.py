"""A base and its adapter as text is written with them: nothing trains, and each token pays for what is multiplied."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.adapters import layout
from posttrain_jax.adapters.bind import EMBEDDING, HEAD, bind
from posttrain_jax.adapters.replaced import Replaced
from posttrain_jax.core import memory, tree, weight
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models import decoder


def settled(
  params: Any, adapter: Any | None = None, *, rounded: bool = False, platform: str | None = None
) -> Any:
  """Parameters that compute what the bound tree computes, without dropout, at the least cost a token; on the device.

  A float32 matrix is merged.  In fewer bits a merged matrix forgets what is less than half a step of it: of a LoRA of
  SmolLM2-135M whose b is 6e-4 everywhere, up or down, as three steps of Adam at 2e-4 could make it, 57 % reaches the
  log-probabilities when it is merged into bfloat16.  So such a matrix stays as
  it is, and the change beside it is written as what multiplies cheapest (`Change.settled`).

  On an accelerator a quantised base stays as it is, since plain it takes four times the room; on a CPU it becomes plain
  numbers of its dtype: a token of SmolLM2-135M takes 0.07 s of processor time so, and 0.26 s in NF4.

  Args:
    rounded: matrices will be kept in fewer bits than they have here (`rollout.storage`).
    platform: None for the default one.
  """
  on_cpu = (platform or jax.default_backend()) == "cpu"
  bound = bind(memory.fetch(params), memory.fetch(adapter or {}))
  if "lm_head" not in bound and isinstance(tree.get(bound, EMBEDDING), Adapted):
    bound = tree.put(bound, HEAD, decoder.head(bound))  # which does not see the update
  return tree.unflatten(
    (path, _one(path, leaf, rounded, on_cpu)) for path, leaf in tree.items(bound)
  )


def _one(path: str, leaf: Any, rounded: bool, on_cpu: bool) -> Any:
  if not isinstance(leaf, Adapted):
    return leaf
  is_plain = not isinstance(weight.unadapted(leaf), weight.Weight)
  if leaf.dtype == jnp.float32 and not rounded and (is_plain or on_cpu):
    return jax.jit(weight.dense)(leaf)
  if isinstance(
    leaf.node, Replaced
  ):  # a matrix is rounded for its products anyway, a vector is not
    return jax.jit(weight.dense)(leaf) if tree.turned(path) or path == EMBEDDING else leaf
  return leaf.node.settled(_base(path, leaf.base, on_cpu))


def _base(path: str, base: Any, on_cpu: bool) -> Any:
  if isinstance(base, Adapted):
    return base.node.settled(_base(path, base.base, on_cpu))
  if not on_cpu or not isinstance(base, weight.Weight) or isinstance(base, weight.Bfloat16):
    return base
  return layout.frozen(path, jax.jit(weight.dense)(base), "cpu")
