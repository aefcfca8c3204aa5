"""The engine's programs of an online run over abstract arrays: do they fit beside what trains?"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from posttrain_jax import adapters
from posttrain_jax.adapters import layout
from posttrain_jax.build import adapter, decisions
from posttrain_jax.core import sharding, tree
from posttrain_jax.models import cache, decoder
from posttrain_jax.objectives import of_policy
from posttrain_jax.plan.program import Compiled, Program, compiled
from posttrain_jax.rollout import engine, piecewise, programs, requests, sampling, storage


def figures(built: Program) -> dict[str, Any]:
  """{rows, length, programs: {name: sizes}} of the engine that `posttrain train` would make.

  length: the most that data.length leaves, which no prompt that is accepted goes beyond.

  Raises:
    OutOfMemory: the compiler found no way to fit a program into a device.
  """
  online, data = built.config.online, built.config.data
  rows = min(online.rows, built.config.batch.rows * online.minibatches * online.samples)
  answer = online.max_new_tokens + 1
  share = data.length - online.samples * answer
  prompt = share if data.share_prompt else data.length // online.samples - answer
  described = adapter.described(built.config)
  soft = 0 if described is None else adapter.slots(described)
  length = min(soft + max(prompt, 1) + online.max_new_tokens, built.model.max_length)
  sizes = {name: one.figures() for name, one in _compiled(built, rows, length).items()}
  return {"rows": rows, "length": length, "programs": sizes}


def _compiled(built: Program, rows: int, length: int) -> dict[str, Compiled]:
  """The two programs that take memory: a window of tokens, and the largest piece of a prompt."""
  model = built.model
  dtype = decisions.between(decisions.products(built.config), built.device.platform)
  params = parameters(built)
  slots = jax.eval_shape(
    lambda: programs.empty(model, rows, cache.fitting(length + piecewise.SPARE), dtype, _plan(rows))
  )
  slots = programs.laid(slots, lambda x, axes: _placed(x, sharding.logical(axes), built))
  whole = lambda x: _placed(x, PartitionSpec(), built)
  number = whole(jax.ShapeDtypeStruct((), jnp.int32))
  size = piecewise.PIECES[0]
  pieces = jax.tree.map(whole, jax.eval_shape(lambda: _pieces(size)))
  drawn = (params, slots, number, number, model, engine.WINDOW, dtype, False, 0)
  return {
    f"a window of {engine.WINDOW} tokens": compiled(built, programs.window, *drawn),
    f"{size} tokens of a prompt": compiled(
      built, programs.read, params, slots, pieces, model, dtype
    ),
  }


def parameters(built: Program) -> Any:
  """What writes, as `engine.prepare` lays it out: settled, whole along fsdp."""
  how = built.config.online.storage
  if built.context.fixed is None:
    shapes = decoder.abstract(built.model, decisions.products(built.config))
  else:
    settle = functools.partial(
      adapters.settled, rounded=how != storage.AUTO, platform=built.device.platform
    )
    nodes = tree.combine(of_policy(built.state.trainable), of_policy(built.context.fixed))
    shapes = jax.eval_shape(settle, built.context.base, nodes)
  if how != storage.AUTO:
    shapes = jax.eval_shape(lambda params: storage.store(params, built.model, how), shapes)

  def one(path: str, leaf: Any) -> Any:
    specs = sharding.specs(leaf, sharding.spec_for(path, layout.RULES))
    whole = lambda x, spec: _placed(
      x, PartitionSpec(*[a if a != "fsdp" else None for a in spec]), built
    )
    return jax.tree.map(whole, leaf, specs)

  return tree.unflatten((path, one(path, leaf)) for path, leaf in tree.items(shapes))


def _placed(x: Any, spec: PartitionSpec, built: Program) -> jax.ShapeDtypeStruct:
  if built.mesh is None:
    where: jax.sharding.Sharding = SingleDeviceSharding(built.device)
  else:
    where = NamedSharding(built.mesh, sharding.fitted(spec, x.shape, built.mesh))
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _pieces(size: int) -> programs.Pieces:
  none = jnp.zeros(piecewise.TOGETHER // size, jnp.int32)
  return programs.Pieces(none, none, none, none, jnp.zeros((len(none), size), jnp.int32))


def _plan(rows: int) -> programs.Plan:
  none = jnp.zeros(rows, jnp.int32)
  return programs.Plan(
    how=sampling.Rows.of([sampling.Sampling()] * rows),
    least=none,
    most=none,
    stops=jnp.zeros((rows, requests.MOST_STOPS), jnp.int32),
    identity=jnp.zeros((rows, 3), jnp.uint32),
    row=none,
    tops=none.astype(bool),
  )
