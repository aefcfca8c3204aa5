"""Whether a rendered conversation holds all that its row says; a template writes nothing for a field it does not know.

Two looks.  Once for each shape of conversation (its roles, and which fields its messages have) a copy is rendered whose
every string is a mark of its own: a mark that is missing is a field that is dropped, however common the row's own words
are.  And in each row's own text its own words are looked for, since a template may cut what it finds in them.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from posttrain_jax.data import messages as messages_lib
from posttrain_jax.data.messages import REASONING

# what a template may leave out without a word
IDENTIFIERS = {"role", "content", "tool_calls", "weight", "tool_call_id", "id", *REASONING}
THOUGHT_ENDS = "</think>"  # templates cut what stands before it from turns that are past

Shape = tuple


def shape(messages: Sequence[dict], variables: Mapping[str, Any]) -> Shape:
  """What a template's choice of fields may depend on, the words aside."""
  plain = all(message.keys() <= {"role", "content"} for message in messages)
  turns = tuple((m["role"], bool(m["content"].strip())) if plain else _turn(m) for m in messages)
  others = {key: value for key, value in variables.items() if key not in ("tools", "documents")}
  cited = tuple(tuple(sorted(written)) for written in map(words, variables.get("documents", ())))
  written = json.dumps(others, sort_keys=True) if others else ""
  return turns, bool(variables.get("tools")), cited, written


def words(document: Mapping[str, Any]) -> dict[str, str]:
  """The fields of a document that hold words, but for those that tell it from others."""
  return {
    key: value
    for key, value in document.items()
    if isinstance(value, str) and value.strip() and key not in ("id", "doc_id")
  }


def unread(message: Mapping[str, Any]) -> list[str]:
  """The fields of a message that a template need not write, but which it is told when it does not."""
  names = message.keys() - IDENTIFIERS
  # a tool's name says again which call it answers
  return sorted(names - {"name"} if message["role"] == "tool" else names)


def _turn(message):
  content = message.get("content")
  calls = tuple(bool(call["function"]["arguments"]) for call in message.get("tool_calls", ()))
  others = tuple(sorted(message.keys() - {"role", "content", "tool_calls"}))
  return message["role"], None if content is None else bool(content.strip()), others, calls


def marked(messages: Sequence[dict], variables: Mapping[str, Any]) -> tuple[list[dict], dict, dict]:
  """(messages, variables, {(index, field): marks}): the conversation with a mark in place of each string."""
  marks: dict[tuple[int, str], list[str]] = {}
  turns = []
  for at, message in enumerate(messages):
    turn = dict(message)
    if message.get("content", "").strip():
      turn["content"] = _mark(marks, at, "content")
    for key in REASONING:
      if message.get(key):
        turn[key] = _mark(marks, at, key)
    for key in unread(message):
      if isinstance(message[key], str):
        turn[key] = _mark(marks, at, key)
    if message.get("tool_calls"):
      turn["tool_calls"] = [
        _marked_call(marks, at, f"tool_calls[{i}]", call)
        for i, call in enumerate(message["tool_calls"])
      ]
    turns.append(turn)
  variables = dict(variables)
  if variables.get("tools"):
    name = _mark(marks, -1, "tools")
    function = {
      "name": name,
      "description": "x",
      "parameters": {"type": "object", "properties": {}},
    }
    variables["tools"] = [{"type": "function", "function": function}]
  if variables.get("documents"):
    variables["documents"] = [
      {**document, **{key: _mark(marks, -1, f"documents[{i}][{key!r}]") for key in words(document)}}
      for i, document in enumerate(variables["documents"])
    ]
  return turns, variables, marks


def _mark(marks, at, field):
  mark = f"mark{len(marks)}x{len(marks.get((at, field), ()))}q"
  marks.setdefault((at, field), []).append(mark)
  return mark


def _marked_call(marks, at, field, call):
  name = _mark(marks, at, field)
  arguments = {"key": _mark(marks, at, field)} if call["function"]["arguments"] else {}
  return {**call, "function": {**call["function"], "name": name, "arguments": arguments}}


def dropped(marks: Mapping[tuple[int, str], Sequence[str]], text: str) -> set[tuple[int, str]]:
  """The fields some mark of which is not in the text."""
  return {field for field, some in marks.items() if any(mark not in text for mark in some)}


def missing(message: dict, text: str, fields: Collection[str] | None = None) -> str | None:
  """The first field of the message (of those named) whose words the text does not hold."""
  for field, words in messages_lib.speech(message).items():
    if (fields is None or field in fields) and not all(holds(text, some) for some in words):
      return field
  return None


def holds(text: str, words: str) -> bool:
  """Whether the text has the words, but for space around them, as they are or written as JSON."""
  words = words.strip()
  if words in text:
    return True
  return any(
    _squeezed(form) in _squeezed(text)
    for form in (words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1])
  )


def _squeezed(text):
  return re.sub(r"\s+", "", text)


def past(message: dict) -> dict:
  """What of a message templates keep once others follow it: not an answer's thoughts."""
  if message["role"] != "assistant":
    return message
  kept = {key: value for key, value in message.items() if key not in REASONING}
  if THOUGHT_ENDS in kept.get("content", ""):
    kept["content"] = kept["content"].rpartition(THOUGHT_ENDS)[2]
  return kept
