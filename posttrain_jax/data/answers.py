"""Answers to one prompt, to be compared or scored: the prompt is a stretch of tokens that all of them share.

A pair is two answers, a labelled completion is one, a scored group is as many as were sampled.  They stand in a row one
after the other, behind the beginning that they have in common; each sees that beginning and itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain_jax.data import borders, chat, lengths, plans, schema
from posttrain_jax.data.encoded import Encoded, Example
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.schema import Row, Skipped

SHARED = -1  # the answer that a token of the common beginning belongs to
TRUNCATE = ("error", "drop", "prompt")
# what else there is to write where rows are too long, by what was written
WAYS = {
  "error": f"prompt (their prompts lose the beginning, where that is enough) or {chat.DROP}",
  "prompt": chat.DROP,
}
_BATCH = 500  # rows encoded together


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
  """All that is known of the answers to one prompt.  Arrays are [time], `values` has one number an answer."""

  tokens: np.ndarray  # int32
  mask: np.ndarray  # bool, True where the token is the model's: scored and, mostly, trained
  answer: np.ndarray  # int32, which answer the token belongs to, or SHARED
  positions: np.ndarray  # int32, each answer's going on from the common beginning
  count: int
  values: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
  steps: np.ndarray | None = None  # float32, a label where a step ends, NaN elsewhere
  # float32, log-probabilities under the reference, of trained tokens
  ref_logps: np.ndarray | None = None
  # float32, log-probabilities that trained tokens were drawn with
  sampling_logps: np.ndarray | None = None
  # [time, words] uint32: the tokens that each trained one was drawn among (`core.bits`)
  kept: np.ndarray | None = None
  # an answer to another prompt behind this one (KTO's estimate of the KL)
  companion: Answers | None = None
  channel: str | None = None
  origin: str = ""
  is_chat: bool = False
  is_cut: bool = False

  def __len__(self) -> int:
    return max(len(self.tokens), 0 if self.companion is None else len(self.companion))

  @functools.cached_property
  def lengths(self) -> tuple[int, ...]:
    """Trained tokens of each answer."""
    return tuple(int((self.mask & (self.answer == i)).sum()) for i in range(self.count))

  @functools.cached_property
  def shares(self) -> bool:
    """Whether there is a beginning that the answers have in common."""
    return bool((self.answer == SHARED).any())

  def prompt(self, i: int) -> np.ndarray:
    """The tokens that answer i stands behind."""
    seen = (self.answer == SHARED) | (self.answer == i)
    return self.tokens[seen][: int(np.argmax(self.mask[seen]))]

  def segments(self) -> tuple[np.ndarray, np.ndarray, int]:
    """(segment ids from 1, the one more segment that a token sees or 0, how many segments)."""
    shared = self.answer == SHARED
    first = 1 if shared.any() else 0
    ids = np.where(shared, 1, self.answer + 1 + first).astype(np.int32)
    prefixes = np.where(shared, 0, first).astype(np.int32)
    return ids, prefixes, self.count + first


# what is known of each answer of a kind, one number each; pairs may say `weight` and `margin` besides
VALUES = {
  "labels": ("label",),
  "outcomes": ("label",),
  "scored": ("score", "advantage", "deviation"),
}
SHARING = ("pairs", "triples", "scored")  # kinds of several answers to a prompt


def blank(kind: str, *, with_ref_logps: bool, with_companion: bool) -> Answers:
  """Answers of a kind of one token each, for programs that are compiled and not run."""
  count = {"pairs": 2, "triples": 3}.get(kind, 1)
  names = VALUES.get(kind, ("label",) if with_companion else ())
  where = np.arange(count + 1, dtype=np.int32) - 1
  example = Answers(
    tokens=np.zeros(count + 1, np.int32),
    mask=where >= 0,
    answer=where,
    positions=np.minimum(where + 1, 1),
    count=count,
    values=dict.fromkeys(names, (0.0,) * count),
    steps=np.full(count + 1, np.nan, np.float32) if kind == "steps" else None,
    ref_logps=np.zeros(count + 1, np.float32) if with_ref_logps else None,
  )
  companion = dataclasses.replace(example, values={}) if with_companion else None
  return dataclasses.replace(example, companion=companion)


def join(
  examples: Sequence[Example], *, share: bool = True, values: Mapping[str, Any] | None = None
) -> Answers:
  """The Answers of examples that begin with the same prompt.

  The common beginning ends one token before the first trained one at the latest: the token that an answer's first is
  predicted from belongs to the answer.  share=False repeats the prompt for each.
  """
  first = examples[0]
  common = 0
  if share and len(examples) > 1:
    common = min(int(np.argmax(example.mask)) - 1 for example in examples)
    for other in examples[1:]:
      n = min(common, len(other))
      differ = np.flatnonzero(first.tokens[:n] != other.tokens[:n])
      common = int(differ[0]) if len(differ) else n
    common = max(common, 0)
  head = first.tokens[:common]
  tails = [example.tokens[common:] for example in examples]
  return Answers(
    tokens=np.concatenate([head, *tails]).astype(np.int32),
    mask=np.concatenate([np.zeros(common, bool), *(e.mask[common:] for e in examples)]),
    answer=np.concatenate(
      [np.full(common, SHARED), *(np.full(len(tail), i) for i, tail in enumerate(tails))]
    ).astype(np.int32),
    positions=np.concatenate(
      [np.arange(common), *(np.arange(common, len(e.tokens)) for e in examples)]
    ).astype(np.int32),
    count=len(examples),
    values={name: tuple(map(float, numbers)) for name, numbers in (values or {}).items()},
    channel=first.channel,
    origin=first.origin,
    is_chat=first.is_chat,
    is_cut=any(e.is_cut for e in examples),
  )


def encode_all(
  rows: Sequence[Row],
  tokenizer,
  template=None,
  *,
  kind: str,
  max_length: int,
  truncate: str = "error",
  on_error: str = "raise",
  share: bool = True,
  room: int | None = None,
) -> Encoded:
  """The Answers of many rows, in order.

  What does not fit into `max_length` tokens (prompt and all answers together) is an error, is left out and counted
  ("drop"), or loses the beginning of its prompt ("prompt"); an answer is never cut, so that its end of turn stays.

  Args:
    kind: what rows are to be: "pairs" (chosen, rejected), "triples" (and reference, a gold answer), "labels" (prompt,
      completion, label; a pair is two of them), "outcomes" (the same, for a reward model: no companions), "steps"
      (prompt, completions, labels), "scored" (prompt, completions, scores); "judged" takes any of these, and prompts
      with one completion, for a reward model to score.
    share: whether answers to a prompt share its tokens, or repeat them.
    room: tokens that the model can read of a row, for the advice.

  Raises:
    RowError: a row of another schema, answers that are equal, an empty one, some that do not fit.
    ValueError: no row is left.
  """
  if truncate not in TRUNCATE:
    raise ValueError(
      f"truncate={truncate!r}: answers are kept whole; write one of {', '.join(TRUNCATE)}"
    )
  kept, skipped = [], Skipped()
  too_long: list[RowError] = []
  split = functools.partial(_SPLIT[kind], tokenizer=tokenizer)
  encode = chat.each(tokenizer, template, max_length=max_length, any_prompt=truncate == "prompt")
  for start in range(0, len(rows), _BATCH):
    jobs: list[Any] = []
    for row in rows[start : start + _BATCH]:
      try:
        jobs += split(row)
      except RowError as error:
        jobs.append(error)
    plain = [part for job in jobs if isinstance(job, _Job) for part in job.rows]
    encoded = iter(encode(plain))
    for job in jobs:
      try:
        if isinstance(job, RowError):
          raise job
        # all of a job's rows are taken from the stream before the first error of theirs is raised
        examples = [next(encoded) for _ in job.rows]
        joined = _joined(job, examples, share)
        if job.steps is not None:
          joined = _process(joined, examples[0].spans, job.steps)
        kept.append(_fitted(joined, max_length, truncate))
      except RowError as error:
        if on_error == "skip" or (truncate == "drop" and error.reason == "too long"):
          skipped.add(error)
        elif error.reason == "too long":
          too_long.append(error)  # all of them are told together
        else:
          raise
  if too_long:
    fitting = [len(example.tokens) for example in kept]
    raise lengths.summary(too_long, fitting, limit=max_length, ways=WAYS[truncate], room=room)
  if not kept:
    raise ValueError(f"no row gave an example; {skipped}")
  return Encoded(tuple(kept), skipped)


@dataclasses.dataclass(frozen=True)
class _Job:
  """The rows of one Answers, each a prompt and a completion, and one number an answer."""

  rows: tuple[Row, ...]
  values: dict[str, tuple[float, ...]]
  names: tuple[str, ...]  # of the answers, in the row
  steps: tuple[bool, ...] | None = None  # the label of each step
  different: bool = False  # the first two answers must differ


def _row(row: Row, prompt, completion) -> Row:
  fields = {k: v for k, v in row.fields.items() if k in schema.CARRIED}
  return Row(
    {**fields, "prompt": prompt, "completion": completion}, row.origin, "prompt_completion"
  )


def _wrong(row: Row, wanted: str) -> RowError:
  return RowError(
    "wrong schema", row.origin, f"{row.kind!r} rows cannot be used here; that takes {wanted}"
  )


def _pairs(row: Row, tokenizer, with_gold: bool = False) -> list[_Job]:
  if row.kind != "preference":
    raise _wrong(row, '"chosen" and "rejected", with or without "prompt"')
  fields = row.fields
  names = ("chosen", "rejected")
  if with_gold:
    if "reference" not in fields:
      raise _wrong(row, 'a third answer, "reference", beside "chosen" and "rejected"')
    names = (*names, "reference")
  prompt, texts = apart(fields.get("prompt"), [fields[name] for name in names], row, tokenizer)
  numbers = {
    name: (float(fields[name]),) * len(texts)
    for name in ("margin", "weight")
    if fields.get(name) is not None
  }
  return [_Job(tuple(_row(row, prompt, text) for text in texts), numbers, names, different=True)]


def _labels(row: Row, tokenizer) -> list[_Job]:
  """A pair is a desirable answer and an undesirable one."""
  fields = row.fields
  if row.kind == "preference":
    (job,) = _pairs(row, tokenizer)
    if job.rows[0].fields["completion"] == job.rows[1].fields["completion"]:
      raise _identical(row.origin)
    return [
      _Job((part,), {"label": (float(i == 0),)}, (job.names[i],)) for i, part in enumerate(job.rows)
    ]
  if row.kind != "unpaired":
    raise _wrong(row, '"prompt", "completion" and "label", or "messages" and "label", or pairs')
  return [_Job((answered(row),), {"label": (float(fields["label"]),)}, ("completion",))]


def answered(row: Row) -> Row:
  """A prompt and its completion, or a conversation up to its last answer and that answer."""
  fields = row.fields
  if "messages" not in fields:
    return _row(row, fields["prompt"], fields["completion"])
  messages = fields["messages"]
  if messages[-1]["role"] != "assistant" or len(messages) < 2:
    raise RowError(
      "no answer", row.origin, "the last of 'messages' must be the assistant's answer to others"
    )
  return _row(row, messages[:-1], messages[-1:])


def _scored(row: Row, tokenizer) -> list[_Job]:
  if row.kind != "scored":
    raise _wrong(row, '"prompt", "completions" and "scores"')
  fields = row.fields
  scores = tuple(float("nan") if s is None else float(s) for s in fields["scores"])
  parts = tuple(_row(row, fields["prompt"], text) for text in fields["completions"])
  names = tuple(f"completions[{i}]" for i in range(len(parts)))
  return [_Job(parts, {"score": scores}, names)]


def _steps(row: Row, tokenizer) -> list[_Job]:
  if row.kind != "stepwise":
    raise _wrong(row, '"prompt", "completions" (the steps) and "labels"')
  return _in_steps(row, row.fields["labels"])


def _judged(row: Row, tokenizer) -> list[_Job]:
  """All answers of a row, with no number but where steps end."""
  if row.kind in ("stepwise", "steps"):
    return _in_steps(row, [False] * len(row.fields["completions"]))
  if row.kind in ("prompt_completion", "messages", "unpaired"):
    return [_Job((answered(row),), {}, ("completion",))]
  if row.kind not in ("preference", "scored"):
    raise _wrong(row, "a prompt with its answer or answers")
  (job,) = _pairs(row, tokenizer) if row.kind == "preference" else _scored(row, tokenizer)
  return [_Job(job.rows, {}, job.names)]


def _in_steps(row: Row, labels: Sequence[bool]) -> list[_Job]:
  fields = {k: v for k, v in row.fields.items() if k in schema.CARRIED}
  fields |= {"prompt": row.fields["prompt"], "completions": row.fields["completions"]}
  parts = (Row(fields, row.origin, plans.IN_STEPS),)
  return [_Job(parts, {}, ("completions",), steps=tuple(labels))]


_SPLIT = {
  "pairs": _pairs,
  "triples": functools.partial(_pairs, with_gold=True),
  "labels": _labels,
  "outcomes": _labels,
  "scored": _scored,
  "steps": _steps,
  "judged": _judged,
}


def apart(prompt, answers, row, tokenizer):
  """(prompt, answers): what all answers begin with and no assistant wrote is prompt, whether there is one or not."""
  if isinstance(answers[0], str):
    if prompt is None:
      at = borders.common(answers, tokenizer)
      if at == 0:
        raise _no_prompt(row, "text")
      prompt, answers = answers[0][:at], [answer[at:] for answer in answers]
    return prompt, answers
  known = prompt is not None
  at = _same(answers, asked_alone=known)
  if not known and at == 0:
    raise _no_prompt(row, "message")
  prompt, answers = [*(prompt or []), *answers[0][:at]], [answer[at:] for answer in answers]
  for answer in answers:
    if answer[0]["role"] not in ("assistant", "tool"):
      raise RowError(
        "different prompts",
        row.origin,
        f"the answers part at a message of the {answer[0]['role']}'s: they are to be answers to one prompt",
      )
  return prompt, answers


def _same(answers, asked_alone):
  """How many leading messages are the same; with asked_alone only those before the first that an assistant wrote."""
  for at in range(
    min(map(len, answers)) - 1
  ):  # an answer is left; equal ones are found later, in words
    first = answers[0][at]
    if any(answer[at] != first for answer in answers) or (
      asked_alone and first["role"] in ("assistant", "tool")
    ):
      return at
  return min(map(len, answers)) - 1


def _no_prompt(row, what):
  return RowError(
    "no common prompt",
    row.origin,
    f"there is no 'prompt', and the answers do not begin with the same {what}; write the prompt as a column",
  )


def _identical(origin):
  return RowError(
    "identical answers",
    origin,
    "'chosen' and 'rejected' are the same; there is no preference to learn",
  )


def _joined(job: _Job, examples, share) -> Answers:
  for example, name in zip(examples, job.names):
    if isinstance(example, RowError):
      # an answer was encoded as a completion, which is not what the row calls it
      detail = example.detail.replace("completion[", f"{name}[")
      if isinstance(example, lengths.TooLong):
        raise example
      raise RowError(example.reason, example.origin, detail, example.cure)
  if job.different and np.array_equal(examples[0].tokens, examples[1].tokens):
    raise _identical(examples[0].origin)
  return join(examples, share=share, values=job.values)


def _process(example: Answers, spans, labels) -> Answers:
  """The example with the label of each step at the step's last token."""
  steps = np.full(len(example.tokens), np.nan, np.float32)
  steps[[stop - 1 for _, stop in spans]] = labels
  return dataclasses.replace(example, steps=steps)


def _fitted(example: Answers, limit: int, truncate: str) -> Answers:
  excess = len(example.tokens) - limit
  if excess <= 0:
    return example
  # of a shared beginning all can go, of a prompt that stands before each answer all but its last token
  copies = 1 if example.shares else example.count
  per_copy = -(-excess // copies)
  prompts = [len(example.prompt(i)) for i in range(example.count)]
  room = int((example.answer == SHARED).sum()) if example.shares else min(prompts) - 1
  if truncate == "prompt" and per_copy <= room:
    return cut(example, per_copy)
  answers = "answers" if example.count > 1 else "answer"
  raise lengths.TooLong(
    example.origin,
    f"{len(example.tokens)} tokens, prompt and {answers} together, but a row has {limit} (data.length)",
    f"raise --config.data.length, or write --config.data.truncate={WAYS.get(truncate, chat.DROP)}",
    len(example.tokens),
  )


def cut(example: Answers, count: int) -> Answers:
  """The example without the first `count` tokens of its prompt, of each copy of it where answers do not share it."""
  kept = example.positions >= count
  return dataclasses.replace(
    example,
    tokens=example.tokens[kept],
    mask=example.mask[kept],
    answer=example.answer[kept],
    positions=example.positions[kept] - count,
    steps=None if example.steps is None else example.steps[kept],
    is_cut=True,
  )


def check_classes(examples: Sequence[Answers], where: str, cure: str) -> None:
  """Raises unless completions of both labels are there; for all that is used together, after every cut."""
  labels = {example.values["label"][0] for example in examples}
  if len(labels) == 1:
    have = "desirable" if labels == {1.0} else "undesirable"
    raise ValueError(
      f"all {len(examples)} completions of {where} are labelled {have}, and two classes are weighed against each other;"
      f" {cure}"
    )


def with_values(examples: Iterable[Answers], name: str, values: Iterable[Sequence[float]]) -> list:
  """Each with one more number an answer."""
  return [
    dataclasses.replace(example, values={**example.values, name: tuple(map(float, numbers))})
    for example, numbers in zip(examples, values, strict=True)
  ]
