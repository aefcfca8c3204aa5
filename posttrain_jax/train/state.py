"""What changes from step to step: made, laid out over the mesh, and started."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.adapters import layout as adapter_layout
from posttrain_jax.core import struct, tree
from posttrain_jax.objectives import Context, Objective
from posttrain_jax.optim import layout as optimizer_layout

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

  @property
  def adapter(self) -> Any:
    """The adapter as it stands, whole; in full fine-tuning the parameters."""
    return self.trainable if self.carried is None else tree.combine(self.trainable, self.carried)

  def context(self, context: Context) -> Context:
    """The context with what the state carries of the adapter."""
    return context if self.carried is None else dataclasses.replace(context, fixed=self.carried)


def start(
  trainable: Any,
  optimizer: optax.GradientTransformation,
  carried: Any = None,
  memory: Any = None,
) -> State:
  # one buffer each: a donated state must not hold the same array twice
  zero = lambda: jnp.zeros((), jnp.int32)
  return State(zero(), trainable, optimizer.init(trainable), carried, zero(), zero(), memory)


def first(
  trainable: Any,
  optimizer: optax.GradientTransformation,
  carried: Any,
  objective: Objective,
  mesh: jax.sharding.Mesh | None,
) -> State:
  """The state that a run starts with, every leaf committed to where `abstract` says."""
  shapes = abstract(trainable, optimizer, carried, objective, mesh)
  where = jax.tree.map(lambda x: x.sharding, shapes)
  if mesh is None:  # without a copy of the parameters
    init = jax.jit(optimizer.init, out_shardings=where.optimizer)
    state = start(trainable, optimizer._replace(init=init), carried, objective.start(trainable))
    return jax.tree.map(jax.device_put, state, where)
  return jax.jit(_maker(optimizer, objective), out_shardings=where)(trainable, carried)


def abstract(
  trainable: Any,
  optimizer: optax.GradientTransformation,
  carried: Any,
  objective: Objective,
  mesh: jax.sharding.Mesh | None,
) -> State:
  """The first state as shapes on their devices; arrays with a sharding are given, or such shapes."""
  shapes = jax.eval_shape(_maker(optimizer, objective), trainable, carried)
  device = next(iter(jax.tree.leaves(trainable)[0].sharding.device_set))
  replicated = adapter_layout.replicated(mesh, device=device)
  where = layout(shapes, trainable, replicated, carried)
  return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, where)


def devices(state: State) -> Collection[jax.Device]:
  """Where it lies; shapes on devices will do."""
  return state.step.sharding.device_set


def _maker(
  optimizer: optax.GradientTransformation, objective: Objective
) -> Callable[[Any, Any], State]:
  return lambda trainable, carried: start(trainable, optimizer, carried, objective.start(trainable))


def layout(
  state: State,
  trainable: Any,
  replicated: jax.sharding.Sharding,
  carried: Any = None,
) -> State:
  """The shardings of a state (shapes will do): moments lie as the parameters they belong to, the rest `replicated`."""
  where = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  return jax.tree.map(lambda _: replicated, state).replace(
    trainable=where(trainable),
    optimizer=optimizer_layout.shardings(state.optimizer, trainable, replicated),
    carried=where(carried),
    memory=optimizer_layout.shardings(state.memory, trainable, replicated),
  )
