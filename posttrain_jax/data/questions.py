"""Rows as questions: what a model is asked, and the answer that the row holds to be right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.data import answers, messages, schema, templates
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.schema import Row
from posttrain_jax.data.templates import Template

NO_CHANNEL = "rows"


def of(row: Row, tokenizer: Any) -> dict[str, Any]:
  """A question as `evals.tasks` asks it: prompt, question, gold, channel, row, origin, variables.

  prompt: messages or a string: all that stands before the row's last answer.
  question: the prompt as a reader sees it.
  gold: the text of that answer; of a pair the chosen one, of scored answers the best, of labelled ones a desirable one;
    None where the row holds none.
  row: the row as it stands in its file, with the file's own columns.

  Raises:
    RowError: it has no prompt, or no answer to it.
  """
  prompt, answer = _parts(row, tokenizer)
  if isinstance(prompt, list) and answer is not None:
    prompt, answer = _before_last(prompt, answer, row.origin)
  gold = answer if isinstance(answer, str | None) else _said(answer[-1])
  return dict(
    prompt=prompt,
    question=shown(prompt),
    gold=gold,
    channel=row.fields.get("channel") or NO_CHANNEL,
    row=row.raw,
    origin=row.origin,
    variables=_variables(row),
  )


def carried(question: Mapping[str, Any]) -> dict[str, Any]:
  """What a row that is made of a question and an answer has beside them: its channel, and what the template reads."""
  channel = {"channel": question["channel"]} if question["channel"] != NO_CHANNEL else {}
  tools = {k: v for k, v in question.get("variables", {}).items() if k == "tools"}
  row = question.get("row", {})
  others = {k: row[k] for k in ("documents", schema.TEMPLATE_VALUES) if row.get(k)}
  return channel | tools | others


def tokens(
  questions: Sequence[Mapping[str, Any]], tokenizer: Any, template: Template | None
) -> list[list[int]]:
  """The prompts, with the opening of the assistant's turn where they are messages.

  Raises:
    RowError: the prompt holds messages and there is no template.
    TemplateError: the template refuses them.
  """
  talk = [q for q in questions if not isinstance(q["prompt"], str)]
  if talk and template is None:
    raise RowError(
      "no template", talk[0].get("origin", "row"), "the row holds messages: name a chat template"
    )
  jobs = [templates.job(q["prompt"], True, **q.get("variables", {})) for q in talk]
  rendered = iter(template.render_all(jobs) if template is not None and jobs else [])
  return [_ids(q, rendered, tokenizer) for q in questions]


def _ids(question, rendered, tokenizer):
  if isinstance(question["prompt"], str):
    return templates.opening(tokenizer, question["prompt"])
  text = next(rendered)
  if isinstance(text, Exception):
    raise text
  # a rendered template has its BOS already
  return tokenizer(text, add_special_tokens=False)["input_ids"]


def shown(prompt: str | Sequence[Mapping[str, Any]]) -> str:
  """A prompt for a reader: one user's words as they are, a longer conversation with its roles, no system message."""
  if isinstance(prompt, str):
    return prompt
  turns = [message for message in prompt if message["role"] != "system"]
  if len(turns) == 1 and turns[0]["role"] == "user":
    return _said(turns[0])
  return "\n\n".join(f"{message['role']}: {_said(message)}" for message in turns)


def _parts(row: Row, tokenizer: Any) -> tuple[Any, Any]:
  """(prompt, answer): two strings, or two lists of messages; no answer where the row holds none."""
  fields = row.fields
  match row.kind:
    case "messages":
      return [], fields["messages"]
    case "prompt":
      return fields["prompt"], None
    case "prompt_completion":
      return fields["prompt"], fields["completion"]
    case "preference":
      prompt, texts = answers.apart(
        fields.get("prompt"), [fields["chosen"], fields["rejected"]], row, tokenizer
      )
      return prompt, texts[0]
    case "unpaired":
      asked = answers.answered(row).fields
      return asked["prompt"], asked["completion"] if fields["label"] else None
    case "scored":
      scores = [(score, i) for i, score in enumerate(fields["scores"]) if score == score]
      best = max((pair for pair in scores if pair[0] is not None), default=None)
      return fields["prompt"], None if best is None else fields["completions"][best[1]]
  what = "plain text" if row.kind == "text" else "steps to be judged"
  raise RowError(
    "no prompt",
    row.origin,
    f"the row is {what}, which asks nothing that could be answered; answers are written to rows with a prompt:"
    " messages, prompt and completion, or chosen and rejected",
  )


def _before_last(prompt, answer, origin):
  """(all that stands before the last answer of a conversation, that answer)."""
  said = [*prompt, *answer]
  at = max((i for i, message in enumerate(said) if message["role"] == "assistant"), default=-1)
  if at < 1:
    why = "begins with the assistant" if at == 0 else "has no message of the assistant's"
    raise RowError("no answer", origin, f"the conversation {why}: there is nothing to answer")
  return said[:at], said[at : at + 1]


def _said(message: Mapping[str, Any]) -> str:
  """The words of a message; where it calls tools, the calls as JSON."""
  words = message.get("content") or ""
  calls = message.get("tool_calls")
  return words if words.strip() or not calls else json.dumps(calls, ensure_ascii=False)


def _variables(row: Row) -> dict[str, Any]:
  """What else the chat template is given."""
  variables = dict(row.fields.get(schema.TEMPLATE_VALUES, {}))
  if row.fields.get("tools"):
    variables["tools"] = row.fields["tools"]
  cited = row.fields.get("documents") or variables.pop("documents", None)
  return variables | ({"documents": messages.documents(cited, row.origin)} if cited else {})
