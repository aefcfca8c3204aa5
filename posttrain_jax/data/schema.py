"""Rows of training data: what a file may hold, checked, each with the file and line it came from.

The schemas are TRL's: `text`, `messages`, `prompt`/`completion`, `chosen`/`rejected`, `label`,
`completions`/`labels`; what Alpaca, ShareGPT and OpenAI write becomes one of them (`forms`).  Nothing is guessed: a
row that fits none of them, or several, is an error that says so, and `columns=` says which columns of the file play
which part.
"""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from posttrain_jax.data import files, forms, messages, tables
from posttrain_jax.data.errors import RowError

log = logging.getLogger(__name__)

KNOWN = """\
  {"text": ...}                                            plain text
  {"messages": [{"role": ..., "content": ...}, ...]}       a conversation
  {"prompt": ..., "completion": ...}                       two strings, or two message lists
  {"prompt": ..., "chosen": ..., "rejected": ...}          preference ("prompt" may be left out)
  {"prompt": ..., "completion": ..., "label": true}        unpaired preference
  {"prompt": ..., "completions": [...], "labels": [...]}   stepwise
  {"prompt": ..., "completions": [...], "scores": [...]}   a group of scored answers
  {"prompt": ..., "completions": [...]}                    steps for a reward model to score
  {"instruction": ..., "input": ..., "output": ...}        Alpaca ("input", "system", "history" may be left out)
  {"conversations": [{"from": ..., "value": ...}, ...]}    ShareGPT
  {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}   OpenAI's preferences
or say which columns play these parts, as in
  --config.data.columns.prompt=question --config.data.columns.completion=answer
  --config.data.columns.prompt="('title','body')" --config.data.columns.completion=answer   (joined by a newline)"""

# What else a row may carry whatever its kind: kept when `columns` picks the others.
# `reference` is a gold answer beside a pair (TPO), `margin` how much better its chosen answer is held to be.
# `chat_template_kwargs` are further variables of the chat template.
TEMPLATE_VALUES = "chat_template_kwargs"
CARRIED = ("channel", "tools", "documents", TEMPLATE_VALUES, "reference", "margin", "weight")
# What other formats write beside a conversation, and where it stands here; naming `columns` leaves it out.
BESIDE = {
  "system": 'the first message, {"role": "system", "content": ...}',
  "system_prompt": 'the first message, {"role": "system", "content": ...}',
  "functions": "the row's 'tools'",
}
ANSWERS = ("completion", "chosen", "rejected", "reference")


class Row(NamedTuple):
  """One checked row: its fields, where it stands (`file.jsonl:12`), which schema it fits, and how its file has it."""

  fields: dict[str, Any]
  origin: str
  kind: str
  raw: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass
class Skipped:
  """How many rows were left out, by reason, with the first of each in words."""

  counts: Counter = dataclasses.field(default_factory=Counter)
  first: dict[str, str] = dataclasses.field(default_factory=dict)

  def add(self, error: RowError):
    self.counts[error.reason] += 1
    # what to write instead was decided: to leave it out
    self.first.setdefault(error.reason, f"{error.origin}: {error.detail}")

  def __add__(self, other: "Skipped") -> "Skipped":
    return Skipped(self.counts + other.counts, {**other.first, **self.first})

  def __len__(self):
    return self.counts.total()

  def __str__(self):
    if not self.counts:
      return "no row skipped"
    reasons = (f"{n} {why} (first: {self.first[why]})" for why, n in self.counts.most_common())
    return f"{len(self)} skipped: " + "; ".join(reasons)


@dataclasses.dataclass(frozen=True)
class Rows(Sequence):
  """The rows of one source, what was skipped on the way, and in words what its columns were taken for."""

  rows: tuple[Row, ...]
  skipped: Skipped
  reads: tuple[str, ...] = ()

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    return self.rows[index]


def read(
  source: str | Path | Sequence[Mapping[str, Any]],
  *,
  split: str = "train",
  on_error: str = "raise",
  columns: Mapping[str, str | Sequence[str]] | None = None,
  chat: bool = False,
  system: str | None = None,
  channel: str | None = None,
  kinds: Collection[str] | None = None,
) -> Rows:
  """The checked rows of a file, of a built-in task, of a hub dataset (`owner/name[:config][#split]`), or of a list.

  Files end in .jsonl, .json, .csv, .tsv or .parquet, all but the last also with .gz.  `columns` maps a
  schema's names to the file's.  `chat` turns a prompt and a completion given as strings into a
  user's and an assistant's message (after `system`, if given), so that the chat template applies; rows that hold
  messages or plain text stay as they are.  `kinds` are those that can be used, of a row that could be several.
  `channel` names the rows that carry no channel of their own.  `on_error="skip"` counts the
  rows it cannot use instead of stopping at the first.
  """
  if on_error not in ("raise", "skip"):
    raise ValueError(f"on_error={on_error!r}: write 'raise' or 'skip'")
  if system is not None and not chat:
    raise ValueError("system= has no effect on rows that stay strings: add chat=True")
  rows, skipped = [], Skipped()
  echoes: list[str] = []
  reads = _Reads(columns)
  in_text = isinstance(source, str | Path) and tables.is_table(source)
  for origin, raw in _raw(source, split):
    try:
      fields = check_row(raw, origin, columns, chat=chat, in_text=in_text, kinds=kinds, reads=reads)
      if _echoes(fields):
        echoes.append(origin)
      if chat:
        fields = as_chat(fields, origin, system)
      if channel is not None and fields.get("channel") is None:
        fields = {**fields, "channel": channel}
      rows.append(
        Row(fields, origin, kind(fields, origin), raw if isinstance(raw, Mapping) else {})
      )
    except RowError as error:
      if on_error == "raise":
        raise
      skipped.add(error)
  if echoes:
    log.warning(
      "the answers of %d of %d rows begin with their whole prompt, which is trained as if they said it (first: %s); if"
      " the file has whole texts there, leave the prompt out:"
      " --config.data.columns.chosen=chosen --config.data.columns.rejected=rejected",
      *(len(echoes), len(rows), echoes[0]),
    )
  held = source if isinstance(source, str | Path) else "the list"
  if not rows:
    raise ValueError(f"{held}: holds no usable row; {skipped}")
  return Rows(tuple(rows), skipped, reads.told(str(held)))


class _Reads:
  """What the columns of a source were taken for, and which nobody reads."""

  def __init__(self, columns: Mapping[str, str | Sequence[str]] | None):
    self._of = {
      name: [of] if isinstance(of, str) else list(of) for name, of in (columns or {}).items()
    }
    # of each form: part -> its columns, and columns that no part has, both in their order
    self._parts: dict[forms.Form, dict[str, dict[str, None]]] = {}
    self._unread: dict[forms.Form, dict[str, None]] = {}
    self._seen: set[tuple[int, tuple[str, ...]]] = set()

  def add(self, form: forms.Form, raw: Mapping[str, Any], usual: Collection[str] = ()) -> None:
    """usual: the parts that stand in columns of their own names, beside those that were named."""
    key = id(form), tuple(raw)
    if key in self._seen:
      return
    self._seen.add(key)
    parts, read = self._parts.setdefault(form, {}), set()
    for name, part in form.parts.items():
      for column in self._of.get(
        name, [name] if not self._of or name in (*CARRIED, *usual) else []
      ):
        if column in raw:
          parts.setdefault(part, {})[column] = None
          read.add(column)
    self._unread.setdefault(form, {}).update(dict.fromkeys(c for c in raw if c not in read))

  def told(self, source: str) -> tuple[str, ...]:
    """A sentence for each form that rows of the source have."""
    return tuple(self._sentence(source, form) for form in self._parts)

  def _sentence(self, source, form):
    parts = [f"{_quoted(columns)} as {part}" for part, columns in self._parts[form].items()]
    unread = self._unread[form]
    beside = f"; nobody reads {_quoted(unread)}" if unread else ""
    return f"{source}: reads {', '.join(parts)}{beside}"


def _quoted(columns: Iterable[str]) -> str:
  names = [messages.short(column) for column in columns]
  rest = f" and {len(names) - 8} more columns" if len(names) > 8 else ""
  return ", ".join(names[:8]) + rest


def _echoes(fields):
  """Whether both answers of a pair in strings go on from the prompt instead of answering it."""
  texts = [fields.get(key) for key in ("prompt", "chosen", "rejected")]
  if not all(isinstance(text, str) and text.strip() for text in texts):
    return False
  prompt, *answers = texts
  return all(
    answer.startswith(prompt) and not (prompt[-1:] + answer[len(prompt) :][:1]).isalnum()
    for answer in answers
  )


def _raw(
  source: str | Path | Sequence[Mapping[str, Any]], split: str
) -> Iterable[tuple[str, object]]:
  if isinstance(source, str | Path):
    return files.raw_rows(source, split)
  return ((f"row {i}", row) for i, row in enumerate(source))


def check_row(
  raw: Any,
  origin: str,
  columns: Mapping[str, str | Sequence[str]] | None = None,
  *,
  chat: bool = False,
  in_text: bool = False,
  kinds: Collection[str] | None = None,
  reads: _Reads | None = None,
) -> dict[str, Any]:
  """The fields of one raw row, renamed by `columns`, in TRL's columns, with every value of its kind checked.

  Args:
    chat: whether a chat template writes it.
    in_text: whether all its values are texts, as those of a table.
    kinds: which it may be, where it could be several.
    reads: is told what its columns were taken for.
  """
  if isinstance(raw, RowError):
    raise raw
  if not (isinstance(raw, dict) and all(isinstance(key, str) for key in raw)):
    raise RowError(
      "not an object",
      origin,
      f"expected an object with named columns, found {messages.shown(raw)}",
    )
  fields, usual = dict(raw), ()
  if columns is not None:
    fields = _renamed(raw, columns, origin)
    usual = _usual(columns, raw, kinds)
    fields |= {name: raw[name] for name in usual}
  if in_text:
    fields = tables.typed(fields, origin)
  for alias, name in forms.ALIASES.items():
    if alias in fields and name not in fields:
      fields[name] = fields.pop(alias)
  is_prompt_enough = kinds is None or "prompt" in kinds
  if columns and not any(
    form.kind != "prompt" or is_prompt_enough for form in forms.fitting(frozenset(fields))
  ):
    raise _unfinished(fields, raw, origin, kinds)
  form = forms.of(fields.keys(), origin, kinds, KNOWN)
  if reads is not None:
    reads.add(form, raw, usual)
  return validate(forms.written(fields, form, origin, chat), origin)


def kind(fields: Mapping[str, Any], origin: str) -> str:
  """The schema that a row's columns fit."""
  return forms.of(fields.keys(), origin, None, KNOWN).kind


def validate(fields: dict[str, Any], origin: str) -> dict[str, Any]:
  """The fields with each value checked for its kind, messages in one form (role, content)."""
  checked = dict(fields)
  for key in ("channel", "tools", "documents", TEMPLATE_VALUES):
    if checked.get(key) is None or checked[key] == "":
      checked.pop(key, None)
  if not isinstance(checked.get("channel", ""), str):
    raise messages.wrong_type("channel", checked["channel"], "a string", origin)
  if "tools" in checked:
    checked["tools"] = messages.tools(checked["tools"], origin)
    if not checked["tools"]:
      del checked["tools"]
  if TEMPLATE_VALUES in checked:
    checked[TEMPLATE_VALUES] = _template_values(checked[TEMPLATE_VALUES], origin)
  of_kind = kind(checked, origin)
  _VALIDATE[of_kind](checked, origin)
  if of_kind not in ("text", "steps", "stepwise"):
    _nothing_beside(checked, origin)
  return checked


def _holds_words(value):
  return bool(value.strip() if isinstance(value, str) else isinstance(value, list | dict) and value)


def _nothing_beside(fields, origin):
  """Raises where words stand beside the messages, or beside a prompt, that no template would be given."""
  talk = [m for part in fields.values() if isinstance(part, list) for m in part]
  said = [m.get("content") for m in talk if isinstance(m, dict) and m.get("role") == "system"]
  for name, place in BESIDE.items():
    if _holds_words(fields.get(name)) and fields[name] not in said:
      columns = next(
        key
        for key in ("messages", "chosen", "completion", "completions", "prompt")
        if key in fields
      )
      raise RowError(
        "beside the conversation",
        origin,
        f"{name!r} stands beside {columns!r} and would be left out of the text; write it as {place}, or leave it out by"
        f" naming the columns to use, as in --config.data.columns.{columns}={columns}",
      )


def as_chat(fields: dict[str, Any], origin: str, system: str | None) -> dict[str, Any]:
  """A prompt and any answers in strings, as a user's and an assistant's messages; other rows stay as they are."""
  answers = [name for name in (*ANSWERS, "completions") if name in fields]
  steps = "completions" in fields and "scores" not in fields
  if not isinstance(fields.get("prompt"), str) or steps:
    if system is None:
      return fields
    raise RowError(
      "no place for the system message",
      origin,
      f"data.system goes before a prompt and its answers in strings, found {messages.names(fields)} (which are not all"
      " strings); put the message into the rows, or leave data.system out",
    )
  if not fields["prompt"].strip():
    raise RowError("empty prompt", origin, "an empty prompt cannot be a user's message")
  opening = [] if system is None else [{"role": "system", "content": system}]
  turn = lambda text: [{"role": "assistant", "content": text}]
  said = {
    name: list(map(turn, fields[name])) if name == "completions" else turn(fields[name])
    for name in answers
  }
  return {**fields, **said, "prompt": opening + [{"role": "user", "content": fields["prompt"]}]}


def _renamed(raw, columns, origin):
  renamed = {key: raw[key] for key in CARRIED if key in raw}
  for name, of in columns.items():
    wanted = [of] if isinstance(of, str) else list(of)
    missing = [column for column in wanted if column not in raw]
    if missing:
      raise RowError(
        "missing column",
        origin,
        f"data.columns asks for {missing[0]!r} as {name!r}, the row has {messages.names(raw)}",
      )
    parts = [raw[column] for column in wanted]
    if len(parts) == 1:
      renamed[name] = parts[0]
      continue
    for column, part in zip(wanted, parts):
      if not isinstance(part, str | None):
        raise messages.wrong_type(column, part, "a string (several columns are joined)", origin)
    renamed[name] = "\n".join(part for part in parts if part)
  return renamed


def _usual(
  columns: Mapping[str, str | Sequence[str]], raw: Mapping[str, Any], kinds: Collection[str] | None
) -> tuple[str, ...]:
  """The parts that a row has in columns of their own names, where those that were named make no row alone.

  Whoever names all parts of a form leaves the others out.

  >>> _usual({"completion": "answer"}, {"prompt": "a", "answer": "b", "text": "c"}, None)
  ('prompt',)
  >>> _usual({"chosen": "good", "rejected": "bad"}, {"prompt": "a", "good": "b", "bad": "c"}, None)
  ()
  """
  if any(form.kind != "prompt" for form in forms.fitting(frozenset(columns))):
    return ()
  taken = {name for of in columns.values() for name in ([of] if isinstance(of, str) else of)}
  usable = [form for form in forms.FORMS if kinds is None or form.kind in kinds]
  needed = [
    form.needs
    for form in usable
    if {*columns} <= {*form.needs}
    and all(name in raw and name not in taken for name in {*form.needs} - {*columns})
  ]
  most = [needs for needs in needed if not any({*needs} < {*other} for other in needed)]
  return tuple(name for name in most[0] if name not in columns) if len(most) == 1 else ()


def _unfinished(fields, raw, origin, kinds):
  """The error of a row of which too few parts were named: which others go with them."""
  rest = dict.fromkeys(
    tuple(name for name in form.needs if name not in fields)
    for form in forms.FORMS
    if (kinds is None or form.kind in kinds) and {*form.needs} & {*fields}
  )
  ways = (" ".join(f"--config.data.columns.{name}=COLUMN" for name in names) for names in rest)
  cure = f"write {', or '.join(ways)}, too" if rest else f"name those of one of\n{KNOWN}"
  return RowError(
    "unknown columns",
    origin,
    f"data.columns names {messages.names(fields)}, which make no row alone; the row has {messages.names(raw)}: {cure}",
  )


def _text(fields, origin):
  _string(fields, "text", origin)
  if not fields["text"].strip():
    raise RowError("empty text", origin, "'text' is empty")


def _template_values(value, origin):
  if not isinstance(value, dict):
    raise messages.wrong_type(TEMPLATE_VALUES, value, "an object of template variables", origin)
  taken = value.keys() & {"messages", "tools", "add_generation_prompt"}
  if taken:
    raise RowError(
      "taken variable", origin, f"{TEMPLATE_VALUES!r} sets {min(taken)!r}, which is the row's own"
    )
  return messages.plain(value, TEMPLATE_VALUES, origin)


def _conversation(fields, origin):
  fields["messages"] = messages.checked(fields["messages"], "messages", origin)


def _prompt(fields, origin):
  fields["prompt"] = _string_or_messages(fields["prompt"], "prompt", origin)


def _prompt_completion(fields, origin):
  _prompt(fields, origin)
  fields["completion"] = _completion(fields["completion"], "completion", origin)
  fields.update(_without_repeats(fields, ("completion",), origin))
  _same_form(fields, ("prompt", "completion"), origin)


def _preference(fields, origin):
  keys = ("chosen", "rejected")
  if "prompt" in fields:
    _prompt(fields, origin)
    keys = ("prompt", *keys)
  if "reference" in fields:
    keys = (*keys, "reference")
  for key in keys:
    if key != "prompt":
      fields[key] = _completion(fields[key], key, origin)
  for key in ("margin", "weight"):
    value = fields.get(key)
    if value is not None and not _is_number(value):
      raise messages.wrong_type(key, value, "a finite number", origin)
  if (fields.get("weight") or 0) < 0:
    raise RowError(
      "negative weight",
      origin,
      f"'weight' is {fields['weight']}, which would teach the pair's reverse; write 0 or more",
    )
  fields.update(_without_repeats(fields, tuple(k for k in keys if k != "prompt"), origin))
  _same_form(fields, keys, origin)


def _unpaired(fields, origin):
  if "messages" in fields:
    _conversation(fields, origin)
  else:
    _prompt_completion(fields, origin)
  if not isinstance(fields["label"], bool):
    raise messages.wrong_type("label", fields["label"], "true or false", origin)


def _steps(fields, origin):
  _string(fields, "prompt", origin)
  steps = fields["completions"]
  if not isinstance(steps, list) or not steps:
    raise messages.wrong_type("completions", steps, "a list of strings with at least one", origin)
  for step in steps:
    if not isinstance(step, str):
      raise messages.wrong_type("completions", step, "a list of strings", origin)
    _completion(step, "completions", origin)


def _stepwise(fields, origin):
  _steps(fields, origin)
  steps, labels = fields["completions"], fields["labels"]
  if not isinstance(labels, list) or not all(isinstance(label, bool) for label in labels):
    raise messages.wrong_type("labels", labels, "a list of true and false", origin)
  if len(steps) != len(labels):
    raise RowError(
      "unequal steps", origin, f"{len(steps)} completions but {len(labels)} labels; each needs one"
    )


def _scored(fields, origin):
  _prompt(fields, origin)
  answers, scores = fields["completions"], fields["scores"]
  if not isinstance(answers, list) or len(answers) < 2:
    raise messages.wrong_type("completions", answers, "a list of at least two answers", origin)
  numbers = isinstance(scores, list) and all(s is None or _is_number(s) for s in scores)
  if not numbers:
    raise messages.wrong_type(
      "scores", scores, "a list of numbers, all finite (null where an answer has none)", origin
    )
  if len(answers) != len(scores):
    raise RowError(
      "unequal scores", origin, f"{len(answers)} completions but {len(scores)} scores; each has one"
    )
  fields["completions"] = [_completion(answer, "completions", origin) for answer in answers]
  numbered = {f"completions[{i}]": answer for i, answer in enumerate(fields["completions"])}
  unrepeated = _without_repeats({"prompt": fields["prompt"], **numbered}, tuple(numbered), origin)
  fields["prompt"], fields["completions"] = (
    unrepeated["prompt"],
    [unrepeated[key] for key in numbered],
  )
  for answer in fields["completions"]:
    _same_form(
      {"prompt": fields["prompt"], "completions": answer}, ("prompt", "completions"), origin
    )


_VALIDATE = {
  "text": _text,
  "messages": _conversation,
  "prompt": _prompt,
  "prompt_completion": _prompt_completion,
  "preference": _preference,
  "unpaired": _unpaired,
  "stepwise": _stepwise,
  "scored": _scored,
  "steps": _steps,
}


def _without_repeats(fields, keys, origin):
  """The fields, answers without the prompt that they all begin with: many files hold whole conversations there."""
  prompt, answers = fields.get("prompt"), [fields[key] for key in keys]
  if prompt is None or not all(isinstance(answer, list) for answer in answers):
    return fields
  if isinstance(prompt, str):
    prompt = _up_to_question(prompt, answers[0])
  count = len(prompt)
  repeats = [bool(count) and answer[:count] == prompt for answer in answers]
  if all(repeats):
    short = [key for key, answer in zip(keys, answers) if len(answer) == count]
    if short:
      raise RowError("empty completion", origin, f"{short[0]!r} is the prompt and nothing else")
    stripped = {key: answer[count:] for key, answer in zip(keys, answers)}
    fields = {**fields, **stripped, "prompt": prompt}
  elif any(repeats):
    key = keys[repeats.index(True)]
    raise RowError(
      "repeated prompt", origin, f"{key!r} repeats 'prompt', and another answer does not"
    )
  for key in keys:
    _check_answers(fields["prompt"], fields[key], key, origin)
  return fields


def _up_to_question(prompt, conversation):
  """The beginning of a conversation that ends with the user's message `prompt`; [] where none does."""
  for at, message in enumerate(conversation):
    if message["role"] == "assistant":
      break
    if message["role"] == "user" and message.get("content") == prompt:
      return conversation[: at + 1]
  return []


def _check_answers(prompt, answer, key, origin):
  """Raises where an answer repeats some of the prompt, is no answer, or goes on in the prompt's last message."""
  if prompt and isinstance(prompt, list) and prompt[-1]["role"] == answer[0]["role"] == "user":
    raise RowError(
      "repeated prompt",
      origin,
      f"{key!r} begins with a user's message behind the user's message that ends 'prompt'; it is the answer alone,"
      " or repeats the whole prompt",
    )
  if _goes_on(prompt, answer):
    raise RowError(
      "begun answer",
      origin,
      f"'prompt' ends with an assistant's message and {key!r} goes on with another, which would be a turn of its own;"
      " end 'prompt' with the message before it, and write its words at the beginning of the answer",
    )


def _goes_on(prompt, answer):
  """Whether a prompt in messages ends with words of the assistant's that the answer goes on from, or repeats."""
  if not prompt or isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
    return False
  before = len(prompt) - 1
  repeats = bool(before) and answer[:before] == prompt[:before]
  next_is = answer[before] if repeats and len(answer) > before else answer[0]
  return next_is["role"] == "assistant" and "tool_calls" not in prompt[-1]


def _is_number(value):
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  try:
    return math.isfinite(float(value))
  except OverflowError:
    return False


def _string(fields, key, origin):
  if not isinstance(fields[key], str):
    raise messages.wrong_type(key, fields[key], "a string", origin)
  messages.text(fields[key], key, origin)


def _string_or_messages(value, key, origin):
  if isinstance(value, str):
    return messages.text(value, key, origin)
  if isinstance(value, list):
    return messages.checked(value, key, origin)
  raise messages.wrong_type(key, value, "a string or a list of messages", origin)


def _completion(value, key, origin):
  if isinstance(value, dict) and (
    {"role", "content"} <= set(value) or {"from", "value"} <= set(value)
  ):
    value = [value]  # one message instead of a list of one
  if value == [] or (isinstance(value, str) and not value.strip()):
    raise RowError("empty completion", origin, f"{key!r} is empty; there is nothing to learn from")
  return _string_or_messages(value, key, origin)


def _same_form(fields, keys, origin):
  forms = {key: "a string" if isinstance(fields[key], str) else "messages" for key in keys}
  if len(set(forms.values())) > 1:
    described = ", ".join(f"{key!r} is {form}" for key, form in forms.items())
    raise RowError("mixed forms", origin, f"{described}; write all as strings or all as messages")


def kinds(rows: Iterable[Row]) -> Counter:
  """How many rows there are of each schema."""
  return Counter(row.kind for row in rows)
