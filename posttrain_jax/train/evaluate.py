"""`posttrain eval`: what a model, an adapter or a run is worth on held-out data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import rich

from posttrain_jax import adapters
from posttrain_jax.adapters import peft_format
from posttrain_jax.core import files
from posttrain_jax.data import chat, loader, schema
from posttrain_jax.evals import margins, tasks
from posttrain_jax.evals import pairs as pair_lib
from posttrain_jax.evals import run as runs
from posttrain_jax.models import before, fetch, hf, rotary
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.train import assemble, comparisons, objectives, settings, step
from posttrain_jax.train import metrics as metrics_lib
from posttrain_jax.train.settings import ConfigError

ROWS = 8  # examples in an evaluation batch


def evaluate(
  *,
  config: str | None = None,
  overrides: Sequence[str] = (),
  workdir: str | None = None,
  model: str | None = None,
  adapter: str | None = None,
  data: str | None = None,
  limit: int = 0,
) -> int:
  """Prints loss and token accuracy on `data`, and for a built-in task how many answers were right.

  A run folder brings its own model, adapter and data; `eval.json` is left in it.  Without one, `model` and `data` say
  what to evaluate on what.  Several adapters, with commas between, are an ensemble: the loss is told of each, a task is
  answered with all of them in one batch, and the commonest answer counts.

  Raises:
    ConfigError: too little was said, or the run has produced nothing yet.
  """
  run = _settings(config, overrides, workdir)
  own_data = data is None
  if run is not None:
    if workdir and not model and not adapter:
      model, adapter = _produced(Path(workdir), run)
    model, data = model or run.model.name, data or run.data.eval or run.data.train
  if run is not None and run.objective.name != "sft":
    return _compared(run, str(model), adapter, None if own_data else data, workdir)
  if not model or not data:
    raise ConfigError("write --workdir=DIR (a run), or --model=NAME_OR_DIR and --data=SOURCE")
  folder = fetch.resolve(model)
  name = run.model.template if run is not None else "tokenizer"
  params, model_config, ensemble, tokenizer, template = loaded(folder, adapter, name)
  results: dict[str, Any] = {"model": str(folder), "adapter": adapter, "data": data}
  loss = lambda params: losses(
    params, model_config, tokenizer, template, data, run, own_data, limit
  )
  if ensemble:
    results["members"] = [loss(adapters.bind(params, member)) for member in ensemble]
  else:
    results.update(loss(params))
  if data in tasks.TASKS:
    answered = tasks.evaluate(
      params,
      model_config,
      tokenizer,
      task=data,
      split="test",
      limit=limit or None,
      template=template,
      ensemble=ensemble,
    )
    for member, right in zip(results.get("members", ()), answered.by_member):
      member["accuracy"] = right / answered.total
    results["accuracy"] = answered.accuracy
    results["correct"], results["total"] = answered.correct, answered.total
    results["by_channel"] = {
      name: f"{right}/{n}" for name, (right, n) in answered.by_channel.items()
    }
  rich.print_json(json.dumps(results))
  if workdir:
    files.write_json(Path(workdir) / "eval.json", results)
  return 0


def scores(model: str, adapter: str | None, sources: Sequence[str], limit: int) -> dict[str, float]:
  """{measure: value}: of a built-in task the share answered right, of any data the loss."""
  params, config, _, tokenizer, template = loaded(fetch.resolve(model), adapter, "tokenizer")
  found = {}
  for source in sources:
    name = Path(source).stem
    lost = losses(params, config, tokenizer, template, source, limit=limit)
    if source in tasks.TASKS:
      answered = tasks.evaluate(
        params, config, tokenizer, task=source, split="test", limit=limit or None, template=template
      )
      found[f"{name}, right"] = answered.accuracy
    found[f"{name}, loss"] = lost["loss"]
  return found


def loaded(folder: Path, adapter: str | None, name: str) -> tuple[Any, ModelConfig, list, Any, Any]:
  """(params, config, ensemble, tokenizer, chat template or None), the adapter merged where it is one."""
  params, model_config = hf.load(folder, dtype=assemble.compute_dtype("auto"))
  params, model_config, ensemble = _adapted(params, model_config, adapter)
  tokenizer = chat.load_tokenizer(folder)
  own = name == "tokenizer"
  template = (
    None if own and not tokenizer.chat_template else chat.template(tokenizer, None if own else name)
  )
  return params, model_config, ensemble, tokenizer, template


def _compared(run, model: str, adapter: str | None, data: str | None, workdir: str | None) -> int:
  """What an objective on answers says of its held-out rows; of pairs also a report of their margins."""
  mine = ml_collections.ConfigDict(run.to_dict())
  if data is not None:
    mine.data.eval, mine.data.eval_rows = data, 0
  # an adapter file is one of the original base: where that was stored as it is and no more, it is so here
  chosen = assemble.adapter_config(mine)
  quantised = mine.model.base != "dense"
  if chosen is None or chosen.changes_base or chosen.context_length:
    quantised, mine.model.base = False, "dense"
  if not quantised:
    mine.adapter = ml_collections.ConfigDict({"method": "none"})
  base = assemble.model(mine)
  # the policy is what the run made, the reference what it says; nothing trains here
  mine.adapter = ml_collections.ConfigDict({"method": "none"})
  params, config = _policy(base, model, adapter, merged=not quantised)
  policy = dataclasses.replace(base, params=params, config=config)
  objective = assemble.objective(mine, policy, ())
  other = None
  if isinstance(objective, objectives.Scorer) and objective.needs_reference:
    other = assemble.reference_params(mine, base, None)
  found = assemble.data(mine, policy)
  examples = found.eval or found.train
  batches = list(
    loader.eval_batches(
      examples, batch_size=run.eval.rows, length=run.data.length, packing=run.data.packing
    )
  )
  frozen = objectives.Frozen(reference=other, memory=objective.start(None))
  measure = jax.jit(step.evaluate(objective))
  total: Any = None
  for batch in batches:
    metrics = measure(params, frozen, batch)
    total = metrics if total is None else jax.tree.map(lambda a, b: a + b, total, metrics)
  results: dict[str, Any] = {"model": model, "adapter": adapter, "examples": len(examples)}
  results |= metrics_lib.read(total)
  if isinstance(objective, comparisons.Preference):
    compared = _margins(objective, params, frozen, examples, run, base.tokenizer)
    if workdir:
      diagnosis, path = margins.write(workdir, compared)
      print(f"report: {path}")
    else:
      diagnosis = margins.diagnose(compared)
    results |= {"diagnosis": diagnosis}
  rich.print_json(json.dumps(results))
  if workdir:
    files.write_json(Path(workdir) / "eval.json", results)
  return 0


def _policy(
  base: assemble.Model, model: str, adapter: str | None, *, merged: bool
) -> tuple[Any, ModelConfig]:
  """What a run has made: its adapter merged into the base or bound to it, or the model that it wrote."""
  if adapter and not merged:
    node, _ = peft_format.load(adapter, base.params, base.config)
    return adapters.bind(base.params, node), base.config
  if adapter:
    return _adapted(base.params, base.config, adapter)[:2]
  return hf.load(fetch.resolve(model), dtype=base.dtype)


def _margins(objective, params, frozen, examples, run, tokenizer) -> margins.Compared:
  compare = jax.jit(objective.compare)
  rows: dict[str, list[np.ndarray]] = {}
  # one example a row, so that rows are in the order of the examples
  length = max(map(len, examples))
  for start in range(0, len(examples), run.eval.rows):
    some = examples[start : start + run.eval.rows]
    (batch,) = loader.eval_batches(
      some, batch_size=run.eval.rows, edges=(length,), length=length, packing=False
    )
    for name, values in jax.device_get(compare(params, frozen, batch)).items():
      rows.setdefault(name, []).append(values[: len(some), 0])
  found = {name: np.concatenate(values) for name, values in rows.items()}
  del found["present"]
  return margins.Compared(**found, texts=[_texts(e, tokenizer) for e in examples])


def _texts(example, tokenizer) -> tuple[str, str, str]:
  """(prompt, chosen, rejected) of an example, decoded."""
  said = [tokenizer.decode(example.tokens[example.mask & (example.answer == i)]) for i in (0, 1)]
  prompt = example.tokens[~example.mask & (example.answer <= 0)]
  return tokenizer.decode(prompt), said[0], said[1]


def pairs(
  *,
  model: str,
  adapter: str | None,
  task: str,
  out: str,
  limit: int,
  samples: int,
  temperature: float,
  seed: int,
) -> int:
  """Writes preference pairs, JSONL, out of the model's own answers to a task's training questions.

  Raises:
    ConfigError: the file is there already, or every answer was right.
  """
  path = Path(out)
  if path.exists():
    raise ConfigError(f"{path} is there already: write another --out, or remove it")
  params, config, ensemble, tokenizer, template = loaded(fetch.resolve(model), adapter, "tokenizer")
  if ensemble:
    raise ConfigError("--adapter: answers are drawn from one adapter")
  made = pair_lib.make(
    params,
    config,
    tokenizer,
    task=task,
    limit=limit or None,
    samples=samples,
    temperature=temperature,
    seed=seed,
    template=template,
  )
  if not made.rows:
    raise ConfigError(
      f"all {samples} answers to each of {made.questions} questions were right: there is no pair; raise"
      " --temperature or --samples"
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows))
  print(f"{made}; written: {path}")
  return 0


def _adapted(params, config, adapter: str | None) -> tuple[Any, ModelConfig, list[Any]]:
  """(params, config, ensemble): one adapter merged into params, or several, with commas between, to be bound as one."""
  folders = adapter.split(",") if adapter else []
  loaded = [peft_format.load(folder, params, config) for folder in folders]
  lengths = {found.context_length for _, found in loaded}
  if len(lengths) > 1:
    raise ConfigError(f"{adapter}: the adapters are made for contexts of different lengths")
  config = rotary.stretched(config, max(lengths, default=0))
  if len(loaded) == 1:
    return adapters.merge(params, loaded[0][0]), config, []
  return params, config, [node for node, _ in loaded]


def _settings(config, overrides, workdir) -> ml_collections.ConfigDict | None:
  if config:
    return settings.load(config, overrides)
  if not workdir:
    return None
  record = Path(workdir) / runs.CONFIG
  if not record.exists():
    raise ConfigError(f"{workdir} holds no run: there is no {runs.CONFIG}")
  return ml_collections.ConfigDict(files.read_json(record)["config"])


def _produced(workdir: Path, run) -> tuple[str, str | None]:
  """(model, adapter) that the run has exported."""
  if (workdir / "adapter").exists():
    return run.model.name, str(workdir / "adapter")
  if (workdir / "model").exists():
    return str(workdir / "model"), None
  raise ConfigError(
    f"{workdir} holds neither adapter/ nor model/: the run has exported nothing yet; run its train command again"
  )


def losses(
  params, config, tokenizer, template, source, run=None, own_data=False, limit=0
) -> dict[str, float]:
  """Loss and token accuracy over the source's evaluation rows."""
  d = run.data if run is not None else None
  mapped = assemble.columns(d.columns) if d is not None and own_data else None
  split = "eval" if source in tasks.TASKS else "train"
  rows = schema.read(source, split=split, columns=mapped, chat=template is not None)
  examples = chat.encode_all(
    list(rows)[: limit or None],
    tokenizer,
    template,
    max_length=config.max_length - before.slots(params),
  ).examples
  channels = loader.channel_names(examples)
  objective = objectives.Sft(config, channels=channels)
  measure = jax.jit(step.evaluate(objective))
  length = max(map(len, examples))
  total: Any = None
  for batch in loader.eval_batches(
    examples, batch_size=ROWS, length=length, packing=False, channels=channels
  ):
    found = measure(params, objectives.Frozen(), batch)
    total = found if total is None else jax.tree.map(lambda a, b: a + b, total, found)
  return {"examples": len(examples), **metrics_lib.read(total)}
