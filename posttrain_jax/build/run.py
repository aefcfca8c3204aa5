"""A config becomes a run: its pieces, built once; what is said before it starts; the run to its end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import rich

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import over
from posttrain_jax.adapters.peft_format import UNDER
from posttrain_jax.build import (
  adapter,
  attention,
  best,
  checks,
  critic,
  data,
  decisions,
  earlier_adapter,
  export,
  mesh,
  model,
  objective,
  online,
  optimizer,
  prompts,
  questions,
  reference,
  regress,
  run_length,
  scoring,
  self_checks,
  teacher,
  turns,
  use,
)
from posttrain_jax.build.adapter import Trees
from posttrain_jax.build.data import Data
from posttrain_jax.build.model import Model
from posttrain_jax.build.teacher import Teacher
from posttrain_jax.core import distributed, files, memory, metrics, tree
from posttrain_jax.core import progress as progress_lib
from posttrain_jax.core.checkpoint import Checkpoints
from posttrain_jax.core.started import Started
from posttrain_jax.data import encoded, loader
from posttrain_jax.evals import gate, report, tasks
from posttrain_jax.evals.suite import Suite
from posttrain_jax.models import decoder, hf
from posttrain_jax.objectives import Scorer, evaluation, measured, of_policy
from posttrain_jax.optim import schedules
from posttrain_jax.runs import folder as run_folder
from posttrain_jax.runs import record, trackers
from posttrain_jax.settings import fields
from posttrain_jax.train import loop, signals, step
from posttrain_jax.train import state as state_lib
from posttrain_jax.train.state import State

Say = Callable[[str], None]
# what is trained is smaller than LARGE; beyond, its products may not be finite, and beyond LARGEST float16 ends
LARGE, LARGEST = 1e3, 65504.0
BATCHES_TRIED = 3


def train(
  config: ml_collections.ConfigDict,
  folder: str | Path,
  *,
  dry_run: bool = False,
  given: Sequence[str] = (),
  started: Started | None = None,
) -> int:
  """Trains as config says into the run folder; the same call again continues it.  Returns the exit code.

  0: complete.  75: stopped by SIGTERM or Ctrl-C with everything saved; run again to go on.

  Args:
    given: fields that were written by hand: one that nothing reads is a mistake.
    started: what the start took so far; default: it begins here.

  Raises:
    ConfigError, RowError, ValueError, OSError: what the user can mend, in words.
    loop.Diverged: the gradients stayed not finite.
  """
  say: Say = _print if distributed.is_main() else lambda _: None
  started = started or Started()
  fields.check(settings.plain(config), given)
  config, notes = earlier_adapter.settled(config, given)
  checks.check(config)
  trackers.check(settings.plain(config))
  if not dry_run:
    folder = run_folder.check(folder, config)
    if _is_complete(folder, config, say):
      return 0
    if config.steps is not None:
      run_length.check_change(folder, config)
    earlier_adapter.check_same(folder, config)
  devices = mesh.make(config)
  if devices is not None:
    say(f"mesh: {dict(devices.shape)}")
  ambient = contextlib.nullcontext() if devices is None else jax.set_mesh(devices)
  products, why = _products(config, None if dry_run else Path(folder))
  quiet = contextlib.nullcontext() if distributed.is_main() else progress_lib.muted()
  with ambient, quiet, signals.exiting():
    pieces = build(config, devices, sys.stdout, products, started)
    config = pieces.config
    if not dry_run and _is_complete(Path(folder), config, say):
      return 0
    best.check(pieces)
    for note in (*notes, *why):
      say(note)
    _introduce(pieces, say)
    if dry_run:
      _explain_memory(pieces, say)
      return 0
    run_length.check_change(Path(folder), config)
    if told := run_length.told(Path(folder), config):
      say(told)
    with run_folder.claimed(Path(folder), config, **pieces.identity()):
      distributed.exchanged(
        None
      )  # no other process writes to a folder that the main one has yet to claim
      pieces = pieces.with_reference(say)
      started.ends("reference" if pieces.objective.needs_reference else "adapter")
      return _Training(pieces, Path(folder), say, started).to_the_end()


def _products(
  config: ml_collections.ConfigDict, folder: Path | None
) -> tuple[Any, tuple[str, ...]]:
  """(the dtype of products, what is to be said of it): what a run that is under way began with, wherever it goes on."""
  products = decisions.products(config)
  is_begun = folder is not None and record.is_begun(folder)
  if is_begun:
    products = decisions.recorded(record.read(folder).record)
  told = decisions.told(config.model.dtype, products, is_begun)
  return products, () if told is None else (told,)


def _is_complete(folder: Path, config: ml_collections.ConfigDict, say: Say) -> bool:
  if not run_folder.is_complete(folder, settings.plain(config)):
    return False
  say(f"{folder} is complete: {(folder / record.DONE).read_text().strip()}")
  return True


def _print(text: str) -> None:
  print(text, flush=True)  # whoever reads a log file sees it when it is said


@dataclasses.dataclass(frozen=True)
class Pieces:
  """What a config names, ready to train."""

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh | None
  model: Model
  data: Data
  trees: Trees
  objective: Scorer
  optimizer: optax.GradientTransformation
  schedule: schedules.Rate
  batches: loader.Loader | online.Online
  step: Any  # jitted: (state, context, batch) -> (state, metrics), the state donated
  task: tasks.Task | None  # what is asked before and after training
  teacher: Teacher | None = None  # what is distilled
  suite: Suite | None = None  # what else is measured before and after training

  def identity(self) -> dict[str, Any]:
    """What the run's record says of what its config only names: rows held out, the user's code, an earlier adapter."""
    digests = {g.name: g.digest for g in (self.task.graders if self.task else ()) if g.digest}
    began = earlier_adapter.fingerprint(self.config)
    named = {"metrics": digests or None, earlier_adapter.STARTED: began}
    products = jnp.dtype(self.model.products).name
    return {"rows": data.identity(self.data), decisions.DTYPE: products} | {
      name: value for name, value in named.items() if value is not None
    }

  def first_state(self) -> State:
    return state_lib.first(
      self.trees.trainable, self.optimizer, self.trees.carried, self.objective, self.mesh
    )

  def abstract_state(self) -> State:
    """`first_state` as shapes on their devices."""
    return state_lib.abstract(
      self.trees.trainable, self.optimizer, self.trees.carried, self.objective, self.mesh
    )

  def with_reference(self, say: Say) -> Pieces:
    """The pieces with what reference and teacher say in their data, where it is computed once."""
    taught = teacher.taught(self.config, self.teacher, self.data, self.mesh, say)
    scored = reference.scored(self.config, self.model, taught, self.objective, self.mesh, say)
    if scored is self.data:
      return self
    batches = data.stream(self.config, scored, self.mesh)
    return dataclasses.replace(self, data=scored, batches=batches, teacher=None)

  def eval_batches(self) -> Iterator[Any]:
    """One pass over the held-out examples."""
    if self.data.eval:
      yield from loader.eval_batches(
        self.data.eval,
        batch_size=self.config.eval.rows,
        length=self.config.data.length,
        packing=self.config.data.packing,
        shard=distributed.shard(self.mesh),
        channels=self.data.channels,
      )


def build(
  config: ml_collections.ConfigDict,
  devices: jax.sharding.Mesh | None,
  stream: TextIO | None = None,
  products: Any = None,
  started: Started | None = None,
) -> Pieces:
  """The pieces of a run; an optimizer that these parameters do not suit says so here.

  Args:
    stream: where it is said what is read; default stderr.
    products: their dtype; None: as the config says.
    started: what is told how long each took.
  """
  started = started or Started()
  with progress_lib.phase(f"reading {config.model.name}", stream=stream):
    base = model.load(config, devices, products)
  started.ends("model")
  with progress_lib.phase("reading the data", stream=stream):
    rows = prompts.read(config, base) if online.is_online(config) else data.read(config, base)
  started.ends("data")
  say = _print if distributed.is_main() else lambda _: None
  written = online.Online(config, base, rows, say, devices) if online.is_online(config) else None
  batches = data.stream(config, rows, devices) if written is None else written
  config = run_length.of_data(config, batches)
  with (
    progress_lib.phase("reading the teacher", stream=stream)
    if decisions.teacher(config)
    else contextlib.nullcontext()
  ):
    taught = teacher.load(config, base, devices)
    teacher.check_room(config, taught, rows)
  read_by = None if taught is None else (taught.reader, taught.vocab)
  with settings.section("objective"):
    loss = objective.make(config, base, rows.channels, teacher=read_by)
  if loss.needs_reference:
    reference.check(config, base)
  other = reference.in_step(config, base, devices) if loss.needs_reference else None
  with progress_lib.phase("making what trains", stream=stream), settings.section("adapter"):
    trees = adapter.make(config, base, other, devices)
    trees = dataclasses.replace(trees, context=teacher.beside(config, trees.context, taught))
  started.ends("adapter")
  if written is not None:
    written.bind(trees, loss, taught)
  with settings.section("optimizer"):
    updates, schedule = optimizer.make(config, base.config)
    shapes = state_lib.abstract(trees.trainable, updates, trees.carried, loss, devices)
  return Pieces(
    config=config,
    mesh=devices,
    model=base,
    data=rows,
    trees=trees,
    objective=loss,
    optimizer=updates,
    schedule=schedule,
    batches=batches,
    step=jitted_step(config, trees.adapter_config, loss, updates, shapes, schedule),
    task=turns.asked(config, base, questions.make(config, base, rows)),
    teacher=taught,
    suite=regress.of_run(config, base, rows),
  )


def jitted_step(
  config: ml_collections.ConfigDict,
  adapter_config: adapters.AnyConfig | None,
  loss: Scorer,
  updates: optax.GradientTransformation,
  shapes: State,
  rate: schedules.Rate,
) -> Any:
  """The training step, jitted once for all states of these shapes: its result lies as its argument does."""
  return step.jitted(
    loss,
    updates,
    shapes,
    accumulate=decisions.micro_batches(config, state_lib.devices(shapes)),
    seed=config.seed,
    rate=rate,
    hooks=adapters.hooks(adapter_config, config.steps),
  )


def _introduce(pieces: Pieces, say: Say) -> None:
  """What is about to run, before it does: parameters, data, and one example with its trained tokens marked."""
  trees, base = pieces.trees, pieces.model
  if trees.adapter_config is None:
    total = tree.size(of_policy(trees.trainable))
    say(f"trainable params: {total:,} || all params: {total:,} || trainable%: 100.0000")
    if critic.has(pieces.config):
      say(critic.told(pieces.config, trees.trainable))
  else:
    say(adapters.summary(trees.context.base, trees.adapter))
    if critic.has(pieces.config):
      say(critic.told(pieces.config, trees.trainable))
    size = tree.nbytes(trees.context.base) / 1e6
    say(f"base: {pieces.config.model.base}, {size:,.0f} MB")
  if base.earlier is not None and base.earlier.under and trees.adapter_config is not None:
    is_one = over.adds_up([*base.earlier.under, (trees.adapter, trees.adapter_config)])
    how = (
      "as one adapter of the base" if is_one else f"with what it stands on in {UNDER}/ beside it"
    )
    say(f"exported: {how}")
  if base.started is not None:
    say(base.started.describe())
  for sentence in pieces.data.reads:
    say(sentence)
  say(f"data: {pieces.batches.stats()}")
  say(run_length.describe(pieces.config, pieces.batches))
  if pieces.data.skipped:
    say(f"left out: {pieces.data.skipped}")
  if not online.is_online(pieces.config):
    say(f"held out: {len(pieces.data.eval)} examples")
  if pieces.data.eval:
    say(best.describe(pieces.config))
  for note in pieces.data.notes:
    say(note)
  if by := attention.told(pieces.config, base.config):
    say(by)
  if pieces.suite is not None:
    say(f"suite {pieces.suite.name}: {regress.described(pieces.suite)}, before and after training")
  if pieces.task is not None:
    say(f"answers: {_asked(pieces.task, pieces.config.eval.before)}")
  example = encoded.describe(pieces.data.examples[0], base.tokenizer)
  what = (
    "first prompt" if online.is_online(pieces.config) else "first example, trained tokens in [[ ]]"
  )
  say(f"{what}:\n{example}\n")


def _asked(task: tasks.Task, before: bool) -> str:
  """What is asked when, and who grades it."""
  when = "before and after training" if before else "after training"
  graders = ", ".join(grader.name for grader in task.graders)
  by = f", graded by {graders}" if graders else ", to be read in the report"
  count, longest = len(task.examples("test")), task.max_new_tokens
  return f"to {count} questions ({task.name}) {when}, at most {longest} tokens each{by}"


def _explain_memory(pieces: Pieces, say: Say) -> None:
  """Compiles the step and says what it needs; nothing is run."""
  batch = reference.blank(pieces.config, pieces.batches.batch(None), pieces.objective)
  batch = teacher.blank(pieces.config, batch)
  if pieces.mesh is not None:
    batch = distributed.global_batch(pieces.mesh, batch)
  began = time.monotonic()
  lowered = pieces.step.lower(pieces.abstract_state(), pieces.trees.context, batch)
  needed = lowered.compile().memory_analysis()
  say(
    f"memory a device: {needed.argument_size_in_bytes / 1e9:.2f} GB of parameters, optimizer state and batch, "
    f"{needed.temp_size_in_bytes / 1e9:.2f} GB of temporaries; compiled in {time.monotonic() - began:.1f} s"
  )
  say("dry run: nothing was trained or written")


@dataclasses.dataclass
class _Training:
  """A run in its folder, from its first state or its last checkpoint to its end."""

  pieces: Pieces
  folder: Path
  say: Say
  started: Started

  def to_the_end(self) -> int:
    """The exit code."""
    config = self.pieces.config
    checkpoints = Checkpoints(self.folder / "checkpoints", keep=config.checkpoint.keep)
    state = self.pieces.first_state()
    if isinstance(self.pieces.batches, online.Online):
      self.pieces.batches.folder = self.folder
    progress = loop.Progress()
    if checkpoints.latest() is not None:
      data.check_held_out(self.folder, config, self.pieces.data)
      state, progress = self._resumed(checkpoints, state)
      self._note_scoring(progress)
      self._regrade()
    else:
      if told := record.last_step(self.folder):
        self.say(
          f"{record.METRICS} goes to step {told} and no checkpoint is there: beginning again"
        )
      with progress_lib.phase("checking what the run starts from", stream=sys.stdout):
        self_checks.fresh_adapter(self.pieces, self.say)
        if isinstance(self.pieces.batches, online.Online):
          self.pieces.batches.check(state)
      self._note_scoring(progress)
      self.started.ends("checks")
      if config.eval.before and self.pieces.task is not None:
        self._evaluate_task("before", state)
        self.started.ends("answering before")
      if self.pieces.suite is not None:
        self._measure_suite("before", state, 0)
        self.started.ends("measuring before")
    state, progress, complete = loop.loop(self._run(), state, progress, checkpoints)
    if not complete:
      checkpoints.close()
      return signals.PREEMPTED
    self._check_sound(state, progress)
    if best.of(config).is_given and progress.best_step not in (0, progress.step):
      shapes = abstract(state)
      del state  # there may be no room for two
      state, _, _ = checkpoints.restore(shapes, step=progress.best_step)
    checkpoints.close()
    self._finish(state, progress)
    return 0

  def _resumed(self, checkpoints: Checkpoints, state: State) -> tuple[State, loop.Progress]:
    state, saved, at = checkpoints.restore(abstract(state))
    self.pieces = _on_its_base(self.pieces, state)
    self.pieces.batches.set_state(saved["batches"])
    progress, told = loop.Progress(**saved["progress"]), record.last_step(self.folder)
    if progress.step != at:
      raise ValueError(
        f"{self.folder / 'checkpoints' / str(at)} holds the state of step {progress.step}: its folder has been renamed;"
        " name it by that step"
      )
    self._take_up(progress)
    if told <= at - self.pieces.config.log_every:
      self.say(f"{record.METRICS} ends at step {told}: its lines from there to step {at} are gone")
    self.say(f"going on from step {at} of {self.pieces.config.steps}")
    return state, progress

  def _take_up(self, progress: loop.Progress) -> None:
    """What a run that was given other steps at this one counts anew."""
    history = record.read(self.folder).history
    if not history or history[-1]["step"] != progress.step:
      return
    progress.unimproved = 0
    if history[-1]["reached"] > progress.step and not best.of(self.pieces.config).is_given:
      # what was exported is perhaps of a step that this run takes otherwise
      progress.best_step, progress.best_value = 0, None

  def _run(self) -> loop.Run:
    pieces, config = self.pieces, self.pieces.config
    return loop.Run(
      folder=self.folder,
      steps=config.steps,
      step=pieces.step,
      evaluate=jax.jit(evaluation(pieces.objective)),
      context=pieces.trees.context,
      batches=pieces.batches,
      eval_batches=pieces.eval_batches,
      learning_rate=jax.jit(pieces.schedule),  # in one program, not one for each of its operations
      export=self._export_best,
      best=best.of(config),
      trackers=functools.partial(trackers.of_run, self.folder, settings.plain(config)),
      check_start=pieces.objective.check_start,
      check_step=functools.partial(online.check_step, config),
      mesh=pieces.mesh,
      eval_every=config.eval.every if pieces.data.eval else 0,
      save_every=config.checkpoint.every,
      log_every=config.log_every,
      max_skipped=config.max_skipped,
      started=self.started,
    )

  def _export_best(self, state: State, name: str) -> None:
    """The best so far; an older one that a finished run put aside is no longer that."""
    self._export(state, name)
    if distributed.is_main():
      shutil.rmtree(_aside(self._exported), ignore_errors=True)

  @property
  def _exported(self) -> Path:
    """The folder of what the run gives."""
    is_full = self.pieces.trees.adapter_config is None
    return self.folder / ("model" if is_full else "adapter")

  def _export(self, state: State, name: str) -> None:
    """The adapter as a PEFT folder, or (full fine-tuning) the model as a Hugging Face folder."""
    pieces, base = self.pieces, self.pieces.model
    trained = distributed.whole(of_policy(state.trainable), pieces.mesh)
    carried = distributed.whole(of_policy(state.carried), pieces.mesh)
    if not distributed.is_main():
      return
    adapter_config = pieces.trees.adapter_config
    if adapter_config is not None:
      nodes = tree.combine(trained, carried)
      under = () if base.earlier is None else base.earlier.under
      over.save(
        self.folder / name,
        [*under, (nodes, adapter_config)],
        base.config,
        base_name=pieces.config.model.name,
        finish=self._accompany,
      )
      return
    source = json.loads(base.config.source)
    dtype = files.numpy_dtype(source.get("dtype") or source.get("torch_dtype") or "float32")
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), trained)
    folder = self.folder / name.replace("adapter", "model")
    hf.save(folder, params, base.config, finish=self._accompany)

  def _accompany(self, folder: Path) -> None:
    """Beside what is exported stands what it needs to be used as it was trained."""
    pieces, config = self.pieces, self.pieces.config
    how = use.manner_of(config, is_chat=pieces.data.is_chat)
    spoken = pieces.model.speech or pieces.model.folder
    export.accompany(folder, spoken, config.model.template, how)

  def _evaluate_task(self, when: str, state: State) -> None:
    """Answers what the run asks, and keeps the answers with their grades beside the metrics."""
    base, task = self.pieces.model, self.pieces.task
    if task is None:
      return
    params = self._for_writing(state)
    doing = f"answering {when} training"
    with settings.section("eval.task"), progress_lib.counter(doing) as count:
      result = tasks.evaluate(
        params,
        base.config,
        base.tokenizer,
        task=task,
        template=base.template,
        dtype=base.dtype,
        progress=count,
      )
    files.write_json(self.folder / f"evaluation-{when}.json", result.to_json())
    for line in report.told(result, when):
      self.say(line)

  def _for_writing(self, state: State) -> Any:
    """The parameters of a state, as they write best."""
    pieces = self.pieces
    if pieces.trees.adapter_config is None:
      return decoder.multiplied_in(memory.fetch(of_policy(state.trainable)), pieces.model.products)
    nodes = tree.combine(of_policy(state.trainable), of_policy(state.carried))
    return adapters.settled(pieces.trees.context.base, nodes)

  def _measure_suite(self, when: str, state: State, step: int) -> None:
    """What the suite says of a state, kept in the run's folder."""
    if self.pieces.suite is not None:
      params = self._for_writing(state)
      regress.measured_in(self.folder, when, step, self.pieces.suite, self.pieces.model, params)

  def _compare_suite(self) -> dict[str, float]:
    """What became of the suite, said and written beside the metrics; its results, for done.json."""
    if self.pieces.suite is None:
      return {}
    found = regress.compared_in(self.folder, self.pieces.suite)
    rich.print(gate.table(found))
    for sentence in gate.sentences(found):
      self.say(sentence)
    return found.finals()

  def _note_scoring(self, progress: loop.Progress) -> None:
    if not isinstance(self.pieces.batches, online.Online) or not distributed.is_main():
      return
    if told := scoring.note_changes(self.folder, self.pieces.config, progress.step):
      self.say(f"warning: {told}")

  def _regrade(self) -> None:
    """The answers before training are graded as those after it will be, where a metric's code has changed since."""
    task, path = self.pieces.task, self.folder / record.BEFORE
    if task is None:
      return
    was = files.read_json(self.folder / record.CONFIG).get("metrics", {})
    before = record.read_json(path)
    if before is not None:
      # by what they were graded last, which need not be what the run began with
      was = was | before.get("digests", {})
    changed = [g.name for g in task.graders if g.name in was and g.digest != was[g.name]]
    if not changed:
      return
    anew = ""
    if before is not None:
      result = record.TaskResult.from_json(before)
      files.write_json(path, tasks.regraded(result, task).to_json())
      anew = ": the answers before training were graded anew with it"
    self.say(f"the metric {', '.join(changed)} has changed since this run began{anew}")

  def _check_sound(self, state: State, progress: loop.Progress) -> None:
    """Raises Diverged where what the run made, or what it gives, is not finite: that is neither exported nor done."""
    kept = f"nothing was exported; checkpoints up to step {progress.step} are kept"
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state.adapter)[0]:
      path = jax.tree_util.keystr(keys, simple=True, separator="/")
      if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(_is_finite(leaf)):
        raise loop.Diverged(
          f"{path} holds numbers that are not finite after step {progress.step}; {kept}"
        )
    left_out = int(state.skipped)
    if left_out == progress.step:
      raise loop.Diverged(
        f"none of the {left_out} updates was finite: nothing was trained and {kept}. Lower optimizer.lr, or look at the"
        " data and the base"
      )
    largest = _largest(state.trainable)
    if largest > LARGEST:
      raise loop.Diverged(
        f"after step {progress.step} what was trained has grown to {largest:.2g}, beyond what half precision holds;"
        f" {kept}. Lower optimizer.lr in another --workdir"
      )
    is_sound = progress.is_sound
    if is_sound and (int(state.skipped_in_a_row) or largest > LARGE):
      is_sound = self._gives_numbers(state)
    if not is_sound:
      raise loop.Diverged(
        f"after step {progress.step} the loss is not finite; {kept}. Lower optimizer.lr in another --workdir, or look"
        " at the data and the base"
      )

  def _gives_numbers(self, state: State) -> bool:
    """Whether the loss of some batch is finite; one that is bad in itself says nothing."""
    pieces, context = self.pieces, state.context(self.pieces.trees.context)
    measure = jax.jit(evaluation(pieces.objective))
    for _ in range(BATCHES_TRIED):
      batch = pieces.batches.batch(state)
      placed = batch if pieces.mesh is None else distributed.global_batch(pieces.mesh, batch)
      loss = metrics.read(measured(measure, [placed], state.trainable, context, state.memory))[
        "loss"
      ]
      if math.isfinite(loss):
        return True
    return False

  def _finish(self, state: State, progress: loop.Progress) -> None:
    """Exports, last evaluation, report; `done.json` comes last, so that it means complete.

    state: what the run gives: the last, or the best.
    """
    exported, chosen = self._exported, best.of(self.pieces.config)
    if progress.best_step not in (0, progress.step) and distributed.is_main():
      value = f"{progress.best_value:.4f} at step {progress.best_step}"
      if chosen.is_given:
        self.say(f"exported is the best, {chosen.metric} {value}; the last is in checkpoints/")
      elif exported.exists():
        if not _aside(exported).exists():
          exported.rename(_aside(exported))
        self.say(f"lowest eval_loss {value}: kept as {_aside(exported)}")
    with progress_lib.phase("writing what was trained", stream=sys.stdout):
      self._export(state, "adapter")
    self._evaluate_task("after", state)
    self._measure_suite("after", state, progress.step)
    if not distributed.is_main():
      return
    done = {
      "steps": progress.step,
      "seconds": round(progress.seconds, 1),
      "started": self.started.seconds(),
      "tokens": progress.tokens,
      **best.reached(chosen, progress, self.pieces.config.steps),
      **({record.HISTORY: history} if (history := record.read(self.folder).history) else {}),
      "final": {
        **record.last_values(self.folder),
        **report.graded(record.read(self.folder)),
        **self._compare_suite(),
      },
    }
    with progress_lib.phase("drawing the report", stream=sys.stdout):
      page = report.write(self.folder, done=done)
    files.write_json(self.folder / record.DONE, done)
    rich.print(report.summary_table(self.folder))
    self.say(f"{exported.name}: {exported}\nreport: {page}")
    self.say(f"use it: {report.use_command(record.read(self.folder))}")


def _aside(exported: Path) -> Path:
  """Where the best lies beside the last."""
  return exported.with_name(f"{exported.name}-best")


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
  return jnp.all(jnp.isfinite(memory.fetch(x)))


def _largest(arrays: Any) -> float:
  """The largest absolute value."""
  of = jax.jit(lambda x: jnp.max(jnp.abs(memory.fetch(x)), initial=0))
  return max((float(of(x)) for x in jax.tree.leaves(arrays)), default=0.0)


def _on_its_base(pieces: Pieces, state: State) -> Pieces:
  """The pieces with the base that the checkpoint's adapter belongs to, where a start was taken out of it."""
  if pieces.model.started is None:
    return pieces
  of_state = (of_policy(state.trainable), of_policy(state.carried))
  trained, carried = (distributed.whole(part, pieces.mesh) for part in of_state)
  # a product of sharded factors is added up otherwise
  nodes = tree.flatten(jax.device_get(tree.combine(trained, carried)))
  context = adapter.resumed(pieces.model, pieces.trees.context, nodes, pieces.mesh)
  return dataclasses.replace(pieces, trees=dataclasses.replace(pieces.trees, context=context))


def abstract(state: State) -> Any:
  """The shapes of a state, and where it lies."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
