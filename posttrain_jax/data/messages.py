"""What a conversation may hold, checked: messages, the tools they may call, and the calls.

Two ways of writing one thing become one, so that templates meet the form they are written for: arguments that are JSON
in a string (as they travel over the wire) are the object they describe, a call or a message without its wrapping gets
it.  Nulls of arguments are kept: a row that says null says something.
"""

import datetime
import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any

from posttrain_jax.data.errors import RowError

ROLES = ("system", "developer", "user", "assistant", "tool")

# ShareGPT's conversations name their speakers in their own way.
SHAREGPT_ROLES = {
  "system": "system",
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "assistant": "assistant",
  "tool": "tool",
  "observation": "tool",
}
CALL = "function_call"  # the speaker of a message that is a call, as JSON

REASONING = (
  "reasoning_content",
  "thinking",
  "reasoning",
)  # what templates call it, commonest first
MAX_DEPTH = 64  # of objects in objects, in what a template is given


def checked(value: Any, key: str, origin: str, *, trains: bool = True) -> list[dict]:
  """The messages in one form: each an object with a role, and words or calls.

  trains: whether an assistant's message has to say something, since it is to be learned.
  """
  if not isinstance(value, list):
    raise wrong_type(key, value, "a list of messages", origin)
  if not value:
    raise RowError("empty messages", origin, f"{key!r} is an empty list; a conversation has a turn")
  return [_message(message, f"{key}[{i}]", origin, trains) for i, message in enumerate(value)]


def tools(value: Any, origin: str) -> list[dict]:
  """The descriptions of tools that a conversation may call, as a list or as JSON in a string."""
  value = _parsed(value, "tools", origin)
  if not isinstance(value, list):
    raise wrong_type("tools", value, "a list of tool descriptions", origin)
  return [_tool(_parsed(tool, f"tools[{i}]", origin), f"tools[{i}]", origin)
          for i, tool in enumerate(value)]  # fmt: skip


def documents(value: Any, origin: str) -> list[dict]:
  """What a conversation may cite, as templates read it: objects such as {"title": ..., "text": ...}."""
  value = _parsed(value, "documents", origin)
  if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
    raise wrong_type("documents", value, 'a list of {"title": ..., "text": ...}', origin)
  return [plain(item, f"documents[{i}]", origin) for i, item in enumerate(value)]


def text(value: str, key: str, origin: str) -> str:
  """A string that a tokenizer can read: no half of a surrogate pair is in it."""
  if not value.isascii():
    try:
      value.encode("utf-8")
    except UnicodeEncodeError as error:
      raise RowError(
        "not text", origin, f"{key!r} holds half of a surrogate pair ({error.reason})"
      ) from None
  return value


def wrong_type(key: str, value: Any, expected: str, origin: str) -> RowError:
  return RowError("wrong type", origin, f"{key!r} is {shown(value)}, expected {expected}")


class _Short(reprlib.Repr):
  """repr of the first things of a value, so that a row of a gigabyte is named as fast as a short one."""

  def __init__(self):
    super().__init__()
    self.maxstring = self.maxother = self.maxlong = 57
    self.maxlevel, self.maxdict, self.maxlist = 2, 3, 3


_SHORT = _Short()


def shown(value: Any) -> str:
  """A value in a few words, however large or deep it is."""
  names = {dict: "an object", list: "an array", str: "the string", type(None): "null"}
  name = names.get(type(value), type(value).__name__)
  if value is None:
    return name
  short = _SHORT.repr(value)
  return f"{name} {short if len(short) <= 60 else short[:57] + '...'}"


def short(value: Any) -> str:
  """A value as Python writes it, cut short."""
  return _SHORT.repr(value)


def names(keys: Any) -> list[str]:
  """Keys of a row or message as an error lists them."""
  listed = sorted(key if len(key) <= 60 else key[:57] + "..." for key in map(str, keys))
  return listed if len(listed) <= 12 else [*listed[:12], f"and {len(listed) - 12} more"]


def _message(message, where, origin, trains=True):
  if not isinstance(message, dict):
    raise wrong_type(where, message, 'a message {"role": ..., "content": ...}', origin)
  # Columnar formats fill what a message lacks with nulls.
  message = {key: value for key, value in message.items() if value is not None}
  if "role" not in message and {"from", "value"} <= set(message):
    speaker = message.pop("from")
    if speaker == CALL:
      calls = _parsed(message.pop("value"), f"{where}['value']", origin)
      message = {
        "role": "assistant",
        "tool_calls": calls if isinstance(calls, list) else [calls],
        **message,
      }
      return _message(message, where, origin, trains)
    role = SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    message = {"role": role, "content": message.pop("value"), **message}
  role = message.get("role")
  if role == "function":  # OpenAI's word before `tool`
    role = message["role"] = "tool"
  if role is None:
    raise RowError(
      "message without role",
      origin,
      f"{where} has {names(message)}, but a message has a 'role'",
    )
  if not isinstance(role, str) or role not in ROLES:
    raise RowError(
      "unknown role",
      origin,
      f"{where} has role {_SHORT.repr(role)}; roles are {', '.join(ROLES)}",
    )
  if CALL in message:
    if "tool_calls" in message:
      raise RowError(
        "function_call",
        origin,
        f"{where} has 'function_call' and 'tool_calls'; write the latter alone",
      )
    message["tool_calls"] = [message.pop(CALL)]  # OpenAI's word before `tool_calls`
  if "tool_calls" in message:
    message["tool_calls"] = _calls(message["tool_calls"], f"{where}['tool_calls']", role, origin)
    if not message["tool_calls"]:
      del message["tool_calls"]
  if "content" not in message and "tool_calls" not in message:
    raise RowError("message without content", origin, f"{where} has no 'content'")
  if "content" in message:
    message["content"] = _content(message["content"], where, origin)
    says = message["content"].strip() or "tool_calls" in message
    if trains and role == "assistant" and not says:
      raise RowError("empty completion", origin, f"{where}, an assistant's message, is empty")
  if message.get("weight", 1) not in (0, 1):
    raise RowError(
      "unusable weight",
      origin,
      f"{where} has weight {_SHORT.repr(message['weight'])}; a message is trained (1) or not (0)",
    )
  for key in message.keys() & REASONING:
    if not isinstance(message[key], str):
      raise wrong_type(f"{where}[{key!r}]", message[key], "a string", origin)
  for key in message.keys() - {"role", "content", "tool_calls"}:
    message[key] = plain(message[key], f"{where}[{key!r}]", origin)
  return message


def _content(content, where, origin):
  if isinstance(content, str):
    return text(content, f"{where}['content']", origin)
  if isinstance(content, list) and all(isinstance(part, dict) for part in content):
    others = [part.get("type") for part in content if not isinstance(part.get("text"), str)]
    if not others:
      return text("".join(part["text"] for part in content), f"{where}['content']", origin)
    raise RowError(
      "not text",
      origin,
      f"{where} holds {_SHORT.repr(others[0])} content; only text is supported",
    )
  raise wrong_type(f"{where}['content']", content, "a string", origin)


def _calls(calls, where, role, origin):
  if not isinstance(calls, list):
    raise wrong_type(where, calls, "a list of calls", origin)
  if calls and role != "assistant":
    raise RowError(
      "call of another", origin, f"{where}: the message's role is {role!r}; assistants call tools"
    )
  return [_call(call, f"{where}[{i}]", origin) for i, call in enumerate(calls)]


def _call(call, where, origin):
  """One call as templates read it: {"type": "function", "function": {"name", "arguments"}}."""
  if not isinstance(call, dict):
    raise wrong_type(where, call, 'a call {"function": {"name": ..., "arguments": ...}}', origin)
  call = {key: value for key, value in call.items() if value is not None}
  if "function" not in call and "name" in call:
    inner = {key: call.pop(key) for key in ("name", "arguments") if key in call}
    outer = {key: call.pop(key) for key in ("id", "type") if key in call}
    call = {**outer, "function": {**inner, **call}}
  function = call.get("function")
  if not isinstance(function, dict):
    raise wrong_type(
      f"{where}['function']", function, 'an object {"name": ..., "arguments": ...}', origin
    )
  where = f"{where}['function']"
  function = {key: value for key, value in function.items() if value is not None}
  name = function.get("name")
  if not isinstance(name, str) or not name:
    raise wrong_type(f"{where}['name']", name, "the name of a tool", origin)
  others = function.keys() - {"name", "arguments"}
  if others and "arguments" not in function:
    raise RowError(
      "call without arguments",
      origin,
      f"{where} has {names(function)}; what a tool is called with stands under 'arguments'",
    )
  arguments = _arguments(function.get("arguments", {}), f"{where}['arguments']", origin)
  function = {**{k: plain(v, where, origin) for k, v in function.items()}, "arguments": arguments}
  rest = {k: plain(v, where, origin) for k, v in call.items() if k not in ("type", "function")}
  return {"type": call.get("type", "function"), **rest, "function": function}


def _arguments(value, where, origin):
  if isinstance(value, str) and not value.strip():
    return {}
  value = _parsed(value, where, origin)
  if not isinstance(value, dict):
    raise wrong_type(where, value, "an object, or one as JSON in a string", origin)
  return plain(value, where, origin)


def _tool(tool, where, origin):
  if not isinstance(tool, dict):
    raise wrong_type(where, tool, "the description of a tool, an object", origin)
  named = tool.get("function") if isinstance(tool.get("function"), dict) else tool
  if not isinstance(named.get("name"), str) or not named["name"]:
    raise RowError(
      "tool without name", origin, f"{where} has {names(named)}; a tool has a 'name', a string"
    )
  return plain(tool, where, origin)


def _parsed(value, where, origin):
  """What a JSON text in a string says; anything else as it is."""
  if not isinstance(value, str):
    return value
  try:
    return json.loads(value, parse_constant=_refuse)
  except (ValueError, RecursionError) as error:
    why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise RowError(
      "not JSON", origin, f"{where!r} is a string that is not JSON ({why}): {_SHORT.repr(value)}"
    ) from None


def _refuse(constant):
  raise ValueError(f"{constant} is no JSON number")


def plain(value: Any, where: str, origin: str, depth: int = 0) -> Any:
  """A value that JSON can hold; dates, which Arrow has besides, as their text."""
  if isinstance(value, str):
    return text(value, where, origin)
  if value is None or isinstance(value, bool | int):
    return value
  if isinstance(value, float) and math.isfinite(value):
    return value
  if isinstance(value, datetime.date | datetime.time):
    return value.isoformat()
  if depth > MAX_DEPTH:
    raise RowError("nested too deeply", origin, f"{where!r} is nested more than {MAX_DEPTH} deep")
  if isinstance(value, dict) and all(isinstance(key, str) for key in value):
    return {text(k, where, origin): plain(v, where, origin, depth + 1) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item, where, origin, depth + 1) for item in value]
  raise wrong_type(where, value, "what JSON can hold", origin)


def speech(message: dict) -> dict[str, Sequence[str]]:
  """{field: the strings that a rendered text of the message must hold}, in the order they are said."""
  said: dict[str, Sequence[str]] = {}
  for key in REASONING:
    if message.get(key):
      said[key] = [message[key]]
  if message.get("content", "").strip():
    said["content"] = [message["content"]]
  for i, call in enumerate(message.get("tool_calls", ())):
    function = call["function"]
    said[f"tool_calls[{i}]"] = [function["name"], *leaves(function["arguments"])]
  return said


def leaves(value: Any) -> list[str]:
  """Every string in a JSON value, the keys of objects among them."""
  if isinstance(value, str):
    return [value]
  if isinstance(value, dict):
    return [text for key, item in value.items() for text in (key, *leaves(item))]
  if isinstance(value, list):
    return [text for item in value for text in leaves(item)]
  return []
