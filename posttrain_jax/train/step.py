"""One optimizer update as a pure function: (state, frozen, batch) -> (state, metrics)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from posttrain_jax import adapters
from posttrain_jax.core import memory, sharding, struct, tree
from posttrain_jax.optim import layout as optimizer_layout
from posttrain_jax.optim import offload
from posttrain_jax.train import metrics as metrics_lib
from posttrain_jax.train.objectives import Batch, Frozen, Objective

Array = jax.Array


@struct.dataclass
class State:
  """What changes from step to step, all of it in the checkpoint."""

  step: Array  # optimizer updates tried, skipped ones included
  trainable: Any
  optimizer: Any
  # the part of the adapter that the optimizer does not see (scales, masks, what a method remembers); None without one
  carried: Any
  skipped: Array  # updates left out because a gradient was not finite
  skipped_in_a_row: Array
  memory: Any = None  # what the objective carries from step to step


def start(
  trainable: Any,
  optimizer: optax.GradientTransformation,
  carried: Any = None,
  memory: Any = None,
) -> State:
  # one buffer each: a donated state must not hold the same array twice
  zero = lambda: jnp.zeros((), jnp.int32)
  return State(zero(), trainable, optimizer.init(trainable), carried, zero(), zero(), memory)


def layout(
  state: State,
  trainable: Any,
  replicated: jax.sharding.Sharding,
  carried: Any = None,
) -> State:
  """The shardings of a state (shapes will do): moments lie as the parameters they belong to, the rest `replicated`."""
  where = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  own = where(trainable)
  moments = optimizer_layout.shardings(state.optimizer, trainable, replicated)
  return jax.tree.map(lambda _: replicated, state).replace(
    trainable=own,
    optimizer=moments,
    carried=where(carried),
    memory=optimizer_layout.shardings(state.memory, trainable, replicated),
  )


def make(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  seed: int = 0,
  hooks: adapters.Hooks | None = None,
) -> Callable[[State, Frozen, Batch], tuple[State, dict[str, Any]]]:
  """The training step; jit it with the state donated.

  The batch's rows are taken `accumulate` micro-batches at a time; gradients are summed in float32.  A gradient that is
  not finite leaves parameters and optimizer as they were and is counted.  Randomness is fold_in(seed, step).

  Args:
    accumulate: micro-batches in an optimizer batch; divides its rows.
    hooks: what the adapter's method adds: a penalty on its parameters, once a batch, and a change after each update.
  """
  update = optax.with_extra_args_support(optimizer).update

  def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, dict[str, Any]]:
    frozen = with_state(frozen, state)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    totals = objective.totals(state.trainable, frozen, batch, key)
    memory = totals.get("memory")
    gradient, metrics = _gradient(
      objective, state.trainable, frozen, batch, totals, key, accumulate
    )
    if hooks is not None:
      adapter = lambda trainable: tree.combine(trainable, state.carried)
      penalty, more = jax.value_and_grad(lambda t: hooks.penalty(adapter(t)))(state.trainable)
      gradient = jax.tree.map(jnp.add, gradient, more)
      metrics = dict(metrics, penalty=penalty)
    norm = offload.global_norm(gradient)
    finite = jnp.isfinite(norm)
    updates, optimizer_state = update(
      gradient, state.optimizer, state.trainable, norm=norm, finite=finite
    )
    trainable, carried = offload.apply(state.trainable, updates, finite), state.carried
    if hooks is not None:
      trainable, carried = tree.partition(
        hooks.after_update(adapter(trainable), gradient, state.step)
      )
    keep = lambda new, old: jnp.where(finite, new, old)
    new = State(
      step=state.step + 1,
      trainable=offload.keep(finite, trainable, state.trainable),
      optimizer=offload.keep(finite, optimizer_state, state.optimizer),
      carried=jax.tree.map(keep, carried, state.carried),
      skipped=state.skipped + ~finite,
      skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
      memory=jax.tree.map(keep, memory, state.memory),
    )
    if hooks is not None:
      metrics |= hooks.metrics(tree.combine(new.trainable, new.carried))
    metrics = dict(
      metrics, grad_norm=norm, skipped=new.skipped, skipped_in_a_row=new.skipped_in_a_row
    )
    return new, metrics

  return step


def with_state(frozen: Frozen, state: State) -> Frozen:
  """frozen with what the state carries for it."""
  if state.carried is not None:
    frozen = dataclasses.replace(frozen, adapter=state.carried)
  return dataclasses.replace(frozen, memory=state.memory)


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
  start = (jax.tree.map(memory.back, zeros[0], trainable), zeros[1])

  def body(carry, xs):
    grads, metrics = one(*xs)
    return (offload.add(carry[0], grads), jax.tree.map(jnp.add, carry[1], metrics)), None

  (grads, metrics), _ = jax.lax.scan(body, start, (microbatches, jnp.arange(accumulate)))
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
    totals = objective.totals(trainable, frozen, batch, None)
    return objective.loss(trainable, frozen, batch, totals, None)[1]

  return evaluation
