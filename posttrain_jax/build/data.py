"""config.data: rows, read, checked and encoded, and the stream of batches made of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from posttrain_jax.build import decisions, self_checks
from posttrain_jax.build.model import Model
from posttrain_jax.core import distributed
from posttrain_jax.data import answers, chat, companions, loader, mixture, schema
from posttrain_jax.evals import tasks
from posttrain_jax.losses import advantage
from posttrain_jax.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class Data:
  """Encoded examples; `skipped` says in words what was left out, "" for nothing."""

  train: Any  # a sequence of examples, or a mixture
  eval: Sequence[Any]
  channels: tuple[str, ...]
  skipped: str

  @property
  def examples(self) -> Sequence[Any]:
    """Every example to train on, each once."""
    return self.train.examples if isinstance(self.train, mixture.Mixture) else self.train

  def map(self, change: Callable[[Sequence[Any]], Sequence[Any]]) -> Data:
    """The data with its examples, one for one, as `change` makes them of all that there are of a split."""
    train = change(self.examples)
    if isinstance(self.train, mixture.Mixture):
      train = self.train.holding(train)
    return dataclasses.replace(self, train=train, eval=change(self.eval) if self.eval else ())


def read(config: ml_collections.ConfigDict, model: Model) -> Data:
  """config.data read, checked and encoded.

  Raises:
    RowError: a row that cannot be used, with its file and line.
    ConfigError: settings that do not fit one another.
  """
  d = config.data
  train, skipped = _sources(config, model)
  if d.limit:
    train = train[: d.limit]
  held_out: Sequence[Any]
  if d.eval or d.train in tasks.TASKS:
    held_out, also_skipped = _encoded(config, d.eval or d.train, "eval", model, d.columns)
    skipped += also_skipped
    held_out = held_out[: d.eval_rows] if d.eval_rows else held_out
  elif d.eval_rows:
    if len(train) <= d.eval_rows:
      raise ConfigError(
        f"data.eval_rows={d.eval_rows} would leave nothing of the {len(train)} rows to train on; "
        "lower it or name data.eval"
      )
    train, held_out = train[: -d.eval_rows], train[-d.eval_rows :]
  else:
    held_out = ()
  if d.replay:
    general, also_skipped = _encoded(config, d.replay, "train", model, d.replay_columns)
    skipped += also_skipped
    train = mixture.replay(train, general, d.replay_fraction, by=d.replay_by, seed=config.seed)
  data = Data(train, held_out, (), "; ".join(map(str, skipped)))
  if d.kind == "scored":
    data = data.map(functools.partial(with_advantages, config))
  if model.template is not None and d.kind != "steps":
    self_checks.end_of_turn(data.examples, model.tokenizer, model.template)
  channels = loader.channel_names(data.examples, held_out)
  return dataclasses.replace(data, channels=channels)


def with_advantages(
  config: ml_collections.ConfigDict, examples: Sequence[answers.Answers]
) -> Sequence[answers.Answers]:
  """Groups of scored answers with the advantage of each, as config.objective.advantage says.

  "batch" divides by one deviation over the data: what is in an optimizer batch is not known yet.
  """
  how = config.objective.advantage
  if not examples:
    return examples
  scores = _padded([example.values["score"] for example in examples])
  if how == "leave_one_out":
    advantages = advantage.leave_one_out(scores)
  else:
    advantages = advantage.group_relative(scores, scale=how)
  examples = answers.with_values(examples, "deviation", _trimmed(_deviations(scores), examples))
  return answers.with_values(examples, "advantage", _trimmed(advantages, examples))


def _padded(groups: Sequence[Sequence[float]]) -> jax.Array:
  """[groups, largest group] float32, NaN behind smaller ones.

  Raises:
    ValueError: a group has one answer.
  """
  if min(map(len, groups)) < 2:
    raise ValueError("a row of scored answers has one: its advantage is over others to its prompt")
  padded = np.full((len(groups), max(map(len, groups))), np.nan, np.float32)
  for row, group in zip(padded, groups):
    row[: len(group)] = group
  return jnp.asarray(padded)


def _deviations(scores: jax.Array) -> jax.Array:
  """The standard deviation of each group, at each of its answers; 0 where it agrees, or has one score."""
  centred = advantage.group_relative(scores, scale="none")
  count = jnp.sum(~jnp.isnan(scores), axis=1, keepdims=True)
  squares = jnp.sum(centred**2, axis=1, keepdims=True)
  return jnp.broadcast_to(jnp.sqrt(squares / jnp.maximum(count - 1, 1)), scores.shape)


def _trimmed(values: Any, examples: Sequence[answers.Answers]) -> list[list[float]]:
  """What is not padding of each group."""
  return [row[: e.count].tolist() for row, e in zip(np.asarray(values), examples, strict=True)]


def _sources(config: ml_collections.ConfigDict, model: Model) -> tuple[Any, list[str]]:
  """config.data.train: one source, or several as `a.jsonl*0.7+b.jsonl*0.3`, fractions of the tokens."""
  text, columns = config.data.train, config.data.columns
  if not decisions.is_mixture(text):
    return _encoded(config, text, "train", model, columns)
  sources, fractions, skipped = {}, {}, []
  for part in text.split("+"):
    name, _, fraction = part.rpartition("*")
    try:
      fractions[name] = float(fraction)
    except ValueError:
      raise ConfigError(f"data.train={text!r}: write a mixture as FIRST*0.7+SECOND*0.3") from None
    sources[name], also_skipped = _encoded(config, name, "train", model, columns)
    skipped += also_skipped
  return mixture.Mixture(sources, fractions, by="tokens", seed=config.seed), skipped


def _encoded(config, source, split, model, mapping) -> tuple[Sequence[Any], list[str]]:
  """(examples, [what was skipped])."""
  d = config.data
  rows = schema.read(
    source,
    split=split,
    on_error=d.on_error,
    columns=columns(mapping),
    chat=bool(d.chat and model.template is not None),
    system=d.system if d.chat and model.template is not None else None,
  )
  how: dict[str, Any] = dict(max_length=d.length, truncate=d.truncate, on_error=d.on_error)
  if d.kind == "text":
    how |= dict(train_on=d.train_on)
    examples = chat.encode_all(rows, model.tokenizer, model.template, **how)
  else:
    how |= dict(kind=d.kind, share=d.share_prompt)
    examples = answers.encode_all(list(rows), model.tokenizer, model.template, **how)
  if decisions.has_companions(config):
    beside = companions.beside(examples.examples, d.length, share=d.share_prompt)
    examples = dataclasses.replace(examples, examples=tuple(beside))
  skipped = [f"{source}: {part}" for part in (rows.skipped, examples.skipped) if len(part)]
  return examples.examples, skipped


def columns(mapping: ml_collections.ConfigDict) -> dict[str, str | list[str]] | None:
  """config.data.columns as `schema.read` takes it; None where it is empty."""
  plain = mapping.to_dict()
  return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()} or None


def stream(
  config: ml_collections.ConfigDict, data: Data, mesh: jax.sharding.Mesh | None
) -> loader.Loader:
  """The resumable stream of this process's share of the optimizer batches."""
  return loader.Loader(
    data.train,
    batch_size=config.batch.rows,
    length=config.data.length,
    packing=config.data.packing,
    seed=config.seed,
    shard=distributed.shard(mesh),
    accumulate=config.batch.accumulate,
    channels=data.channels,
  )
