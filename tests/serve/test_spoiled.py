"""Right requests spoiled at random: each is answered or refused in words, and none is a fault of ours."""

import copy
import json
import random

import pytest

from tests.serve import fake, served

WHOLE = {
  "model": "base",
  "messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {
      "role": "assistant",
      "content": None,
      "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
      ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
  ],
  "tools": served.TOOLS,
  "tool_choice": "auto",
  "response_format": {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}, "strict": True},
  },
  "chat_template_kwargs": {"enable_thinking": False},
  "logit_bias": {"5": 1},
  "stop": ["a", "b"],
  "n": 2,
  "seed": 3,
  "temperature": 0.5,
  "top_p": 0.5,
  "max_tokens": 5,
  "logprobs": True,
  "top_logprobs": 2,
  "stream": False,
}
TEXT = {
  "model": "base",
  "prompt": ["a", "b"],
  "echo": True,
  "logprobs": 2,
  "stop": "x",
  "stream": True,
  "stream_options": {"include_usage": True},
  "max_tokens": 3,
}
JUNK = (
  None, True, 0, -1, 1.5, 1e308, 2**70, "", "x", "\ud800", "\0", "../..", "x" * 5000, [], {}, [[]],
  [None], {"": 0}, [{}], {"a": {"a": {}}}, "base", "user", [1, "a"],
)  # fmt: skip


def places(value, path=()):
  """Every place within a value."""
  yield path
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, part in items:
    if isinstance(part, dict | list):
      yield from places(part, (*path, key))
    else:
      yield (*path, key)


def spoiled(value, draw):
  """The value with one or two places changed, taken out or doubled."""
  made = copy.deepcopy(value)
  for _ in range(draw.randint(1, 2)):
    path = draw.choice([path for path in places(made) if path])
    of = made
    for key in path[:-1]:
      of = of[key]
    what = draw.random()
    if what < 0.7:
      of[path[-1]] = draw.choice(JUNK)
    elif what < 0.9:
      del of[path[-1]]
    elif isinstance(of, dict):
      of[str(path[-1]) + draw.choice(("_", "s", "\0"))] = of.pop(path[-1])
    else:
      of.append(copy.deepcopy(of[path[-1]]))
  return made


@pytest.fixture(scope="module")
def client():
  return served.client(fake.Worker(served.says("Hello {}")), length=2048)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
  ("route", "whole"), [("chat/completions", WHOLE), ("completions", TEXT)], ids=["chat", "text"]
)
def test_a_spoiled_request_is_answered_or_refused_in_words(client, seed, route, whole):
  draw = random.Random(seed)
  headers = {"content-type": "application/json"}
  assert client.post(f"/v1/{route}", json=whole).status_code == 200
  refused = 0
  for _ in range(60):
    body = json.dumps(spoiled(whole, draw)).encode()
    response = client.post(f"/v1/{route}", content=body, headers=headers)
    assert response.status_code < 500, (body, response.text)
    if response.status_code != 200:
      assert set(response.json()["error"]) == {"message", "type", "param", "code"}
      assert len(response.text) < 2000
      refused += 1
  assert refused > 20
