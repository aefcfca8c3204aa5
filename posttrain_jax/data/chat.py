"""Conversations and texts become tokens and a mask of the tokens that are trained.

The mask comes from token prefixes: a text is tokenised once, whole, and what of it is prompt is found
by tokenising the prompt alone and counting the tokens that agree.  It is a mask by position, never by
token id, so a padding token that equals EOS does not take the EOS out of training.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_jax.data import templates
from posttrain_jax.data.files import RowError
from posttrain_jax.data.schema import Row, Skipped
from posttrain_jax.data.template_sandbox import TemplateError
from posttrain_jax.data.templates import Template

TRUNCATE = ("error", "keep_start", "drop", "split")
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


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """Tokens of one row; `mask` is True where the token is a trained target (never the first)."""

  tokens: np.ndarray  # int32 [time]
  mask: np.ndarray  # bool [time]
  channel: str | None = None
  origin: str = ""
  is_chat: bool = False
  is_cut: bool = False  # lost its end to the length limit, or is a piece of a split text

  def __len__(self):
    return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Encoded(Sequence):
  """The examples of a data set, what was left out, and how many were cut."""

  examples: tuple[Any, ...]  # of Example, or of answers.Answers
  skipped: Skipped

  @property
  def cut(self) -> int:
    return sum(example.is_cut for example in self.examples)

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, index):
    return self.examples[index]

  def __str__(self):
    tokens = sum(map(len, self.examples))
    trained = sum(int(example.mask.sum()) for example in self.examples)
    return (
      f"{len(self):,} examples, {tokens:,} tokens, {trained:,} trained"
      f" ({trained / max(tokens, 1):.0%}), {self.cut:,} cut, {self.skipped}"
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
  """A text, and the spans of it that are trained: each (prompt text, text up to its end)."""

  text: str
  spans: tuple[tuple[str, str], ...]


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
) -> Encoded:
  """The examples of many rows, in order.

  A row longer than `max_length` is an error that names it, or is cut at the end
  (`truncate="keep_start"`), left out ("drop") or, for plain text, cut into pieces ("split").  A row
  left without a trained token is an error, or with "drop" and "keep_start" counted as skipped.
  `template` is needed for rows that hold messages.
  """
  if truncate not in TRUNCATE:
    raise ValueError(f"truncate={truncate!r}: write one of {', '.join(TRUNCATE)}")
  if on_error not in ("raise", "skip"):
    raise ValueError(f"on_error={on_error!r}: write 'raise' or 'skip'")
  if max_length < 2:
    raise ValueError(f"max_length={max_length}: a target needs a token before it, so at least 2")
  encoder = _Encoder(tokenizer, template, max_length, truncate)
  rows, examples, skipped = list(rows), [], Skipped()
  for start in range(0, len(rows), _BATCH):
    for result in encoder.batch(rows[start : start + _BATCH]):
      if not isinstance(result, RowError):
        examples += result
      elif on_error == "skip" or result.reason in encoder.counted:
        skipped.add(result)
      else:
        raise result
  if not examples:
    raise ValueError(f"no row gave an example; {skipped}")
  return Encoded(tuple(examples), skipped)


def encode_each(rows: Sequence[Row], tokenizer, template=None) -> list[Example | RowError]:
  """The example of each row, or why there is none; of any length."""
  encoder = _Encoder(tokenizer, template, sys.maxsize, "error")
  results = encoder.batch(list(rows)) if rows else []
  return [r if isinstance(r, RowError) else r[0] for r in results]


class _Encoder:
  def __init__(self, tokenizer, template, max_length, truncate):
    self.tokenizer, self.template = tokenizer, template
    self.max_length, self.truncate = max_length, truncate
    self.counted = {
      "drop": ("too long", "nothing to train after the cut"),
      "keep_start": ("nothing to train after the cut",),
    }.get(truncate, ())
    self.bos = [tokenizer.bos_token_id] if templates.adds_bos(tokenizer) else []
    self.eos = tokenizer.eos_token_id
    self.end_of_turn = None if template is None else templates.end_of_turn(tokenizer, template)

  def batch(self, rows: list[Row]) -> list[list[Example] | RowError]:
    plans = self._plans(rows)
    texts = [[p.text, *(t for s in p.spans for t in s)] for p in plans if isinstance(p, _Plan)]
    unique = list(dict.fromkeys(text for some in texts for text in some))
    ids = dict(zip(unique, self._ids(unique)))
    return [p if isinstance(p, RowError) else self._attempt(r, p, ids) for r, p in zip(rows, plans)]

  def _attempt(self, row, plan, ids):
    try:
      return self._examples(row, plan, ids)
    except RowError as error:
      return error

  def _ids(self, texts):
    # add_special_tokens=False: a rendered template has its BOS already, plain text gets it below.
    return (
      self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    )

  def _plans(self, rows):
    turns = [_turns(row) for row in rows]
    jobs, owners = [], []
    for at, (row, parsed) in enumerate(zip(rows, turns)):
      if isinstance(parsed, _Turns):
        if self.template is None:
          raise RowError("no template", row.origin, "the row holds messages: pass a chat template")
        new = _jobs(parsed)
        jobs += new
        owners += [at] * len(new)
    rendered: dict[int, list] = {}
    for at, text in zip(owners, self.template.render_all(jobs) if jobs else []):
      rendered.setdefault(at, []).append(text)
    return [
      self._chat_plan(row, parsed, rendered[at]) if isinstance(parsed, _Turns) else parsed
      for at, (row, parsed) in enumerate(zip(rows, turns))
    ]

  def _chat_plan(self, row, turns, texts):
    for text in texts:
      if isinstance(text, TemplateError):
        return RowError("refused by the template", row.origin, f"the chat template says: {text}")
    whole, spans = texts[0], []
    for index, prompt, end in zip(turns.trained, texts[1::2], texts[2::2]):
      shared = _common(end, whole)
      if not (
        whole.startswith(prompt) and end.startswith(prompt) and self._ended(end, prompt, shared)
      ):
        return RowError(
          "template without prefixes",
          row.origin,
          f"message {index} is rendered differently once others follow it, so template"
          f" {self.template.name!r} does not say which tokens the assistant wrote; train the last turn"
          ' only (give the others "weight": 0) or name another template',
        )
      spans.append((prompt, whole[:shared]))
    return _Plan(whole, tuple(spans))

  def _ended(self, end, prompt, shared):
    """Whether the turn's ending lies in what the texts share: some close the last turn with more."""
    if self.end_of_turn is None:
      return len(end.rstrip()) <= shared and len(prompt) < shared
    ending = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
    at = end.rfind(ending)
    return len(prompt) <= at and at + len(ending) <= shared

  def _examples(self, row, plan, ids):
    tokens = np.asarray(ids[plan.text], np.int32)
    mask = np.zeros(len(tokens), bool)
    is_chat = _is_chat(row)
    for prompt, end in plan.spans:
      start, stop = (_agreeing(ids[text], ids[plan.text]) for text in (prompt, end))
      mask[start : self._last_end_of_turn(tokens, start, stop) if is_chat else stop] = True
    if not is_chat:
      tokens, mask = self._framed(tokens, mask, row)
    if len(mask):
      mask[0] = False  # nothing comes before it, so nothing predicts it
    if not mask.any():
      raise RowError("nothing to train", row.origin, "the row has no token to train")
    return self._fitted(Example(tokens, mask, row.fields.get("channel"), row.origin, is_chat))

  def _last_end_of_turn(self, tokens, start, stop):
    """Where the model stops; what a template writes after it (a newline) is not the model's."""
    ends = (
      np.flatnonzero(tokens[start:stop] == self.end_of_turn) if self.end_of_turn is not None else ()
    )
    return start + ends[-1] + 1 if len(ends) else stop

  def _framed(self, tokens, mask, row):
    """The example with exactly one BOS where the tokenizer wants one, and an EOS that is trained."""
    if self.eos is None:
      raise RowError(
        "no EOS", row.origin, "the tokenizer has no EOS token, so text could not be made to end"
      )
    before = [] if list(tokens[:1]) == self.bos else self.bos
    after = [] if len(tokens) and tokens[-1] == self.eos else [self.eos]
    tokens = np.concatenate([before, tokens, after]).astype(np.int32)
    mask = np.concatenate([np.zeros(len(before), bool), mask, np.ones(len(after), bool)])
    return tokens, mask

  def _fitted(self, example):
    length, limit = len(example), self.max_length
    if length <= limit:
      return [example]
    if self.truncate == "split" and not example.is_chat and example.mask[1:].all():
      return _split(example, limit)
    prompt = int(np.argmax(example.mask))
    if self.truncate == "keep_start":
      if prompt >= limit:
        raise RowError(
          "nothing to train after the cut",
          example.origin,
          f"the prompt has {prompt} tokens, so nothing is left to train in {limit}",
        )
      return [_piece(example, 0, limit)]
    what = f"{length} tokens ({prompt} before the first trained one)"
    if prompt >= limit:
      what = f"a prompt of {prompt} tokens, {length} with the completion"
    advice = 'raise max_length, or choose truncate="keep_start" or "drop"'
    if self.truncate == "split":
      advice = 'only plain text can be split; choose "keep_start" or "drop"'
    raise RowError("too long", example.origin, f"{what}, but max_length is {limit}; {advice}")


@dataclasses.dataclass(frozen=True)
class _Turns:
  """A conversation and the indices of the messages that are trained."""

  messages: list[dict]
  trained: tuple[int, ...]
  variables: dict


def _turns(row: Row) -> "_Turns | _Plan | RowError":
  fields = row.fields
  if row.kind == "text":
    return _Plan(fields["text"], (("", fields["text"]),))
  if row.kind == "prompt_completion" and isinstance(fields["prompt"], str):
    text = fields["prompt"] + fields["completion"]
    return _Plan(text, ((fields["prompt"], text),))
  if row.kind == "prompt_completion":
    messages, first = fields["prompt"] + fields["completion"], len(fields["prompt"])
  elif row.kind == "messages":
    messages, first = fields["messages"], 0
  else:
    return RowError(
      "wrong schema",
      row.origin,
      f"{row.kind!r} rows cannot be fine-tuned on; that takes text, messages or prompt and completion",
    )
  trained = tuple(
    at
    for at, message in enumerate(messages)
    if at >= first and message["role"] == "assistant" and message.get("weight", 1)
  )
  if not trained:
    return RowError("nothing to train", row.origin, "no assistant's message is there to be trained")
  if trained[0] == 0:
    return RowError(
      "starts with the assistant",
      row.origin,
      "the first message is the assistant's, with no prompt",
    )
  variables = {"tools": fields["tools"]} if "tools" in fields else {}
  return _Turns(messages, trained, variables)


def _is_chat(row):
  return row.kind == "messages" or not isinstance(row.fields.get("prompt", ""), str)


def _jobs(turns):
  """The whole conversation, then for each trained turn the prompt before it and the text with it."""
  jobs = [templates.job(turns.messages, False, **turns.variables)]
  for at in turns.trained:
    jobs.append(templates.job(turns.messages[:at], True, **turns.variables))
    jobs.append(templates.job(turns.messages[: at + 1], False, **turns.variables))
  return jobs


def _common(a, b):
  """How many leading characters two texts share."""
  if b.startswith(a):
    return len(a)
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _agreeing(prefix, whole):
  """How many leading tokens agree: fewer than the prefix has where a merge crosses its end."""
  n = min(len(prefix), len(whole))
  differ = np.flatnonzero(np.asarray(prefix[:n]) != np.asarray(whole[:n]))
  return int(differ[0]) if len(differ) else n


def _split(example, limit):
  """Pieces that overlap by one token, so that every token but the first is trained once."""
  return [_piece(example, at, limit) for at in range(0, len(example) - 1, limit - 1)]


def _piece(example, at, limit):
  mask = example.mask[at : at + limit].copy()
  mask[0] = False
  return dataclasses.replace(
    example, tokens=example.tokens[at : at + limit], mask=mask, is_cut=True
  )


def describe(example: Example, tokenizer, *, marks=("[[", "]]")) -> str:
  """The decoded example, its trained tokens between marks."""
  edges = np.flatnonzero(np.diff(example.mask.astype(int), prepend=0, append=0))
  text, done = "", 0
  for at in [*edges, len(example.tokens)]:
    # Decoded from the beginning each time: a piece alone would lose its leading space.
    decoded = tokenizer.decode(example.tokens[:at].tolist(), skip_special_tokens=False)
    piece = decoded[done:]
    trained = at > 0 and example.mask[at - 1]
    text += f"{marks[0]}{piece}{marks[1]}" if trained else piece
    done = len(decoded)
  return text
