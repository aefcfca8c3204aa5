"""How AdaLoRA spends its rank: importance of every triplet, a budget that falls, a threshold over all matrices.

As peft's RankAllocator computes it in the loop that its documentation shows (backward, optimizer step,
`update_and_allocate(step)`), with steps counted from 1: the importance takes the parameters after the update and the
gradient before it, not clipped.  In the order of that loop the last step is total_step, so that the budget ends exactly
at its target; loops that count from 0 end one step above it, and ones that never call it do not prune.

The orthogonality penalty counts once an optimizer batch.  PEFT adds it in every forward pass: over micro-batches whose
losses are summed it weighs as many times as much there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters import adalora
from posttrain_jax.adapters.adalora import AdaLoRA, Factors
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.hooks import Hooks
from posttrain_jax.core import tree

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How many ranks in all are left after update number `step`, counted from 1; the `end` is the last that prunes."""

  first: int  # ranks of all modules at the start
  target: int
  start: int
  end: int
  every: int

  def budget(self, step: int) -> int:
    """The ranks to keep: cubic from first to target between start and end."""
    if step <= self.start:
      return self.first
    if step >= self.end:
      return self.target
    left = 1 - (step - self.start) / (self.end - self.start)
    return int((self.first - self.target) * left**3 + self.target)

  def prunes(self, step: int) -> bool:
    """Whether the update of this number is followed by an allocation."""
    return step == self.end or (self.start < step < self.end and step % self.every == 0)


def schedule(config: AdapterConfig, steps: int, modules: int) -> Schedule:
  """The schedule of a run of `steps` updates over `modules` adapted matrices.

  Raises:
    ValueError: the phases leave no step to prune in, or the run ends before they do.
  """
  total = steps if config.total_step is None else config.total_step
  if not 1 <= total <= steps:
    raise ValueError(
      f"total_step={total}: the run has {steps} steps, and the schedule must end within them; "
      "leave total_step out for the run's own"
    )
  if config.tinit + config.tfinal >= total:
    raise ValueError(
      f"tinit={config.tinit} and tfinal={config.tfinal} leave none of {total} steps to prune in; lower them, "
      "or train for longer"
    )
  return Schedule(
    config.init_r * modules,
    config.target_r * modules,
    config.tinit,
    total - config.tfinal,
    config.deltaT,
  )


def hooks(config: AdapterConfig, steps: int) -> Hooks:
  """What AdaLoRA adds to the step of a run of `steps` updates."""
  adalora.check(config)
  schedule(config, steps, 1)
  return Hooks(
    penalty=functools.partial(penalty, weight=config.orth_reg_weight),
    after_update=functools.partial(after_update, config=config, steps=steps),
    metrics=metrics,
  )


def penalty(adapter: Any, weight: float) -> Array:
  """weight * mean over all a and b of |a.T a - I| and |b b.T - I|, Frobenius; pruned ranks count, as in PEFT."""
  adaloras = nodes(adapter)
  total = jnp.zeros(())
  for node in adaloras.values():
    total += _distance(node.a, node.adapted) + _distance(node.b.mT, node.adapted)
  return weight * total / (2 * count(adaloras))


def _distance(factor: Array, adapted: tuple[bool, ...]) -> Array:
  """|factor.T factor - I| summed over the layers that are adapted; its gradient at 0 is 0."""
  square = jnp.einsum("...ir,...is->...rs", factor, factor, precision=jax.lax.Precision.HIGHEST)
  square = jnp.sum(jnp.square(square - jnp.eye(factor.shape[-1])), (-1, -2))
  there = jnp.asarray(adapted).reshape(square.shape) & (square > 0)
  return jnp.sum(jnp.where(there, jnp.sqrt(jnp.where(there, square, 1.0)), 0.0))


def nodes(adapter: Any) -> dict[str, AdaLoRA]:
  return {path: node for path, node in tree.items(adapter) if isinstance(node, AdaLoRA)}


def count(adaloras: Mapping[str, AdaLoRA]) -> int:
  """Adapted modules."""
  return sum(sum(node.adapted) for node in adaloras.values())


def after_update(
  adapter: Any, gradient: Any, step: Array, config: AdapterConfig, steps: int
) -> Any:
  """adapter with its importance moved on by one update, and pruned where the schedule says so.

  Args:
    adapter: after the optimizer's update.
    gradient: that the update was made of, before clipping, the penalty's in it.
    step: updates before this one.
  """
  adaloras = nodes(adapter)
  plan = schedule(config, steps, count(adaloras))
  number = step + 1
  moving = number < plan.end
  adaloras = {
    path: _moved(node, tree.get(gradient, path), config, moving) for path, node in adaloras.items()
  }
  # an end that was left out, its gradient not finite, is made up for by the next update
  late = (number > plan.end) & (total_rank(adaloras) > plan.target)
  at = jnp.minimum(number, plan.end)
  steps_to_end = range(plan.end + 1)
  prune = jnp.asarray([plan.prunes(n) for n in steps_to_end])[at] & (number <= plan.end) | late
  budget = jnp.asarray([plan.budget(n) for n in steps_to_end])[at]
  masks = _kept({path: scores(node) for path, node in adaloras.items()}, adaloras, budget)
  done = (number >= plan.end) | prune
  for path, node in adaloras.items():
    mask = jnp.where(prune, masks[path], node.mask)
    e = jnp.where(done & (mask == 0), 0.0, node.e)
    node = dataclasses.replace(node, mask=mask, e=e)
    adapter = tree.put(adapter, path, node)
  return adapter


def _moved(node: AdaLoRA, gradient: AdaLoRA, config: AdapterConfig, moving: Array) -> AdaLoRA:
  """The moving averages of sensitivity |parameter * gradient|, and of its distance from its own average."""

  def one(parameter, slope, average, distance):
    sensitivity = jnp.abs(parameter * slope)
    new = config.beta1 * average + (1 - config.beta1) * sensitivity
    spread = config.beta2 * distance + (1 - config.beta2) * jnp.abs(sensitivity - new)
    return jnp.where(moving, new, average), jnp.where(moving, spread, distance)

  pairs = {
    name: one(*[vars(x)[name] for x in (node, gradient, node.importance, node.uncertainty)])
    for name in AdaLoRA.TRAINED
  }
  return dataclasses.replace(
    node,
    importance=Factors(**{name: pair[0] for name, pair in pairs.items()}),
    uncertainty=Factors(**{name: pair[1] for name, pair in pairs.items()}),
  )


def scores(node: AdaLoRA) -> Array:
  """[..., rank]: of e, plus the means of a's column and b's row, each importance * uncertainty."""
  of = jax.tree.map(jnp.multiply, node.importance, node.uncertainty)
  return of.e + (of.a.mean(-2) + of.b.mean(-1))


def _kept(scored, adaloras, budget):
  """{path: mask}: the scores above the (all - budget)-th smallest of all adapted layers; ties at it are cut with it."""
  there = {
    path: np.asarray(adaloras[path].adapted).reshape(x.shape[:-1]) for path, x in scored.items()
  }
  every = jnp.sort(jnp.concatenate([x[there[path]].ravel() for path, x in scored.items()]))
  cut = every.size - budget
  threshold = jnp.where(cut > 0, every[jnp.maximum(cut - 1, 0)], -jnp.inf)
  return {
    path: ((x > threshold) & there[path][..., None]).astype(jnp.float32)
    for path, x in scored.items()
  }


def total_rank(adaloras: Mapping[str, AdaLoRA]) -> Array:
  """Ranks that are kept, over all modules."""
  return sum((jnp.sum(node.mask) for node in adaloras.values()), jnp.zeros(()))


def metrics(adapter: Any) -> dict[str, Array]:
  """The mean rank of the adapted modules."""
  adaloras = nodes(adapter)
  return {"adalora/mean_rank": total_rank(adaloras) / count(adaloras)}
