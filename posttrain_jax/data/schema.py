"""Rows of training data: what a file may hold, checked, each with the file and line it came from.

The schemas are TRL's: `text`, `messages`, `prompt`/`completion`, `chosen`/`rejected`, `label`,
`completions`/`labels`.  Nothing is guessed: a row that fits none of them is an error that lists
them, and `columns=` says which columns of the file play which part.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain_jax.data import files
from posttrain_jax.data.files import RowError

ROLES = ("system", "developer", "user", "assistant", "tool")

# name -> the columns that make it; a row is the kind with the most columns among those that fit.
KINDS = {
  "text": ({"text"},),
  "messages": ({"messages"},),
  "prompt": ({"prompt"},),
  "prompt_completion": ({"prompt", "completion"},),
  "preference": ({"chosen", "rejected"}, {"prompt", "chosen", "rejected"}),
  "unpaired": ({"prompt", "completion", "label"}, {"messages", "label"}),
  "stepwise": ({"prompt", "completions", "labels"},),
  "scored": ({"prompt", "completions", "scores"},),
  "steps": ({"prompt", "completions"},),
}

KNOWN = """\
  {"text": ...}                                            plain text
  {"messages": [{"role": ..., "content": ...}, ...]}       a conversation
  {"prompt": ..., "completion": ...}                       two strings, or two message lists
  {"prompt": ..., "chosen": ..., "rejected": ...}          preference ("prompt" may be left out)
  {"prompt": ..., "completion": ..., "label": true}        unpaired preference
  {"prompt": ..., "completions": [...], "labels": [...]}   stepwise
  {"prompt": ..., "completions": [...], "scores": [...]}   a group of scored answers
  {"prompt": ..., "completions": [...]}                    steps for a reward model to score
or say which columns play these parts, as in
  columns={"prompt": "question", "completion": "answer"}
  columns={"prompt": ["instruction", "input"], "completion": "output"}   (joined by a newline)"""

# What else a row may carry whatever its kind: kept when `columns` picks the others.
# `reference` is a gold answer beside a pair (TPO), `margin` how much better its chosen answer is held to be.
CARRIED = ("channel", "tools", "reference", "margin", "weight")
ANSWERS = ("completion", "chosen", "rejected", "reference")

# ShareGPT's conversations name their speakers in their own way.
SHAREGPT_ROLES = {
  "system": "system",
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "assistant": "assistant",
  "tool": "tool",
}


class Row(NamedTuple):
  """One checked row: its fields, where it stands (`file.jsonl:12`), and which schema it fits."""

  fields: dict[str, Any]
  origin: str
  kind: str


@dataclasses.dataclass
class Skipped:
  """How many rows were left out, by reason, with the first of each in words."""

  counts: Counter = dataclasses.field(default_factory=Counter)
  first: dict[str, str] = dataclasses.field(default_factory=dict)

  def add(self, error: RowError):
    self.counts[error.reason] += 1
    self.first.setdefault(error.reason, str(error))

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
  """The rows of one source, and what was skipped on the way."""

  rows: tuple[Row, ...]
  skipped: Skipped

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
) -> Rows:
  """The checked rows of a file, of a built-in task, of a hub dataset (`owner/name[:config][#split]`), or of a list.

  Files end in .jsonl, .json (one array) or .parquet, the first two also with .gz.  `columns` maps a
  schema's names to the file's.  `chat` turns a prompt and a completion given as strings into a
  user's and an assistant's message (after `system`, if given), so that the chat template applies; rows that hold
  messages or plain text stay as they are.
  `channel` names the rows that carry no channel of their own.  `on_error="skip"` counts the
  rows it cannot use instead of stopping at the first.
  """
  if on_error not in ("raise", "skip"):
    raise ValueError(f"on_error={on_error!r}: write 'raise' or 'skip'")
  if system is not None and not chat:
    raise ValueError("system= has no effect on rows that stay strings: add chat=True")
  rows, skipped = [], Skipped()
  for origin, raw in _raw(source, split):
    try:
      fields = check_row(raw, origin, columns)
      if chat:
        fields = as_chat(fields, origin, system)
      if channel is not None and fields.get("channel") is None:
        fields = {**fields, "channel": channel}
      rows.append(Row(fields, origin, kind(fields, origin)))
    except RowError as error:
      if on_error == "raise":
        raise
      skipped.add(error)
  if not rows:
    held = source if isinstance(source, str | Path) else "the list"
    raise ValueError(f"{held}: holds no usable row; {skipped}")
  return Rows(tuple(rows), skipped)


def _raw(
  source: str | Path | Sequence[Mapping[str, Any]], split: str
) -> Iterable[tuple[str, object]]:
  if isinstance(source, str | Path):
    return files.raw_rows(source, split)
  return ((f"row {i}", row) for i, row in enumerate(source))


def check_row(raw: Any, origin: str, columns=None) -> dict[str, Any]:
  """The fields of one raw row, renamed by `columns`, with every value of its kind checked."""
  if isinstance(raw, RowError):
    raise raw
  if not isinstance(raw, dict):
    raise RowError(
      "not an object",
      origin,
      f"expected an object with named columns, found {_shown(raw)}",
    )
  fields = dict(raw) if columns is None else _renamed(raw, columns, origin)
  return validate(fields, origin)


def kind(fields: Mapping[str, Any], origin: str) -> str:
  """The schema that a row's columns fit: a key of KINDS."""
  columns = set(fields)
  fits = [(name, need) for name, forms in KINDS.items() for need in forms if need <= columns]
  largest = [(name, need) for name, need in fits if not any(need < other for _, other in fits)]
  names = sorted({name for name, _ in largest})
  if not names:
    raise RowError(
      "unknown columns", origin, f"no schema has {sorted(columns)}; write one of\n{KNOWN}"
    )
  if len(names) > 1:
    raise RowError(
      "ambiguous columns",
      origin,
      f"{sorted(columns)} could be {' or '.join(names)}; pick the columns to use with columns=",
    )
  return names[0]


def validate(fields: dict[str, Any], origin: str) -> dict[str, Any]:
  """The fields with each value checked for its kind, messages in one form (role, content)."""
  checked = dict(fields)
  for key in ("channel", "tools"):
    if checked.get(key) is None:
      checked.pop(key, None)
  if not isinstance(checked.get("channel", ""), str):
    raise _wrong_type("channel", checked["channel"], "a string", origin)
  if not isinstance(checked.get("tools", []), list):
    raise _wrong_type("tools", checked["tools"], "a list of tool descriptions", origin)
  _VALIDATE[kind(checked, origin)](checked, origin)
  return checked


def as_chat(fields: dict[str, Any], origin: str, system: str | None) -> dict[str, Any]:
  """A prompt and its answers in strings, as a user's and an assistant's messages; other rows stay as they are."""
  answers = [name for name in (*ANSWERS, "completions") if name in fields]
  steps = "completions" in fields and "scores" not in fields
  if not (isinstance(fields.get("prompt"), str) and answers) or steps:
    if system is None:
      return fields
    raise RowError(
      "no place for the system message",
      origin,
      f"system= goes before a prompt and its answers in strings, found {sorted(fields)} (which are not all"
      " strings); put the message into the rows, or leave system= out",
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
        f"columns={dict(columns)!r} asks for {missing[0]!r}, the row has {sorted(raw)}",
      )
    parts = [raw[column] for column in wanted]
    if len(parts) == 1:
      renamed[name] = parts[0]
      continue
    for column, part in zip(wanted, parts):
      if not isinstance(part, str | None):
        raise _wrong_type(column, part, "a string (several columns are joined)", origin)
    renamed[name] = "\n".join(part for part in parts if part)
  return renamed


def _text(fields, origin):
  _string(fields, "text", origin)
  if not fields["text"].strip():
    raise RowError("empty text", origin, "'text' is empty")


def _conversation(fields, origin):
  fields["messages"] = _messages(fields["messages"], "messages", origin)


def _prompt(fields, origin):
  fields["prompt"] = _string_or_messages(fields["prompt"], "prompt", origin)


def _prompt_completion(fields, origin):
  _prompt(fields, origin)
  fields["completion"] = _completion(fields["completion"], "completion", origin)
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
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
      raise _wrong_type(key, value, "a number", origin)
  _same_form(fields, keys, origin)


def _unpaired(fields, origin):
  if "messages" in fields:
    _conversation(fields, origin)
  else:
    _prompt_completion(fields, origin)
  if not isinstance(fields["label"], bool):
    raise _wrong_type("label", fields["label"], "true or false", origin)


def _steps(fields, origin):
  _string(fields, "prompt", origin)
  steps = fields["completions"]
  if not isinstance(steps, list) or not steps:
    raise _wrong_type("completions", steps, "a list of strings with at least one", origin)
  for step in steps:
    if not isinstance(step, str):
      raise _wrong_type("completions", step, "a list of strings", origin)
    _completion(step, "completions", origin)


def _stepwise(fields, origin):
  _steps(fields, origin)
  steps, labels = fields["completions"], fields["labels"]
  if not isinstance(labels, list) or not all(isinstance(label, bool) for label in labels):
    raise _wrong_type("labels", labels, "a list of true and false", origin)
  if len(steps) != len(labels):
    raise RowError(
      "unequal steps", origin, f"{len(steps)} completions but {len(labels)} labels; each needs one"
    )


def _scored(fields, origin):
  _prompt(fields, origin)
  answers, scores = fields["completions"], fields["scores"]
  if not isinstance(answers, list) or len(answers) < 2:
    raise _wrong_type("completions", answers, "a list of at least two answers", origin)
  numbers = isinstance(scores, list) and all(
    score is None or (isinstance(score, int | float) and not isinstance(score, bool))
    for score in scores
  )
  if not numbers:
    raise _wrong_type("scores", scores, "a list of numbers (null where an answer has none)", origin)
  if len(answers) != len(scores):
    raise RowError(
      "unequal scores", origin, f"{len(answers)} completions but {len(scores)} scores; each has one"
    )
  fields["completions"] = [_completion(answer, "completions", origin) for answer in answers]
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


def _string(fields, key, origin):
  if not isinstance(fields[key], str):
    raise _wrong_type(key, fields[key], "a string", origin)


def _string_or_messages(value, key, origin):
  if isinstance(value, str):
    return value
  if isinstance(value, list):
    return _messages(value, key, origin)
  raise _wrong_type(key, value, "a string or a list of messages", origin)


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


def _messages(value, key, origin):
  if not isinstance(value, list):
    raise _wrong_type(key, value, "a list of messages", origin)
  if not value:
    raise RowError("empty messages", origin, f"{key!r} is an empty list; a conversation has a turn")
  return [_message(message, f"{key}[{i}]", origin) for i, message in enumerate(value)]


def _message(message, where, origin):
  if not isinstance(message, dict):
    raise _wrong_type(where, message, 'a message {"role": ..., "content": ...}', origin)
  # Columnar formats fill what a message lacks with nulls.
  message = {key: value for key, value in message.items() if value is not None}
  if "role" not in message and {"from", "value"} <= set(message):
    speaker = message.pop("from")
    role = SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    message = {"role": role, "content": message.pop("value"), **message}
  role = message.get("role")
  if role is None:
    raise RowError(
      "message without role", origin, f"{where} has {sorted(message)}, but a message has a 'role'"
    )
  if role not in ROLES:
    raise RowError(
      "unknown role", origin, f"{where} has role {role!r}; roles are {', '.join(ROLES)}"
    )
  if "content" not in message and not message.get("tool_calls"):
    raise RowError("message without content", origin, f"{where} has no 'content'")
  if "content" in message:
    message["content"] = _content(message["content"], where, origin)
    if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
      raise RowError("empty completion", origin, f"{where}, an assistant's message, is empty")
  if message.get("weight", 1) not in (0, 1):
    raise RowError(
      "unusable weight",
      origin,
      f"{where} has weight {message['weight']!r}; a message is trained (1) or not (0)",
    )
  return message


def _content(content, where, origin):
  if isinstance(content, str):
    return content
  if isinstance(content, list) and all(isinstance(part, dict) for part in content):
    others = [part.get("type") for part in content if not isinstance(part.get("text"), str)]
    if not others:
      return "".join(part["text"] for part in content)
    raise RowError(
      "not text", origin, f"{where} holds {others[0]!r} content; only text is supported"
    )
  raise _wrong_type(f"{where}['content']", content, "a string", origin)


def _wrong_type(key, value, expected, origin):
  return RowError("wrong type", origin, f"{key!r} is {_shown(value)}, expected {expected}")


def _shown(value):
  names = {dict: "an object", list: "an array", str: "the string", type(None): "null"}
  text = repr(value)
  name = names.get(type(value), type(value).__name__)
  return name if value is None else f"{name} {text if len(text) <= 60 else text[:57] + '...'}"


def kinds(rows: Iterable[Row]) -> Counter:
  """How many rows there are of each schema."""
  return Counter(row.kind for row in rows)
