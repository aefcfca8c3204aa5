"""What a checkpoint is worth on a built-in task: generate an answer to every held-out question, and verify it."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from posttrain_jax import adapters
from posttrain_jax.core import weight
from posttrain_jax.data import chat, templates
from posttrain_jax.data.tasks import sql
from posttrain_jax.data.templates import Template
from posttrain_jax.evals import vote
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.sampling import GREEDY, Sampling
from posttrain_jax.runs.record import TaskResult

Params = Any


@dataclasses.dataclass(frozen=True)
class Task:
  """Questions with an answer that can be checked.

  examples: (split, n=None) -> rows with `prompt` (messages), `question`, `gold` and `channel`.
  score: (answer, gold) -> (correct, reason).
  max_new_tokens: enough for every gold answer, and for the model to end its turn.
  system: the system message that every prompt begins with.
  """

  examples: Callable[..., list[dict]]
  score: Callable[[str, str], tuple[bool, str]]
  max_new_tokens: int
  system: str


def _score_sql(answer: str, gold: str) -> tuple[bool, str]:
  score = sql.score(answer, gold)
  return score.correct, score.reason


# The longest gold query takes 38 tokens of SmolLM2's.
TASKS = {"sql": Task(sql.examples, _score_sql, max_new_tokens=48, system=sql.SYSTEM)}


def evaluate(
  params: Params,
  config: ModelConfig,
  tokenizer: Any,
  *,
  task: str = "sql",
  limit: int | None = None,
  split: str = "test",
  template: Template | str | None = None,
  ensemble: Sequence[Any] = (),
  max_new_tokens: int | None = None,
  batch_size: int = 16,
  dtype: Any = None,
  progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
  """Greedy answers to the questions of a split, each verified.

  An ensemble answers every question with each of its adapters, in one batch, and the commonest answer counts (prompt
  ensembling, Lester et al. 2021, section 6).

  Args:
    params: as for `rollout.engine.generate`, which is fastest with adapters merged.
    limit: that many questions, drawn over the channels as the whole split is; None for the split.
    template: a bound chat template, or the name of one; None for the tokenizer's own.
    ensemble: adapters of params, such as `adapters.stack` takes; () for params alone.
    max_new_tokens: of an answer; None for what the task needs.
    batch_size: the most answers generated at once.
    dtype: of the computation; None for the parameters' own.
    progress: called with (answers done, answers wanted).

  Raises:
    ValueError: no such task or split, or a question that with its answer does not fit the model.
  """
  started = time.monotonic()
  members = len(ensemble) or 1
  _, verified = answer(
    params,
    config,
    tokenizer,
    task=task,
    split=split,
    limit=limit,
    template=template,
    ensemble=ensemble,
    copies=members,
    max_new_tokens=max_new_tokens,
    batch_size=batch_size,
    dtype=dtype,
    progress=progress,
  )
  ballots = [verified[i : i + members] for i in range(0, len(verified), members)]
  answers = [ballot[vote.majority([a["answer"] for a in ballot])] for ballot in ballots]
  return TaskResult(
    task=task,
    split=split,
    correct=sum(answer["correct"] for answer in answers),
    total=len(answers),
    by_channel=_by_channel(answers),
    reasons=dict(Counter(a["reason"].partition(":")[0] for a in answers).most_common()),
    answers=[{k: v for k, v in a.items() if k != "tokens"} for a in answers],
    seconds=time.monotonic() - started,
    new_tokens=sum(a["tokens"] for a in verified),
    by_member=tuple(sum(a["correct"] for a in verified[i::members]) for i in range(len(ensemble))),
  )


def answer(
  params: Params,
  config: ModelConfig,
  tokenizer: Any,
  *,
  task: str,
  split: str,
  limit: int | None = None,
  template: Template | str | None = None,
  ensemble: Sequence[Any] = (),
  copies: int = 1,
  sampling: Sampling = GREEDY,
  key: Any = None,
  max_new_tokens: int | None = None,
  batch_size: int = 16,
  dtype: Any = None,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict], list[dict]]:
  """(questions, `copies` verified answers to each, one question after the other); arguments as `evaluate`'s.

  Answers are dicts as in `TaskResult`, and `tokens`, how many were generated.
  """
  if task not in TASKS:
    raise ValueError(f"unknown task {task!r}; there are: {', '.join(TASKS)}")
  if limit is not None and limit < 1:
    raise ValueError(f"limit={limit}: ask for at least one question, or None for the whole split")
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, found {batch_size}")
  built_in = TASKS[task]
  if not isinstance(template, Template):
    template = chat.template(tokenizer, template)
  rows = built_in.examples(split, n=limit)
  jobs = [templates.job(row["prompt"], True) for row in rows]
  prompts = [_tokens(text, tokenizer) for text in template.render_all(jobs)]
  ends = templates.end_of_turn(tokenizer, template)
  stops = {*engine.stop_tokens(config, tokenizer), *(() if ends is None else (ends,))}
  if ensemble:
    index = np.tile(np.arange(len(ensemble)), len(prompts))
    params = adapters.bind(params, adapters.stack(ensemble, params), rows=index)
  drawn = _generate(
    engine.prepare(params, config),
    config,
    [prompt for prompt in prompts for _ in range(copies)],
    batch_size,
    progress,
    key,
    sampling=sampling,
    max_new_tokens=built_in.max_new_tokens if max_new_tokens is None else max_new_tokens,
    stop_tokens=tuple(sorted(stops)),
    dtype=dtype,
  )
  return rows, [
    _answer(rows[i // copies], ids, finished, tokenizer, built_in)
    for i, (ids, finished) in enumerate(drawn)
  ]


def _tokens(text, tokenizer):
  if isinstance(text, Exception):
    raise text
  # A rendered template has its BOS already.
  return tokenizer(text, add_special_tokens=False)["input_ids"]


def _generate(params, config, prompts, batch_size, progress, key, **options):
  """(new tokens, finished) of each prompt, in batches of like length so that progress can be told."""
  drawn: dict[int, tuple[list[int], bool]] = {}
  for number, batch in enumerate(_batches([len(prompt) for prompt in prompts], batch_size)):
    # the batch's, since a row draws with its own number in it
    options["key"] = None if key is None else jax.random.fold_in(key, number)
    some = [prompts[i] for i in batch]
    batch_params = weight.take_rows(params, np.asarray(batch))
    generation = engine.generate(batch_params, config, some, batch_size=len(some), **options)
    drawn.update(zip(batch, zip(generation.tokens, generation.finished)))
    if progress is not None:
      progress(len(drawn), len(prompts))
  return [drawn[i] for i in range(len(prompts))]


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
  """Indices by rising length in batches of one size, since each size is a compilation; the last ones overlap."""
  order = np.argsort(lengths, kind="stable").tolist()
  count = -(-len(order) // batch_size)
  size = -(-len(order) // count)
  for start in range(0, len(order), size):
    start = min(start, len(order) - size)
    yield order[start : start + size]


def _answer(row, ids, finished, tokenizer, task):
  text = tokenizer.decode(ids, skip_special_tokens=True)
  correct, reason = task.score(text, row["gold"])
  return dict(
    question=row["question"],
    answer=text,
    gold=row["gold"],
    correct=correct,
    reason=reason,
    channel=row["channel"],
    finished=finished,
    tokens=len(ids),
  )


def _by_channel(answers):
  counts = dict.fromkeys(sorted({answer["channel"] for answer in answers}), (0, 0))
  for answer in answers:
    correct, total = counts[answer["channel"]]
    counts[answer["channel"]] = (correct + answer["correct"], total + 1)
  return counts
