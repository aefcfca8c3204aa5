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

from posttrain_jax.data import chat, schema
from posttrain_jax.data.chat import Example
from posttrain_jax.data.files import RowError
from posttrain_jax.data.schema import Row, Skipped

SHARED = -1  # the answer that a token of the common beginning belongs to
TRUNCATE = ("error", "drop", "prompt")
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
) -> chat.Encoded:
  """The Answers of many rows, in order.

  What does not fit into `max_length` tokens (prompt and all answers together) is an error, is left out and counted
  ("drop"), or loses the beginning of its prompt ("prompt"); an answer is never cut, so that its end of turn stays.

  Args:
    kind: what rows are to be: "pairs" (chosen, rejected), "triples" (and reference, a gold answer), "labels" (prompt,
      completion, label; a pair is two of them), "outcomes" (the same, for a reward model: no companions), "steps"
      (prompt, completions, labels), "scored" (prompt, completions, scores); "judged" takes any of these, and prompts
      with one completion, for a reward model to score.
    share: whether answers to a prompt share its tokens, or repeat them.

  Raises:
    RowError: a row of another schema, answers that are equal, an empty one, one that does not fit.
    ValueError: no row is left, or labels are all of one class.
  """
  if truncate not in TRUNCATE:
    raise ValueError(
      f"truncate={truncate!r}: answers are kept whole; write one of {', '.join(TRUNCATE)}"
    )
  kept, skipped = [], Skipped()
  split = _SPLIT[kind]
  for start in range(0, len(rows), _BATCH):
    jobs: list[Any] = []
    for row in rows[start : start + _BATCH]:
      try:
        jobs += split(row)
      except RowError as error:
        jobs.append(error)
    plain = [part for job in jobs if isinstance(job, _Job) for part in job.rows]
    encoded = iter(chat.encode_each(plain, tokenizer, template))
    for job in jobs:
      try:
        if isinstance(job, RowError):
          raise job
        # all of a job's rows are taken from the stream before the first error of theirs is raised
        examples = [next(encoded) for _ in job.rows]
        joined = _joined(job, examples, share)
        if job.steps is not None:
          joined = _process(joined, job.steps, tokenizer)
        kept.append(_fitted(joined, max_length, truncate))
      except RowError as error:
        if on_error == "raise" and not (truncate == "drop" and error.reason == "too long"):
          raise
        skipped.add(error)
  if not kept:
    raise ValueError(f"no row gave an example; {skipped}")
  if kind in ("labels", "outcomes"):
    _check_classes(kept)
  return chat.Encoded(tuple(kept), skipped)


@dataclasses.dataclass(frozen=True)
class _Job:
  """The rows of one Answers, each a prompt and a completion, and one number an answer."""

  rows: tuple[Row, ...]
  values: dict[str, tuple[float, ...]]
  steps: tuple[tuple[str, bool], ...] | None = None
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


def _pairs(row: Row, with_gold: bool = False) -> list[_Job]:
  if row.kind != "preference":
    raise _wrong(row, '"chosen" and "rejected", with or without "prompt"')
  fields = row.fields
  texts = [fields["chosen"], fields["rejected"]]
  if with_gold:
    if "reference" not in fields:
      raise _wrong(row, 'a third answer, "reference", beside "chosen" and "rejected"')
    texts.append(fields["reference"])
  prompt = fields.get("prompt")
  if prompt is None:
    prompt, texts = _implicit(texts, row.origin)
  numbers = {
    name: (float(fields[name]),) * len(texts)
    for name in ("margin", "weight")
    if fields.get(name) is not None
  }
  return [_Job(tuple(_row(row, prompt, text) for text in texts), numbers, different=True)]


def _labels(row: Row) -> list[_Job]:
  """A pair is a desirable answer and an undesirable one."""
  fields = row.fields
  if row.kind == "preference":
    (job,) = _pairs(row)
    return [_Job((part,), {"label": (float(i == 0),)}) for i, part in enumerate(job.rows)]
  if row.kind != "unpaired":
    raise _wrong(row, '"prompt", "completion" and "label", or "messages" and "label", or pairs')
  return [_Job((_answered(row),), {"label": (float(fields["label"]),)})]


def _answered(row: Row) -> Row:
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


def _scored(row: Row) -> list[_Job]:
  if row.kind != "scored":
    raise _wrong(row, '"prompt", "completions" and "scores"')
  fields = row.fields
  scores = tuple(float("nan") if s is None else float(s) for s in fields["scores"])
  parts = tuple(_row(row, fields["prompt"], text) for text in fields["completions"])
  return [_Job(parts, {"score": scores})]


def _steps(row: Row) -> list[_Job]:
  if row.kind != "stepwise":
    raise _wrong(row, '"prompt", "completions" (the steps) and "labels"')
  return _in_steps(row, row.fields["labels"])


def _judged(row: Row) -> list[_Job]:
  """All answers of a row, with no number but where steps end."""
  if row.kind in ("stepwise", "steps"):
    return _in_steps(row, [False] * len(row.fields["completions"]))
  if row.kind in ("prompt_completion", "messages", "unpaired"):
    return [_Job((_answered(row),), {})]
  if row.kind not in ("preference", "scored"):
    raise _wrong(row, "a prompt with its answer or answers")
  (job,) = _pairs(row) if row.kind == "preference" else _scored(row)
  return [_Job(job.rows, {})]


def _in_steps(row: Row, labels: Sequence[bool]) -> list[_Job]:
  steps = tuple(zip(row.fields["completions"], labels))
  text = SEPARATOR.join(row.fields["completions"]) + SEPARATOR
  return [_Job((_row(row, row.fields["prompt"], text),), {}, steps=steps)]


SEPARATOR = "\n"  # after each step of a process; its score is read there

_SPLIT = {
  "pairs": _pairs,
  "triples": lambda row: _pairs(row, with_gold=True),
  "labels": _labels,
  "outcomes": _labels,
  "scored": _scored,
  "steps": _steps,
  "judged": _judged,
}


def _implicit(texts, origin):
  """(prompt, answers) of whole conversations or texts: what all of them begin with is the prompt."""
  shortest = min(map(len, texts))
  same = next(
    (i for i in range(shortest) if any(text[i] != texts[0][i] for text in texts[1:])), shortest
  )
  if isinstance(texts[0], str):
    same = texts[0].rfind(" ", 0, same) if same and " " in texts[0][:same] else 0
    what = "text"
  else:
    same = min(same, shortest - 1)  # answers that are equal are found later, in words
    what = "message"
  if same <= 0:
    raise RowError(
      "no common prompt",
      origin,
      f"there is no 'prompt', and the answers do not begin with the same {what}; write the prompt as a column",
    )
  return texts[0][:same], [text[same:] for text in texts]


def _joined(job: _Job, examples, share) -> Answers:
  for example in examples:
    if isinstance(example, RowError):
      raise example
  if job.different and np.array_equal(examples[0].tokens, examples[1].tokens):
    raise RowError(
      "identical answers",
      examples[0].origin,
      "'chosen' and 'rejected' are the same; there is no preference to learn",
    )
  return join(examples, share=share, values=job.values)


def _process(example: Answers, steps, tokenizer) -> Answers:
  """The example, its answer told apart into steps, each tokenised with its separator and labelled at its last token."""
  prompt = example.tokens[: int(np.argmax(example.mask))]
  pieces = tokenizer([text + SEPARATOR for text, _ in steps], add_special_tokens=False)["input_ids"]
  tokens = np.concatenate([prompt, *pieces]).astype(np.int32)
  labels = np.full(len(tokens), np.nan, np.float32)
  labels[len(prompt) + np.cumsum(list(map(len, pieces))) - 1] = [label for _, label in steps]
  return dataclasses.replace(
    example,
    tokens=tokens,
    mask=np.arange(len(tokens)) >= len(prompt),
    answer=np.zeros(len(tokens), np.int32),
    positions=np.arange(len(tokens), dtype=np.int32),
    steps=labels,
  )


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
  raise RowError(
    "too long",
    example.origin,
    f"{len(example.tokens)} tokens, prompt and {answers} together, but a row has {limit}; raise data.length, or write"
    ' data.truncate="prompt" (cuts the beginning of the prompt, where that is enough) or "drop"',
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


def _check_classes(examples: list[Answers]) -> None:
  labels = {example.values["label"][0] for example in examples}
  if len(labels) < 2:
    have = "desirable" if labels == {1.0} else "undesirable"
    raise ValueError(
      f"all {len(examples)} completions are labelled {have}: two classes are weighed against each other; add the other"
      " class, or fine-tune on the desirable ones (objective sft)"
    )


def with_values(examples: Iterable[Answers], name: str, values: Iterable[Sequence[float]]) -> list:
  """Each with one more number an answer."""
  return [
    dataclasses.replace(example, values={**example.values, name: tuple(map(float, numbers))})
    for example, numbers in zip(examples, values, strict=True)
  ]
