"""Conversations and texts become tokens and a mask of the tokens that are trained.

The mask comes from token prefixes: a text is tokenised once, whole, and what of it is prompt is found
by tokenising the prompt alone and counting the tokens that agree.  It is a mask by position, never by
token id, so a padding token that equals EOS does not take the EOS out of training.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from posttrain_jax.data import encoded, lengths, messages, templates
from posttrain_jax.data.encoded import Encoded, Example
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.plans import IN_STEPS, Planner, too_long
from posttrain_jax.data.schema import Row, Skipped
from posttrain_jax.data.spans import Plan, Reader
from posttrain_jax.data.templates import Template

TRUNCATE = ("error", "keep_start", "drop", "split")
TRAIN_ON = ("assistant", "last")
DROP = "drop (they are left out and counted)"
IDS = "completion_ids"  # the column with an answer's tokens, as they were drawn
ENDED = "ended"  # the column of an answer's end, where no token of its own ends it
STRING = "stop_string"  # what that column says of one that a stop string ended
CHARACTERS = 64  # of a token, where texts are held to be too long by their beginning
_BATCH = 1000  # rows tokenised together


def load_tokenizer(folder: str | Path):
  """The tokenizer in a local folder.  Nothing is downloaded and no code of the folder runs."""
  from transformers import AutoTokenizer

  path = Path(folder).expanduser()
  if not path.is_dir():
    raise FileNotFoundError(f"{folder} is not a folder with a tokenizer")
  if not any(
    (path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
  ):
    listed = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
    raise FileNotFoundError(f"{folder} holds no tokenizer.json; found {listed}")
  try:
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
  except Exception as error:  # whatever transformers says of a file that is not what it should be
    said = " ".join(str(error).split())[:300] or type(error).__name__
    raise ValueError(
      f"{folder}: its tokenizer cannot be read from tokenizer.json, tokenizer_config.json and config.json: {said}"
    ) from error
  if tokenizer is None or not tokenizer.is_fast:
    raise ValueError(
      f"{folder} has only a slow tokenizer; write its tokenizer.json with transformers'"
      " `convert_slow_tokenizer` and load that"
    )
  return tokenizer


def template(tokenizer, name: str | None = None) -> Template:
  """The tokenizer's own chat template, or a named one: chatml, llama3, ..., or a .jinja file."""
  return templates.bind(tokenizer, name)


def encode(row: Row, tokenizer, template: Template | None = None, *, max_length: int) -> Example:
  """The example of one row; one that does not fit is an error."""
  return encode_all([row], tokenizer, template, max_length=max_length)[0]


def encode_all(
  rows: Iterable[Row],
  tokenizer,
  template: Template | None = None,
  *,
  max_length: int,
  truncate: str = "error",
  on_error: str = "raise",
  train_on: str = "assistant",
  room: int | None = None,
) -> Encoded:
  """The examples of many rows, in order.

  What is trained of a conversation is what its assistant wrote, every message of it or with train_on="last" the last
  one, each with its end of turn, and nothing else; of a prompt and its completion, the completion.

  Rows longer than `max_length` are an error that counts them, or are cut at the end
  (`truncate="keep_start"`), left out ("drop") or, for plain text, cut into pieces ("split").  A row
  left without a trained token is an error, or with "drop" and "keep_start" counted as skipped.
  `template` is needed for rows that hold messages; `room`, the tokens that the model can read of a row, for the advice.
  """
  if truncate not in TRUNCATE:
    raise ValueError(f"truncate={truncate!r}: write one of {', '.join(TRUNCATE)}")
  if on_error not in ("raise", "skip"):
    raise ValueError(f"on_error={on_error!r}: write 'raise' or 'skip'")
  if train_on not in TRAIN_ON:
    raise ValueError(f"train_on={train_on!r}: write one of {', '.join(TRAIN_ON)}")
  if max_length < 2:
    raise ValueError(f"max_length={max_length}: a target needs a token before it, so at least 2")
  encoder = _Encoder(tokenizer, template, max_length, truncate, train_on)
  rows, examples, skipped = list(rows), [], Skipped()
  too_long_rows: list[RowError] = []
  for start in range(0, len(rows), _BATCH):
    for result in encoder.batch(rows[start : start + _BATCH]):
      if not isinstance(result, RowError):
        examples += result
      elif on_error == "skip" or result.reason in encoder.counted:
        skipped.add(result)
      elif result.reason == "too long":
        too_long_rows.append(result)  # all of them are told together
      else:
        raise result
  if too_long_rows:
    pieces = ", split (they become pieces)" if all(row.kind == "text" for row in rows) else ""
    ways = f"keep_start (their ends are cut){pieces} or {DROP}"
    fitting = list(map(len, examples))
    raise lengths.summary(too_long_rows, fitting, limit=max_length, ways=ways, room=room)
  if not examples:
    raise ValueError(f"no row gave an example; {skipped}")
  encoder.planner.tell()
  return Encoded(tuple(examples), skipped)


def each(tokenizer, template=None, *, max_length: int, any_prompt: bool):
  """A function from rows to the example of each, or why there is none.

  What cannot fit into `max_length` tokens is told early, with any_prompt=True of answers alone; what is a little longer
  is there as it is.
  """
  encoder = _Encoder(
    tokenizer, template, max_length, "prompt" if any_prompt else "whole", train_on=None
  )

  def encode(rows: Sequence[Row]) -> list[Example | RowError]:
    results = encoder.batch(list(rows)) if rows else []
    encoder.planner.tell()
    return [r if isinstance(r, RowError) else r[0] for r in results]

  return encode


def _are_ids(value):
  is_id = lambda i: isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31
  return isinstance(value, list) and bool(value) and all(map(is_id, value))


class _Encoder:
  """Rows of one data set, turned into examples."""

  def __init__(self, tokenizer, template, max_length, truncate, train_on="assistant"):
    self.planner = Planner(tokenizer, template, max_length, truncate, train_on)
    self.reader = Reader(tokenizer)
    self.max_length, self.truncate = max_length, truncate
    self.takes_ids = train_on is not None  # where an answer is trained, and not compared
    self.counted = {
      "drop": ("too long", "nothing to train after the cut"),
      "keep_start": ("nothing to train after the cut",),
    }.get(truncate, ())
    self.bos = [tokenizer.bos_token_id] if templates.adds_bos(tokenizer) else []
    self.eos = tokenizer.eos_token_id
    self.end_of_turn = None if template is None else templates.end_of_turn(tokenizer, template)

  def batch(self, rows: list[Row]) -> list[list[Example] | RowError]:
    plans = [self._bounded(row, plan) for row, plan in zip(rows, self.planner.plans(rows))]
    texts = [p.prefixes() for p in plans if isinstance(p, Plan)]
    unique = list(dict.fromkeys(text for some in texts for text in some))
    ids = dict(zip(unique, self.reader.ids(unique)))
    results = [self._attempt(row, plan, ids) for row, plan in zip(rows, plans)]
    return self._checked(plans, results)

  def _attempt(self, row, plan, ids):
    if isinstance(plan, RowError):
      return plan
    try:
      return self._example(row, plan, ids)
    except RowError as error:
      return error

  def _bounded(self, row, plan):
    """The plan, or that its text cannot fit, which its beginning tells: a row may hold a library."""
    if isinstance(plan, RowError):
      return plan
    start = plan.spans[0][0] if self.truncate == "prompt" else 0
    head = (self.max_length + 16) * CHARACTERS
    is_split = self.truncate == "split" and plan.spans[0] == (0, len(plan.text))
    if len(plan.text) - start <= head or is_split:
      return plan
    (ids,) = self.reader.ids([plan.text[start : start + head]])
    if len(ids) <= self.max_length + 16:
      return plan
    if self.truncate == "keep_start":
      spans = tuple((a, min(b, head)) for a, b in plan.spans if a < head)
      if not spans:
        return RowError(
          "nothing to train after the cut",
          row.origin,
          f"the prompt has {plan.spans[0][0]:,} characters, so nothing is left to train in {self.max_length} tokens",
        )
      return dataclasses.replace(plan, text=plan.text[:head], spans=spans)
    what = f"more than {self.max_length} tokens ({len(plan.text):,} characters)"
    return too_long(row.origin, what, len(ids), self.max_length, self.truncate, counted=False)

  def _example(self, row, plan, ids):
    found, spans = self.reader.tokens(plan, ids, row.origin)
    if self.takes_ids and row.kind == "prompt_completion" and IDS in row.fields:
      return [self._of_ids(row, found[: spans[0][0]], is_chat=plan.is_chat)]
    tokens = np.asarray(found, np.int32)
    mask = np.zeros(len(tokens), bool)
    for start, stop in spans:
      mask[start:stop] = True
    if not plan.is_chat:
      tokens, mask, moved = self._framed(tokens, mask, row, ends=row.kind != IN_STEPS)
      spans = [(start + moved, stop + moved) for start, stop in spans]
    if len(mask):
      mask[0] = False  # nothing comes before it, so nothing predicts it
    if not mask.any():
      raise RowError("nothing to train", row.origin, "the row has no token to train")
    channel = row.fields.get("channel")
    return [Example(tokens, mask, channel, row.origin, plan.is_chat, spans=tuple(spans))]

  def _of_ids(self, row, prompt, *, is_chat):
    """The example of an answer that brings its tokens: those, and no others that say the same.

    Behind one that a stop string ended stands what ends an answer: that is where the model is to end.
    """
    ids, said = row.fields[IDS], row.fields["completion"]
    if not _are_ids(ids):
      raise messages.wrong_type(IDS, ids, "a list of token ids, at least one", row.origin)
    said = said if isinstance(said, str) else said[-1]["content"]
    read = self.reader.tokenizer.decode(ids, skip_special_tokens=True)
    if read != said:
      raise RowError(
        "not the answer",
        row.origin,
        f"its {IDS} say {read[:60]!r}, and the completion is {said[:60]!r}",
        f"leave the column {IDS} out where the text is to be tokenised anew, as for another tokenizer",
      )
    is_stopped = row.fields.get(ENDED) == STRING
    end = [self.end_of_turn] if is_stopped and is_chat and self.end_of_turn is not None else []
    tokens = np.asarray([*prompt, *ids, *end], np.int32)
    mask = np.arange(len(tokens)) >= len(prompt)
    if not is_chat:
      tokens, mask, _ = self._framed(tokens, mask, row, ends=is_stopped)
    mask[0] = False
    is_cut = row.fields.get("finished") is False  # as `posttrain sample` says it
    channel = row.fields.get("channel")
    return Example(tokens, mask, channel, row.origin, is_chat, is_cut, is_drawn=True)

  def _checked(self, plans, results):
    """The results, but for those whose trained tokens do not say the answer and its end."""
    pieces = [
      (at, example.tokens[start:stop].tolist(), plan.text[a:b])
      for at, (plan, examples) in enumerate(zip(plans, results))
      if not isinstance(examples, RowError)
      for example in examples
      for (start, stop), (a, b) in zip(example.spans, plan.spans)
    ]
    decoded = self.reader.decoded([ids for _, ids, _ in pieces])
    for (at, ids, text), read in zip(pieces, decoded):
      if (
        read != text
        and not isinstance(results[at], RowError)
        and not self.reader.says(ids, read, text)
      ):
        results[at] = RowError(
          "not the answer",
          results[at][0].origin,
          f"the tokenizer reads {text[:60]!r} as {read[:60]!r}",
        )
    return [self._attempt_fit(result) for result in results]

  def _attempt_fit(self, result):
    if isinstance(result, RowError):
      return result
    try:
      return self._fitted(result[0])
    except RowError as error:
      return error

  def _framed(self, tokens, mask, row, *, ends):
    """(tokens, mask, how far they moved): with one BOS where the tokenizer wants one, and an EOS that is trained."""
    if self.eos is None and ends:
      raise RowError(
        "no EOS", row.origin, "the tokenizer has no EOS token, so text could not be made to end"
      )
    before = [] if list(tokens[:1]) == self.bos else self.bos
    after = [] if not ends or (len(tokens) and tokens[-1] == self.eos) else [self.eos]
    tokens = np.concatenate([before, tokens, after]).astype(np.int32)
    mask = np.concatenate([np.zeros(len(before), bool), mask, np.ones(len(after), bool)])
    return tokens, mask, len(before)

  def _fitted(self, example):
    length, limit = len(example), self.max_length
    if length <= limit or self.truncate in ("prompt", "whole"):
      return [example]
    if self.truncate == "split" and not example.is_chat and example.mask[1:].all():
      return encoded.split(example, limit)
    prompt = int(np.argmax(example.mask))
    if self.truncate == "keep_start":
      if prompt >= limit:
        raise RowError(
          "nothing to train after the cut",
          example.origin,
          f"the prompt has {prompt} tokens, so nothing is left to train in {limit}",
        )
      return [encoded.piece(example, 0, limit)]
    what = f"{length} tokens ({prompt} before the first trained one)"
    if prompt >= limit:
      what = f"a prompt of {prompt} tokens, {length} with the completion"
    raise too_long(example.origin, what, length, limit, self.truncate)
