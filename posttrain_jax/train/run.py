"""`posttrain train`: a config becomes a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import rich

from posttrain_jax import adapters
from posttrain_jax.adapters import peft_format
from posttrain_jax.core import files, memory, tree
from posttrain_jax.core.checkpoint import Checkpoints
from posttrain_jax.data import chat, loader
from posttrain_jax.evals import report, tasks
from posttrain_jax.evals import run as run_files
from posttrain_jax.models import decoder, hf
from posttrain_jax.train import (
  assemble,
  distributed,
  loop,
  objectives,
  settings,
  signals,
  step,
  workdir,
)
from posttrain_jax.train.assemble import Data, Model
from posttrain_jax.train.objectives import Frozen

log = logging.getLogger(__name__)
TOLERANCE = 1e-5  # of a fresh adapter's logits against the base's, relative to their size


def train(config: ml_collections.ConfigDict, folder: str | Path, *, dry_run: bool = False) -> int:
  """Trains as config says into the run folder; the same call again continues it.  Returns the exit code.

  0: complete.  75: stopped by SIGTERM or Ctrl-C with everything saved; run again to go on.

  Raises:
    ConfigError, RowError, ValueError, OSError: what the user can mend, in words.
    loop.Diverged: the gradients stayed not finite.
  """
  say = print if distributed.is_main() else lambda *_: None
  if not dry_run:
    folder = workdir.check(folder, config)
    if (folder / run_files.DONE).exists():
      say(f"{folder} is complete: {(folder / run_files.DONE).read_text().strip()}")
      return 0
  mesh = assemble.mesh(config)
  if mesh is not None:
    say(f"mesh: {dict(mesh.shape)}")
  ambient = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
  with ambient, signals.exiting():
    model = assemble.model(config, mesh)
    data = assemble.data(config, model)
    pieces = _pieces(config, model, data, mesh)
    _introduce(config, model, data, pieces, say)
    if dry_run:
      _explain_memory(config, pieces, say)
      return 0
    workdir.claim(Path(folder), config)
    scored = assemble.with_reference(config, model, data, pieces.objective, mesh, say)
    if scored is not data:
      data = scored
      pieces = dataclasses.replace(pieces, batches=assemble.batches(config, data, mesh))
    return _train(config, Path(folder), model, data, pieces, say)


@dataclasses.dataclass(frozen=True)
class _Pieces:
  """What `_train` and `--dry_run` share."""

  trainable: Any
  carried: Any  # what else a state starts with: the fixed part of the adapter
  frozen: Frozen
  chosen: adapters.AdapterConfig | None
  objective: objectives.Objective
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  batches: loader.Loader
  step: Any
  mesh: jax.sharding.Mesh | None


def _pieces(config, model: Model, data: Data, mesh) -> _Pieces:
  trainable, carried, frozen, chosen = assemble.split(config, model, mesh)
  objective = assemble.objective(config, model, data.channels)
  optimizer, schedule = assemble.optimizer(config, model.config)
  # an optimizer that these parameters do not suit says so before the folder is claimed
  jax.eval_shape(optimizer.init, trainable)
  made = step.make(
    objective,
    optimizer,
    accumulate=config.batch.accumulate,
    seed=config.seed,
    hooks=adapters.hooks(chosen, config.steps),
  )
  return _Pieces(
    trainable,
    carried,
    frozen,
    chosen,
    objective,
    optimizer,
    schedule,
    assemble.batches(config, data, mesh),
    jax.jit(made, donate_argnums=0),
    mesh,
  )


def _introduce(config, model: Model, data: Data, pieces: _Pieces, say) -> None:
  """What is about to run, before it does: parameters, data, and one example with its trained tokens marked."""
  if pieces.chosen is None:
    total = tree.size(pieces.trainable)
    say(f"trainable params: {total:,} || all params: {total:,} || trainable%: 100.0000")
  else:
    adapter = tree.combine(pieces.trainable, pieces.carried)
    say(adapters.summary(pieces.frozen.params, adapter))
    say(f"base: {config.model.base}, {tree.nbytes(pieces.frozen.params) / 1e6:,.0f} MB")
  if model.started is not None:
    say(model.started.describe())
  say(f"data: {pieces.batches.stats()}")
  if data.skipped:
    say(f"left out: {data.skipped}")
  say(f"held out: {len(data.eval)} examples")
  say(f"first example, trained tokens in [[ ]]:\n{chat.describe(data.first, model.tokenizer)}\n")


def _explain_memory(config, pieces: _Pieces, say) -> None:
  """Compiles the step and says what it needs; nothing is run."""
  state = _shapes(pieces)
  batch = assemble.with_blank_reference(config, next(pieces.batches), pieces.objective)
  began = time.monotonic()
  memory = pieces.step.lower(state, pieces.frozen, batch).compile().memory_analysis()
  say(
    f"memory a device: {memory.argument_size_in_bytes / 1e9:.2f} GB of parameters, optimizer state and batch, "
    f"{memory.temp_size_in_bytes / 1e9:.2f} GB of temporaries; compiled in {time.monotonic() - began:.1f} s"
  )
  say("dry run: nothing was trained or written")


def _train(config, folder: Path, model: Model, data: Data, pieces: _Pieces, say) -> int:
  checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
  state = _started(pieces)
  progress = loop.Progress()
  resumed = checkpoints.latest() is not None
  if resumed:
    state, saved, at = checkpoints.restore(_abstract(state))
    pieces = _on_its_base(config, model, pieces, state)
    pieces.batches.set_state(saved["batches"])
    progress = loop.Progress(**saved["progress"])
    say(f"going on from step {at} of {config.steps}")
  else:
    _check_start(pieces, model, say)
    if config.eval.before:
      _evaluate_task(config, folder, "before", model, pieces, state, say)
  run = loop.Run(
    folder=folder,
    steps=config.steps,
    step=pieces.step,
    evaluate=jax.jit(step.evaluate(pieces.objective)),
    frozen=pieces.frozen,
    batches=pieces.batches,
    eval_batches=functools.partial(_eval_batches, config, data, pieces.mesh),
    learning_rate=pieces.schedule,
    export=functools.partial(_export, config, folder, model, pieces),
    check_start=pieces.objective.check_start,
    mesh=pieces.mesh,
    eval_every=config.eval.every,
    save_every=config.checkpoint.every,
    log_every=config.log_every,
    max_skipped=config.max_skipped,
  )
  state, progress, complete = loop.loop(run, state, progress, checkpoints)
  checkpoints.close()
  if not complete:
    return signals.PREEMPTED
  _finish(config, folder, model, pieces, run, state, progress, say)
  return 0


def _on_its_base(config, model: Model, pieces: _Pieces, state: step.State) -> _Pieces:
  """pieces with the base that the checkpoint's adapter belongs to, where a start was taken out of it."""
  if model.started is None:
    return pieces
  adapter = tree.combine(_whole(state.trainable, pieces.mesh), _whole(state.carried, pieces.mesh))
  nodes = tree.flatten(
    jax.device_get(adapter)
  )  # a product of sharded factors is added up otherwise
  frozen = assemble.resumed(config, model, pieces.frozen, nodes, pieces.mesh)
  return dataclasses.replace(pieces, frozen=frozen)


def _started(pieces: _Pieces) -> step.State:
  """The first state, optimizer moments laid out as the parameters they belong to."""
  where = jax.tree.map(lambda x: x.sharding, _shapes(pieces))
  if pieces.mesh is None:  # without a copy of the parameters
    init = jax.jit(pieces.optimizer.init, out_shardings=where.optimizer)
    optimizer = pieces.optimizer._replace(init=init)
    memory = pieces.objective.start(pieces.trainable)
    return step.start(pieces.trainable, optimizer, pieces.carried, memory)
  first = functools.partial(_first, pieces)
  return jax.jit(first, out_shardings=where)(pieces.trainable, pieces.carried)


def _shapes(pieces: _Pieces) -> step.State:
  """The state that `_started` makes, as shapes on their devices."""
  shapes = jax.eval_shape(functools.partial(_first, pieces), pieces.trainable, pieces.carried)
  if pieces.mesh is None:
    replicated = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  else:
    replicated = jax.sharding.NamedSharding(pieces.mesh, jax.sharding.PartitionSpec())
  layout = step.layout(shapes, pieces.trainable, replicated, pieces.carried)
  return jax.tree.map(lambda x, where: x.update(sharding=where), shapes, layout)


def _first(pieces: _Pieces, trainable: Any, carried: Any) -> step.State:
  return step.start(trainable, pieces.optimizer, carried, pieces.objective.start(trainable))


def _abstract(state: step.State) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _check_start(pieces: _Pieces, model: Model, say) -> None:
  """Cheap and fatal: a fresh adapter leaves the logits unchanged; what stands before the text may not, and says so.

  What took its start out of the base was compared with the original as that was read (`train.start`).
  """
  if pieces.chosen is None or model.started is not None:
    return
  tokens = jnp.asarray(np.arange(16, dtype=np.int32)[None] % model.config.vocab_size)
  logits = jax.jit(lambda params: decoder.forward(params, tokens, model.config, dtype=model.dtype))
  frozen = dataclasses.replace(pieces.frozen, adapter=pieces.carried)
  bound = logits(objectives.policy(pieces.trainable, frozen))
  base = logits(pieces.frozen.params)
  change = float(jnp.max(jnp.abs(bound - base)) / jnp.max(jnp.abs(base)))
  if pieces.chosen.method in ("prompt", "prefix"):
    say(f"the fresh {pieces.chosen.method} changes the logits by {change:.2f} of their size")
    return
  if not change <= TOLERANCE:
    raise ValueError(
      f"the fresh adapter changes the logits by {change:.1e} of their size before any training"
    )


def _eval_batches(config, data: Data, mesh):
  if not data.eval:
    return
  yield from loader.eval_batches(
    data.eval,
    batch_size=config.eval.rows,
    length=config.data.length,
    packing=config.data.packing,
    shard=distributed.shard(mesh),
    channels=data.channels,
  )


def _whole(tree_: Any, mesh) -> Any:
  """Every shard of every array on this host."""
  if jax.process_count() == 1:
    return tree_
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.device_get(jax.jit(memory.fetch, out_shardings=replicated)(tree_))


def _export(
  config, folder: Path, model: Model, pieces: _Pieces, state: step.State, name: str
) -> None:
  """The adapter as a PEFT folder, or (full fine-tuning) the model as a Hugging Face folder."""
  whole = _whole(state.trainable, pieces.mesh)
  if not distributed.is_main():
    return
  if pieces.chosen is None:
    source = json.loads(model.config.source)
    dtype = source.get("dtype") or source.get("torch_dtype") or "float32"
    params = jax.tree.map(lambda x: np.asarray(x).astype(files.numpy_dtype(dtype)), whole)
    hf.save(
      folder / name.replace("adapter", "model"), params, model.config, tokenizer_from=model.folder
    )
    return
  adapter = tree.combine(whole, _whole(state.carried, pieces.mesh))
  peft_format.save(folder / name, adapter, pieces.chosen, model.config, base_name=config.model.name)


def _evaluate_task(
  config, folder: Path, when: str, model: Model, pieces: _Pieces, state: step.State, say
) -> None:
  """Answers the built-in task's held-out questions and keeps the result beside the metrics."""
  if not config.eval.task:
    return
  if jax.process_count() > 1:
    raise settings.ConfigError(
      "eval.task generates text in one process; run `posttrain eval` afterwards instead"
    )
  params = memory.fetch(state.trainable) if pieces.chosen is None else _merged(pieces, state)
  result = tasks.evaluate(
    params,
    model.config,
    model.tokenizer,
    task=config.eval.task,
    limit=config.eval.task_limit or None,
    template=model.template,
    dtype=model.dtype,
  )
  files.write_json(folder / f"evaluation-{when}.json", result.to_json())
  say(
    f"{result.task} {when} training: {result.correct}/{result.total} correct ({100 * result.accuracy:.1f} %)"
  )


def _merged(pieces: _Pieces, state: step.State) -> Any:
  return adapters.merge(pieces.frozen.params, tree.combine(state.trainable, state.carried))


def _finish(
  config, folder: Path, model: Model, pieces: _Pieces, run: loop.Run, state, progress, say
) -> None:
  """Exports, last evaluation, report; `done.json` comes last, so that it means complete."""
  exported = folder / ("adapter" if pieces.chosen is not None else "model")
  if progress.best_step not in (0, progress.step) and distributed.is_main() and exported.exists():
    best = exported.with_name(f"{exported.name}-best")
    if not best.exists():
      exported.rename(best)
    say(f"lowest eval_loss {progress.best_loss:.4f} at step {progress.best_step}: kept as {best}")
  run.export(state, "adapter")
  _evaluate_task(config, folder, "after", model, pieces, state, say)
  if not distributed.is_main():
    return
  final = {"steps": progress.step, "seconds": round(progress.seconds, 1), "tokens": progress.tokens}
  lines: Sequence[str] = (folder / run_files.METRICS).read_text().splitlines()
  last: dict[str, float] = {}
  for line in lines:
    last.update(json.loads(line))
  final["final"] = {name: value for name, value in last.items() if name != "step"}
  page = report.write(folder, done=final)
  files.write_json(folder / run_files.DONE, final)
  rich.print(report.summary_table(folder))
  say(f"{exported.name}: {exported}\nreport: {page}")
  say(f"use it: {report.use_command(run_files.read(folder))}")
