"""The reference policy: its log-probabilities, and the copy of the policy that follows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax import adapters
from posttrain_jax.core import struct
from posttrain_jax.objectives.objective import (
  Batch,
  Context,
  Forward,
  Memory,
  Scorer,
  Totals,
  following,
  of_policy,
  policy,
)

Array = jax.Array
stop = jax.lax.stop_gradient
# nats a token by which a policy may differ from its own start: two programs round differently, the more so in bfloat16
ROUNDING = {"float32": 2e-3, "bfloat16": 0.05}


def reference(context: Context) -> Any:
  """The parameters of the reference policy, never differentiated: given ones, or the base without its adapter.

  A run that goes on with an adapter has the base with that one, as it came, for its reference.  Where the adapter
  began with a part of the base, that part is the base's again.

  Raises:
    ValueError: full fine-tuning without a reference: its base is what changes.
  """
  if context.reference is not None:
    return stop(context.reference)
  if context.base is None:
    raise ValueError("full fine-tuning changes its base: give it a reference, or cache its scores")
  if context.reference_adapter is not None:
    return stop(adapters.bind(context.base, context.reference_adapter))
  return stop(adapters.original(context.base, of_policy(context.fixed) or {}))


def reference_logps(
  scorer: Scorer, context: Context, batch: Batch, mask: Array, *, temperature: float = 1.0
) -> Array:
  """[rows, time] log-probabilities of the tokens after each position: cached with the batch, or computed.

  temperature: of the softmax, where they are computed; what a filter kept is the batch's to say.
  """
  if "ref_logps" in batch:
    return jnp.where(mask, following(batch["ref_logps"]), 0.0)
  params = reference(context)
  forward = Forward(params, scorer.hidden(params, batch))
  return stop(scorer.scores(forward, batch, mask, temperature=temperature).logp)


@struct.dataclass
class Synchronised:
  """TR-DPO's reference: a copy of what trains, which follows it."""

  trainable: Any
  count: Array  # optimizer updates so far

  def after(self, trainable: Any, every: int, mix: float) -> Synchronised:
    """One update later: every `every` of them mix * policy + (1 - mix) * reference.

    Gorbatovski et al. 2024 (TR-DPO, arXiv 2404.09656), eq. 6; mix 1 is the hard update.  Of an adapter the trained
    fields are mixed, factor by factor.
    """
    count = self.count + 1
    due = count % every == 0
    move = lambda new, old: jnp.where(due, (mix * new + (1 - mix) * old).astype(old.dtype), old)
    return Synchronised(jax.tree.map(move, stop(trainable), self.trainable), count)


@dataclasses.dataclass(frozen=True)
class Compared(Scorer):
  """What objectives with a reference share: beta, and whether the reference follows the policy."""

  beta: float = 0.1  # weight of the KL to the reference
  own_base: bool = False  # the reference is the base that the policy is bound to
  starts_there: bool = False  # and the first step is taken where the two are equal
  # updates from one step of the reference towards the policy to the next; 0: it stays
  sync_every: int = 0
  sync_mix: float = 0.6

  def start(self, trainable: Any) -> Memory:
    if not self.sync_every or trainable is None:
      return None
    copy = jax.tree.map(jnp.copy, trainable)
    return {"reference": Synchronised(copy, jnp.zeros((), jnp.int32))}

  def context(self, context: Context, memory: Memory) -> Context:
    if not memory or "reference" not in memory:
      return context
    follower = policy(memory["reference"].trainable, context)
    return dataclasses.replace(context, reference=follower)

  def after_update(self, trainable: Any, memory: Memory, totals: Totals) -> Memory:
    if not memory or "reference" not in memory:
      return memory
    follower = memory["reference"].after(trainable, self.sync_every, self.sync_mix)
    return {**memory, "reference": follower}

  def at_hand(self, context: Context) -> bool:
    """Whether the reference's parameters are there, be its log-probabilities cached or not."""
    return context.reference is not None or (self.own_base and context.base is not None)

  def check_start(self, metrics: Mapping[str, float]) -> None:
    """The policy is its reference: every log-ratio is 0, DPO's loss is log 2, and there is no KL."""
    if not (self.starts_there and self.needs_reference and self.beta):
      return
    sides = [side for side in ("chosen", "rejected") if f"rewards/{side}" in metrics]
    drifts = [abs(metrics[f"rewards/{s}"]) / self.beta / metrics[f"lengths/{s}"] for s in sides]
    drift = max(drifts, default=0.0)
    allowed = ROUNDING.get(
      jnp.dtype(self.products or self.dtype or jnp.float32).name, ROUNDING["bfloat16"]
    )
    if not drift <= allowed:
      raise ValueError(
        f"before any training the policy's log-probabilities differ from the reference's by {drift:.3g} nats a token,"
        f" where rounding explains {allowed:g}: they are not of the same model. Were cached ones made by other"
        " parameters? Delete the folder `reference` in the cache, or compute them at each step"
        " (--config.objective.cache_reference=false)"
      )
