"""What a model, an adapter or a run is worth on held-out data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import peft_format
from posttrain_jax.build import adapter as adapter_lib
from posttrain_jax.build import checks, decisions, objective, reference
from posttrain_jax.build import data as data_lib
from posttrain_jax.build import model as model_lib
from posttrain_jax.core import files
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.data import chat, loader
from posttrain_jax.evals import losses as losses_lib
from posttrain_jax.evals import margins, tasks
from posttrain_jax.models import fetch, hf, rotary
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.objectives import Context, Preference, Scorer, Sum, evaluation, measured
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model ready to be asked: one adapter merged into it, or several to be bound as one."""

  params: Any
  config: ModelConfig
  ensemble: Sequence[Any]
  tokenizer: Any
  template: Any  # None for a base model that has no chat template

  @property
  def alone(self) -> tuple[Any, ModelConfig, Any, Any]:
    """(params, config, tokenizer, template) of a model without an ensemble.

    Raises:
      ConfigError: several adapters were named.
    """
    if self.ensemble:
      raise ConfigError("--adapter: answers are drawn from one adapter")
    return self.params, self.config, self.tokenizer, self.template


def load(name: str, adapter: str | None, template: str = "tokenizer") -> Loaded:
  """A model by its name or folder, with an adapter's folder, or several with commas between."""
  folder = fetch.resolve(name)
  params, config = hf.load(folder, dtype=decisions.dtype("auto"))
  params, config, ensemble = _adapted(params, config, adapter)
  tokenizer = chat.load_tokenizer(folder)
  return Loaded(params, config, ensemble, tokenizer, model_lib.template_of(tokenizer, template))


def evaluate(
  *,
  config: str | None = None,
  overrides: Sequence[str] = (),
  workdir: str | None = None,
  model: str | None = None,
  adapter: str | None = None,
  data: str | None = None,
  limit: int = 0,
) -> dict[str, Any]:
  """Loss and token accuracy on `data`, and for a built-in task how many answers were right.

  A run folder brings its own model, adapter and data; `eval.json` is left in it.  Without one, `model` and `data` say
  what to evaluate on what.  Several adapters, with commas between, are an ensemble: the loss is told of each, a task is
  answered with all of them in one batch, and the commonest answer counts.

  Raises:
    ConfigError: too little was said, or the run has produced nothing yet.
  """
  run = _settings(config, overrides, workdir)
  own_data = data is None
  if run is not None:
    checks.check(run)
    if workdir and not model and not adapter:
      model, adapter = _produced(Path(workdir), run)
    model, data = model or run.model.name, data or run.data.eval or run.data.train
  if run is not None and run.objective.name != "sft":
    results = _on_answers(run, str(model), adapter, None if own_data else data, workdir)
  elif model and data:
    template = run.model.template if run is not None else "tokenizer"
    columns = data_lib.columns(run.data.columns) if run is not None and own_data else None
    loaded = load(model, adapter, template)
    results = {"model": str(fetch.resolve(model)), "adapter": adapter, "data": data}
    results |= _on_text(loaded, data, columns, limit)
  else:
    raise ConfigError("write --workdir=DIR (a run), or --model=NAME_OR_DIR and --data=SOURCE")
  if workdir:
    files.write_json(Path(workdir) / "eval.json", results)
  return results


def _on_text(loaded: Loaded, data: str, columns: Any, limit: int) -> dict[str, Any]:
  """Losses, of each member of an ensemble, and of a built-in task the answers that were right."""
  results: dict[str, Any] = {}
  loss = functools.partial(
    losses_lib.losses,
    config=loaded.config,
    tokenizer=loaded.tokenizer,
    template=loaded.template,
    source=data,
    columns=columns,
    limit=limit,
  )
  if loaded.ensemble:
    results["members"] = [loss(adapters.bind(loaded.params, node)) for node in loaded.ensemble]
  else:
    results.update(loss(loaded.params))
  if data not in tasks.TASKS:
    return results
  answered = tasks.evaluate(
    loaded.params,
    loaded.config,
    loaded.tokenizer,
    task=data,
    split="test",
    limit=limit or None,
    template=loaded.template,
    ensemble=loaded.ensemble,
  )
  if loaded.ensemble:
    for member, right in zip(results["members"], answered.by_member):
      member["accuracy"] = right / answered.total
  by_channel = {name: f"{right}/{n}" for name, (right, n) in answered.by_channel.items()}
  return results | {
    "accuracy": answered.accuracy,
    "correct": answered.correct,
    "total": answered.total,
    "by_channel": by_channel,
  }


def _on_answers(
  run: ml_collections.ConfigDict,
  name: str,
  adapter: str | None,
  source: str | None,
  workdir: str | None,
) -> dict[str, Any]:
  """What an objective on answers says of its held-out rows; of pairs also a report of their margins."""
  config = ml_collections.ConfigDict(run.to_dict())
  if source is not None:
    config.data.eval, config.data.eval_rows = source, 0
  # an adapter file is one of the original base: where that was stored as it is and no more, it is so here
  adapter_config = adapter_lib.described(config)
  quantised = config.model.base != "dense"
  if adapter_config is None or adapter_config.changes_base or adapter_config.context_length:
    quantised, config.model.base = False, "dense"
  if not quantised:
    config.adapter = ml_collections.ConfigDict({"method": "none"})
  base = model_lib.load(config)
  # the policy is what the run made, the reference what it says; nothing trains here
  config.adapter = ml_collections.ConfigDict({"method": "none"})
  params, model_config = _policy(base, name, adapter, merged=not quantised)
  policy = dataclasses.replace(base, params=params, config=model_config)
  loss = objective.make(config, policy, ())
  other = reference.params(config, base, None) if loss.needs_reference else None
  rows = data_lib.read(config, policy)
  examples = rows.eval or rows.train
  batches = loader.eval_batches(
    examples, batch_size=run.eval.rows, length=run.data.length, packing=run.data.packing
  )
  context = Context(reference=other)
  measure = jax.jit(evaluation(loss))
  metrics = measured(measure, batches, params, context, loss.start(None))
  results: dict[str, Any] = {"model": name, "adapter": adapter, "examples": len(examples)}
  results |= metrics_lib.read(metrics)
  pairs = _preference(loss)
  if pairs is not None:
    compared = _margins(pairs, params, context, examples, run, base.tokenizer)
    if workdir:
      diagnosis, path = margins.write(workdir, compared)
      print(f"report: {path}")
    else:
      diagnosis = margins.diagnose(compared)
    results["diagnosis"] = diagnosis
  return results


def _preference(loss: Scorer) -> Preference | None:
  """The part of an objective that compares pairs."""
  parts = [part for _, part, _ in loss.parts] if isinstance(loss, Sum) else [loss]
  return next((part for part in parts if isinstance(part, Preference)), None)


def _policy(
  base: model_lib.Model, name: str, adapter: str | None, *, merged: bool
) -> tuple[Any, ModelConfig]:
  """What a run has made: its adapter merged into the base or bound to it, or the model that it wrote."""
  if adapter and not merged:
    node, _ = peft_format.load(adapter, base.params, base.config)
    return adapters.bind(base.params, node), base.config
  if adapter:
    return _adapted(base.params, base.config, adapter)[:2]
  return hf.load(fetch.resolve(name), dtype=base.dtype)


def _margins(
  loss: Preference, params: Any, context: Context, examples: Any, run: Any, tokenizer: Any
) -> margins.Compared:
  compare = jax.jit(loss.compare)
  columns: dict[str, list[np.ndarray]] = {}
  # one example a row, so that rows are in the order of the examples
  length = max(map(len, examples))
  for start in range(0, len(examples), run.eval.rows):
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


def _adapted(
  params: Any, config: ModelConfig, adapter: str | None
) -> tuple[Any, ModelConfig, list[Any]]:
  """(params, config, ensemble): one adapter merged into params, or several, with commas between, to be bound as one."""
  folders = adapter.split(",") if adapter else []
  loaded = [peft_format.load(folder, params, config) for folder in folders]
  lengths = {adapter_config.context_length for _, adapter_config in loaded}
  if len(lengths) > 1:
    raise ConfigError(f"{adapter}: the adapters are made for contexts of different lengths")
  config = rotary.stretched(config, max(lengths, default=0))
  if len(loaded) == 1:
    return adapters.merge(params, loaded[0][0]), config, []
  return params, config, [node for node, _ in loaded]


def _settings(
  config: str | None, overrides: Sequence[str], workdir: str | None
) -> ml_collections.ConfigDict | None:
  if config:
    return settings.load(config, overrides)
  if not workdir:
    return None
  written = Path(workdir) / record.CONFIG
  if not written.exists():
    raise ConfigError(f"{workdir} holds no run: there is no {record.CONFIG}")
  return ml_collections.ConfigDict(files.read_json(written)["config"])


def _produced(workdir: Path, run: ml_collections.ConfigDict) -> tuple[str, str | None]:
  """(model, adapter) that the run has exported."""
  if (workdir / "adapter").exists():
    return run.model.name, str(workdir / "adapter")
  if (workdir / "model").exists():
    return str(workdir / "model"), None
  raise ConfigError(
    f"{workdir} holds neither adapter/ nor model/: the run has exported nothing yet; run its train command again"
  )
