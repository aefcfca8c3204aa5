"""What a model, an adapter or a run is worth on held-out data."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import layout
from posttrain_jax.build import adapter as adapter_lib
from posttrain_jax.build import checks, decisions, objective, questions, reference, teacher, use
from posttrain_jax.build import data as data_lib
from posttrain_jax.build import model as model_lib
from posttrain_jax.build import run as runs
from posttrain_jax.build import turns as turns_lib
from posttrain_jax.core import files, progress, tree
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core.checkpoint import Checkpoints
from posttrain_jax.data import loader, schema, turns
from posttrain_jax.evals import margins, tasks
from posttrain_jax.models import before, fetch, hf
from posttrain_jax.objectives import Context, Preference, Scorer, Sum, evaluation, measured
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError

log = logging.getLogger(__name__)
ROWS = 8  # examples in a batch, where no config says


def evaluate(
  *,
  config: str | None = None,
  overrides: Sequence[str] = (),
  workdir: str | None = None,
  model: str | None = None,
  adapter: str | None = None,
  data: str | None = None,
  columns: Mapping[str, Any] | None = None,
  limit: int = 0,
  base: str | None = None,
  template: str | None = None,
  metric: str | None = None,
  out: str | None = None,
) -> dict[str, Any]:
  """What the objective says of held-out rows, and how good answers to them are: of a built-in task, or by a metric.

  A run folder brings its own model, adapter and data: the rows that its training held out, prepared by the functions
  that prepared them there, so that the loss is the one that training printed.  `eval.json` is left in it.  Without one,
  `model` or `adapter`, and `data`, say what to evaluate on what.  Several adapters, with commas between, are an
  ensemble: the loss is told of each, a task is answered with all of them in one batch, and the commonest answer counts.

  Args:
    columns: of `data`, as config.data.columns: {"prompt": "question"}; None or {}: what the run's config says.
    limit: so many rows, drawn; 0 for all.
    base: how the base's matrices are stored; None: as they were when the adapter was trained.
    template: a chat template's name; None: what was trained with.
    metric: what grades answers to the rows, as config.eval.metric; None: what the run's config says.
    out: a JSONL file for the answers with their grades.

  Raises:
    ConfigError: too little was said, or the run has produced nothing yet.
  """
  workdir = workdir and str(Path(workdir).expanduser())
  run, is_whole = _settings(config, overrides, workdir), False
  if run is not None:
    checks.check(run)
    if workdir and not model and not adapter:
      model, adapter = use.produced(Path(workdir))
      is_whole = base is None and template is None
    model = model or run.model.name
  elif not data:
    raise ConfigError("write --workdir=DIR (a run), or --model=NAME_OR_DIR and --data=SOURCE")
  manner = None if run is None else use.manner_of(run)
  used = use.load(model, adapter, base=base, template=template, manner=manner)
  if run is not None and decisions.has_score(run) and not used.config.scores:
    raise ConfigError(
      f"{used.name} has no score head, which objective.name={run.objective.name} trains: write --workdir=DIR (its run)"
      " or --adapter=DIR"
    )
  if run is not None and is_whole and used.nodes:
    used = _on_its_rest(run, used)
  if run is None:
    used.check_writes()  # rows are imitated
  how = described(used, str(data), columns) if run is None else run
  if run is not None and columns:
    how = ml_collections.ConfigDict(
      {**run.to_dict(), "data": {**run.data.to_dict(), "columns": dict(columns)}}
    )
  how = how if metric is None else _grading(how, metric)
  results: dict[str, Any] = {"model": str(used.folder), "adapter": adapter}
  results["base"] = used.storage
  results["data"] = data or how.data.eval or how.data.train
  if run is None and metric and (kinds := _unlike(str(data), columns)):
    log.info("no loss: rows of %s are answered here, and not imitated", kinds)
  elif len(used.nodes) > 1:
    each = [_measured(how, used, params, data, limit, None) for params in used.members]
    results["members"] = each
  else:
    results |= _measured(how, used, used.bound, data, limit, workdir, is_whole=is_whole)
  task = _task(how, used, data, limit)
  if task is None and how.objective.name == "sft" and results["data"] in tasks.TASKS:
    task = tasks.TASKS[results["data"]]
  if task is not None:
    results |= _answered(used, task, limit, results.get("members", ()), out)
  elif out is not None:
    raise ConfigError(
      "--out: no answers are graded here; write --metric=exact (contained, json, number, FILE.py:name)"
    )
  if workdir:
    files.write_json(Path(workdir) / "eval.json", results)
  return results


def _on_its_rest(run: ml_collections.ConfigDict, used: use.Used) -> use.Used:
  """The model on the base that training had, where the adapter took its start out of it before it was quantised.

  What was left of the base, quantised, with the start beside it: the adapter's file is of the original.
  """
  adapter_config = adapter_lib.described(run)
  if adapter_config is None or not adapter_config.changes_base or run.model.base == "dense":
    return used
  log.info(
    "base: what the start left of it, in %s, as in training; on the original, for which the adapter's file is made, the"
    " loss is another (--base=dense)",
    run.model.base,
  )
  model = model_lib.load(run)
  assert model.started is not None
  nodes = tree.unflatten(model.started.nodes.items())
  params = adapters.original(model.params, nodes)
  return dataclasses.replace(used, params=params, bare=params, storage=run.model.base)


def described(
  used: use.Used, source: str, columns: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
  """What a config says of rows to imitate, where there is none: what the model was trained with, and its own length."""
  params = used.members[0] if len(used.nodes) > 1 else used.bound
  length = used.config.max_length - before.slots(params)
  manner = used.manner
  system = manner.system
  if system is not None:
    rows = schema.read(source, split="eval", columns=columns or None)
    system = system if turns.in_strings(rows, source) else None
  config = settings.load("sft:adapter=none").unlock()
  config.model.update(name=used.name, remat="none", base="dense")
  config.eval.rows = ROWS
  config.data.update(train="", eval="", eval_rows=0, packing=False, system=system)
  config.data.update(chat=manner.chat, length=length, columns={**(columns or {})})
  return config.lock()


def _measured(
  config: ml_collections.ConfigDict,
  used: use.Used,
  params: Any,
  source: str | None,
  limit: int,
  workdir: str | None,
  *,
  is_whole: bool = False,
) -> dict[str, Any]:
  """What the objective of a config says of parameters, on its held-out rows or on those of a source.

  is_whole: whether they are what the run in workdir trained, so that its checkpoint is of them.
  """
  model = as_model(used, params)
  data = data_lib.evaluated(config, model, source, limit)
  if workdir and source is None and not limit and data_lib.TRAINED_ON not in data.notes:
    data_lib.check_held_out(Path(workdir), config, data)
  for note in (*data.notes, *([f"left out: {data.skipped}"] if data.skipped else [])):
    log.info(note)
  taught = teacher.load(config, model, None)
  data = teacher.taught(config, taught, data, None, log.info)
  read_by = None if taught is None else (taught.reader, taught.vocab)
  loss = objective.make(config, model, data.channels, teacher=read_by)
  trainable, context, memory = _policy(config, used, params, loss, workdir if is_whole else None)
  context = teacher.beside(config, context, taught)
  batches = loader.eval_batches(
    data.eval,
    batch_size=config.eval.rows,
    length=config.data.length,
    packing=config.data.packing,
    channels=data.channels,
  )
  metrics = measured(
    jax.jit(evaluation(loss)), progress.told(batches, "evaluating"), trainable, context, memory
  )
  rows = "trained on" if data_lib.TRAINED_ON in data.notes else "held out"
  results: dict[str, Any] = {"examples": len(data.eval), **({} if source else {"rows": rows})}
  results |= metrics_lib.read(metrics)
  pairs = _preference(loss)
  if pairs is not None:
    compared_with = loss.context(context, memory)
    compared = _margins(pairs, trainable, compared_with, data.eval, config, used.tokenizer)
    if workdir:
      diagnosis, path = margins.write(workdir, compared)
      log.info("report: %s", path)
    else:
      diagnosis = margins.diagnose(compared)
    results["diagnosis"] = diagnosis
  return results


def _policy(
  config: ml_collections.ConfigDict,
  used: use.Used,
  params: Any,
  loss: Scorer,
  workdir: str | None,
) -> tuple[Any, Context, Any]:
  """(what is evaluated, what it is compared with, what the objective carries): of the checkpoint that a run gave."""
  memory = loss.start(None)
  carries = memory is not None or decisions.follows(config)
  if carries and workdir is not None:
    with Checkpoints(Path(workdir) / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
      if checkpoints.latest() is not None:
        pieces = runs.build(config, None)
        shapes = runs.abstract(pieces.first_state())
        state, _, _ = checkpoints.restore(shapes, step=record.read(workdir).given_step)
        return state.trainable, state.context(pieces.trees.context), state.memory
  if carries:
    log.info("what the objective carries from step to step begins anew: the loss is not training's")
  other = _reference(config, used) if loss.needs_reference else None
  return params, Context(reference=other), memory


def as_model(used: use.Used, params: Any) -> model_lib.Model:
  """What training has of a model, of one that is used."""
  return model_lib.Model(
    used.folder,
    params,
    used.config,
    used.tokenizer,
    used.template,
    used.dtype,
    bare=used.bare,
    products=used.products,
  )


def _reference(config: ml_collections.ConfigDict, used: use.Used) -> Any:
  """The parameters of config.objective.reference; of what was trained whole, the base is what it began with."""
  named = config.objective.reference
  if not decisions.is_full(config):
    return reference.params(config, as_model(used, used.params), None)
  if named == "base" or reference.is_adapter(named):
    folder = fetch.resolve(config.model.name)
    params, began = hf.load(folder, dtype=used.products, storage="dense", place=layout.place)
    model = dataclasses.replace(as_model(used, params), config=began, bare=params)
    return reference.params(config, model, None)
  return reference.params(config, as_model(used, None), None)


def _unlike(source: str, columns: Mapping[str, Any] | None) -> str:
  """The kinds of rows of a source that no text is imitated of, "" for none."""
  kinds = {row.kind for row in schema.read(source, split="eval", columns=columns or None)}
  return ", ".join(sorted(kinds - {"text", "messages", "prompt_completion"}))


def _grading(config: ml_collections.ConfigDict, metric: str) -> ml_collections.ConfigDict:
  """The config with another metric, of a run of any version."""
  asked = dict(samples=0, task="", task_limit=0, max_new_tokens=0) | config.eval.to_dict()
  return ml_collections.ConfigDict({**config.to_dict(), "eval": {**asked, "metric": metric}})


def _task(
  config: ml_collections.ConfigDict, used: use.Used, source: str | None, limit: int
) -> tasks.Task | None:
  """What a metric grades: the questions that training asked, or the rows of a source; None where there is no metric."""
  if not decisions.grades(config):
    return None
  used.check_writes()
  if limit:
    config = _grading(config, config.eval.metric)
    config.eval.task_limit = limit
  model = as_model(used, used.params)
  held_out = None if source or config.eval.task else data_lib.evaluated(config, model)
  if held_out is not None and data_lib.TRAINED_ON in held_out.notes:
    log.info("answers: %s", data_lib.TRAINED_ON)
  return turns_lib.asked(config, model, questions.make(config, model, held_out, source))


def _answered(
  used: use.Used,
  task: tasks.Task,
  limit: int,
  members: Sequence[dict[str, Any]],
  out: str | None,
) -> dict[str, Any]:
  """How good answers to a task are; each member of an ensemble is told its own share."""
  is_ensemble = len(used.nodes) > 1
  with progress.counter("answering") as count:
    answered = tasks.evaluate(
      used.params if is_ensemble else used.written(),
      used.config,
      used.tokenizer,
      task=task,
      split="test",
      limit=limit or None,
      template=used.template,
      ensemble=used.nodes if is_ensemble else (),
      dtype=used.dtype,
      progress=count,
    )
  for member, right in zip(members, answered.by_member):
    member["accuracy"] = right / answered.total
  if out is not None:
    lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answered.answers]
    files.write_text(Path(out), "".join(lines))
  by_channel = {name: f"{right}/{n}" for name, (right, n) in answered.by_channel.items()}
  counted = dict(accuracy=answered.accuracy, correct=answered.correct, by_channel=by_channel)
  return {
    **(counted if answered.is_share else {}),
    "total": answered.total,
    "scores": dict(answered.scores),
    "cut": answered.cut,
    **({"answers": out} if out is not None else {}),
  }


def scores(
  model: str, adapter: str | None, sources: Sequence[str], limit: int
) -> dict[str, dict[str, float]]:
  """{source: {measure: value}} of a model: of a built-in task the share answered right, of any data the loss."""
  used = use.load(model, adapter)
  results = {}
  for source in sources:
    config = described(used, source)
    lost = _measured(config, used, used.bound, source, limit, None)["loss"]
    asked = tasks.TASKS.get(source)
    right = {} if asked is None else _answered(used, asked, limit, (), None)
    results[source] = {name: right[name] for name in ("accuracy",) if right} | {"loss": lost}
  return results


def _preference(loss: Scorer) -> Preference | None:
  """The part of an objective that compares pairs."""
  parts = [part for _, part, _ in loss.parts] if isinstance(loss, Sum) else [loss]
  return next((part for part in parts if isinstance(part, Preference)), None)


def _margins(
  loss: Preference, params: Any, context: Context, examples: Any, run: Any, tokenizer: Any
) -> margins.Compared:
  compare = jax.jit(loss.compare)
  columns: dict[str, list[np.ndarray]] = {}
  # one example a row, so that rows are in the order of the examples
  length = max(map(len, examples))
  for start in progress.told(range(0, len(examples), run.eval.rows), "comparing pairs"):
    some = examples[start : start + run.eval.rows]
    (batch,) = loader.eval_batches(
      some, batch_size=run.eval.rows, edges=(length,), length=length, packing=False
    )
    for name, values in jax.device_get(compare(params, context, batch)).items():
      columns.setdefault(name, []).append(values[: len(some), 0])
  compared = {name: np.concatenate(values) for name, values in columns.items()}
  del compared["present"]
  return margins.Compared(**compared, texts=[_texts(e, tokenizer) for e in examples])


def _texts(example: Any, tokenizer: Any) -> tuple[str, str, str]:
  """(prompt, chosen, rejected) of an example, decoded."""
  said = [tokenizer.decode(example.tokens[example.mask & (example.answer == i)]) for i in (0, 1)]
  prompt = example.tokens[~example.mask & (example.answer <= 0)]
  return tokenizer.decode(prompt), said[0], said[1]


def _settings(
  config: str | None, overrides: Sequence[str], workdir: str | None
) -> ml_collections.ConfigDict | None:
  if config:
    return settings.load(config, overrides)
  if overrides:
    raise ConfigError(
      f"{overrides[0]} changes a config file's field: write --config=FILE before it"
    )
  if not workdir:
    return None
  if not (Path(workdir) / record.CONFIG).exists():
    raise ConfigError(f"{workdir} holds no run: there is no {record.CONFIG}")
  return settings.restored(record.config(workdir))
