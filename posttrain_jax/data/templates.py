"""Chat templates: the tokenizer's own, or one of these by name for models that come without.

Each is the format its family was trained in.  `{{ bos_token }}` is taken out where the tokenizer does
not start plain text with a BOS, so that a model sees the beginnings it knows.
"""

import dataclasses
import functools
from pathlib import Path

from posttrain_jax.data.template_sandbox import Renderer, TemplateError

CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
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


@dataclasses.dataclass(frozen=True)
class Template:
  """A chat template bound to a tokenizer's special tokens; `text` is what an export writes."""

  name: str
  text: str
  renderer: Renderer = dataclasses.field(repr=False, compare=False)

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
    return self.renderer.render(jobs)

  @functools.cached_property
  def turn_ending(self) -> str:
    """What the template writes after an assistant's words: `<|im_end|>`, perhaps more."""
    question = {"role": "user", "content": "Question"}
    text = self.render([question, {"role": "assistant", "content": _PROBE}])
    return text[text.rindex(_PROBE) + len(_PROBE) :].strip() if _PROBE in text else ""


def job(messages: list[dict], add_generation_prompt: bool, **variables) -> dict:
  """The variables of one rendering, as a template sees them."""
  return {"messages": messages, "add_generation_prompt": add_generation_prompt, **variables}


def bind(tokenizer, name: str | None = None) -> Template:
  """The tokenizer's own chat template, or a named one: a key of `NAMED` or a .jinja file.

  A named template must end a turn with one token of this tokenizer: generation stops at a token.
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
  return Template(name or "tokenizer", text, Renderer(text, variables))


def end_of_turn(tokenizer, chat_template: Template) -> int | None:
  """The token an assistant's turn ends with, or None if it is no special or added token."""
  ids = tokenizer(chat_template.turn_ending, add_special_tokens=False)["input_ids"]
  special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
  return ids[0] if ids and ids[0] in special else None


def adds_bos(tokenizer) -> bool:
  """Whether the tokenizer starts plain text with its BOS token (some have one and never use it)."""
  ids = tokenizer("a")["input_ids"]
  return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def opening(tokenizer, text: str) -> list[int]:
  """The tokens of a text that is to be continued: behind the tokenizer's BOS if it writes one, and no EOS at its end.

  A tokenizer with `add_eos_token` would end it, and the model be asked what comes after the end.
  """
  ids = tokenizer(text, add_special_tokens=False)["input_ids"]
  bos = tokenizer.bos_token_id
  return [bos, *ids] if adds_bos(tokenizer) and ids[:1] != [bos] else ids


def _text(tokenizer, name):
  if name in NAMED:
    return _named(tokenizer, name)
  if name is not None and name.endswith(".jinja"):
    return Path(name).expanduser().read_text(encoding="utf-8")
  if name is not None:
    raise ValueError(
      f"no chat template {name!r}; write one of {', '.join(NAMED)}, a .jinja file,"
      " or None for the tokenizer's own"
    )
  text = tokenizer.chat_template
  if isinstance(text, dict):
    text = text.get("default")
  if text is None:
    raise ValueError(f"this tokenizer has no chat template; name one of {', '.join(NAMED)}")
  return text


def _named(tokenizer, name):
  text = NAMED[name]
  return text if adds_bos(tokenizer) else text.replace("{{- bos_token }}\n", "")
