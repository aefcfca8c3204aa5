"""What a checkpoint is worth on a task: an answer to every held-out question, and what graders say of it."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from posttrain_jax import adapters
from posttrain_jax.data import chat, held_out, questions, templates
from posttrain_jax.data.tasks import sql
from posttrain_jax.data.templates import Template
from posttrain_jax.evals import graders as graders_lib
from posttrain_jax.evals import intervals, vote
from posttrain_jax.evals.graders import Grader
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rewards import sql as sql_reward
from posttrain_jax.rollout import engine
from posttrain_jax.runs.record import TaskResult

Params = Any


@dataclasses.dataclass(frozen=True)
class Answered:
  """text: the words that it ends with.  finished: whether it came to an end of its own.  tokens: that the model wrote.

  problem: why it is wrong whatever it says: its environment failed, a turn cannot be read.
  """

  text: str
  finished: bool
  tokens: int
  problem: str = ""


class Turns(Protocol):
  """What asks questions in turns, with tools or an environment."""

  def answer(
    self,
    params: Params,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    dtype: Any,
    progress: Callable[[int, int], None] | None,
  ) -> list[Answered]:
    """An answer to each question."""
    ...


@dataclasses.dataclass(frozen=True)
class Task:
  """Questions with answers that can be graded.

  examples: (split, n=None) -> rows with `prompt` (messages, or a string to be continued), `question` (it, for a
    reader), `gold` and `channel`; of one's own data also what `data.questions` says, and `best`, what each grader gives
    for gold.
  graders: the first says which answers are right: those that get as much as the gold answer, or 1; () for answers that
    are read and not graded.
  max_new_tokens: enough for every gold answer, and for the model to end its turn.
  system: the system message that every prompt begins with.
  turns: what answers in several turns; None where an answer is one.
  """

  name: str
  examples: Callable[..., list[dict]]
  graders: tuple[Grader, ...]
  max_new_tokens: int
  system: str = ""
  turns: Turns | None = None


def _score_sql(answer: str, question: Mapping[str, Any]) -> tuple[float, str]:
  score = sql_reward.score(answer, question["gold"])
  return score.value or 0.0, score.reason  # never missing: a gold query that fails raises


# The longest gold query takes 38 tokens of SmolLM2's.
TASKS = {
  "sql": Task(
    "sql", sql.examples, (Grader("sql", _score_sql),), max_new_tokens=48, system=sql.SYSTEM
  )
}


def own(
  name: str, rows: Sequence[dict[str, Any]], graders: Sequence[Grader], max_new_tokens: int
) -> Task:
  """A task of the rows of one's own data, whatever the split.

  Raises:
    RowError: a metric cannot compare with a row's expected answer.
    ConfigError: a metric of the user's fails on it.
  """
  graded = [{**row, "best": {g.name: graders_lib.check(g, row) for g in graders}} for row in rows]
  some = lambda split, n=None: graded if n is None else list(held_out.limited(graded, n, seed=0))
  return Task(name, some, tuple(graders), max_new_tokens)


def evaluate(
  params: Params,
  config: ModelConfig,
  tokenizer: Any,
  *,
  task: str | Task = "sql",
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
    task: the name of a built-in one, or questions of one's own.
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
    max_new_tokens=max_new_tokens,
    batch_size=batch_size,
    dtype=dtype,
    progress=progress,
  )
  ballots = [verified[i : i + members] for i in range(0, len(verified), members)]
  answers = [ballot[vote.majority([a["answer"] for a in ballot])] for ballot in ballots]
  asked = known(task)
  return TaskResult(
    task=asked.name,
    split=split,
    correct=sum(answer["correct"] or 0 for answer in answers),
    total=len(answers),
    by_channel=_by_channel(answers),
    reasons=dict(Counter(a["reason"].partition(":")[0] for a in answers).most_common()),
    answers=[{k: v for k, v in a.items() if k != "tokens"} for a in answers],
    seconds=time.monotonic() - started,
    new_tokens=sum(a["tokens"] for a in verified),
    by_member=tuple(
      sum(a["correct"] or 0 for a in verified[i::members]) for i in range(len(ensemble))
    ),
    scores=scores(answers),
    digests={grader.name: grader.digest for grader in asked.graders},
    max_new_tokens=asked.max_new_tokens if max_new_tokens is None else max_new_tokens,
  )


def known(task: str | Task) -> Task:
  """The task of a name.

  Raises:
    ValueError: there is none.
  """
  if isinstance(task, Task):
    return task
  if task not in TASKS:
    raise ValueError(f"unknown task {task!r}; there are: {', '.join(TASKS)}")
  return TASKS[task]


def scores(answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """{grader: its mean over the answers, with a 95 % interval}, as `intervals.mean` gives them."""
  names = list(answers[0]["scores"]) if answers else []
  return {name: intervals.mean([a["scores"][name] for a in answers]) for name in names}


def regraded(result: TaskResult, task: Task) -> TaskResult:
  """The same answers as the task's graders see them now.

  Raises:
    ValueError: they are answers to other questions.
  """
  rows = task.examples(result.split)
  if [row["question"] for row in rows] != [a["question"] for a in result.answers]:
    raise ValueError("the answers are to other questions: answer them anew")
  answers = [
    {**answer, **_graded(answer["answer"], row, task, answer.get("problem", ""))}
    for answer, row in zip(result.answers, rows)
  ]
  return dataclasses.replace(
    result,
    correct=sum(a["correct"] or 0 for a in answers),
    by_channel=_by_channel(answers),
    reasons=dict(Counter(a["reason"].partition(":")[0] for a in answers).most_common()),
    answers=answers,
    scores=scores(answers),
    digests={grader.name: grader.digest for grader in task.graders},
  )


def answer(
  params: Params,
  config: ModelConfig,
  tokenizer: Any,
  *,
  task: str | Task,
  split: str,
  limit: int | None = None,
  template: Template | str | None = None,
  ensemble: Sequence[Any] = (),
  max_new_tokens: int | None = None,
  batch_size: int = 16,
  dtype: Any = None,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict], list[dict]]:
  """(questions, a verified answer of each of the ensemble to each, one question after the other); as `evaluate`.

  Answers are dicts as in `TaskResult`, and `tokens`, how many were generated.
  """
  asked = known(task)
  if limit is not None and limit < 1:
    raise ValueError(f"limit={limit}: ask for at least one question, or None for the whole split")
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, found {batch_size}")
  rows = asked.examples(split, n=limit)
  if asked.turns is not None:
    if ensemble:
      raise ValueError(
        "several adapters answer in one turn alone: give one, or a task without tools"
      )
    given = asked.turns.answer(params, rows, batch_size=batch_size, dtype=dtype, progress=progress)
    return rows, [_answered(row, one, asked) for row, one in zip(rows, given, strict=True)]
  if not isinstance(template, Template) and any(not isinstance(r["prompt"], str) for r in rows):
    template = chat.template(tokenizer, template)
  spoken = template if isinstance(template, Template) else None
  prompts = questions.tokens(rows, tokenizer, spoken)
  ends = None if spoken is None else templates.end_of_turn(tokenizer, spoken)
  stops = {*engine.stop_tokens(config, tokenizer), *(() if ends is None else (ends,))}
  members = len(ensemble) or 1
  if ensemble:  # each of its adapters answers each question once
    prompts = [prompt for prompt in prompts for _ in ensemble]
    index = np.tile(np.arange(len(ensemble)), len(rows))
    params = adapters.bind(params, adapters.stack(ensemble, params), rows=index)
  drawn = engine.generate(
    params,
    config,
    prompts,
    max_new_tokens=asked.max_new_tokens if max_new_tokens is None else max_new_tokens,
    stop_tokens=tuple(sorted(stops)),
    batch_size=batch_size,
    dtype=dtype,
    progress=progress,
  )
  return rows, [
    _answer(rows[i // members], ids, finished, tokenizer, asked)
    for i, (ids, finished) in enumerate(zip(drawn.tokens, drawn.finished))
  ]


def _answer(row, ids, finished, tokenizer, task):
  text = tokenizer.decode(ids, skip_special_tokens=True)
  return _answered(row, Answered(text, finished, len(ids)), task)


def _answered(row, given, task):
  return dict(
    question=row["question"],
    answer=given.text,
    gold=row["gold"],
    channel=row["channel"],
    finished=given.finished,
    tokens=given.tokens,
    **({"problem": given.problem} if given.problem else {}),
    **({"origin": row["origin"]} if "origin" in row else {}),
    **_graded(given.text, row, task, given.problem),
  )


def _graded(text, row, task, problem=""):
  """What the graders say of an answer; whether it is right, None where nobody says."""
  if problem:
    scores = {grader.name: 0.0 for grader in task.graders}
    return dict(correct=False if scores else None, reason=problem, scores=scores)
  given = {grader.name: grader.score(text, row) for grader in task.graders}
  scores = {name: score for name, (score, _) in given.items()}
  if not scores:
    return dict(correct=None, reason="", scores={})
  first = task.graders[0].name
  return dict(
    correct=scores[first] >= row.get("best", {}).get(first, 1.0),
    reason=given[first][1],
    scores=scores,
  )


def _by_channel(answers):
  counts = dict.fromkeys(sorted({answer["channel"] for answer in answers}), (0, 0))
  for answer in answers:
    correct, total = counts[answer["channel"]]
    counts[answer["channel"]] = (correct + (answer["correct"] or 0), total + 1)
  return counts
