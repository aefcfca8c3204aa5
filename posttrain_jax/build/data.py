"""config.data: rows, read, checked and encoded, and the stream of batches made of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from posttrain_jax.build import adapter, decisions, self_checks
from posttrain_jax.build.model import Model
from posttrain_jax.core import distributed, files
from posttrain_jax.data import answers, chat, companions, held_out, loader, mixture, schema
from posttrain_jax.data import bounds as bounds_lib
from posttrain_jax.data.errors import SHORTEN, RowError
from posttrain_jax.evals import tasks
from posttrain_jax.losses import advantage
from posttrain_jax.models import before as before_lib
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError

# data.kind -> the kinds of rows that it is made of
KINDS = {
  "text": ("text", "messages", "prompt_completion"),
  "pairs": ("preference",),
  "triples": ("preference",),
  "labels": ("unpaired", "preference"),
  "outcomes": ("unpaired", "preference"),
  "steps": ("stepwise",),
  "scored": ("scored",),
  "prompts": ("prompt", "prompt_completion", "messages", "preference", "unpaired", "scored"),
}
TRAINED_ON = "no rows were held out (data.eval_rows): these were trained on, so the loss says nothing of others"


@dataclasses.dataclass(frozen=True)
class Data:
  """Encoded examples; `skipped` says in words what was left out, "" for nothing."""

  train: Any  # a sequence of examples, or a mixture
  eval: Sequence[Any]
  channels: tuple[str, ...]
  skipped: str
  notes: tuple[str, ...] = ()  # what else is to be said before the run starts
  reads: tuple[str, ...] = ()  # what the columns of each source were taken for

  @property
  def examples(self) -> Sequence[Any]:
    """Every example to train on, each once."""
    return self.train.examples if isinstance(self.train, mixture.Mixture) else self.train

  @property
  def is_chat(self) -> bool:
    """Whether a chat template wrote any of the text."""
    return any(example.is_chat for example in self.examples)

  def map(self, change: Callable[[Sequence[Any]], Sequence[Any]]) -> Data:
    """The data with its examples, one for one, as `change` makes them of all that there are of a split."""
    train = change(self.examples)
    if isinstance(self.train, mixture.Mixture):
      train = self.train.holding(train)
    return dataclasses.replace(self, train=train, eval=change(self.eval) if self.eval else ())


def read(config: ml_collections.ConfigDict, model: Model) -> Data:
  """config.data read, checked and encoded: the one road to it, of training and evaluation alike.

  Raises:
    RowError: a row that cannot be used, with its file and line.
    ConfigError: settings that do not fit one another.
  """
  d = config.data
  train, told = _sources(config, model)
  if d.limit:
    train = held_out.limited(train, d.limit, seed=config.seed)
  train, eval_examples, also = _parted(config, model, train)
  told += also
  if d.replay:
    with told_of("data.replay"):
      general, also = _encoded(config, d.replay, "train", model, d.replay_columns)
    general, notes = _apart(general, eval_examples)
    told += also + _Told(notes=notes)
    train = mixture.replay(train, general, d.replay_fraction, by=d.replay_by, seed=config.seed)
  data = told.of(train, eval_examples)
  if model.template is not None and d.kind != "steps":
    self_checks.end_of_turn(data.examples, model.tokenizer, model.template, model.ends)
  return _finished(config, model, data)


def evaluated(
  config: ml_collections.ConfigDict, model: Model, source: str | None = None, limit: int = 0
) -> Data:
  """The data of an evaluation, in `eval`: what `read` holds out, or all rows of `source`, prepared as they are.

  Where nothing was held out, the rows that were trained on, which a note says.

  Args:
    limit: so many of its rows, drawn; 0 for all.
  """
  d = config.data
  told = _Told()
  if source is not None:
    with told_of("", SHORTEN):
      rows, told = _encoded(config, source, "eval", model, d.columns)
  elif d.eval or d.train in tasks.TASKS:
    _, rows, told = _parted(config, model, ())
  else:
    whole = read(config, model)
    rows = whole.eval
    told = _Told([whole.skipped] if whole.skipped else [])
    if not rows:
      rows, told = whole.examples, told + _Told(notes=[TRAINED_ON])
  if limit:
    rows = held_out.limited(rows, limit, seed=config.seed)
  data = told.of((), rows)
  return _finished(config, model, data, source)


@dataclasses.dataclass(frozen=True)
class _Told:
  """What was left out of rows, what else is to be said of them, and what their columns are, a sentence each."""

  skipped: list[str] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)
  reads: list[str] = dataclasses.field(default_factory=list)

  def __add__(self, other: _Told) -> _Told:
    return _Told(self.skipped + other.skipped, self.notes + other.notes, self.reads + other.reads)

  def of(self, train: Any, rows: Sequence[Any]) -> Data:
    reads = tuple(dict.fromkeys(self.reads))
    return Data(train, rows, (), "; ".join(self.skipped), tuple(self.notes), reads)


def _parted(
  config: ml_collections.ConfigDict, model: Model, train: Any
) -> tuple[Any, Sequence[Any], _Told]:
  """(what trains, what is held out, what is to be said)."""
  d = config.data
  if d.eval or d.train in tasks.TASKS:
    with told_of("data.eval" if d.eval else ""):
      rows, told = _encoded(config, d.eval or d.train, "eval", model, d.columns)
    if d.eval_rows != 0:
      most = held_out.MOST if d.eval_rows is None else d.eval_rows
      rows = held_out.limited(rows, most, seed=config.seed)
    return train, rows, told
  if d.eval_rows == 0:
    return train, (), _Told()
  if decisions.is_mixture(d.train):
    return train, (), _Told(notes=["held out: no row of a mixture; name some with data.eval"])
  if d.eval_rows is None:
    return _some_held_out(config, train)
  if len(train) <= d.eval_rows:
    raise ConfigError(
      f"data.eval_rows={d.eval_rows} would leave nothing of the {len(train)} rows to train on; lower it, leave it out"
      " (a tenth of the rows is held out, at most 64), or name data.eval"
    )
  train, rows, note = held_out.parted(train, d.eval_rows, seed=config.seed)
  return train, rows, _Told(notes=[note] if note else [])


def _some_held_out(
  config: ml_collections.ConfigDict, train: Any
) -> tuple[Any, Sequence[Any], _Told]:
  """A tenth of the rows, at most `held_out.MOST`; none where what is compared would not be on both sides."""
  least = 2 if config.data.kind in ("labels", "outcomes") or decisions.has_companions(config) else 1
  count = min(held_out.MOST, len(train) // 10)
  if count >= least:
    rest, rows, note = held_out.parted(train, count, seed=config.seed)
    if all(_is_whole(config, side) for side in (rest, rows)):
      how = f"held out: a tenth of the rows, at most {held_out.MOST}; data.eval_rows says how many"
      return rest, rows, _Told(notes=[how, *([note] if note else [])])
  note = (
    f"held out: no row, since a tenth of {len(train)} is too few to say anything, so that every loss is of rows that"
    " are trained on; name others with data.eval, or say how many with data.eval_rows"
  )
  return train, (), _Told(notes=[note])


def _is_whole(config: ml_collections.ConfigDict, examples: Sequence[Any]) -> bool:
  """Whether a side of the cut has what is compared in it: both labels, several prompts."""
  if config.data.kind in ("labels", "outcomes") and len(set(map(held_out.label, examples))) < 2:
    return False
  return not decisions.has_companions(config) or len(set(map(held_out.prompt, examples))) > 1


def _apart(general: Sequence[Any], eval_examples: Sequence[Any]) -> tuple[Sequence[Any], list[str]]:
  """(the rows to replay that are not held out, what is to be said)."""
  seen = {example.tokens.tobytes() for example in eval_examples}
  others = tuple(example for example in general if example.tokens.tobytes() not in seen)
  if not others:
    raise ConfigError("data.replay: every row of it is held out; name other data, or data.eval")
  left_out = len(general) - len(others)
  return others, [f"replay: {left_out} rows left out that are held out"] if left_out else []


def _finished(
  config: ml_collections.ConfigDict, model: Model, data: Data, source: str | None = None
) -> Data:
  """The data with what its examples say of one another, once it is decided which there are."""
  kind = config.data.kind
  if kind in ("labels", "outcomes"):
    _check_classes(config, data, source)
  if decisions.has_companions(config):
    data = data.map(functools.partial(_with_companions, config, bounds_of(config, model)))
  if kind == "scored":
    data = data.map(functools.partial(with_advantages, config))
  channels = loader.channel_names(data.examples, data.eval)
  return dataclasses.replace(data, channels=channels)


def _check_classes(config: ml_collections.ConfigDict, data: Data, source: str | None) -> None:
  """Raises unless rows of both labels train and are held out; after every cut, since a cut may take a class away."""
  d = config.data
  cut = ", or raise data.limit if that cut it off" if d.limit else ""
  answers.check_classes(
    data.examples,
    f"the training rows (data.train={d.train})",
    f"add the other class{cut}, or fine-tune on the desirable ones (objective.name=sft)",
  )
  if source is not None:
    where, cure = f"the rows of {source}", "add the other class"
  elif d.eval:
    where = f"the held-out rows (data.eval={d.eval})"
    cure = "add the other class, raise data.eval_rows if that cut it off, or leave data.eval out"
  else:
    where = f"the held-out rows (data.eval_rows={d.eval_rows} of data.train={d.train})"
    cure = "raise data.eval_rows, or name rows of both classes with data.eval"
  answers.check_classes(data.eval, where, cure)


def _with_companions(
  config: ml_collections.ConfigDict,
  bounds: bounds_lib.Bounds,
  examples: Sequence[answers.Answers],
) -> Sequence[answers.Answers]:
  """Beside each row another prompt's answer, of those on its own side of the cut."""
  d = config.data
  if not examples:
    return ()
  limit = min(d.length, bounds.room)
  return tuple(companions.beside(examples, limit, share=d.share_prompt))


def identity(data: Data) -> dict[str, Any]:
  """What tells the held-out rows of a run from others, for its record."""
  digest = hashlib.blake2b(digest_size=8)
  for example in data.eval:
    digest.update(example.tokens.tobytes() + example.mask.tobytes())
  return {"held_out": len(data.eval), "digest": digest.hexdigest()}


def check_held_out(folder: Path, config: ml_collections.ConfigDict, data: Data) -> None:
  """Raises where the run in a folder held out other rows than these: its numbers would be of two sets, unsaid.

  Raises:
    ConfigError: a file was changed, or the run is of a version that held out the last rows.
  """
  was, now = files.read_json(folder / record.CONFIG).get("rows"), identity(data)
  if was == now or (was is None and not _is_drawn(config, data)):
    return
  d = config.data
  if was is None:
    raise ConfigError(
      f"{folder} was started by a version that held out other rows of {d.eval or d.train} (the last ones of data.train,"
      " the first of data.eval), and this one draws them: write those into a file and name it (eval --data=FILE),"
      " or start over in another folder"
    )
  raise ConfigError(
    f"the held-out rows are not those that {folder} was started with: {was['held_out']} then, {now['held_out']} now,"
    f" and not the same; {d.eval or d.train} has changed since, or the tokenizer or template: restore it, start over in"
    " another folder, or (eval) name the rows with --data=FILE"
  )


def _is_drawn(config: ml_collections.ConfigDict, data: Data) -> bool:
  """Whether the held-out rows are drawn among others."""
  d = config.data
  from_train = not d.eval and d.train not in tasks.TASKS
  most = held_out.MOST if d.eval_rows is None else d.eval_rows
  return bool(data.eval) and bool(d.limit or from_train or len(data.eval) == most)


def with_advantages(
  config: ml_collections.ConfigDict, examples: Sequence[answers.Answers]
) -> Sequence[answers.Answers]:
  """Groups of scored answers with the advantage of each, as config.objective.advantage says.

  "batch" divides by one deviation over the data: what is in an optimizer batch is not known yet.
  """
  if not examples:
    return examples
  scores = _padded([example.values["score"] for example in examples])
  advantages = advantage.named(config.objective.advantage, scores)
  examples = answers.with_values(examples, "deviation", _trimmed(_deviations(scores), examples))
  return answers.with_values(examples, "advantage", _trimmed(advantages, examples))


def _padded(groups: Sequence[Sequence[float]]) -> np.ndarray:
  """[groups, largest group] float64, NaN behind smaller ones.

  Raises:
    ValueError: a group has one answer.
  """
  if min(map(len, groups)) < 2:
    raise ValueError("a row of scored answers has one: its advantage is over others to its prompt")
  padded = np.full((len(groups), max(map(len, groups))), np.nan)
  for row, group in zip(padded, groups):
    row[: len(group)] = group
  return padded


def _deviations(scores: np.ndarray) -> np.ndarray:
  """The standard deviation of each group, at each of its answers; 0 where it agrees, or has one score."""
  centred = advantage.named("none", scores)
  count = np.sum(~np.isnan(scores), axis=1, keepdims=True)
  squares = np.sum(centred**2, axis=1, keepdims=True)
  return np.broadcast_to(np.sqrt(squares / np.maximum(count - 1, 1)), scores.shape)


def _trimmed(values: Any, examples: Sequence[answers.Answers]) -> list[list[float]]:
  """What is not padding of each group."""
  return [row[: e.count].tolist() for row, e in zip(np.asarray(values), examples, strict=True)]


def _sources(config: ml_collections.ConfigDict, model: Model) -> tuple[Any, _Told]:
  """config.data.train: one source, or several as `a.jsonl*0.7+b.jsonl*0.3`, fractions of the tokens."""
  text, columns = config.data.train, config.data.columns
  if not decisions.is_mixture(text):
    return _encoded(config, text, "train", model, columns)
  fractions = decisions.mixture(text)
  sources, told = {}, _Told()
  for name in fractions:
    sources[name], also = _encoded(config, name, "train", model, columns)
    told += also
  return mixture.Mixture(sources, fractions, by="tokens", seed=config.seed), told


@contextlib.contextmanager
def told_of(name: str, too_long: str = "") -> Generator[None]:
  """What is wrong with a source is said with the name of the setting that it stands in, "" for data.train.

  Args:
    too_long: what to do of a row that is too long, where it is not what the settings of training say.
  """
  before = f"{name}: " if name else ""
  try:
    yield
  except ConfigError:
    raise
  except RowError as error:
    told = error.instead(too_long) if too_long else error
    raise (told.within(name) if name else told) from None
  except (ValueError, OSError) as error:
    # as the kind that says how it is answered
    raise (ValueError if isinstance(error, ValueError) else type(error))(
      f"{before}{error}"
    ) from None


@contextlib.contextmanager
def told_of_columns() -> Generator[None]:
  """What columns are to be named is said as commands without a config name them: --columns=prompt=question."""
  field = "--config.data.columns."
  try:
    yield
  except RowError as error:
    detail, cure = (text.replace(field, "--columns=") for text in (error.detail, error.cure))
    raise RowError(error.reason, error.origin, detail, cure) from None


def read_rows(
  config: ml_collections.ConfigDict, model: Model, source: str, split: str, mapping: Any
) -> schema.Rows:
  """The rows of a source, with a template as turns where config.data.chat says so."""
  d = config.data
  as_turns = bool(d.chat and model.template is not None)
  return schema.read(
    source,
    split=split,
    on_error=d.on_error,
    columns=columns(mapping),
    chat=as_turns,
    system=d.system if as_turns else None,
    kinds=KINDS[d.kind],
  )


def held_out_rows(
  config: ml_collections.ConfigDict, model: Model, examples: Sequence[Any]
) -> list[schema.Row]:
  """The rows that held-out examples were made of, in their order."""
  d = config.data
  is_apart = d.eval or d.train in tasks.TASKS
  every = read_rows(config, model, d.eval or d.train, "eval" if is_apart else "train", d.columns)
  by_origin = {row.origin: row for row in every}
  return [by_origin[origin] for origin in dict.fromkeys(e.origin for e in examples)]


def _encoded(config, source, split, model, mapping) -> tuple[Sequence[Any], _Told]:
  """(examples that the model can read, what is to be said of them)."""
  d = config.data
  rows = read_rows(config, model, source, split, mapping)
  bounds = bounds_of(config, model)
  how: dict[str, Any] = dict(
    max_length=d.length, truncate=d.truncate, on_error=d.on_error, room=bounds.room
  )
  if d.kind == "text":
    how |= dict(train_on=d.train_on)
    if d.truncate != "error":  # cut and split at what the model can read
      how["max_length"] = min(d.length, bounds.room)
    examples = chat.encode_all(rows, model.tokenizer, model.template, **how)
  else:
    how |= dict(kind=d.kind, share=d.share_prompt)
    examples = answers.encode_all(list(rows), model.tokenizer, model.template, **how)
  within, beyond = bounds_lib.kept(
    examples, bounds, truncate=d.truncate, on_error=d.on_error, tokenizer=model.tokenizer
  )
  every = (rows.skipped, examples.skipped, beyond)
  return within, _Told([f"{source}: {part}" for part in every if len(part)], reads=list(rows.reads))


def bounds_of(config: ml_collections.ConfigDict, model: Model) -> bounds_lib.Bounds:
  """What the model can read, with what the adapter puts before every text."""
  adapter_config = adapter.described(config)
  before = 0 if adapter_config is None else adapter.slots(adapter_config)
  if model.params is not None:  # of what is used, they are bound already
    before = max(before, before_lib.slots(model.params))
  return bounds_lib.Bounds(model.config.vocab_size, model.config.max_length, before)


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
