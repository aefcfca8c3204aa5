"""One optimizer update as a pure function: (state, frozen, batch) -> (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec as P

from posttrain_jax.core import sharding
from posttrain_jax.train import metrics as metrics_lib
from posttrain_jax.train.objectives import Batch, Frozen, Objective

Array = jax.Array


@struct.dataclass
class State:
  """What changes from step to step, all of it in the checkpoint."""

  step: Array  # optimizer updates tried, skipped ones included
  trainable: Any
  optimizer: Any
  skipped: Array  # updates left out because a gradient was not finite
  skipped_in_a_row: Array


def start(trainable: Any, optimizer: optax.GradientTransformation) -> State:
  # one buffer each: a donated state must not hold the same array twice
  zero = lambda: jnp.zeros((), jnp.int32)
  return State(zero(), trainable, optimizer.init(trainable), zero(), zero())


def layout(
  state: State,
  trainable: Any,
  optimizer: optax.GradientTransformation,
  replicated: jax.sharding.Sharding,
) -> State:
  """The shardings of a state (shapes will do): moments lie as the parameters they belong to, the rest `replicated`."""
  own = jax.tree.map(lambda x: x.sharding, trainable)
  moments = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, sharding: sharding,
    state.optimizer,
    own,
    transform_non_params=lambda _: replicated,
  )
  return jax.tree.map(lambda _: replicated, state).replace(trainable=own, optimizer=moments)


def make(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  seed: int = 0,
) -> Callable[[State, Frozen, Batch], tuple[State, dict[str, Any]]]:
  """The training step; jit it with the state donated.

  The batch's rows are taken `accumulate` micro-batches at a time; gradients are summed in float32.  A gradient that is
  not finite leaves parameters and optimizer as they were and is counted.  Randomness is fold_in(seed, step).

  Args:
    accumulate: micro-batches in an optimizer batch; divides its rows.
  """

  def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, dict[str, Any]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    totals = objective.totals(state.trainable, frozen, batch, key)
    gradient, metrics = _gradient(
      objective, state.trainable, frozen, batch, totals, key, accumulate
    )
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
    keep = lambda new, old: jnp.where(finite, new, old)
    new = State(
      step=state.step + 1,
      trainable=jax.tree.map(keep, optax.apply_updates(state.trainable, updates), state.trainable),
      optimizer=jax.tree.map(keep, optimizer_state, state.optimizer),
      skipped=state.skipped + ~finite,
      skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    metrics = dict(
      metrics, grad_norm=norm, skipped=new.skipped, skipped_in_a_row=new.skipped_in_a_row
    )
    return new, metrics

  return step


def gradient(
  objective: Objective,
  trainable: Any,
  frozen: Frozen,
  batch: Batch,
  key: Array,
  *,
  accumulate: int = 1,
) -> tuple[Any, dict[str, Any]]:
  """(gradient, metrics) of one optimizer batch, as the step computes it."""
  totals = objective.totals(trainable, frozen, batch, key)
  return _gradient(objective, trainable, frozen, batch, totals, key, accumulate)


def _gradient(objective, trainable, frozen, batch, totals, key, accumulate):
  def one(microbatch, index):
    own = jax.random.fold_in(key, index)
    loss = lambda trainable: objective.loss(trainable, frozen, microbatch, totals, own)
    grads, metrics = jax.grad(loss, has_aux=True)(trainable)
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics

  if accumulate == 1:
    return one(batch, 0)
  microbatches = jax.tree.map(lambda x: _split(x, accumulate), batch)
  first = jax.tree.map(lambda x: x[0], microbatches)
  zeros = metrics_lib.zeros_like(jax.eval_shape(one, first, 0))

  def body(carry, xs):
    return jax.tree.map(jnp.add, carry, one(*xs)), None

  (grads, metrics), _ = jax.lax.scan(body, zeros, (microbatches, jnp.arange(accumulate)))
  return grads, metrics


def _split(x, accumulate):
  """[rows, ...] -> [accumulate, rows / accumulate, ...], every device keeping the rows it has."""
  if x.shape[0] % accumulate:
    raise ValueError(f"{x.shape[0]} rows do not split into {accumulate} micro-batches")
  x = x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
  if sharding.active():
    x = jax.lax.with_sharding_constraint(x, P(None, sharding.ACTIVATIONS["batch"]))
  return x


def evaluate(objective: Objective) -> Callable[[Any, Frozen, Batch], dict[str, Any]]:
  """(trainable, frozen, batch) -> metrics; jit it.  No gradient, no dropout."""

  def evaluation(trainable: Any, frozen: Frozen, batch: Batch) -> dict[str, Any]:
    key = jax.random.key(0)
    totals = objective.totals(trainable, frozen, batch, key)
    return objective.loss(trainable, frozen, batch, totals, None)[1]

  return evaluation
