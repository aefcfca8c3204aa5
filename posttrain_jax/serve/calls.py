"""Calls of tools, as a chat template writes them: found in an answer, and given back in OpenAI's form.

What stands before and behind a call is asked of the template itself: it is shown a conversation with a call, and the
JSON object that holds the tool's name is looked for in what it writes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from typing import Any

from posttrain_jax.data import templates
from posttrain_jax.data.template_sandbox import TemplateError

_NAME, _KEY, _VALUE = "probe_name", "probe_key", "probe_value"
_WORDS = "\N{SECTION SIGN}"  # no opening of a call begins with it
_TOOL = dict(
  type="function",
  function=dict(
    name=_NAME,
    description="PROBE",
    parameters=dict(type="object", properties={_KEY: dict(type="string")}),
  ),
)
_CALL = dict(
  id="probeid01",
  type="function",
  function=dict(name=_NAME, arguments={_KEY: _VALUE}),
)


@dataclasses.dataclass(frozen=True)
class Form:
  """opening, closing: what stands around a call, as `<tool_call>` and `</tool_call>`; the former may be empty.

  arguments: the key under which the call's object has what the tool is called with.
  in_list: whether calls are the entries of a JSON list.
  """

  opening: str
  closing: str
  arguments: str
  in_list: bool

  def found(self, text: str) -> tuple[str, list[dict[str, Any]]]:
    """(the words beside the calls, the calls in OpenAI's form); no calls where what looks like one is none.

    >>> form = Form("<tool_call>", "</tool_call>", "arguments", False)
    >>> words, (call,) = form.found('Well. <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
    >>> words, call["function"]
    ('Well.', {'name': 'f', 'arguments': '{"x": 1}'})
    """
    at = text.find(self.opening) if self.opening else _first_json(text)
    if at < 0:
      return text, []
    words, calls = text[:at], []
    reader = json.JSONDecoder()
    while at >= 0:
      start = at + len(self.opening)
      start += len(text[start:]) - len(text[start:].lstrip())
      try:
        value, end = reader.raw_decode(text, start)
      except (ValueError, RecursionError):
        return text, []
      items = value if isinstance(value, list) else [value]
      if not items or not all(self._is_call(item) for item in items):
        return text, []
      calls += [self._call(item) for item in items]
      at = text.find(self.opening, end) if self.opening else -1
    return words.strip(), calls

  def _is_call(self, item: Any) -> bool:
    named = isinstance(item, dict) and isinstance(item.get("name"), str)
    return named and isinstance(item.get(self.arguments, {}), dict)

  def _call(self, item: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(item.get(self.arguments, {}), ensure_ascii=False)
    function = dict(name=item["name"], arguments=arguments)
    return dict(id=f"call_{secrets.token_hex(12)}", type="function", function=function)


def _first_json(text: str) -> int:
  """Where an answer that is a call and nothing else begins; -1 of other text."""
  start = len(text) - len(text.lstrip())
  return start if text[start : start + 1] in ("{", "[") else -1


def form(template: templates.Template) -> Form | None:
  """How a template writes calls; None where it writes none, or none that is JSON."""
  if template.of(True).call_form is None:
    return None
  asked = [{"role": "user", "content": "PROBE"}]
  answered = [*asked, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
  spoke = [*asked, {"role": "assistant", "content": _WORDS}]
  try:
    before = template.render(asked, tools=[_TOOL], add_generation_prompt=True)
    whole = template.render(answered, tools=[_TOOL])
    words = template.render(spoke, tools=[_TOOL])
    none = template.render(asked, add_generation_prompt=True)
  except TemplateError:
    return None
  if before == none:  # it never tells the model which tools there are
    return None
  said = whole[_common(words, whole) :]  # from where an answer of words would begin
  span = _json_around(said, _NAME)
  if span is None:
    return None
  start, end = span
  value = json.loads(said[start:end])
  keys = [key for key, item in value.items() if item == {_KEY: _VALUE}]
  if value.get("name") != _NAME or not keys:
    return None
  head, tail = said[:start], said[end:]
  in_list = head.rstrip().endswith("[") and tail.lstrip().startswith("]")
  if in_list:
    head, tail = head.rstrip()[:-1], tail.lstrip()[1:]
  ending = template.turn_ending
  tail = tail.split(ending)[0] if ending else tail
  return Form(head.strip(), tail.strip(), keys[0], in_list)


def _common(a: str, b: str) -> int:
  """How many letters two texts begin with alike."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _json_around(text: str, word: str) -> tuple[int, int] | None:
  """The outermost JSON object of a text that holds the word."""
  reader = json.JSONDecoder()
  at = text.find(word)
  for brace in re.finditer(r"\{", text[: max(at, 0)]):
    try:
      _, end = reader.raw_decode(text, brace.start())
    except ValueError:
      continue
    if end > at:
      return brace.start(), end
  return None
