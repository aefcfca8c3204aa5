"""Conversations and texts become tokens and a mask of the tokens that are trained.

The mask comes from token prefixes: a text is tokenised once, whole, and what of it is prompt is found
by tokenising the prompt alone and counting the tokens that agree.  It is a mask by position, never by
token id, so a padding token that equals EOS does not take the EOS out of training.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_jax.data import conversation, said, schema, templates
from posttrain_jax.data import messages as messages_lib
from posttrain_jax.data.conversation import Turns
from posttrain_jax.data.files import RowError
from posttrain_jax.data.schema import Row, Skipped
from posttrain_jax.data.spans import Plan, Reader
from posttrain_jax.data.template_sandbox import MAX_CHARACTERS, TemplateError
from posttrain_jax.data.templates import Template

log = logging.getLogger(__name__)

TRUNCATE = ("error", "keep_start", "drop", "split")
TRAIN_ON = ("assistant", "last")
IN_STEPS = "in steps"  # rows whose answer is told apart into steps: `answers` makes them
SEPARATOR = "\n"  # after each step
MAX_RENDERED = 1_000_000  # messages, in all renderings of a row
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


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """Tokens of one row; `mask` is True where the token is a trained target (never the first)."""

  tokens: np.ndarray  # int32 [time]
  mask: np.ndarray  # bool [time]
  channel: str | None = None
  origin: str = ""
  is_chat: bool = False
  is_cut: bool = False  # lost its end to the length limit, or is a piece of a split text
  spans: tuple[tuple[int, int], ...] = ()  # where each answer, or step of one, begins and ends

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
) -> Encoded:
  """The examples of many rows, in order.

  What is trained of a conversation is what its assistant wrote, every message of it or with train_on="last" the last
  one, each with its end of turn, and nothing else; of a prompt and its completion, the completion.

  A row longer than `max_length` is an error that names it, or is cut at the end
  (`truncate="keep_start"`), left out ("drop") or, for plain text, cut into pieces ("split").  A row
  left without a trained token is an error, or with "drop" and "keep_start" counted as skipped.
  `template` is needed for rows that hold messages.
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
  encoder.tell()
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
    encoder.tell()
    return [r if isinstance(r, RowError) else r[0] for r in results]

  return encode


class _Encoder:
  """Rows of one data set, turned into examples."""

  def __init__(self, tokenizer, template, max_length, truncate, train_on="assistant"):
    self.tokenizer, self.template, self.reader = tokenizer, template, Reader(tokenizer)
    self.max_length, self.truncate, self.train_on = max_length, truncate, train_on
    self.counted = {
      "drop": ("too long", "nothing to train after the cut"),
      "keep_start": ("nothing to train after the cut",),
    }.get(truncate, ())
    self.bos = [tokenizer.bos_token_id] if templates.adds_bos(tokenizer) else []
    self.eos = tokenizer.eos_token_id
    self.dropped: dict[
      said.Shape, set[tuple[int, str]]
    ] = {}  # by a template, of conversations of a shape
    self.unread: dict[str, str] = {}  # what the template does not read, and where the first was
    self.told: set[str] = set()
    self._ends: dict[str, tuple[int | None, str]] = {}

  def ending(self, has_tools: bool) -> tuple[int | None, str]:
    """(the token that ends a turn or None, how it is written)."""
    of = self.template.of(has_tools)
    if of.name not in self._ends:
      end = templates.end_of_turn(self.tokenizer, of)
      written = "" if end is None else self.tokenizer.convert_ids_to_tokens(end)
      self._ends[of.name] = end, written
    return self._ends[of.name]

  def batch(self, rows: list[Row]) -> list[list[Example] | RowError]:
    plans = [self._bounded(row, plan) for row, plan in zip(rows, self._plans(rows))]
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

  def tell(self) -> None:
    """Says once what the template is given and does not write or read."""
    for what, origin in self.unread.items():
      if what not in self.told:
        log.warning("%s, which the template does not read (first: %s)", what, origin)
    self.told |= self.unread.keys()

  # From rows to texts

  def _plans(self, rows):
    parsed = [self._turns(row) for row in rows]
    jobs: list[dict] = []
    for row, turns in zip(rows, parsed):
      if isinstance(turns, Turns):
        if self.template is None:
          raise RowError("no template", row.origin, "the row holds messages: pass a chat template")
        jobs += turns.jobs()
    new = self._new_shapes(parsed)
    texts = iter(self.template.render_all(jobs + [job for job, _ in new.values()]) if jobs else [])
    rendered = [
      [next(texts) for _ in range(2 * len(turns.trained))] if isinstance(turns, Turns) else []
      for turns in parsed
    ]
    for key, (_, marks) in new.items():
      text = next(texts)
      # a template that asks more of the words than that they are words says nothing of them here
      self.dropped[key] = said.dropped(marks, text) if isinstance(text, str) else set()
    return [
      self._chat_plan(row, turns, some) if isinstance(turns, Turns) else turns
      for row, turns, some in zip(rows, parsed, rendered)
    ]

  def _new_shapes(self, parsed):
    new: dict[said.Shape, tuple[dict, dict]] = {}
    for turns in parsed:
      if isinstance(turns, Turns) and turns.shape not in self.dropped and turns.shape not in new:
        messages, variables, marks = said.marked(turns.messages, turns.variables)
        new[turns.shape] = templates.job(messages, False, **variables), marks
    return new

  def _turns(self, row: Row) -> Turns | Plan | RowError:
    fields = row.fields
    if row.kind == "text":
      return Plan(fields["text"], ((0, len(fields["text"])),))
    if row.kind == "prompt_completion" and isinstance(fields["prompt"], str):
      prompt, text = fields["prompt"], fields["prompt"] + fields["completion"]
      return Plan(text, ((len(prompt), len(text)),))
    if row.kind == IN_STEPS:
      return _in_steps(fields["prompt"], fields["completions"])
    if row.kind == "prompt_completion":
      messages, first = fields["prompt"] + fields["completion"], len(fields["prompt"])
    elif row.kind == "messages":
      messages, first = fields["messages"], 0
    else:
      return RowError(
        "wrong schema",
        row.origin,
        f"{row.kind!r} rows cannot be fine-tuned on; that takes text, messages or prompt and completion (answers to"
        " compare are for configs/preference.py, kto.py, reward.py and grouped.py, or eval --workdir of their runs)",
      )
    return self._conversation(row, messages, first)

  def _conversation(self, row, messages, first):
    if self.truncate == "keep_start":
      messages = messages[: self.max_length]  # each has a token at least
    size = sum(len(message.get("content") or "") for message in messages)
    if size > MAX_CHARACTERS:
      detail = f"the conversation has {size:,} characters, more than {MAX_CHARACTERS:,}"
      return RowError("too long", row.origin, detail)
    if len(messages) > self.max_length:
      what = f"{len(messages):,} messages"
      return _too_long(row.origin, what, self.max_length, self.truncate)
    trained = tuple(
      at
      for at, message in enumerate(messages)
      if at >= first and message["role"] == "assistant" and message.get("weight", 1)
    )
    if not trained:
      return RowError(
        "nothing to train", row.origin, "no assistant's message is there to be trained"
      )
    if self.train_on == "last":
      trained = trained[-1:]
    if 2 * len(trained) * trained[-1] > MAX_RENDERED:
      return RowError(
        "too long",
        row.origin,
        f"{len(trained):,} messages to train of {trained[-1] + 1:,}, and the template is asked for each anew",
        "part the conversation into several rows, or train the last message only",
      )
    if trained[0] == 0:
      return RowError(
        "starts with the assistant",
        row.origin,
        "the first message is the assistant's, with no prompt",
      )
    variables = dict(row.fields.get(schema.TEMPLATE_VALUES, {}))
    if row.fields.get("tools"):
      variables["tools"] = row.fields["tools"]
    cited = row.fields.get("documents") or variables.pop("documents", None)
    if cited:
      try:
        variables["documents"] = messages_lib.documents(cited, row.origin)
      except RowError as error:
        return error
    # what follows the last trained message is seen by no trained token
    messages = messages[: trained[-1] + 1]
    if self.template is not None:
      ending = self.ending("tools" in variables)[1]
      messages = [conversation.without_ending(message, ending) for message in messages]
    for at, message in enumerate(messages):
      if at in trained and not (message.get("content", "").strip() or message.get("tool_calls")):
        what = f"{conversation.place(first, at)}, an assistant's message, is empty"
        return RowError("empty completion", row.origin, what)
    return Turns(messages, first, trained, variables, said.shape(messages, variables))

  def _chat_plan(self, row, turns, texts):
    for text in texts:
      if isinstance(text, TemplateError):
        return self._refused(row, turns, text)
    end, ending = self.ending("tools" in turns.variables)
    whole, spans = texts[-1], []
    if not whole.startswith(texts[-2]):
      opened = conversation.after_thoughts(texts[-2], whole, turns.messages[-1])
      if opened is None:
        return self._no_border(row, turns, texts[-2], whole)
      whole = texts[-1] = opened
    for index, prompt, text in zip(turns.trained, texts[0::2], texts[1::2]):
      shared = conversation.common(text, whole)
      stop = conversation.ended(text, len(prompt), shared, ending)
      if not (whole.startswith(prompt) and text.startswith(prompt)) or stop is None:
        advice = (
          'write --config.data.train_on=last (or give the others "weight": 0) to train the last turn only, or name'
          " another template"
          if self.train_on is not None
          else "an answer is to be one assistant's message, or name another template"
        )
        return RowError(
          "template without prefixes",
          row.origin,
          f"message {index} is rendered differently once others follow it, so template"
          f" {self.template.name!r} does not say which tokens the assistant wrote; {advice}",
        )
      spans.append((len(prompt), stop))
    self._note_unread(row, turns)
    lost = self._lost(turns, whole, spans)
    if lost is not None:
      return RowError("dropped by the template", row.origin, lost)
    return Plan(whole, tuple(spans), is_chat=True, end=end, ending=ending)

  def _note_unread(self, row, turns):
    """What need not be in the text, and is not."""
    dropped = self.dropped[turns.shape]
    for at, message in enumerate(turns.messages):
      if message.keys() <= {"role", "content"}:
        continue
      for key in said.unread(message):
        if not isinstance(message[key], str) or (at, key) in dropped:
          self.unread.setdefault(f"messages have {key!r}", row.origin)
    if turns.variables:
      known = self.template.of("tools" in turns.variables).renderer.variables
      for key in turns.variables.keys() - {"tools", "documents"} - known:
        self.unread.setdefault(f"{schema.TEMPLATE_VALUES} sets {key!r}", row.origin)

  def _refused(self, row, turns, error):
    calls = [at for at, message in enumerate(turns.messages) if message.get("tool_calls")]
    cure = ""
    if calls and self.template.of("tools" in turns.variables).call_form is None:
      cure = "; " + self._advice(turns, turns.where(calls[0], "tool_calls"), "tool_calls")
    return RowError("refused by the template", row.origin, f"the chat template says: {error}{cure}")

  def _no_border(self, row, turns, prompt, whole):
    rest = prompt[conversation.common(prompt, whole) :]
    return RowError(
      "template without prefixes",
      row.origin,
      f"template {self.template.name!r} begins an answer with {rest[-60:]!r} when it asks for one, and writes"
      f" {turns.where(turns.trained[-1])} without it, so what the assistant goes on from is never trained; name another"
      " template",
    )

  def _lost(self, turns, whole, spans):
    """What the row says and the text does not hold, in words; None for nothing."""
    template = self.template.of("tools" in turns.variables)
    span_of = dict(zip(turns.trained, spans))
    dropped = self.dropped[turns.shape]
    for at, message in enumerate(turns.messages):
      text, kept = whole, said.past(message)
      if at in span_of:
        start, stop = span_of[at]
        text, kept = whole[conversation.before_opening(whole, start) : stop], message
      for field in sorted(field for index, field in dropped if index == at):
        if field in said.unread(message):
          continue
        is_past = at not in span_of and template.writes_reasoning
        if field in said.REASONING and (is_past or said.holds(text, message[field])):
          continue
        return self._advice(turns, turns.where(at, field), field)
      field = said.missing(kept, text)
      if field is not None:
        return self._advice(turns, turns.where(at, field), field)
    if (-1, "tools") in dropped or not all(
      said.holds(whole, _name(tool)) for tool in turns.variables.get("tools", ())
    ):
      return self._advice(turns, "'tools'", "tools")
    for i, document in enumerate(turns.variables.get("documents", ())):
      for key, words in said.words(document).items():
        where = f"documents[{i}][{key!r}]"
        if (-1, where) in dropped or not said.holds(whole, words):
          return self._advice(turns, where, "documents")
    return None

  def _advice(self, turns, where, field):
    cure = "name another template with --config.model.template=FILE.jinja"
    if field not in ("content", "documents") and self.template.name != "chatml":
      if self.template.with_tools is not None and "tools" not in turns.variables:
        cure = "give the row its 'tools': rows that have them are rendered with the tokenizer's tool_use template"
      elif self._takes_chatml:
        cure = "name one that does with --config.model.template=chatml, or a .jinja file"
    return (
      f"template {self.template.of('tools' in turns.variables).name!r} does not write all of {where}, which would be"
      f" left out of what is trained; {cure}, or take the field out of the rows"
    )

  @functools.cached_property
  def _takes_chatml(self):
    return templates.fitting(self.tokenizer, "chatml")

  # From texts to tokens

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
    return _too_long(
      row.origin, f"more than {self.max_length} tokens ({len(plan.text):,} characters)",
      self.max_length, self.truncate,
    )  # fmt: skip

  def _example(self, row, plan, ids):
    found, spans = self.reader.tokens(plan, ids, row.origin)
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
    raise _too_long(example.origin, what, limit, self.truncate)


def _too_long(origin, what, limit, truncate):
  if truncate in ("prompt", "whole"):
    cure = 'raise data.length, or write data.truncate="drop"'
    return RowError("too long", origin, f"{what}, but a row has {limit}", cure)
  cure = 'raise data.length, or write data.truncate="keep_start" or "drop"'
  if truncate == "split":
    cure = 'only plain text can be split: write data.truncate="keep_start" or "drop"'
  return RowError("too long", origin, f"{what}, but max_length is {limit}", cure)


def _name(tool):
  return (tool["function"] if isinstance(tool.get("function"), dict) else tool)["name"]


def _in_steps(prompt, steps):
  ends = list(
    itertools.accumulate((len(step) + len(SEPARATOR) for step in steps), initial=len(prompt))
  )
  return Plan(prompt + "".join(step + SEPARATOR for step in steps), tuple(itertools.pairwise(ends)))


def _split(example, limit):
  """Pieces that overlap by one token, so that every token but the first is trained once."""
  return [_piece(example, at, limit) for at in range(0, len(example) - 1, limit - 1)]


def _piece(example, at, limit):
  mask = example.mask[at : at + limit].copy()
  mask[0] = False
  return dataclasses.replace(
    example, tokens=example.tokens[at : at + limit], mask=mask, is_cut=True, spans=()
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
