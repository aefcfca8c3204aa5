"""Which columns make a row: the forms of TRL, Alpaca, ShareGPT and OpenAI, read as they are.

A form is known by the columns that it needs.  Others than TRL's are written in its columns, as Axolotl and
LLaMA-Factory read them where the two agree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from posttrain_jax.data import messages
from posttrain_jax.data.errors import RowError

Fields = dict[str, Any]

# Stanford's, as Axolotl and LLaMA-Factory write it: with a line break at its end
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLE_WITH_INPUT = (
  "Below is an instruction that describes a task, paired with an input that provides further context. Write a response"
  " that appropriately completes the request."
)

_ANYWHERE = {"channel": "the channel"}
_OF_A_TEMPLATE = {
  **_ANYWHERE,
  "tools": "the tools",
  "functions": "the tools",
  "documents": "the documents",
  "chat_template_kwargs": "variables of the template",
}
_OF_PAIRS = {
  **_OF_A_TEMPLATE,
  "reference": "the gold answer",
  "margin": "the margin",
  "weight": "the weight",
}
_ALPACA = {"instruction": "the prompt", "input": "the prompt", "system": "the system message"}
_ALPACA = {**_ALPACA, "history": "the turns before", **_OF_A_TEMPLATE}
_SHAREGPT = {"conversations": "the conversation", "system": "the system message", **_OF_A_TEMPLATE}
_BETTER = {"chosen": "the better answer", "rejected": "the worse answer"}
_LABELLED = {"label": "whether it is desirable"}
_DRAWN = {  # beside an answer that a model wrote
  "completion_ids": "the answer's tokens",
  "finished": "whether the answer came to its end",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
  """`needs` are the columns that tell it, `parts` what each column that it reads is taken for."""

  kind: str  # of the row that it becomes, a key of `schema.KINDS`
  needs: tuple[str, ...]
  parts: Mapping[str, str]
  # (fields, where they stand, whether a chat template writes them) -> the fields in TRL's columns
  become: Callable[[Fields, str, bool], Fields] | None = None

  def cure(self, columns: Collection[str]) -> str:
    """The flags that choose this form of a row's columns."""
    used = [name for name in self.parts if name in columns and name in (*self.needs, "input")]
    return " ".join(f"--config.data.columns.{name}={name}" for name in used)


def _alpaca(fields: Fields, origin: str, is_chat: bool) -> Fields:
  """An instruction and its input, a line below, are the user's turn; without a template, Stanford's text."""
  instruction, given = (_words(fields, name, origin) for name in ("instruction", "input"))
  system, before = _words(fields, "system", origin), _history(fields.get("history"), origin)
  if not (instruction.strip() or given.strip()):
    raise RowError("empty prompt", origin, "'instruction' is empty, and so is 'input'")
  answers = {name: fields[name] for name in ("chosen", "rejected", "label") if name in fields}
  if "output" in fields:
    answers["completion"] = _words(fields, "output", origin)
    if not answers["completion"].strip():
      raise RowError(
        "empty completion", origin, "'output' is empty; there is nothing to learn from"
      )
  if not is_chat:
    if before:
      raise RowError(
        "history",
        origin,
        "'history' holds turns, which need a chat template; name one with --config.model.template",
      )
    return {"prompt": stanford(instruction, given, system), **answers}
  asked = "\n".join(part for part in (instruction, given) if part)
  if not (system.strip() or before):
    return {"prompt": asked, **answers}
  opening = [{"role": "system", "content": system}] if system.strip() else []
  talk = [*opening, *before, {"role": "user", "content": asked}]
  said = {
    name: [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    for name, answer in answers.items()
  }
  # the answers of earlier turns are trained, too
  return (
    {"messages": talk + said["completion"]}
    if said.keys() == {"completion"}
    else {"prompt": talk, **said}
  )


def stanford(instruction: str, given: str = "", system: str = "") -> str:
  """The prompt that Alpaca's models were trained on; a system message takes the place of its first sentences.

  >>> stanford("Add.", "1 2", "Be brief.")
  'Be brief.\\n\\n### Instruction:\\nAdd.\\n\\n### Input:\\n1 2\\n\\n### Response:\\n'
  """
  opening = system if system.strip() else PREAMBLE_WITH_INPUT if given else PREAMBLE
  middle = f"### Input:\n{given}\n\n" if given else ""
  return f"{opening}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _sharegpt(fields: Fields, origin: str, is_chat: bool) -> Fields:
  """A conversation, behind the row's system message; where answers to it stand beside it, it is their prompt."""
  talk = fields["conversations"]
  system = _words(fields, "system", origin)
  others = {name: fields[name] for name in ("chosen", "rejected", "label") if name in fields}
  if system.strip() and isinstance(talk, list):
    first = messages.checked(talk[:1], "conversations", origin)[0] if talk else {}
    if first.get("role") != "system":
      talk = [{"role": "system", "content": system}, *talk]
    elif first["content"] != system:
      raise RowError(
        "two system messages",
        origin,
        "'system' stands beside 'conversations', which begins with another system message; leave one of them out",
      )
  return {"prompt" if "chosen" in fields else "messages": talk, **others}


def _openai_pair(fields: Fields, origin: str, is_chat: bool) -> Fields:
  """{"input": {"messages": ..., "tools": ...}, "preferred_output": [...], "non_preferred_output": [...]}."""
  asked = fields["input"]
  if not (isinstance(asked, dict) and "messages" in asked):
    raise messages.wrong_type("input", asked, 'an object {"messages": [...]}', origin)
  pair = {
    "prompt": asked["messages"],
    "chosen": fields["preferred_output"],
    "rejected": fields["non_preferred_output"],
  }
  return pair if asked.get("tools") is None else {**pair, "tools": asked["tools"]}


def _trl(kind: str, parts: Mapping[str, str], also: Mapping[str, str] = _OF_A_TEMPLATE) -> Form:
  return Form(kind, tuple(parts), {**parts, **also})


_PROMPT, _ANSWER = {"prompt": "the prompt"}, {"completion": "the answer"}
FORMS = (
  _trl("text", {"text": "the text"}, _ANYWHERE),
  _trl("messages", {"messages": "the conversation"}),
  _trl("prompt", _PROMPT),
  _trl("prompt_completion", _PROMPT | _ANSWER, _OF_A_TEMPLATE | _DRAWN),
  _trl("preference", _BETTER, _OF_PAIRS),
  _trl("preference", _PROMPT | _BETTER, _OF_PAIRS),
  _trl("unpaired", _PROMPT | _ANSWER | _LABELLED),
  _trl("unpaired", {"messages": "the conversation", **_LABELLED}),
  _trl("stepwise", _PROMPT | {"completions": "the steps", "labels": "their labels"}, _ANYWHERE),
  _trl("scored", _PROMPT | {"completions": "the answers", "scores": "their scores"}),
  _trl("steps", _PROMPT | {"completions": "the steps"}, _ANYWHERE),
  Form(
    "prompt_completion", ("instruction", "output"), {**_ALPACA, "output": "the answer"}, _alpaca
  ),
  Form(
    "unpaired",
    ("instruction", "output", "label"),
    {**_ALPACA, "output": "the answer", **_LABELLED},
    _alpaca,
  ),
  Form(
    "preference",
    ("instruction", "chosen", "rejected"),
    {**_ALPACA, **_BETTER, **_OF_PAIRS},
    _alpaca,
  ),
  Form("messages", ("conversations",), _SHAREGPT, _sharegpt),
  Form("unpaired", ("conversations", "label"), {**_SHAREGPT, **_LABELLED}, _sharegpt),
  Form(
    "preference",
    ("conversations", "chosen", "rejected"),
    {**_SHAREGPT, **_BETTER, **_OF_PAIRS},
    _sharegpt,
  ),
  Form(
    "preference",
    ("input", "preferred_output", "non_preferred_output"),
    {
      "input": "the prompt",
      "preferred_output": "the better answer",
      "non_preferred_output": "the worse answer",
      **_ANYWHERE,
    },
    _openai_pair,
  ),
)
ALIASES = {"kto_tag": "label"}  # LLaMA-Factory's
# what columns are called that stand for a prompt and its answer, in files of no form
ASKED = ("question", "query", "instruction", "problem", "input", "task", "user", "prompt")
ANSWERED = (
  "answer",
  "response",
  "output",
  "solution",
  "completion",
  "canonical_solution",
  "target",
  "assistant",
)


@functools.lru_cache(maxsize=4096)
def fitting(columns: frozenset[str]) -> tuple[Form, ...]:
  """The forms that the columns fit, without those that another needs all columns of and more.

  >>> [form.needs for form in fitting(frozenset({"instruction", "input", "output", "text"}))]
  [('text',), ('instruction', 'output')]
  """
  fits = [form for form in FORMS if columns.issuperset(form.needs)]
  largest = [form for form in fits if not any({*form.needs} < {*other.needs} for other in fits)]
  # a prompt alone trains nothing: beside a conversation it says again how that begins
  answered = [form for form in largest if form.kind != "prompt"]
  return tuple(answered or largest)


def of(columns: Collection[str], origin: str, kinds: Collection[str] | None, known: str) -> Form:
  """The form of a row of these columns; of several the one that becomes one of `kinds`.

  Raises:
    RowError: there is none, or it could be several.
  """
  forms = fitting(frozenset(columns))
  if len(forms) > 1 and kinds is not None:
    forms = tuple(form for form in forms if form.kind in kinds) or forms
  if kinds is not None and "prompt" not in kinds and all(form.kind == "prompt" for form in forms):
    forms = ()  # a prompt alone trains nothing
  if len(forms) == 1:
    return forms[0]
  if not forms:
    raise RowError(
      "unknown columns",
      origin,
      f"no schema has {messages.names(columns)}; {_guess(columns)}write one of\n{known}",
    )
  ways = ", or ".join(form.cure(columns) for form in forms)
  raise RowError(
    "ambiguous columns",
    origin,
    f"{messages.names(columns)} could be {' or '.join(sorted({form.kind for form in forms}))}; pick the columns to use:"
    f" write {ways}",
  )


def _guess(columns: Collection[str]) -> str:
  asked = next((name for name in ASKED if name in columns), None)
  answer = next((name for name in ANSWERED if name in columns and name != asked), None)
  if asked is None or answer is None:
    return ""
  return (
    f"if {asked!r} is the prompt and {answer!r} the answer, write --config.data.columns.prompt={asked}"
    f" --config.data.columns.completion={answer}; or "
  )


def written(fields: Fields, form: Form, origin: str, is_chat: bool) -> Fields:
  """The fields in TRL's columns; what else the row has is kept."""
  others = {other for f in fitting(frozenset(fields)) if f is not form for other in f.needs}
  if form.become is None:
    dismissed = others - {*form.parts}
    fields = {name: value for name, value in fields.items() if name not in dismissed}
  else:
    own = form.become(fields, origin, is_chat)
    left = fields.keys() - form.parts.keys() - others - own.keys()
    carried = {name: fields[name] for name in fields if name in left or name in _OF_PAIRS}
    fields = {**carried, **own}
  if "functions" in form.parts and fields.get("functions") and not fields.get("tools"):
    fields = {**fields, "tools": fields["functions"]}
    del fields["functions"]  # OpenAI's word before `tools`
  return fields


def _words(fields: Fields, name: str, origin: str) -> str:
  """A string that a row may leave out."""
  value = fields.get(name)
  if value is None:
    return ""
  if not isinstance(value, str):
    raise messages.wrong_type(name, value, "a string", origin)
  return messages.text(value, name, origin)


def _history(turns: Any, origin: str) -> list[dict]:
  """LLaMA-Factory's earlier turns, [[instruction, answer], ...]."""
  pairs = turns or []
  if not isinstance(pairs, list) or not all(
    isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
    for pair in pairs
  ):
    raise messages.wrong_type("history", turns, "a list of [instruction, answer]", origin)
  return [
    {"role": role, "content": text}
    for pair in pairs
    for role, text in zip(("user", "assistant"), pair)
  ]
