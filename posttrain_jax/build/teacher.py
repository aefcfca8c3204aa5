"""config.objective.teacher: a model of any size that says what the student is to learn, in tokens of one vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from posttrain_jax.adapters import layout, peft_format
from posttrain_jax.build import attention, decisions, tools, use
from posttrain_jax.build.data import Data
from posttrain_jax.build.model import Model
from posttrain_jax.data import chat
from posttrain_jax.models import before, fetch, hf
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.objectives import Scorer, Sft, teacher_cache
from posttrain_jax.runs import manner
from posttrain_jax.settings import ConfigError

Config = ml_collections.ConfigDict
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A teacher's parameters, and how it reads a batch.  vocab: the tokens that both models know; None: all of both."""

  params: Any
  reader: Scorer
  vocab: int | None


def load(config: Config, model: Model, mesh: jax.sharding.Mesh | None) -> Teacher | None:
  """The teacher of a config, placed as the base is; None where it names none.

  Raises:
    ConfigError: nothing is there, it writes no text, or it speaks another vocabulary.
  """
  name = decisions.teacher(config)
  if not name:
    return None
  try:
    params, model_config, products, speech = _read(config, name, model, mesh)
  except (OSError, ValueError) as error:
    raise ConfigError(f"objective.teacher={name}: {error}") from error
  _check_vocabulary(name, chat.load_tokenizer(speech), model)
  return Teacher(params, _reader(config, model_config, products), _common(model_config, model))


def _read(
  config: Config, name: str, model: Model, mesh: jax.sharding.Mesh | None
) -> tuple[Any, ModelConfig, Any, Path]:
  """(params, config, the dtype of their products, the folder of the tokenizer)."""
  storage, path = config.objective.teacher_base, Path(name).expanduser()
  if manner.is_run(name) or (path / peft_format.CONFIG).exists():
    run = manner.is_run(name)
    used = use.load(name if run else None, None if run else name, base=_given(storage))
    home = peft_format.locate(path / "adapter" if run else path) if used.nodes else None
    params = layout.laid_out(used.written(), mesh)
    return params, used.config, used.products, use.tokenizer_folder(used.folder, home)
  folder = fetch.resolve(name)
  place = lambda path, leaf: layout.place(path, leaf, mesh=mesh)
  params, model_config = hf.load(folder, dtype=model.products, storage=storage, place=place)
  if model_config.scores and not model_config.writes:
    raise ConfigError("it is a reward model, which has no head to write with")
  return params, model_config, model.products, folder


def _given(storage: str) -> str | None:
  """How an adapter's base is stored: "dense" is as it was trained on."""
  return None if storage == "dense" else storage


def planned(config: Config, shape: ModelConfig, model: Model) -> tuple[Scorer, int | None]:
  """(reader, vocab) of a teacher of that shape, for a program that is compiled and not run."""
  return _reader(config, shape, model.products or model.dtype), _common(shape, model)


def _reader(config: Config, shape: ModelConfig, products: Any) -> Scorer:
  dtype = decisions.between(products)
  by = attention.chosen(config, shape)[0]
  return Sft(shape, dtype=dtype, products=None if products == dtype else products, attention_by=by)


def _common(shape: ModelConfig, model: Model) -> int | None:
  """Rows of one embedding that the other has not are padding, which no tokenizer makes."""
  sizes = {shape.vocab_size, model.config.vocab_size}
  return None if len(sizes) == 1 else min(sizes)


def _check_vocabulary(name: str, theirs: Any, model: Model) -> None:
  """Raises unless each token id is one text to both: what a teacher says of token 17 is learned of token 17."""
  if model.tokenizer is None:
    return
  own, other = ({i: text for text, i in t.get_vocab().items()} for t in (model.tokenizer, theirs))
  differ = [i for i in sorted({*own, *other}) if own.get(i) != other.get(i)]
  if not differ:
    return
  said = lambda vocabulary: repr(vocabulary[differ[0]]) if differ[0] in vocabulary else "no token"
  raise ConfigError(
    f"objective.teacher={name}: its vocabulary is another one ({len(other):,} tokens, the student's {len(own):,};"
    f" token {differ[0]} is {said(other)} to the teacher and {said(own)} to the student). Probabilities of tokens are"
    " learned from a teacher of the same tokenizer alone; from this one take its answers: posttrain sample --model="
    f"{name} --out=FILE.jsonl, then posttrain train --config=sft:data=FILE.jsonl"
  )


def check_room(config: Config, teacher: Teacher | None, data: Data) -> None:
  """Raises ConfigError where a text, or an answer that is yet to be written, has more tokens than the teacher reads."""
  if teacher is None:
    return
  room = teacher.reader.model.max_length - before.slots(teacher.params)
  longest, written = max((*data.examples, *data.eval), key=len), 0
  if "online" in config:
    written = tools.room(config) + config.online.max_new_tokens
  if len(longest) + written > room:
    cure = "online.max_new_tokens" if written else "data.length"
    behind = f", with {written} of an answer behind it" if written else ""
    raise ConfigError(
      f"objective.teacher={decisions.teacher(config)}: it reads {room} tokens, and {longest.origin} has"
      f" {len(longest)}{behind}; lower {cure}, leave such rows out, or name another teacher"
    )


def beside(config: Config, context: Any, teacher: Teacher | None) -> Any:
  """The context of a step, with the teacher in it where each step asks it for all that it says."""
  if teacher is None or not is_in_step(config):
    return context
  return dataclasses.replace(context, teacher=teacher.params)


def is_in_step(config: Config) -> bool:
  """Whether each step computes the teacher's distributions; else they are kept, or of drawn tokens alone."""
  return config.objective.name == "distil" and not config.objective.top_k


def taught(
  config: Config,
  teacher: Teacher | None,
  data: Data,
  mesh: jax.sharding.Mesh | None,
  say: Say,
) -> Data:
  """data with the teacher's most likely tokens, where they are computed once; else as it is.

  Raises:
    ConfigError: there are not so many tokens.
  """
  if teacher is None or not decisions.keeps_teacher(config):
    return data
  k, most = config.objective.top_k, teacher.vocab or teacher.reader.model.vocab_size
  if k >= most:
    raise ConfigError(
      f"objective.top_k={k}: there are {most:,} tokens; write fewer, or 0 for all of them"
    )
  asked = teacher_cache.Asked(teacher.reader, k, config.objective.temperature, teacher.vocab)
  change = lambda examples: teacher_cache.taught(
    examples, asked, teacher.params, cache=fetch.cache() / "teacher", mesh=mesh, say=say
  )
  return data.map(change)


def blank(config: Config, batch: Mapping[str, Any]) -> Mapping[str, Any]:
  """A batch of the shapes that `taught` gives, for a program that is compiled and not run."""
  if not decisions.keeps_teacher(config) or "teacher_ids" in batch:
    return batch
  shape, k = batch["tokens"].shape, config.objective.top_k
  ids, logps = np.zeros((*shape, k), np.int32), np.zeros((*shape, k + 1), np.float32)
  return {**batch, "teacher_ids": ids, "teacher_logps": logps}
