"""One optimizer update as a pure function: (state, context, batch) -> (state, metrics)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from posttrain_jax import adapters
from posttrain_jax.adapters import node
from posttrain_jax.core import memory as memory_lib
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core import seeds, sharding, tree
from posttrain_jax.objectives import Batch, Context, Objective
from posttrain_jax.optim import offload, schedules
from posttrain_jax.train import state as state_lib
from posttrain_jax.train.state import State

Array = jax.Array
Step = Callable[[State, Context, Batch], tuple[State, dict[str, Any]]]


def make(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  seed: int = 0,
  hooks: adapters.Hooks | None = None,
) -> Step:
  """The training step; `jitted` is the same, compiled.

  The batch's rows are taken `accumulate` micro-batches at a time; gradients are summed in float32.  A gradient or an
  update that is not finite leaves parameters and optimizer as they were and is counted.  Randomness is
  fold_in(seed, step).

  Args:
    accumulate: micro-batches in an optimizer batch; divides its rows.
    hooks: what the adapter's method adds: a penalty on its parameters, once a batch, and a change after each update.
  """
  step = _keyed(objective, optimizer, accumulate, hooks, lambda value: contextlib.nullcontext())
  return lambda state, context, batch: step(
    state, context, batch, jax.random.key(seeds.check(seed)), None
  )


def _keyed(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  accumulate: int,
  hooks: adapters.Hooks | None,
  given: Callable[[Any], contextlib.AbstractContextManager[None]],
) -> Callable[[State, Context, Batch, Array, Any], tuple[State, dict[str, Any]]]:
  """The step with the run's key, and the learning rate that is `given` to the optimizer, as arguments."""
  update = optax.with_extra_args_support(optimizer).update

  def step(
    state: State, context: Context, batch: Batch, key: Array, rate: Any
  ) -> tuple[State, dict[str, Any]]:
    key = jax.random.fold_in(key, state.step)
    gradient, totals, metrics = _gradient(
      objective, state.trainable, state.context(context), batch, key, state.memory, accumulate
    )
    if hooks is not None:
      adapter = lambda trainable: tree.combine(trainable, state.carried)
      penalty, penalty_gradient = jax.value_and_grad(lambda t: hooks.penalty(adapter(t)))(
        state.trainable
      )
      gradient = jax.tree.map(jnp.add, gradient, penalty_gradient)
      metrics = dict(metrics, penalty=penalty)
    norm = offload.global_norm(gradient)
    finite = jnp.isfinite(norm)
    with given(rate):
      updates, optimizer_state = update(
        gradient, state.optimizer, state.trainable, norm=norm, finite=finite
      )
    # a gradient may be finite and the update not: the rate, or a moment next to 0
    finite = finite & jnp.isfinite(offload.global_norm(updates))
    trainable, carried = offload.apply(state.trainable, updates, finite), state.carried
    if hooks is not None:
      trainable, carried = tree.partition(
        hooks.after_update(adapter(trainable), gradient, state.step)
      )
    remembered = objective.after_update(trainable, state.memory, totals)
    keep = lambda new, old: jnp.where(finite, new, old)
    new = State(
      step=state.step + 1,
      trainable=offload.keep(finite, trainable, state.trainable),
      optimizer=offload.keep(finite, optimizer_state, state.optimizer),
      carried=jax.tree.map(keep, carried, state.carried),
      skipped=state.skipped + ~finite,
      skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
      memory=jax.tree.map(keep, remembered, state.memory),
    )
    if hooks is not None:
      metrics |= hooks.metrics(tree.combine(new.trainable, new.carried))
    metrics = dict(
      metrics, grad_norm=norm, skipped=new.skipped, skipped_in_a_row=new.skipped_in_a_row
    )
    return new, metrics

  return step


class Jitted:
  """A jitted step with the seed and the rate it was given: arguments, so that runs of others compile nothing."""

  def __init__(self, function: Any, seed: int, rate: schedules.Rate | None):
    self.function = function
    self.key = np.asarray(jax.random.key_data(jax.random.key(seeds.check(seed))))
    # the optimizer counts the updates that were not skipped
    now = lambda step, skipped: None if rate is None else jnp.float32(rate(step - skipped))
    self.rate = jax.jit(now)

  def __call__(self, state: State, context: Context, batch: Batch) -> tuple[State, dict[str, Any]]:
    rate = self.rate(state.step, state.skipped)
    return self.function(state, context, batch, self.key, rate)

  def lower(self, state: State, context: Context, batch: Batch) -> jax.stages.Lowered:
    rate = jax.eval_shape(self.rate, state.step, state.skipped)
    return self.function.lower(state, context, batch, self.key, rate)


def jitted(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  state: State,
  *,
  accumulate: int = 1,
  seed: int = 0,
  rate: schedules.Rate | None = None,
  hooks: adapters.Hooks | None = None,
) -> Jitted:
  """`make`, jitted once for all states that lie as this one (or these shapes) does; the state is donated.

  Args:
    rate: the optimizer's learning rate, where it is to be no part of the program.
  """
  given = (lambda value: contextlib.nullcontext()) if rate is None else rate.given
  function = _keyed(objective, optimizer, accumulate, hooks, given)

  def step(
    state: State, context: Context, batch: Batch, key: Array, rate: Any
  ) -> tuple[State, dict[str, Any]]:
    return function(state, context, batch, jax.random.wrap_key_data(key), rate)

  where = jax.tree.map(lambda x: x.sharding, state)
  return Jitted(jax.jit(step, donate_argnums=0, out_shardings=(where, None)), seed, rate)


def begin(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  adapter: Any,
  *,
  accumulate: int = 1,
  seed: int = 0,
  hooks: adapters.Hooks | None = None,
) -> tuple[State, Step]:
  """(the first state of an adapter's training on one device, the jitted step that moves it).

    state, step = train.begin(objective, optax.adamw(1e-3), adapter)
    state, metrics = step(state, Context(base), batch)

  Args:
    adapter: what `adapters.init` made, or in full fine-tuning the parameters; its arrays are the state's from here on.
    hooks: `adapters.hooks(config, steps)`, where the adapter's method changes anything but by the gradient.
  """
  trainable, fixed = tree.partition(adapter)
  # an adapter whose every number trains is bound to a base all the same
  is_adapter = any(isinstance(leaf, node.Node) for _, leaf in tree.items(adapter))
  carried = fixed if is_adapter else None
  state = state_lib.first(trainable, optimizer, carried, objective, None)
  return state, jitted(objective, optimizer, state, accumulate=accumulate, seed=seed, hooks=hooks)


def gradient(
  objective: Objective,
  trainable: Any,
  context: Context,
  batch: Batch,
  key: Array,
  *,
  memory: Any = None,
  accumulate: int = 1,
) -> tuple[Any, dict[str, Any]]:
  """(gradient, metrics) of one optimizer batch, as the step computes it."""
  grads, _, metrics = _gradient(objective, trainable, context, batch, key, memory, accumulate)
  return grads, metrics


def _gradient(objective, trainable, context, batch, key, memory, accumulate):
  """(gradient, totals, metrics)."""
  context = objective.context(context, memory)
  totals = objective.totals(trainable, context, batch, key, memory=memory, training=True)

  def one(microbatch, index):
    microbatch_key = jax.random.fold_in(key, index)
    loss = lambda trainable: objective.loss(
      trainable, context, microbatch, totals, microbatch_key, training=True
    )

    def learned():
      grads, metrics = jax.grad(loss, has_aux=True)(trainable)
      return jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics

    def measured():
      """The same where the gradient is 0: without the backward pass."""
      return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable), loss(trainable)[1]

    teaches = objective.teaches(microbatch)
    if teaches is None or memory_lib.any_on_host(trainable):
      return learned()
    return jax.lax.cond(teaches, learned, measured)

  grads, metrics = _accumulated(one, trainable, batch, accumulate)
  return grads, totals, metrics


def _accumulated(one, trainable, batch, accumulate):
  """Sums of `one(microbatch, index)` over `accumulate` parts of the batch."""
  if accumulate == 1:
    return one(batch, 0)
  microbatches = jax.tree.map(lambda x: _split(x, accumulate), batch)
  first = jax.tree.map(lambda x: x[0], microbatches)
  zeros = metrics_lib.zeros_like(jax.eval_shape(one, first, 0))
  start = (jax.tree.map(memory_lib.back, zeros[0], trainable), zeros[1])

  def body(carry, xs):
    grads, metrics = one(*xs)
    return (offload.add(carry[0], grads), metrics_lib.add(carry[1], metrics)), None

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
