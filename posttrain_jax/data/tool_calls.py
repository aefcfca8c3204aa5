"""Calls of tools in what a model wrote, read as its chat template writes them.

How a template writes a call is seen from what it makes of a call that is known: the marks around it, and the names of
its two fields.  Read are templates whose calls are JSON (Hermes and Qwen, Llama 3.1, Mistral, and others of that kind).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.core import words
from posttrain_jax.data import templates
from posttrain_jax.data.templates import Template, TemplateError

NAME, KEY, VALUE = "probe_name", "probe_key", "probe_value"
_MARK = "PROBE"
_WORDS = "\N{SECTION SIGN}"  # no mark of a call begins with it
_DECODER = json.JSONDecoder()


@dataclasses.dataclass(frozen=True)
class Turn:
  """What a model said in a turn.

  text: its words, without the calls.  calls: {"name", "arguments"} each.  problem: why the turn cannot be read, ""
  where it can; a turn that cannot has no calls.
  """

  text: str
  calls: tuple[Mapping[str, Any], ...] = ()
  problem: str = ""

  @property
  def message(self) -> dict[str, Any]:
    """The turn as a message, its calls in the form of OpenAI's and Transformers'."""
    said: dict[str, Any] = {"role": "assistant", "content": self.text}
    if self.calls:
      said["tool_calls"] = [{"type": "function", "function": dict(call)} for call in self.calls]
    return said


@dataclasses.dataclass(frozen=True)
class Form:
  """How calls are written: `begin`, JSON, `end`; with `is_list` the JSON is a list of calls.

  A form without a mark at its begin has calls where the turn is JSON and nothing else.
  """

  begin: str
  end: str
  name: str = "name"
  arguments: str = "arguments"
  is_list: bool = False

  def read(self, text: str, *, needs_end: bool = True) -> Turn:
    """The turn's words and calls; needs_end: whether a call without the mark at its end is none.

    >>> Form("<tool_call>", "</tool_call>").read('So: <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
    Turn(text='So:', calls=({'name': 'f', 'arguments': {'x': 1}},), problem='')
    >>> Form("<tool_call>", "</tool_call>").read("<tool_call>f(1)</tool_call>").problem
    "a call is no JSON: 'f(1)</tool_call>'"
    """
    if not self.begin:
      return self._read_bare(text)
    said, calls, at = [], [], 0
    while (found := text.find(self.begin, at)) >= 0:
      said.append(text[at:found])
      start = found + len(self.begin)
      start += len(text[start:]) - len(text[start:].lstrip())
      try:
        value, at = _DECODER.raw_decode(text, start)
        calls += self._calls(value)
      except (ValueError, RecursionError) as error:
        return Turn(text.strip(), problem=_problem(error, text[start:]))
      rest = text[at:].lstrip()
      ends = rest.startswith(self.end)
      if needs_end and not ends:
        return Turn(text.strip(), problem=f"a call does not end with {self.end!r}")
      at = len(text) - len(rest) + (len(self.end) if ends else 0)
    said.append(text[at:])
    return Turn("".join(said).strip(), tuple(calls))

  def _read_bare(self, text: str) -> Turn:
    try:
      calls = self._calls(json.loads(text.strip()))
    except (ValueError, RecursionError):  # words, of which some begin with a bracket
      return Turn(text.strip())
    return Turn("", tuple(calls))

  def _calls(self, value: Any) -> list[dict[str, Any]]:
    """Raises ValueError where the JSON is no call."""
    listed = value if self.is_list and isinstance(value, list) else [value]
    return [self._call(one) for one in listed]

  def _call(self, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get(self.name), str):
      raise _NoCall(f"a call has a text as {self.name!r}: {words.shown(value, 80)}")
    arguments = value.get(self.arguments, {})
    if isinstance(arguments, str):  # as OpenAI's wire has them
      arguments = json.loads(arguments) if arguments.strip() else {}
    if not isinstance(arguments, dict):
      raise _NoCall(
        f"a call has an object as {self.arguments!r}: {words.shown(value.get(self.arguments), 80)}"
      )
    return json.loads(
      words.whole(
        json.dumps({"name": value[self.name], "arguments": arguments}, ensure_ascii=False)
      )
    )


class _NoCall(ValueError):
  """JSON that is no call."""


def _problem(error: Exception, text: str) -> str:
  return str(error) if isinstance(error, _NoCall) else f"a call is no JSON: {words.shown(text, 80)}"


def form(template: Template) -> Form:
  """How the template writes calls.

  Raises:
    ValueError: it writes none, or not in JSON.
  """
  template = template.of(True)
  if template.call_form is None:
    raise ValueError(
      f"the chat template {template.name!r} writes no calls of tools; name one that does, as"
      " --config.model.template=chatml, or a model that has one"
    )
  call = {"type": "function", "id": "probeid01", "function": {"name": NAME, "arguments": {KEY: VALUE}}}  # fmt: skip
  asked = [{"role": "user", "content": _MARK}]
  whole, spoken = (
    template.render([*asked, {"role": "assistant", **turn}], tools=[description(NAME)])
    for turn in ({"content": "", "tool_calls": [call]}, {"content": _WORDS})
  )
  said = whole[_common(whole, spoken) :]  # from where an answer of words would begin
  said = said.split(template.turn_ending or "\0")[0]
  at, value = _json_in(said)
  if at is None:
    raise ValueError(
      f"the chat template {template.name!r} writes calls of tools that are no JSON ({words.shown(said, 80)}), which are"
      " not read here; name another, as --config.model.template=chatml"
    )
  start, stop = at
  is_list = isinstance(value, list)
  (one,) = value if is_list else [value]
  name = next(key for key, held in one.items() if held == NAME)
  arguments = next(key for key, held in one.items() if held in ({KEY: VALUE}, json.dumps({KEY: VALUE})))  # fmt: skip
  return Form(said[:start].strip(), said[stop:].strip(), name, arguments, is_list)


def _json_in(text: str) -> tuple[tuple[int, int] | None, Any]:
  """(where the JSON of the probe's call stands, it): an object, or a list of one."""
  for at, letter in enumerate(text):
    if letter not in "[{":
      continue
    try:
      value, stop = _DECODER.raw_decode(text, at)
    except ValueError:
      continue
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(one, dict) and NAME in one.values():
      return (at, stop), value
  return None, None


def _common(one: str, other: str) -> int:
  """How many letters two texts begin with alike."""
  pairs = enumerate(zip(one, other))
  return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def tells(template: Template) -> bool:
  """Whether the template tells the model which tools there are."""
  asked = [{"role": "user", "content": _MARK}]
  told = template.of(True).render(asked, tools=[description(NAME)], add_generation_prompt=True)
  return NAME in told


def description(name: str) -> dict[str, Any]:
  """A tool that takes anything, as templates are told of tools."""
  parameters = {"type": "object", "properties": {}}
  return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}  # fmt: skip


class Continuation:
  """The tokens of what stands between a turn that a model wrote and its next: tools' results, somebody's words.

  The template is rendered on a conversation that stands for the real one, whose turns stay the ids that they are:
  nothing that was written is decoded and read again (TRL's `_get_tool_suffix_ids`).
  """

  def __init__(
    self, template: Template, tokenizer: Any, tools: Sequence[Mapping[str, Any]] = ()
  ) -> None:
    """Raises ValueError where a turn of this template ends with no token of its own."""
    self.template, self.tokenizer, self.tools = template.of(bool(tools)), tokenizer, [*tools]
    end = templates.end_of_turn(tokenizer, self.template)
    if end is None:
      raise ValueError(
        f"the chat template {template.name!r} ends a turn with {self.template.turn_ending!r}, which is no token of its"
        " own: where a turn ends, and the next begins, could not be told from text; name another template"
      )
    self.end = end
    self._ending = tokenizer.convert_ids_to_tokens(end)
    self._specials = {token for token in tokenizer.get_added_vocab() if token}

  def ids(self, messages: Sequence[Mapping[str, Any]], drawn: Sequence[int] = ()) -> list[int]:
    """Of these messages with the opening of the assistant's next turn, behind a turn of these ids.

    Where the turn did not end with the template's token, that comes first.

    Raises:
      TemplateError: the template refuses the messages, or writes a turn otherwise once others follow.
    """
    text = self._behind(messages)
    said = [str(message["content"]) for message in messages]
    ids = self._encoded(text, said)
    return ids if drawn and drawn[-1] == self.end else [self.end, *ids]

  def _behind(self, messages: Sequence[Mapping[str, Any]]) -> str:
    turn: dict[str, Any] = {"role": "assistant", "content": "" if _is_tool(messages) else _MARK}
    if _is_tool(messages):
      names = [message.get("name", NAME) for message in messages]
      turn["tool_calls"] = [
        {"type": "function", "id": f"probeid{i:02}", "function": {"name": name, "arguments": {}}}
        for i, name in enumerate(names)
      ]
    said = [{"tool_call_id": f"probeid{i:02}", **one} for i, one in enumerate(messages)]
    before = [{"role": "user", "content": _MARK}, turn]
    given: dict[str, Any] = {"tools": self.tools} if self.tools else {}
    first = self.template.render(before, **given)
    whole = self.template.render(
      [*before, *(said if _is_tool(messages) else map(dict, messages))],
      add_generation_prompt=True,
      **given,
    )
    until = first.rindex(self._ending) + len(self._ending)
    if whole[:until] != first[:until]:
      raise TemplateError(
        f"the chat template {self.template.name!r} writes a turn otherwise once others follow it: what was sampled"
        " would not be what the conversation holds"
      )
    return whole[until:]

  def _encoded(self, text: str, said: Sequence[str]) -> list[int]:
    """The ids of a text in which special tokens are those of the template alone, and none that a tool wrote."""
    encode = lambda part, **how: self.tokenizer(part, add_special_tokens=False, **how)["input_ids"]
    if not any(token in content for content in said for token in self._specials):
      return encode(text)
    ids, at = [], 0
    for content in said:
      found = text.find(content, at)
      if found < 0:
        raise TemplateError(
          f"the chat template {self.template.name!r} does not write what a tool said as it is, and"
          f" {words.shown(content, 60)} holds special tokens"
        )
      ids += encode(text[at:found]) + encode(content, split_special_tokens=True)
      at = found + len(content)
    return ids + encode(text[at:])


def _is_tool(messages: Sequence[Mapping[str, Any]]) -> bool:
  return messages[0]["role"] == "tool"
