"""/v1/chat/completions: what is asked, and the answer as OpenAI's clients read it, whole and in pieces."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any

from posttrain_jax.core import words
from posttrain_jax.data import messages as messages_lib
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.tool_calls import Form
from posttrain_jax.serve import spelling, wire
from posttrain_jax.serve.answering import Choice, News, Token
from posttrain_jax.serve.errors import wrong
from posttrain_jax.serve.fields import Fields
from posttrain_jax.serve.grammar import Allowed, Grammars
from posttrain_jax.serve.limits import Limits
from posttrain_jax.serve.voice import RESERVED, Voice

LEAST = -9999.0  # stands for a log-probability of -inf, which JSON has not
AUTO, NONE, REQUIRED = "auto", "none", "required"


@dataclasses.dataclass(frozen=True)
class Chat:
  """A conversation that asks for its next turn.

  calls: how calls of tools are found in an answer; None where none are looked for.
  allowed: makes the masks of one answer; None: every token may come.
  """

  wanted: wire.Wanted
  messages: list[dict]
  tools: list[dict]
  variables: dict[str, Any]
  calls: Form | None
  form: dict[str, Any] | None  # a JSON schema
  forced: list[dict]  # tools of which one must be called


def read(body: Fields, limits: Limits, voice: Voice) -> Chat:
  """What a body asks for.

  Raises:
    Refused: it is no conversation, or asks for what is not honoured here.
  """
  logprobs = body.flag("logprobs")
  top = body.whole("top_logprobs", 0, 0, limits.top)
  if top and not logprobs:
    raise wrong("top_logprobs without logprobs: write logprobs=true beside it", "top_logprobs")
  wanted = wire.wanted(
    body, limits, vocab=voice.vocab, max_new=_max_new(body), top=top if logprobs else None
  )
  _refuse_others(body)
  said = messages(body)
  tools, choice = _tools(body), body.take("tool_choice")
  form, forced = _chosen(choice, tools, voice, body)
  schema = _response_format(body.object("response_format"), limits)
  if schema is not None and forced:
    raise wrong("response_format and a tool that must be called exclude each other", "tool_choice")
  if (schema is not None or forced) and (wanted.ignore_eos or wanted.min_new):
    what = "ignore_eos" if wanted.ignore_eos else "min_tokens"
    raise wrong(
      f"{what} and an answer that is held to a form, which says its end, exclude each other", what
    )
  own = variables(body)
  body.close({"messages"})
  return Chat(
    wanted=wanted,
    messages=said,
    tools=tools if form is not None else [],
    variables=own,
    calls=form,
    form=schema,
    forced=forced,
  )


def allowed(chat: Chat, voice: Voice, grammars: Grammars) -> Allowed | None:
  """The masks of one answer; it may compile a schema, so that it belongs into a thread."""
  if chat.form is not None:
    return grammars.schema(voice, chat.form, "response_format")
  if chat.forced and chat.calls is not None:
    return grammars.tool_calls(voice, chat.calls, chat.forced)
  return None


def _max_new(body: Fields) -> int | None:
  old = body.whole("max_tokens", None, 1, 2**31 - 1)
  new = body.whole("max_completion_tokens", None, 1, 2**31 - 1)
  if old is not None and new is not None and old != new:
    raise wrong("max_tokens and max_completion_tokens differ: write the latter", "max_tokens")
  return old if new is None else new


def _refuse_others(body: Fields) -> None:
  body.only("functions", why="write tools")
  body.only("function_call", why="write tool_choice")
  body.only("audio", why="answers are text")
  body.only("prediction", why="nothing is predicted")
  body.only("web_search_options", why="there is no search")
  body.only("reasoning_effort", why="write chat_template_kwargs, where the template reads one")
  body.only("verbosity", "medium", why="no model here reads it")
  body.only("modalities", ["text"], why="answers are text")
  body.only("parallel_tool_calls", True, why="an answer may hold several calls")


def messages(body: Fields) -> list[dict]:
  given = body.take("messages")
  if given is None:
    raise wrong('messages are missing: write [{"role": "user", "content": "..."}]', "messages")
  # lm-evaluation-harness puts a type beside a message's content
  if isinstance(given, list):
    given = [
      {key: value for key, value in one.items() if key != "type"} if isinstance(one, dict) else one
      for one in given
    ]
  try:
    return messages_lib.checked(given, "messages", "the request", trains=False)
  except RowError as error:
    raise wrong(error.detail, "messages") from None


def _tools(body: Fields) -> list[dict]:
  given = body.take("tools")
  if given is None:
    return []
  try:
    tools = messages_lib.tools(given, "the request")
  except RowError as error:
    raise wrong(error.detail, "tools") from None
  for tool in tools:
    if tool.get("type", "function") != "function" or not isinstance(tool.get("function"), dict):
      raise wrong(
        'a tool is {"type": "function", "function": {"name": ..., "parameters": ...}}', "tools"
      )
  return tools


def _chosen(
  choice: Any, tools: list[dict], voice: Voice, body: Fields
) -> tuple[Form | None, list[dict]]:
  """(how calls are found, the tools of which one must be called)."""
  names = [tool["function"]["name"] for tool in tools]
  if not tools:
    if choice not in (None, NONE, AUTO):
      raise wrong("tool_choice without tools", "tool_choice")
    return None, []
  if choice == NONE:
    return None, []
  form = voice.call_form
  if form is None:
    raise wrong(
      "this model's chat template has no place for tools, or writes calls in a form that is not JSON: leave tools out,"
      " or serve a template that has them (--template=chatml)",
      "tools",
    )
  if choice in (None, AUTO):
    return form, []
  if choice == REQUIRED:
    return form, tools
  named = choice.get("function") if isinstance(choice, dict) else None
  name = named.get("name") if isinstance(named, dict) else None
  if name not in names:
    raise body.error("tool_choice", f"auto, none, required, or one of the tools {names[:8]}")
  return form, [tools[names.index(name)]]


def _response_format(form: Fields | None, limits: Limits) -> dict[str, Any] | None:
  """The schema that an answer has to follow."""
  if form is None:
    return None
  kind = form.text("type")
  if kind == "text":
    form.close()
    return None
  if kind == "json_object":
    form.close()
    return {"type": "object"}
  if kind != "json_schema":
    raise form.error("type", "text, json_object or json_schema")
  described = form.object("json_schema")
  if described is None:
    raise wrong("response_format has no json_schema", "response_format.json_schema")
  schema = described.take("schema")
  if not isinstance(schema, dict):
    raise described.error("schema", "a JSON schema, an object")
  if len(repr(schema)) > limits.schema:
    raise wrong(f"the schema has more than {limits.schema} bytes", described.name("schema"))
  for label in ("name", "description", "strict"):
    described.take(label)
  described.close()
  form.close()
  return schema


def variables(body: Fields) -> dict[str, Any]:
  values = body.mapping("chat_template_kwargs")
  for name in values:
    if not name.isidentifier() or name in RESERVED or name.startswith("_"):
      shown = words.shown(name, 40)
      raise wrong(f"chat_template_kwargs may not set {shown}", "chat_template_kwargs")
  return values


def logprobs(tokens: list[Token], voice: Voice, top: int | None) -> dict[str, Any] | None:
  """The log-probabilities of an answer's tokens; None where nobody asked."""
  if top is None:
    return None
  return dict(content=[_logprob(token, voice, top) for token in tokens], refusal=None)


def _logprob(token: Token, voice: Voice, top: int) -> dict[str, Any]:
  others = [_named(at, logp, voice) for at, logp in token.top[:top]]
  return {**_named(token.id, token.logp, voice), "top_logprobs": others}


def _named(token: int, logp: float | None, voice: Voice) -> dict[str, Any]:
  data = voice.bytes_of(token)
  return dict(token=spelling.shown(data), logprob=finite(logp), bytes=list(data))


def finite(logp: float | None) -> float | None:
  return logp if logp is None or logp > LEAST else LEAST


def reason(choice: Choice, called: bool) -> str | None:
  return "tool_calls" if called and choice.reason == "stop" else choice.reason


def found(form: Form | None, text: str) -> tuple[str, list[dict[str, Any]]]:
  """(the words before the calls, the calls in OpenAI's form); all is words where what looks like a call is none.

  >>> form = Form("<tool_call>", "</tool_call>")
  >>> said, (call,) = found(form, 'Well. <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
  >>> said, call["function"]
  ('Well.', {'name': 'f', 'arguments': '{"x": 1}'})
  """
  calls = () if form is None else form.read(text, needs_end=False).calls
  if form is None or not calls:
    return text, []
  before = text.partition(form.begin)[0] if form.begin else ""
  return before.strip(), [_as_openai(call) for call in calls]


def _as_openai(call: Mapping[str, Any]) -> dict[str, Any]:
  arguments = json.dumps(call["arguments"], ensure_ascii=False)
  function = dict(name=call["name"], arguments=arguments)
  return dict(id=f"call_{secrets.token_hex(12)}", type="function", function=function)


def choice(one: Choice, chat: Chat, voice: Voice) -> dict[str, Any]:
  """A whole answer."""
  words_, called = found(chat.calls, one.text)
  message: dict[str, Any] = dict(role="assistant", content=words_, refusal=None)
  if called:
    message |= dict(content=words_ or None, tool_calls=called)
  return dict(
    index=one.index,
    message=message,
    logprobs=logprobs(one.told, voice, chat.wanted.top),
    finish_reason=reason(one, bool(called)),
  )


class Pieces:
  """The pieces of one answer in a stream; a text that may be a call is held back until it is one or is none."""

  def __init__(self, one: Choice, chat: Chat, voice: Voice) -> None:
    self._one, self._chat, self._voice = one, chat, voice
    form = chat.calls
    self._before = spelling.Spelling(None, (form.begin,)) if form and form.begin else None
    self._holds = form is not None and not form.begin
    self._told = 0  # characters

  def first(self) -> dict[str, Any]:
    return self._piece(dict(role="assistant", content=""))

  def of(self, news: News) -> list[dict[str, Any]]:
    """What a client is told of it."""
    told = news.text
    if self._holds:
      told = ""
    elif self._before is not None:
      told = self._before.add(news.text)
    self._told += len(told)
    pieces = []
    if told or (news.tokens and self._chat.wanted.top is not None):
      pieces.append(self._piece(dict(content=told), news.tokens))
    if news.is_over:
      pieces += self._last()
    return pieces

  def _last(self) -> list[dict[str, Any]]:
    one = self._one
    _, called = found(self._chat.calls, one.text)
    pieces = []
    if called:
      numbered = [dict(index=i, **call) for i, call in enumerate(called)]
      pieces.append(self._piece(dict(tool_calls=numbered)))
    elif rest := one.text[self._told :]:
      pieces.append(self._piece(dict(content=rest)))
    end = self._piece({})
    end["finish_reason"] = reason(one, bool(called))
    return [*pieces, end]

  def _piece(self, delta: dict[str, Any], tokens: list[Token] | None = None) -> dict[str, Any]:
    told = None if not tokens else logprobs(tokens, self._voice, self._chat.wanted.top)
    return dict(index=self._one.index, delta=delta, logprobs=told, finish_reason=None)
