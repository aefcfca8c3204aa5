"""The train step of a config as a program over abstract arrays: lowered and compiled without a weight."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import layout, over
from posttrain_jax.build import (
  adapter,
  checks,
  critic,
  decisions,
  earlier_adapter,
  methods,
  objective,
  online,
  optimizer,
  reference,
  run_length,
  start,
  teacher,
)
from posttrain_jax.build import mesh as mesh_lib
from posttrain_jax.build import run as runs
from posttrain_jax.build.model import Model
from posttrain_jax.core import sharding, tree
from posttrain_jax.data import answers, packing
from posttrain_jax.data.encoded import Example
from posttrain_jax.models import decoder, fetch, hf, rotary
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.shapes import SHAPES
from posttrain_jax.objectives import Context, Scorer
from posttrain_jax.plan.chips import GIB
from posttrain_jax.plan.topology import Target
from posttrain_jax.train import state as state_lib
from posttrain_jax.train.state import State


class OutOfMemory(RuntimeError):
  """The compiler's own words on what does not fit."""


@dataclasses.dataclass(frozen=True)
class Program:
  """A train step and `jax.ShapeDtypeStruct`s of its arguments, laid out over the devices of a target."""

  config: ml_collections.ConfigDict  # "auto" resolved for the target
  model: ModelConfig
  step: Any  # jitted
  state: State
  context: Context
  batch: dict[str, Any]
  mesh: jax.sharding.Mesh | None
  device: jax.Device  # where there is no mesh


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Bytes a device, as the compiler counts them, and how long it took."""

  arguments: int  # parameters, adapter, optimizer state, batch
  temporaries: int
  outputs: int
  aliased: int  # outputs that take the place of donated arguments
  code: int
  host: int  # in the memory of the device's host: not among the others
  seconds: float  # tracing, lowering and compiling
  executable: Any = dataclasses.field(repr=False, compare=False)

  @property
  def peak(self) -> int:
    return self.arguments + self.temporaries + self.outputs - self.aliased

  def figures(self) -> dict[str, float]:
    """GiB a device and seconds, for people and for JSON."""
    names = ("arguments", "temporaries", "outputs", "aliased", "code", "peak")
    sizes = {f"{name}_gib": round(vars(self).get(name, self.peak) / GIB, 3) for name in names}
    return {**sizes, "compile_seconds": round(self.seconds, 1)}


def shape(name: str) -> ModelConfig:
  """The ModelConfig of a folder, a built-in or hub model, or a name in `SHAPES`; config.json alone is fetched and read.

  Raises:
    FileNotFoundError, ConnectionError: there is no such model, or the hub does not answer; with the names in `SHAPES`.
  """
  if name in SHAPES and not Path(name).is_dir():
    return SHAPES[name]
  try:
    folder = fetch.resolve(name, patterns=("config.json",))
  except (FileNotFoundError, ConnectionError) as problem:
    sizes = f"sizes that are planned without a file of theirs: {', '.join(SHAPES)}"
    raise type(problem)(f"{problem}\n{sizes}") from problem
  return hf.read_config(folder)


def resolved(config: ml_collections.ConfigDict, platform: str) -> ml_collections.ConfigDict:
  """A copy of config with what `train` decides by the backend decided for `platform`."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.dtype = jnp.dtype(decisions.products(config, platform)).name
    config.model.remat = decisions.remat(config)
  return run_length.resolved(config, run_length.PLANNED)


def build(config: ml_collections.ConfigDict, target: Target) -> Program:
  """The step that `posttrain train` would run on target."""
  checks.check(config)
  config = resolved(config, target.platform)
  adapter_config = adapter.described(config)
  model_config = shape(config.model.name)
  if adapter_config is not None:
    model_config = rotary.stretched(model_config, adapter_config.context_length)
  if decisions.has_score(config):
    model_config = dataclasses.replace(model_config, scores=1, writes=decisions.writes(config))
  mesh = mesh_lib.make(config, target.devices, target.slices)
  products = decisions.products(config)
  dtype = decisions.between(products, target.platform)
  model = Model(Path(), None, model_config, None, None, dtype, products=products)
  theirs = shape(name) if (name := decisions.teacher(config)) else None
  read_by = None if theirs is None else teacher.planned(config, theirs, model)
  loss = objective.make(config, model, (), target.platform, teacher=read_by)
  trainable, carried, context = parameters(config, model_config, loss, mesh, target.devices[0])
  if theirs is not None and teacher.is_in_step(config):
    stored = base(theirs, products, config.objective.teacher_base)
    placed = layout.abstract(stored, mesh=mesh, device=target.devices[0])
    context = dataclasses.replace(context, teacher=placed)
  updates, rate = optimizer.make(config, model_config)
  state = state_lib.abstract(trainable, updates, carried, loss, mesh)
  jitted = runs.jitted_step(config, adapter_config, loss, updates, state, rate)
  batch = _batch(config, model_config, loss, mesh, target.devices[0])
  return Program(config, model_config, jitted, state, context, batch, mesh, target.devices[0])


def parameters(
  config: ml_collections.ConfigDict,
  model: ModelConfig,
  loss: Scorer,
  mesh: jax.sharding.Mesh | None,
  device: jax.Device,
) -> tuple[Any, Any, Context]:
  """(trainable, carried, context) of abstract arrays, as `build.adapter` makes them of real ones."""
  adapter_config = adapter.described(config)
  placed = functools.partial(layout.abstract, mesh=mesh, device=device)
  if adapter_config is None:
    params = placed(decoder.abstract(model, jnp.float32), on_host=decisions.base_on_host(config))
    other = _other(config, model, loss, placed, params)
    return critic.abstract(config, params, model, placed), None, Context(reference=other)
  kind, dtype = config.model.base, decisions.products(config)
  # a start is taken out of the dense matrix, and the rest is stored
  params = base(model, dtype, "dense" if adapter_config.changes_base else kind)
  params = over.bound(params, earlier_adapter.under_as_shapes(config, model))
  params, nodes = jax.eval_shape(
    lambda params: adapters.init(
      jax.random.key(0),
      params,
      adapter_config,
      store=start.store(kind),
      # any token will do for the shapes
      text_tokens=None if adapter_config.prompt_tuning_init_text is None else (0,),
      model=model,
    ),
    params,
  )
  if adapter_config.changes_base:
    params = _stored(params, kind)
  trainable, carried = tree.partition(critic.abstract(config, placed(nodes), model, placed))
  if decisions.trained_on_host(config):
    trainable = layout.hosted(trainable)
  other = _other(config, model, loss, placed, None)
  frozen = placed(params, on_host=decisions.base_on_host(config))
  return trainable, carried, Context(frozen, reference=other)


def _other(
  config: ml_collections.ConfigDict, model: ModelConfig, loss: Scorer, placed: Any, trained: Any
) -> Any:
  """The parameters that each step compares with, where they are not the base under the adapter; else None.

  Another adapter on the base is left out: its matrices are the base's.

  Args:
    trained: in full fine-tuning what trains, of which the reference is a copy.
  """
  if not (loss.needs_reference and reference.is_in_step(config)):
    return None
  if decisions.compares_with_base(config):
    return trained
  if reference.is_adapter(config.objective.reference):
    return None
  dtype = decisions.products(config)
  return placed(base(dataclasses.replace(model, scores=0), dtype, config.objective.reference_base))


def base(model: ModelConfig, dtype: Any, kind: str) -> Any:
  """The abstract parameters of a frozen base: dense, or with its linear weights in a type of `quant.STORAGES`."""
  return _stored(decoder.abstract(model, dtype), kind)


def _stored(params: Any, kind: str) -> Any:
  return tree.unflatten(
    (path, quant.abstract(path, leaf, kind)) for path, leaf in tree.items(params)
  )


def compile(program: Program) -> Compiled:
  """program through the compiler of its devices; nothing is run.

  Raises:
    OutOfMemory: the compiler found no way to fit the program into a device.
    ValueError: the compiler fails otherwise.
  """
  there = on_host(program)
  args = (program.state, program.context, program.batch)
  one = compiled(program, program.step, *args)
  host, back = sum(there.values()), there["trained"] + there["optimizer"]
  if program.device.platform == "gpu":  # the CUDA plugin without a card has everything on it
    return dataclasses.replace(
      one,
      arguments=one.arguments - host,
      outputs=one.outputs - back,
      aliased=one.aliased - back,
      host=one.host + host,
    )
  return dataclasses.replace(one, host=one.host + host)


def compiled(program: Program, jitted: Any, *args: Any) -> Compiled:
  """Any jitted function of abstract arguments, as `compile` does the step of the program."""
  began = time.monotonic()
  with jax.set_mesh(program.mesh) if program.mesh is not None else contextlib.nullcontext():
    lowered = jitted.lower(*args)
    try:
      executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise ValueError(
          f"the compiler of {program.device.platform} fails at this step, by a fault of its own: "
          f"{str(error).splitlines()[0]}; another base=, model.offload or model.remat may avoid it"
        ) from error
      raise OutOfMemory(str(error)) from None
  seconds = time.monotonic() - began
  memory: Any = executable.memory_analysis()
  return Compiled(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    aliased=memory.alias_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    host=memory.host_temp_size_in_bytes,
    seconds=seconds,
    executable=executable,
  )


def bytes_a_device(arrays: Any) -> int:
  """Bytes of the shard that one device holds of each array, in its own memory or its host's."""
  return sum(map(_shard, jax.tree.leaves(arrays)))


def on_host(program: Program) -> dict[str, int]:
  """{base, trained, optimizer: bytes that one device has in its host's memory}.

  By what the config says: a GPU that is not here has no memories to ask for.
  """
  config, state = program.config, program.state
  layers = lambda params: bytes_a_device((params or {}).get("layers"))
  is_full = decisions.is_full(config)
  moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
  return {
    "base": layers(program.context.base) if decisions.base_on_host(config) and not is_full else 0,
    "trained": layers(state.trainable) if decisions.trained_on_host(config) else 0,
    "optimizer": bytes_a_device(moments) if config.optimizer.offload != "none" else 0,
  }


def _shard(x: Any) -> int:
  return math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize


def _batch(config, model, loss, mesh, device):
  """One optimizer batch, of blank rows that are packed as a run's are."""
  d, kind = config.data, config.data.kind
  rows = [[0], *[[]] * (config.batch.rows - 1)]
  if kind == "text":
    example = Example(np.zeros(2, np.int32), np.asarray([False, True]))
    packed = packing.pack([example], rows, d.length, ())
    packed = teacher.blank(config, packed)
  elif online.is_online(config):
    packed = methods.make(config, model.vocab_size).blank()
  else:
    blank = answers.blank(
      kind,
      with_ref_logps=loss.needs_reference and decisions.caches_reference(config),
      with_companion=decisions.has_companions(config),
    )
    # how many answers a row has room for is the data's to say; as many as answers of 64 tokens
    slots = blank.count * max(1, d.length // (64 * blank.count))
    shares = d.share_prompt and kind in answers.SHARING
    packed = packing.pack_answers([blank], rows, d.length, slots, shares=shares)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), packed)
  spec = P(sharding.ACTIVATIONS["batch"])

  def placed(x):
    where = SingleDeviceSharding(device) if mesh is None else sharding.named(mesh, spec, x.shape)
    return x.update(sharding=where)

  return jax.tree.map(placed, batch)
