"""Calls of tools, and answers held to a form."""

import json
import sys

import jsonschema
import numpy as np
import pytest

from posttrain_jax.core import bits
from posttrain_jax.data import templates
from posttrain_jax.data.tool_calls import Form
from posttrain_jax.serve.errors import Refused
from posttrain_jax.serve.grammar import Grammars
from posttrain_jax.serve.voice import Voice
from tests import tiny
from tests.serve import fake, served

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
MISTRAL_LIKE = (
  "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] ["
  "{% for c in m.tool_calls %}{{ c.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]</s>"
  "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
  "{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}"
)
LLAMA_LIKE = (
  "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}"
  '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
  "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
  "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def form(text, tmp_path):
  path = tmp_path / "template.jinja"
  path.write_text(text)
  return voiced(templates._bound(served.TOKENIZER, str(path)))


def voiced(template):
  return Voice(served.TOKENIZER, template, (), 261).call_form


def test_the_form_of_calls_is_read_off_the_template(tmp_path):
  chatml = voiced(templates.bind(served.TOKENIZER, "chatml"))
  assert chatml == Form("<tool_call>", "</tool_call>")
  assert form(MISTRAL_LIKE, tmp_path) == Form("[TOOL_CALLS]", "", is_list=True)
  assert form(LLAMA_LIKE, tmp_path) == Form("", "", arguments="parameters")


def test_a_template_without_tools_has_no_form_and_tools_are_refused():
  assert voiced(templates.bind(served.TOKENIZER)) is None
  response = served.chat(served.client(template=None), tools=served.TOOLS)
  assert response.status_code == 400
  assert "tools" in response.json()["error"]["message"]


FOUND = [
  (CALL, "", [("weather", {"city": "Bern"})]),
  (f"I look. {CALL}\n{CALL}", "I look.", [("weather", {"city": "Bern"})] * 2),
  ("No call.", "No call.", []),
  ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
  ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
  ('<tool_call>{"name": "f"}', "", [("f", {})]),
]


@pytest.mark.parametrize(("text", "words", "wanted"), FOUND)
@pytest.mark.parametrize("window", [1, 5])
def test_calls_are_given_in_openais_form_whole_and_in_a_stream(text, words, wanted, window):
  client = served.client(fake.Worker(served.says(text), window=window), length=2048)
  choice = served.chat(client, tools=served.TOOLS).json()["choices"][0]
  told = choice["message"].get("tool_calls", [])
  assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in told] == wanted
  assert (choice["message"]["content"] or "") == words
  assert choice["finish_reason"] == ("tool_calls" if wanted else "stop")
  chunks = served.pieces(served.chat(client, tools=served.TOOLS, stream=True))
  deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
  assert "".join(delta.get("content") or "" for delta in deltas).strip() == words
  streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
  assert [(c["index"], c["function"]["name"]) for c in streamed] == [
    (i, name) for i, (name, _) in enumerate(wanted)
  ]
  assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_a_call_and_its_result_go_back_into_the_conversation():
  worker = fake.Worker(served.says("Rain."))
  call = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
  }
  said = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [call]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
  ]
  client = served.client(worker, length=2048)
  assert served.chat(client, messages=said, tools=served.TOOLS).status_code == 200
  prompt = served.TOKENIZER.decode(worker.asked[0].prompt)
  assert CALL in prompt
  assert "<tool_response>\nrain\n</tool_response>" in prompt


def test_tool_choice_none_shows_the_model_no_tools():
  worker = fake.Worker(served.says(CALL))
  client = served.client(worker, length=2048)
  body = served.chat(client, tools=served.TOOLS, tool_choice="none").json()
  assert body["choices"][0]["message"]["content"] == CALL
  assert "weather" not in served.TOKENIZER.decode(worker.asked[0].prompt)


def greedy(asked):
  """Draws the lowest token that its mask allows, as a model might that knows nothing."""
  drawn = []
  while len(drawn) < 400:
    mask = bits.unpack(np.asarray(asked.allowed(drawn)).view(np.uint32), 261)
    (may,) = np.nonzero(np.asarray(mask))
    likely = [t for t in may if t in served.ids('}]"{') or t == served.END] or list(may)
    drawn.append(int(likely[0] if len(drawn) > 5 else may[len(drawn) % len(may)]))
    if drawn[-1] in asked.stop_ids:
      return drawn
  return drawn


SCHEMA = {
  "type": "object",
  "properties": {"age": {"type": "integer", "minimum": 0}, "name": {"type": "string"}},
  "required": ["name", "age"],
  "additionalProperties": False,
}


def test_an_answer_follows_its_schema_whatever_the_model_would_say():
  asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
  client = served.client(fake.Worker(greedy), length=1024)
  body = served.chat(client, response_format=asked, n=2).json()
  for choice in body["choices"]:
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 5}], ids=str)
def test_what_holds_off_the_end_and_a_form_that_says_it_exclude_each_other(fields):
  response = served.chat(served.client(), response_format={"type": "json_object"}, **fields)
  assert response.status_code == 400
  assert "exclude each other" in response.json()["error"]["message"]


def test_a_model_without_an_end_is_held_to_no_form():
  endless = served.voice()
  endless = type(endless)(endless.tokenizer, endless.template, (), 261)
  with pytest.raises(Refused, match="no token that ends"):
    Grammars().json_object(endless)


def test_json_mode_gives_an_object():
  client = served.client(fake.Worker(greedy), length=1024)
  body = served.chat(client, response_format={"type": "json_object"}).json()
  assert isinstance(json.loads(body["choices"][0]["message"]["content"]), dict)


@pytest.mark.parametrize(
  "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str
)
def test_a_tool_that_must_be_called_is_called(choice):
  client = served.client(fake.Worker(greedy), length=1024)
  body = served.chat(client, tools=served.TOOLS, tool_choice=choice).json()
  (call,) = body["choices"][0]["message"]["tool_calls"]
  assert call["function"]["name"] == "weather"
  jsonschema.validate(
    json.loads(call["function"]["arguments"]), served.TOOLS[0]["function"]["parameters"]
  )


@pytest.mark.parametrize("stream", [False, True])
def test_marks_that_the_tokenizer_has_no_token_of_are_written_as_text(stream):
  """SmolLM2 and Llama 2 have an unknown token; no mark is that."""
  tokenizer = tiny.tokenizer()
  tokenizer.unk_token = "<|endoftext|>"
  assert tokenizer.convert_tokens_to_ids("<tool_call>") == tokenizer.unk_token_id
  bound = templates.bind(tokenizer, "chatml")
  spoken = Voice(tokenizer, bound, (served.END,), 261)
  client = served.client(fake.Worker(greedy), length=1024, own=spoken)
  asked = dict(tools=served.TOOLS, tool_choice="required", stream=stream)
  response = served.chat(client, **asked)
  if stream:
    deltas = [piece["choices"][0]["delta"] for piece in served.pieces(response)]
    assert not any(delta.get("content") for delta in deltas)
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
  else:
    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
  assert call["function"]["name"] == "weather"
  said = f"so<|endoftext|>{CALL}"
  client = served.client(fake.Worker(served.says(said)), length=1024, own=spoken)
  told = served.chat(client, tools=served.TOOLS)
  message = told.json()["choices"][0]["message"]
  assert message["content"] == "so"
  assert len(message["tool_calls"]) == 1


def test_masks_are_those_of_the_tokens_drawn_so_far():
  masks = Grammars().json_object(served.voice())
  first = np.asarray(bits.unpack(masks([]).view(np.uint32), 261))
  assert first[served.ids("{")[0]]
  assert not first[served.ids("x")[0]]
  assert not first[served.END]
  closed = np.asarray(bits.unpack(masks(served.ids("{}")).view(np.uint32), 261))
  assert closed[served.END]


@pytest.mark.parametrize(
  ("schema", "word"),
  [({"type": "no such type"}, "cannot be held to"), ({"$ref": "http://evil.example/x"}, "cannot")],
  ids=str,
)
def test_a_schema_that_cannot_be_held_to_is_refused(schema, word):
  asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
  response = served.chat(served.client(), response_format=asked)
  assert response.status_code == 400
  assert word in response.json()["error"]["message"]


def test_without_llguidance_the_format_is_refused_in_words(monkeypatch):
  monkeypatch.setitem(sys.modules, "llguidance", None)
  response = served.chat(served.client(), response_format={"type": "json_object"})
  assert response.status_code == 501
  assert "posttrain-jax[serve]" in response.json()["error"]["message"]


def test_a_grammar_is_compiled_once(monkeypatch):
  import llguidance

  made = []
  matcher = llguidance.LLMatcher

  class Watched:
    grammar_from_lark = matcher.grammar_from_lark

    def __new__(cls, *args, **options):
      made.append(1)
      return matcher(*args, **options)

  monkeypatch.setattr(llguidance, "LLMatcher", Watched)
  grammars, voice = Grammars(), served.voice()
  first, second = grammars.json_object(voice), grammars.json_object(voice)
  assert len(made) == 1
  first(served.ids("{"))
  assert np.array_equal(second([]), grammars.json_object(voice)([]))  # each has a state of its own
