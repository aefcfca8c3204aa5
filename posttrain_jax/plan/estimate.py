"""The memory that a config's train step needs, by arithmetic and as compiled; does it fit?"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.build import checks, decisions, online
from posttrain_jax.core import sharding, tree
from posttrain_jax.core.weight import Weight
from posttrain_jax.losses import logprob
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.plan import program, writing
from posttrain_jax.plan.program import Program
from posttrain_jax.plan.topology import GIB, target
from posttrain_jax.train import state as state_lib


def figures(
  config: Any, *, topology: str | None = None, devices: int | None = None
) -> dict[str, Any]:
  """Everything that `report` prints, for JSON; sizes in GiB a device."""
  chips = target(topology, devices)
  built = program.build(config, chips)
  facts: dict[str, Any] = {
    "model": config.model.name,
    "base": config.model.base,
    "adapter": config.adapter.method,
    "remat": built.config.model.remat,
    "epochs": decisions.epochs(config),
    "rows": config.batch.rows,
    "length": config.data.length,
    "target": chips.name,
    "devices": len(chips.devices),
    "hosts": hosts(chips.devices),
    "device_gib": chips.memory,
    "compiler": chips.compiler,
    "jax": jax.__version__,
    "arithmetic_gib": {name: size / GIB for name, size in arithmetic(built).items()},
  }
  try:
    compiled = program.compile(built)
    if online.is_online(config):
      facts["writing"] = writing.figures(built)
      facts["refused"] = checks.ONE_HOST if facts["hosts"] > 1 else None
  except program.OutOfMemory as problem:
    return {**facts, "compiled": None, "out_of_memory": str(problem), "fits": False}
  # between updates what trains stays where it is, and the engine comes beside it
  peaks = [compiled.peak / GIB]
  if writes := facts.get("writing"):
    beside = max(one["peak_gib"] for one in writes["programs"].values())
    peaks.append(beside + compiled.arguments / GIB)
  fits = None if chips.memory is None else max(peaks) <= chips.memory
  return {**facts, "compiled": compiled.figures(), "peak_gib": round(max(peaks), 3), "fits": fits}


def hosts(devices: Any) -> int:
  """How many processes `posttrain train` has there."""
  return len({device.process_index for device in devices})


def arithmetic(built: Program) -> dict[str, int]:
  """{component: bytes a device}: stored arrays exactly, by their shardings; activations by the remat mode."""
  fixed = [built.context.base, built.state.carried]
  dtype = decisions.between(decisions.products(built.config), built.device.platform)
  parts = decisions.micro_batches(built.config, state_lib.devices(built.state))
  rows = math.ceil(built.config.batch.rows / parts / _row_shards(built))
  tokens = rows * built.config.data.length
  if built.mesh is not None:
    tokens = math.ceil(tokens / built.mesh.shape["context"])
  return {
    "base": sum(map(bytes_a_device, fixed)),
    "trained": bytes_a_device(built.state.trainable),
    "optimizer": bytes_a_device(built.state.optimizer),
    "gradients": bytes_a_device(built.state.trainable),
    "activations": saved(built.model, built.config.model.remat, jnp.dtype(dtype).itemsize) * tokens,
    "dense weights": largest_dense(built, dtype),
    "logits": logits(built.model, tokens),
  }


def bytes_a_device(arrays: Any) -> int:
  """Bytes of the shard that one device holds of each array."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(arrays)
  )


def saved(model: ModelConfig, remat: str, itemsize: int) -> int:
  """Bytes a token that the backward pass finds saved by the layers: their inputs, and what the remat mode adds.

  `none` is a lower bound: what norms, softmax and activations keep depends on the compiler's fusions.
  """
  heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
  inputs, attention = model.hidden_size, heads + 2 * kv
  mlp = 2 * model.intermediate_size
  softmax = 2 * model.num_heads * 4 // itemsize  # a query's maximum and sum, float32
  kept = {
    "full": 0,
    "names": attention + heads + softmax + model.hidden_size + mlp,  # decoder.KEPT
    "dots": attention + heads + 2 * model.hidden_size + mlp,  # every product of a layer
    "none": 2 * (attention + heads) + 4 * model.hidden_size + 2 * mlp,
  }
  return model.num_layers * itemsize * (inputs + kept[remat])


def largest_dense(built: Program, dtype: Any) -> int:
  """Bytes of the one matrix that a quantised base has dense at a time."""
  itemsize = jnp.dtype(dtype).itemsize
  stacks = [leaf for _, leaf in tree.items(built.context.base or {}) if isinstance(leaf, Weight)]
  return max((itemsize * math.prod(leaf.shape[-2:]) for leaf in stacks), default=0)


def logits(model: ModelConfig, tokens: int) -> int:
  """Bytes of the logits that exist at once, float32, and of their gradient."""
  return 2 * 4 * min(tokens, logprob.CHUNK) * model.vocab_size


def report(facts: dict[str, Any]) -> str:
  """The figures as people read them."""
  memory, epochs = facts["device_gib"], facts["epochs"]
  lines = [
    f"{facts['model']}, {facts['base']} base, adapter {facts['adapter']}, {facts['rows']} rows x "
    f"{facts['length']} tokens, remat {facts['remat']}",
    f"on {facts['devices']} x {facts['target']}"
    + (f", {memory:g} GiB each" if memory is not None else ", memory not known"),
    *([] if epochs is None else [f"epochs={epochs:g}: how many steps these are changes nothing"]),
    "",
    "by arithmetic, GiB a device:",
    *_rows(facts["arithmetic_gib"]),
    f"  {'sum':<14}{sum(facts['arithmetic_gib'].values()):>9.3f}",
    "",
  ]
  if facts["compiled"] is None:
    return "\n".join([*lines, f"DOES NOT FIT: {facts['out_of_memory']}"])
  sizes = {
    name.removesuffix("_gib"): size
    for name, size in facts["compiled"].items()
    if name.endswith("_gib")
  }
  verdict = {True: "fits", False: "DOES NOT FIT", None: "whether it fits is not known"}
  return "\n".join(
    [
      *lines,
      f"as compiled by {facts['compiler']}, GiB a device:",
      *_rows(sizes),
      f"  compiled in {facts['compiled']['compile_seconds']} s",
      "",
      *_writing(facts),
      verdict[facts["fits"]]
      + (f": {facts['peak_gib']:.2f} of {memory:g} GiB" if memory is not None else ""),
    ]
  )


def _writing(facts: dict[str, Any]) -> list[str]:
  """What an online run needs to write, beside the arguments of its step."""
  if (writes := facts.get("writing")) is None:
    return []
  lines = [
    f"to write {writes['rows']} answers at once, of {writes['length']} tokens with their prompts:"
  ]
  for name, sizes in writes["programs"].items():
    lines.append(f"  {name}, {sizes['compile_seconds']} s to compile")
    lines += _rows(
      {key.removesuffix("_gib"): v for key, v in sizes.items() if key.endswith("_gib")}
    )
  lines.append("  beside them lie the arguments of the step")
  if facts["refused"]:
    lines.append(
      f"`posttrain train` does not run on these {facts['hosts']} hosts: {facts['refused']}"
    )
  return [*lines, ""]


def _rows(sizes):
  return [f"  {name:<14}{size:>9.3f}" for name, size in sizes.items()]


def _row_shards(built: Program) -> int:
  """Over how many devices the rows are spread."""
  if built.mesh is None:
    return 1
  return sharding.row_shares(built.mesh)
