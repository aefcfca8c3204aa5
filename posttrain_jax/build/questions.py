"""config.eval.samples, .metric and .task: what a run asks before and after training, and who grades it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from posttrain_jax.build import data as data_lib
from posttrain_jax.build import decisions
from posttrain_jax.build.data import Data
from posttrain_jax.build.model import Model
from posttrain_jax.data import held_out, questions
from posttrain_jax.data.errors import RowError
from posttrain_jax.evals import graders as graders_lib
from posttrain_jax.evals import tasks
from posttrain_jax.evals.graders import Grader
from posttrain_jax.settings import ConfigError

HELD_OUT = "held-out rows"
LEAST, UNKNOWN = (
  32,
  128,
)  # tokens of an answer: at least, and where no row says how long answers are
SHOWN = 256  # tokens of an answer that is only shown


def make(
  config: ml_collections.ConfigDict,
  model: Model,
  data: Data | None,
  source: str | None = None,
  split: str = "eval",
) -> tasks.Task | None:
  """The questions of a run with their graders; None where it asks none.

  Args:
    data: with held-out examples, whose rows are asked where nothing else is named.
    source: rows, or a built-in task, to be asked instead of what config.eval says.
    split: of a source that has several and names none.

  Raises:
    ConfigError, RowError: there is nothing to ask, or nothing to compare an answer with.
  """
  if not decisions.asks(config):
    return None
  graders = graders_lib.load(decisions.grades(config))
  source = source or config.eval.task
  if source in tasks.TASKS:
    return _built_in(config, tasks.TASKS[source], graders)
  if source:
    with data_lib.told_of("eval.task" if source == config.eval.task else ""):
      rows = list(data_lib.read_rows(config, model, source, split, config.data.columns))
      return _own(config, model, source, rows, graders)
  field = "eval.metric" if graders else "eval.samples"
  if data is None or not data.eval:
    raise ConfigError(
      f"{field} asks held-out prompts, and no rows are held out: raise data.eval_rows, or name data.eval"
    )
  with data_lib.told_of(field):
    rows = data_lib.held_out_rows(config, model, data.eval)
    return _own(config, model, HELD_OUT, rows, graders)


def _built_in(config: Any, task: tasks.Task, graders: Sequence[Grader]) -> tasks.Task:
  """A built-in task, with more graders than its own."""
  limit = config.eval.task_limit or None
  longest = (config.eval.max_new_tokens if "max_new_tokens" in config.eval else 0) or (
    task.max_new_tokens
  )

  def examples(split: str, n: int | None = None) -> list[dict[str, Any]]:
    rows = task.examples(split, n=limit if n is None else n)
    return [dict(row, row=row, origin=f"{task.name}/{split}:{i}") for i, row in enumerate(rows, 1)]

  return dataclasses.replace(
    task, examples=examples, graders=(*task.graders, *graders), max_new_tokens=longest
  )


def _own(
  config: ml_collections.ConfigDict,
  model: Model,
  name: str,
  rows: Sequence[Any],
  graders: Sequence[Grader],
) -> tasks.Task:
  asked = [questions.of(row, model.tokenizer) for row in rows]
  if any(grader.needs_gold for grader in graders):
    # of labelled answers the undesirable ones are no gold
    asked = [q for q in asked if q["gold"] is not None] or asked
  if not graders:
    asked = list({q["question"]: q for q in reversed(asked)}.values())[::-1]
  count = config.eval.task_limit if graders else config.eval.samples
  if count:
    asked = list(held_out.limited(asked, count, seed=config.seed))
  task = tasks.own(name, asked, graders, 1)
  return dataclasses.replace(task, max_new_tokens=longest(config, model, asked, bool(graders)))


def too_many(prompts: Sequence[Sequence[int]], most: int) -> str:
  """What to do about prompts of more tokens than a model has room for: a few rows are odd, and many ask for another."""
  count = sum(len(prompt) > most for prompt in prompts)
  those = "the row" if count == 1 else f"the {count:,} of {len(prompts):,} rows of which that is so"
  return f"leave out {those}, or take a model that reads more"


def longest(
  config: ml_collections.ConfigDict,
  model: Model,
  asked: Sequence[Mapping[str, Any]],
  is_graded: bool,
  field: str = "eval.max_new_tokens",
) -> int:
  """How many tokens an answer may have.

  Args:
    field: what says so, where it asks for more than there is room for.

  Raises:
    RowError: a prompt leaves no room for it.
  """
  room = data_lib.bounds_of(config, model).room
  prompts = questions.tokens(asked, model.tokenizer, model.template)
  place = max(range(len(prompts)), key=lambda i: len(prompts[i]))
  left = room - len(prompts[place])
  wanted = config.eval.max_new_tokens
  if left < max(wanted, 1):
    raise RowError(
      "too long",
      asked[place]["origin"],
      f"its prompt has {len(prompts[place])} tokens of the {room} that the model reads, which leaves"
      f" {max(left, 0)} for an answer",
      (f"lower {field}={wanted}, or " if left > 0 else "")
      + too_many(prompts, room - max(wanted, 1)),
    )
  if wanted:
    return wanted
  golds = [q["gold"] for q in asked if q["gold"] is not None]
  if not golds:
    return min(UNKNOWN, left)
  ids = model.tokenizer(golds, add_special_tokens=False)["input_ids"]
  needed = max(LEAST, math.ceil(1.25 * max(map(len, ids))))
  return min(needed if is_graded else min(needed, SHOWN), left)
