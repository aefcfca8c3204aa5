"""config.data of a run that writes its own answers: what is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from posttrain_jax.build import data as data_lib
from posttrain_jax.build import questions as questions_lib
from posttrain_jax.build import tools
from posttrain_jax.build.data import Data
from posttrain_jax.build.model import Model
from posttrain_jax.data import questions
from posttrain_jax.data.errors import RowError
from posttrain_jax.evals import tasks
from posttrain_jax.settings import ConfigError

Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """What is asked: its tokens, and the row that verifiers are given."""

  tokens: np.ndarray
  asked: Any  # a string, or messages
  row: Mapping[str, Any]
  origin: str
  channel: str | None = None
  is_chat: bool = False
  variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the chat template

  @property
  def mask(self) -> np.ndarray:
    return np.zeros(len(self.tokens), bool)  # what is trained is yet to be written

  def __len__(self) -> int:
    return len(self.tokens)


def read(config: Config, model: Model) -> Data:
  """The prompts of config.data.

  Raises:
    RowError: a prompt that leaves no room for an answer.
    ConfigError: a row of a group that the model writes would not fit data.length.
  """
  d, most = config.data, config.online.max_new_tokens
  if d.train in tasks.TASKS:
    task = tasks.TASKS[d.train]
    asked: list[dict[str, Any]] = [
      dict(row, row=row, origin=f"{task.name}/train:{i}")
      for i, row in enumerate(task.examples("train"), 1)
    ]
  else:
    with data_lib.told_of("data.train"):
      rows = data_lib.read_rows(config, model, d.train, "train", d.columns)
      asked = [questions.of(row, model.tokenizer) for row in rows]
  if d.limit:
    order = np.random.default_rng(config.seed).permutation(len(asked))[: d.limit]
    asked = [asked[i] for i in sorted(order)]
  tools.check(config, model.template)
  asked = tools.given(config, asked)
  ids = questions.tokens(asked, model.tokenizer, model.template)
  prompts = tuple(
    Prompt(
      tokens=np.asarray(tokens, np.int32),
      asked=question["prompt"],
      row=_row(question),
      origin=question["origin"],
      channel=question["channel"],
      is_chat=not isinstance(question["prompt"], str),
      variables=question.get("variables", {}),
    )
    for question, tokens in zip(asked, ids)
  )
  bounds = data_lib.bounds_of(config, model)
  longest = max(prompts, key=len)
  said = tools.room(config)  # by an environment, behind each prompt
  if len(longest) + said + most > bounds.room:
    beside = f" beside {bounds.before} of a soft prompt or prefix" if bounds.before else ""
    raise RowError(
      "too long",
      longest.origin,
      f"its prompt has {len(longest)} tokens of the {bounds.room} that the model reads{beside}, which leaves"
      f" too few for online.max_new_tokens={most}",
      f"lower online.max_new_tokens, or {questions_lib.too_many(ids, bounds.room - said - most)}",
    )
  share = 1 if d.share_prompt else config.online.samples
  needed = len(longest) * share + config.online.samples * (said + most + 1)
  if needed > d.length:
    raise ConfigError(
      f"data.length={d.length}: a row holds the answers to one prompt, {config.online.samples} of {most} tokens behind"
      f" {len(longest)} of the longest prompt ({longest.origin}): write data.length={needed} or more, or lower"
      " online.samples or online.max_new_tokens"
    )
  return Data(prompts, (), (), "")


def _row(question: Mapping[str, Any]) -> dict[str, Any]:
  """What verifiers are given: the row's own columns, and its answer as `gold` where it has one."""
  gold = {} if question["gold"] is None else {"gold": question["gold"]}
  return {**question["row"], **gold}
