"""Chat templates: the tokenizer's own, or one of these by name for models that come without.

Each is the format its family was trained in.  `{{ bos_token }}` is taken out where the tokenizer does
not start plain text with a BOS, so that a model sees the beginnings it knows.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from posttrain_jax.data import messages as messages_lib
from posttrain_jax.data.template_sandbox import Renderer, TemplateError

# Tools, calls and their results are written as Qwen 2.5 and Hermes do, reasoning as Qwen 3 does; without them it is
# the format alone.
CHATML = """\
{%- set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if messages and messages[0]['role'] == 'system' else messages %}
{%- if tools %}
{{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') }}
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n'
    ~ 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within '
    ~ '<tool_call></tool_call> XML tags:\\n<tool_call>\\n'
    ~ '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages and messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in turns %}
{%- if message['role'] == 'tool' %}
{%- if loop.first or loop.previtem['role'] != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem['role'] != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}
{{- '<|im_start|>' + message['role'] }}
{%- if message['reasoning_content'] %}
{{- '\\n<think>\\n' + message['reasoning_content'].strip('\\n') + '\\n</think>\\n' }}
{%- endif %}
{%- if message['content'] or not message['tool_calls'] %}{{- '\\n' + message['content'] }}{%- endif %}
{%- for call in message['tool_calls'] or [] %}
{{- '\\n<tool_call>\\n{"name": ' ~ (call['function']['name'] | tojson) ~ ', "arguments": '
    ~ (call['function']['arguments'] | tojson) ~ '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# In the three below turns alternate, and a system message is part of the first user's turn.
_ALTERNATING = """\
{%- set system = messages[0]['content'] | trim if messages and messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if messages and messages[0]['role'] == 'system' else messages %}
{%- for message in turns %}
{%- if message['role'] != ('user' if loop.index0 is even else 'assistant') %}
{{- raise_exception('turns must alternate user, assistant, user, ...; turn ' ~ loop.index ~ ' is '
    ~ message['role']) }}
{%- endif %}
{%- endfor %}
"""

# Llama 2 begins each exchange with a BOS; Mistral begins only the conversation with one.
LLAMA2 = (
  _ALTERNATING
  + """\
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- bos_token }}
{{- '[INST] ' }}
{%- if loop.first and system %}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif %}
{{- message['content'] | trim + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif %}
{%- endfor %}
"""
)

MISTRAL = (
  _ALTERNATING
  + """\
{{- bos_token }}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' }}
{%- if loop.first and system %}{{- system + '\\n\\n' }}{%- endif %}
{{- message['content'] | trim + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] | trim + eos_token }}
{%- endif %}
{%- endfor %}
"""
)

GEMMA = (
  _ALTERNATING
  + """\
{{- bos_token }}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- '<start_of_turn>user\\n' }}
{%- if loop.first and system %}{{- system + '\\n\\n' }}{%- endif %}
{%- else %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}
{{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""
)

VICUNA = (
  _ALTERNATING
  + """\
{{- bos_token }}
{%- if not system %}
{%- set system = 'A chat between a curious user and an artificial intelligence assistant. '
    ~ "The assistant gives helpful, detailed, and polite answers to the user's questions." %}
{%- endif %}
{{- system + ' ' }}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- 'USER: ' + message['content'] | trim + ' ' }}
{%- else %}
{{- 'ASSISTANT: ' + message['content'] | trim + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}
"""
)

NAMED = {
  "chatml": CHATML,
  "llama3": LLAMA3,
  "llama2": LLAMA2,
  "mistral": MISTRAL,
  "vicuna": VICUNA,
  "gemma": GEMMA,
}

_PROBE = "PROBE"  # a content whose place in a rendered text can be found again
_CALL = {"name": "probe_name", "arguments": {"probe_key": "probe_value"}}
_TOOL = {"type": "function", "function": {"name": "probe_tool", "description": _PROBE,
         "parameters": {"type": "object", "properties": {}}}}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Template:
  """A chat template bound to a tokenizer's special tokens; `text` is what an export writes."""

  name: str
  text: str
  renderer: Renderer = dataclasses.field(repr=False, compare=False)
  with_tools: "Template | None" = None  # what conversations that have tools are rendered with

  def render(
    self, messages: list[dict], *, add_generation_prompt: bool = False, **variables
  ) -> str:
    """The conversation as text, with the opening of the assistant's next turn if asked for."""
    (text,) = self.render_all([job(messages, add_generation_prompt, **variables)])
    if isinstance(text, TemplateError):
      raise text
    return text

  def render_all(self, jobs: list[dict]) -> list[str | TemplateError]:
    """The texts of many jobs, or the error each ran into, in order."""
    if self.with_tools is None:
      return self.renderer.render([self._as_read(job) for job in jobs])
    texts: dict[bool, Iterator[str | TemplateError]] = {}
    for has_tools in (False, True):
      template = self.of(has_tools)
      some = [template._as_read(job) for job in jobs if bool(job["tools"]) == has_tools]
      texts[has_tools] = iter(template.renderer.render(some))
    return [next(texts[bool(job["tools"])]) for job in jobs]

  def of(self, has_tools: bool) -> "Template":
    """The template of conversations with tools, or without."""
    return self.with_tools if has_tools and self.with_tools is not None else self

  @functools.cached_property
  def turn_ending(self) -> str:
    """What the template writes after an assistant's words: `<|im_end|>`, perhaps more."""
    talk = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _PROBE}]
    try:
      text = self.render(talk)
    except TemplateError as error:
      raise TemplateError(
        f"template {self.name!r}, given a question and its answer: {error}"
      ) from None
    return text[text.rindex(_PROBE) + len(_PROBE) :].strip() if _PROBE in text else ""

  @functools.cached_property
  def call_form(self) -> "tuple[str | None, bool] | None":
    """(what stands for no words beside a call, whether arguments are JSON in a string); None: it writes no calls.

    Templates ask for the one or the other, and write nothing or Python's brackets for the rest.
    """
    for as_text, words, tools in itertools.product((False, True), ("", None), (None, [_TOOL])):
      call = {"type": "function", "id": "probeid01", "function": _CALL}
      turn = {"role": "assistant", "content": words, "tool_calls": [call]}
      asked = job([{"role": "user", "content": _PROBE}, turn], False, tools=tools)
      (text,) = self.renderer.render([_in_form(asked, (words, as_text))])
      if isinstance(text, str) and _writes_call(text, as_text):
        return words, as_text
    return None

  @functools.cached_property
  def writes_reasoning(self) -> bool:
    """Whether an answer's reasoning, where it has any, is in its text."""
    turn = {"role": "assistant", "content": "Answer", messages_lib.REASONING[0]: _PROBE}
    asked = job([{"role": "user", "content": "Question"}, turn], False)
    (text,) = self.renderer.render([self._as_read(asked)])
    return isinstance(text, str) and _PROBE in text

  def _as_read(self, job):
    """The job with calls in the form that the template reads, and reasoning under each of its names."""
    messages = job["messages"]
    if all(message.keys() <= {"role", "content"} for message in messages):
      return job
    if any("tool_calls" in message for message in messages):
      job = _in_form(job, self.call_form or ("", False))
    return {**job, "messages": [_with_reasoning(message) for message in job["messages"]]}


def job(messages: list[dict], add_generation_prompt: bool, **variables) -> dict:
  """The variables of one rendering, as transformers gives them to a template."""
  given = {"tools": None, "documents": None, **variables}
  return {"messages": messages, "add_generation_prompt": add_generation_prompt, **given}


def _in_form(job, form):
  words, as_text = form
  messages = []
  for message in job["messages"]:
    if message.get("tool_calls"):
      message = dict(message)
      if not (message.get("content") or "").strip():
        message["content"] = words
      if as_text:
        message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    messages.append(message)
  return {**job, "messages": messages}


def _with_text(call):
  function = call["function"]
  arguments = json.dumps(function["arguments"], ensure_ascii=False)
  return {**call, "function": {**function, "arguments": arguments}}


def _with_reasoning(message):
  said = next((message[key] for key in messages_lib.REASONING if message.get(key)), None)
  return message if said is None else {"thinking": said, **message, "reasoning_content": said}


def _writes_call(text, as_text):
  arguments = _CALL["arguments"]
  if as_text:
    return _CALL["name"] in text and json.dumps(arguments) in text
  marks = (_CALL["name"], "probe_key", "probe_value")
  return all(mark in text for mark in marks) and str(arguments) not in text


def bind(tokenizer, name: str | None = None) -> Template:
  """The tokenizer's own chat template, or a named one: a key of `NAMED`, another of its own, or a .jinja file.

  Conversations with tools are rendered with the tokenizer's own `tool_use` template where it has one beside its
  default.  A named template must end a turn with one token of this tokenizer: generation stops at a token.
  """
  template = _bound(tokenizer, name)
  if name in NAMED and end_of_turn(tokenizer, template) is None:
    fits = [n for n in NAMED if end_of_turn(tokenizer, _bound(tokenizer, n)) is not None]
    raise ValueError(
      f"template {name!r} ends a turn with {template.turn_ending or 'nothing'!r}, which is not one token"
      f" of this tokenizer; templates that fit it: {', '.join(fits) or 'none'}"
    )
  return template


def _bound(tokenizer, name):
  text = _text(tokenizer, name)
  variables = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
  with_tools = None
  if name is None and "tool_use" in _own(tokenizer):
    tool_text = _own(tokenizer)["tool_use"]
    with_tools = Template("tool_use", tool_text, Renderer(tool_text, variables))
  return Template(name or "tokenizer", text, Renderer(text, variables), with_tools)


def fitting(tokenizer, name: str) -> bool:
  """Whether the tokenizer has the token that ends a turn of a named template."""
  return end_of_turn(tokenizer, _bound(tokenizer, name)) is not None


def end_of_turn(tokenizer, chat_template: Template) -> int | None:
  """The token an assistant's turn ends with, or None if it is no special or added token."""
  ids = tokenizer(chat_template.turn_ending, add_special_tokens=False)["input_ids"]
  special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
  return ids[0] if ids and ids[0] in special else None


def adds_bos(tokenizer) -> bool:
  """Whether the tokenizer starts plain text with its BOS token (some have one and never use it)."""
  ids = tokenizer("a")["input_ids"]
  return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _own(tokenizer) -> dict[str, str]:
  """The tokenizer's own templates by name; one alone is "default"."""
  text = tokenizer.chat_template
  if isinstance(text, dict):
    return text
  return {} if text is None else {"default": text}


def opening(tokenizer, text: str) -> list[int]:
  """The tokens of a text that is to be continued: behind the tokenizer's BOS if it writes one, and no EOS at its end.

  A tokenizer with `add_eos_token` would end it, and the model be asked what comes after the end.
  """
  ids = tokenizer(text, add_special_tokens=False)["input_ids"]
  bos = tokenizer.bos_token_id
  return [bos, *ids] if adds_bos(tokenizer) and ids[:1] != [bos] else ids


def _text(tokenizer, name):
  own = _own(tokenizer)
  if name in NAMED:
    return _named(tokenizer, name)
  if name is not None and name.endswith(".jinja"):
    return _read(Path(name).expanduser())
  if name in own:
    return own[name]
  if name is not None:
    raise ValueError(
      f"no chat template {name!r}; write one of {', '.join([*NAMED, *own.keys() - {'default'}])}, a .jinja file,"
      " or None for the tokenizer's own"
    )
  if "default" not in own:
    beside = f" of its own {', '.join(own)}, or" if own else ""
    raise ValueError(f"this tokenizer has no chat template; name one{beside} of {', '.join(NAMED)}")
  return own["default"]


def _read(path):
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"the chat template {path} is not UTF-8 text ({error.reason})") from None


def _named(tokenizer, name):
  text = NAMED[name]
  return text if adds_bos(tokenizer) else text.replace("{{- bos_token }}\n", "")
