"""What is asked over the wire, right and wrong: OpenAI's shapes, and whatever else a client may send."""

import dataclasses
import json

import pytest

from posttrain_jax.rollout.sampling import Sampling
from posttrain_jax.serve.limits import Limits
from tests import tiny
from tests.serve import fake, served

MESSAGES = [{"role": "user", "content": "Hi"}]
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def client():
  return served.client()


def refused(response, status, word=""):
  """The error of a refused request, in OpenAI's shape."""
  assert response.status_code == status, response.text
  error = response.json()["error"]
  assert set(error) == {"message", "type", "param", "code"}
  assert "Traceback" not in response.text
  assert word in error["message"]
  return error


def served_next(client):
  assert served.chat(client).json()["choices"][0]["message"]["content"] == "Hello"


BODIES = {
  "no JSON": (b"{", "not JSON"),
  "no UTF-8": (b'{"model": "\xff"}', "not UTF-8"),
  "NaN": (b'{"model": "base", "temperature": NaN}', "NaN"),
  "Infinity": (b'{"model": "base", "temperature": 1e999}', "from 0 to 2"),
  "no object": (b"[1]", "no JSON object"),
  "empty": (b"", "not JSON"),
  "a key twice": (b'{"model": "a", "model": "b"}', "twice"),
  "deep": (DEEP.encode(), "deep"),
  "deep within": (b'{"model": "base", "messages": ' + DEEP[99_900:100_100].encode() + b"}", "deep"),
  "a huge number": (b'{"model": "base", "n": ' + b"9" * 5000 + b"}", "not JSON"),
  "null": (b"null", "no JSON object"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_refused_and_the_next_is_served(client, name):
  body, word = BODIES[name]
  headers = {"content-type": "application/json"}
  refused(client.post("/v1/chat/completions", content=body, headers=headers), 400, word)
  served_next(client)


FIELDS = {
  "no messages": ({"messages": None}, "messages are missing"),
  "empty messages": ({"messages": []}, "empty list"),
  "messages a string": ({"messages": "Hi"}, "a list of messages"),
  "a message a string": ({"messages": ["Hi"]}, "a message"),
  "no role": ({"messages": [{"content": "Hi"}]}, "role"),
  "unknown role": ({"messages": [{"role": "admin", "content": "Hi"}]}, "roles"),
  "a number as content": ({"messages": [{"role": "user", "content": 5}]}, "a string"),
  "an image": (
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    "only text",
  ),
  "half a surrogate": ({"messages": [{"role": "user", "content": "\ud83d"}]}, "surrogate"),
  "n 0": ({"n": 0}, "n must be from 1 to 64"),
  "n huge": ({"n": 10**9}, "n must be"),
  "n negative": ({"n": -1}, "n must be"),
  "n true": ({"n": True}, "whole number"),
  "n a string": ({"n": "2"}, "whole number"),
  "n a part": ({"n": 1.5}, "whole number"),
  "max_tokens 0": ({"max_tokens": 0}, "max_tokens must be from 1"),
  "max_tokens negative": ({"max_tokens": -5}, "max_tokens"),
  "max_tokens above the context": ({"max_tokens": 129}, "128 positions"),
  "max_tokens huge": ({"max_tokens": 10**30}, "max_tokens"),
  "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
  "a prompt as long as the context": (
    {"messages": [{"role": "user", "content": "x" * 109}]},
    "positions",
  ),
  "a prompt beyond it": ({"messages": [{"role": "user", "content": "x" * 900_000}]}, "characters"),
  "temperature below": ({"temperature": -0.1}, "from 0 to 2"),
  "temperature above": ({"temperature": 2.1}, "from 0 to 2"),
  "temperature tiny": ({"temperature": 1e-9}, "0 (greedy)"),
  "temperature a string": ({"temperature": "hot"}, "a number"),
  "top_p 0": ({"top_p": 0}, "above 0"),
  "top_p above": ({"top_p": 1.01}, "from 0 to 1"),
  "a penalty above": ({"presence_penalty": 2.5}, "from -2 to 2"),
  "a bias beyond the vocabulary": ({"logit_bias": {"261": 1}}, "0 to 260"),
  "a bias of no id": ({"logit_bias": {"x": 1}}, "0 to 260"),
  "a bias of a unicode digit": ({"logit_bias": {"²": 1}}, "0 to 260"),
  "a bias too strong": ({"logit_bias": {"5": 101}}, "-100 to 100"),
  "a token biased twice": ({"logit_bias": {"5": 1, "05": 2}}, "twice"),
  "too many biases": ({"logit_bias": {str(i): 1 for i in range(301)}}, "at most"),
  "logit_bias a list": ({"logit_bias": []}, "an object"),
  "17 stops": ({"stop": [str(i) for i in range(17)]}, "at most 16"),
  "an empty stop": ({"stop": ""}, "from 1 to 256"),
  "an empty stop of several": ({"stop": ["a", ""]}, "from 1 to 256"),
  "a number as stop": ({"stop": 5}, "a string or a list"),
  "half a surrogate as stop": ({"stop": "\ud83d"}, "surrogate"),
  "a stop of 1,000 letters": ({"stop": "x" * 1000}, "from 1 to 256"),
  "top_logprobs alone": ({"top_logprobs": 2}, "logprobs=true"),
  "top_logprobs above": ({"logprobs": True, "top_logprobs": 21}, "from 0 to 20"),
  "logprobs a number": ({"logprobs": 2}, "true or false"),
  "seed beyond 64 bits": ({"seed": 2**64}, "seed"),
  "seed a string": ({"seed": "x"}, "seed"),
  "stream a string": ({"stream": "yes"}, "true or false"),
  "stream_options alone": ({"stream_options": {}}, "without stream"),
  "an unknown option of streams": (
    {"stream": True, "stream_options": {"usage": True}},
    "stream_options.",
  ),
  "a misspelt field": ({"temprature": 1}, "did you mean 'temperature'"),
  "an unknown field": ({"guided_json": {}}, "unknown field"),
  "functions": ({"functions": [{"name": "f"}]}, "write tools"),
  "store": ({"store": True}, "not honoured"),
  "audio": ({"modalities": ["text", "audio"]}, "not honoured"),
  "one call at a time": ({"parallel_tool_calls": False}, "not honoured"),
  "tool_choice alone": ({"tool_choice": "required"}, "without tools"),
  "an unknown tool": (
    {
      "tools": served.TOOLS,
      "tool_choice": {"type": "function", "function": {"name": "x"}},
    },
    "weather",
  ),
  "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "name"),
  "an unknown format": ({"response_format": {"type": "xml"}}, "json_schema"),
  "no schema": ({"response_format": {"type": "json_schema", "json_schema": {}}}, "schema"),
  "a variable of the template's own": ({"chat_template_kwargs": {"messages": []}}, "may not set"),
  "a model that is a number": ({"model": 5}, "a string"),
  "no model": ({"model": None}, "names no model"),
  "stop_token_ids outside": ({"stop_token_ids": [261]}, "0 to 260"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(client, name):
  fields, word = FIELDS[name]
  body = json.dumps({"model": "base", "messages": MESSAGES, **fields})
  headers = {"content-type": "application/json"}
  refused(client.post("/v1/chat/completions", content=body, headers=headers), 400, word)


PROMPTS = {
  "none": (None, "prompt"),
  "empty text": ("", "is empty"),
  "no prompts": ([], "prompt"),
  "an id outside": ([261], "token 261"),
  "a negative id": ([-1], "token -1"),
  "ids outside among others": ([[1], [5, 999]], "token 999"),
  "mixed": (["a", 1], "prompt"),
  "nested": ([[[1]]], "prompt"),
  "an empty list of ids": ([[]], "is empty"),
  "true": ([True], "prompt"),
  "a number": (5, "prompt"),
  "as long as the context": ([1] * 128, "positions"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_that_is_none_is_refused(client, name):
  prompt, word = PROMPTS[name]
  error = refused(served.complete(client, prompt=prompt, max_tokens=1), 400, word)
  assert error["param"] == "prompt"


@pytest.mark.parametrize(
  ("fields", "word"),
  [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 0, "echo": True}, "max_tokens"),
    ({"suffix": "end"}, "not honoured"),
    ({"best_of": 2}, "not honoured"),
    ({"logprobs": 21}, "from 0 to 20"),
    ({"logprobs": True}, "whole number"),
    ({"prompt": ["a"] * 33, "n": 2}, "more than 64 answers"),
  ],
  ids=str,
)
def test_what_completions_do_not_honour_is_refused(client, fields, word):
  refused(served.complete(client, **fields), 400, word)


@pytest.mark.parametrize(
  "name", ["nope", "../secret", "base/../x", "é\N{SNOWMAN}", "a" * 5000, "", "%2e%2e"]
)
def test_an_unknown_model_is_404_and_never_another_models_answer(client, name):
  error = refused(served.chat(client, model=name), 404, "does not exist")
  assert (error["code"], error["param"]) == ("model_not_found", "model")
  served_next(client)


def test_what_asks_for_nothing_of_the_answer_is_taken(client):
  labels = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
  assert served.chat(client, **labels, parallel_tool_calls=True, n=None).status_code == 200


def test_how_tokens_are_drawn_reaches_the_worker():
  worker = fake.Worker(served.says("Hello"))
  fields = dict(
    temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2, seed=-1, n=2
  )
  biased = dict(logit_bias={"5": -3, "2": 1.5}, presence_penalty=0.5, frequency_penalty=-0.5)
  more = dict(stop=["x", "y"], max_completion_tokens=9, min_tokens=2, stop_token_ids=[4])
  assert served.chat(served.client(worker), **fields, **biased, **more).status_code == 200
  first, second = sorted(worker.asked, key=lambda asked: asked.sample)
  assert first.sampling == Sampling(0.5, 7, 0.9, 0.1, 1.2, 0.5, -0.5, ((2, 1.5), (5, -3.0)))
  assert (first.seed, first.number, first.sample) == (2**32 - 1, 2**32 - 1, 0)
  assert second.sample == 1
  assert (first.stop_strings, first.max_new, first.min_new) == (("x", "y"), 9, 2)
  assert first.stop_ids == {4, served.END}


def test_without_a_seed_two_requests_draw_by_two():
  worker = fake.Worker(served.says("Hello"))
  client = served.client(worker)
  served.chat(client)
  served.chat(client)
  assert len({(asked.seed, asked.number) for asked in worker.asked}) == 2


def test_an_answer_without_a_limit_has_the_room_that_is_left():
  worker = fake.Worker(served.says("Hello"))
  served.chat(served.client(worker))
  (asked,) = worker.asked
  assert asked.max_new == 128 - len(asked.prompt)


def test_ignore_eos_leaves_the_ends_that_were_asked_for():
  worker = fake.Worker(served.says("Hello", ends=False))
  response = served.chat(served.client(worker), ignore_eos=True, stop_token_ids=[7], max_tokens=5)
  assert worker.asked[0].stop_ids == {7}
  assert response.json()["choices"][0]["finish_reason"] == "length"


def test_a_whole_answer_has_openais_shape(client):
  body = served.chat(client, n=2, max_tokens=20).json()
  assert body["object"] == "chat.completion"
  assert [choice["index"] for choice in body["choices"]] == [0, 1]
  assert body["choices"][0]["message"] == {
    "role": "assistant",
    "content": "Hello",
    "refusal": None,
  }
  assert body["choices"][0]["finish_reason"] == "stop"
  prompt = body["usage"]["prompt_tokens"]
  assert body["usage"]["completion_tokens"] == 12  # with the ends
  assert body["usage"]["total_tokens"] == prompt + 12


def test_a_stream_says_what_the_whole_answer_says(client):
  whole = served.chat(client, n=2).json()
  stream = served.chat(client, n=2, stream=True, stream_options={"include_usage": True})
  chunks = served.pieces(stream)
  assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
  assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
  assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
  for index in range(2):
    mine = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
    assert "".join(one["delta"].get("content") or "" for one in mine) == "Hello"
    assert [one["finish_reason"] for one in mine][-1] == "stop"
    assert all(one["finish_reason"] is None for one in mine[:-1])
  assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
  assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_echo_scores_the_prompt_and_the_first_token_has_no_score(client):
  body = served.complete(client, prompt=[[39, 72], [40]], echo=True, logprobs=1, max_tokens=1)
  first, second = body.json()["choices"]
  assert (first["text"], second["text"]) == ("HiH", "IH")
  assert first["logprobs"]["tokens"] == ["H", "i", "H"]
  # the fake worker's log-probability of token t is -t / 100, and its likeliest is token 0
  scores = first["logprobs"]["token_logprobs"]
  assert scores[0] is None
  assert scores[1:] == pytest.approx([-0.72, -0.39])
  assert first["logprobs"]["top_logprobs"][0] is None
  top = first["logprobs"]["top_logprobs"][1]
  assert top["i"] == scores[1]  # the same number, by which lm-eval sees whether it is the likeliest
  assert max(top.values()) == 0
  assert first["logprobs"]["text_offset"] == [0, 1, 2]


def test_a_prompt_may_be_scored_without_a_token_drawn(client):
  body = served.complete(client, prompt="Hi", echo=True, logprobs=0, max_tokens=0).json()
  assert body["choices"][0]["text"] == "Hi"
  assert body["choices"][0]["logprobs"]["token_logprobs"][1] == pytest.approx(-0.72)
  assert body["usage"]["completion_tokens"] == 0


def test_answers_are_numbered_prompt_by_prompt():
  worker = fake.Worker(lambda asked: [asked.prompt[0], served.END])
  body = served.complete(served.client(worker), prompt=["a", "b"], n=2).json()
  told = [(one["index"], one["text"]) for one in body["choices"]]
  assert told == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
  assert body["usage"]["prompt_tokens"] == 2


def test_a_stream_of_a_completion_echoes_its_prompt_once(client):
  chunks = served.pieces(served.complete(client, echo=True, logprobs=1, stream=True))
  choices = [chunk["choices"][0] for chunk in chunks]
  assert "".join(choice["text"] for choice in choices) == "HiHello"
  told = lambda name: [one for choice in choices for one in choice["logprobs"][name]]
  assert told("tokens") == list("HiHello")
  assert told("text_offset") == list(range(7))
  assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("window", [1, 2, 3, 64])
@pytest.mark.parametrize("stop", ["lo W", "W", "Hello World", "o", "World!"])
def test_a_stop_string_is_cut_wherever_windows_end(window, stop):
  client = served.client(fake.Worker(served.says("Hello World"), window=window))
  wanted = "Hello World".split(stop)[0]
  whole = served.chat(client, stop=[stop, "never"]).json()["choices"][0]
  assert (whole["message"]["content"], whole["finish_reason"]) == (wanted, "stop")
  chunks = served.pieces(served.chat(client, stop=[stop], stream=True))
  assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == wanted


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_stop_string_among_the_tokens_that_must_come_is_text(stream):
  client = served.client(fake.Worker(served.says("so so so"), window=1))
  answer = served.chat(client, stop="s", min_tokens=4, stream=stream)
  told = served.pieces(answer) if stream else [answer.json()]
  of = lambda choice: choice.get("delta", choice.get("message")).get("content") or ""
  assert "".join(of(one["choices"][0]) for one in told) == "so so "


def test_stop_strings_are_looked_for_in_what_the_models_own_tokenizer_writes():
  worker = fake.Worker(served.says("Hello"))
  own = tiny.tokenizer()
  speak = lambda home: dataclasses.replace(served.voice(), tokenizer=own)
  worker.adapters.folders["other"] = served.folder()
  client = served.client(worker, speak=speak)
  for model, tokenizer in (("base", served.TOKENIZER), ("other", own)):
    assert served.chat(client, model=model, stop="x").status_code == 200
    assert worker.asked[-1].tokenizer is tokenizer


def test_a_text_that_only_begins_a_stop_string_is_told_in_the_end():
  client = served.client(fake.Worker(served.says("so STO"), window=1))
  assert served.chat(client, stop="STOP").json()["choices"][0]["message"]["content"] == "so STO"
  chunks = served.pieces(served.chat(client, stop="STOP", stream=True))
  assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "so STO"


CHARACTERS = (
  "é 漢字 \N{FAMILY}\N{ZERO WIDTH JOINER}\N{GIRL} \N{GRINNING FACE} e\N{COMBINING ACUTE ACCENT}"
)


@pytest.mark.parametrize("window", [1, 3])
def test_no_character_leaves_in_parts(window):
  client = served.client(fake.Worker(served.says(CHARACTERS), window=window))
  chunks = served.pieces(served.chat(client, stream=True))
  texts = [c["choices"][0]["delta"].get("content") or "" for c in chunks]
  assert "".join(texts) == CHARACTERS
  assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_a_stop_string_is_found_inside_an_emoji_sequence():
  client = served.client(fake.Worker(served.says(CHARACTERS), window=1))
  cut = served.chat(client, stop="\N{ZERO WIDTH JOINER}").json()["choices"][0]["message"]["content"]
  assert cut == CHARACTERS.split("\N{ZERO WIDTH JOINER}")[0]


def test_bytes_that_are_no_text_are_told_as_such():
  client = served.client(
    fake.Worker(lambda asked: [*served.ids("é")[:1], *served.ids("a"), served.END])
  )
  choice = served.chat(client, logprobs=True).json()["choices"][0]
  assert choice["message"]["content"] == "\N{REPLACEMENT CHARACTER}a"
  first = choice["logprobs"]["content"][0]
  assert (first["token"], first["bytes"]) == ("bytes:\\xc3", [0xC3])


def test_a_log_probability_of_minus_infinity_is_a_number(monkeypatch):
  worker = fake.Worker(served.says("Hello"))
  endless = lambda asked, ids: (served_infinite(len(ids)), None)
  monkeypatch.setattr(worker, "_logps", endless)
  body = served.complete(served.client(worker), logprobs=0).json()
  assert body["choices"][0]["logprobs"]["token_logprobs"][0] == -9999.0


def served_infinite(count):
  import numpy as np

  return np.full(count, -np.inf, np.float32)


def test_models_are_listed_as_openai_lists_them(client):
  listed = client.get("/v1/models").json()
  assert listed["object"] == "list"
  (card,) = listed["data"]
  assert card.items() >= {"id": "base", "object": "model", "parent": None}.items()
  assert client.get("/v1/models/base").json() == card
  refused(client.get("/v1/models/other"), 404)


def test_tokens_and_texts_are_given_in_vllms_shapes(client):
  told = client.post("/tokenize", json={"prompt": "Hi"}).json()
  assert told == {"tokens": [39, 72], "count": 2, "max_model_len": 128}
  named = client.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True}).json()
  assert named["token_strs"] == ["H", "i"]
  asked = {"messages": MESSAGES, "model": "base"}
  spoken = client.post("/tokenize", json=asked).json()["tokens"]
  text = client.post("/detokenize", json={"tokens": spoken}).json()["prompt"]
  assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  assert client.get("/tokenizer_info").json()["eos_token"] == "<|im_end|>"
  refused(client.post("/detokenize", json={"tokens": [999]}), 400)
  refused(client.post("/tokenize", json={}), 400, "neither")


def test_a_text_that_would_keep_others_waiting_is_not_taken_apart():
  client = served.client(limits=Limits(text=100))
  said = [{"role": "user", "content": "x" * 90}]  # with what the template writes
  for asked in ({"prompt": "x" * 101}, {"messages": said}):
    refused(client.post("/tokenize", json=asked), 400, "at most 100 at once")
  assert client.post("/tokenize", json={"prompt": "x" * 100}).json()["count"] == 100


def test_as_many_ends_as_a_model_has_are_taken():
  worker = fake.Worker(served.says("Hello"))
  client = served.client(worker)
  assert served.chat(client, stop_token_ids=list(range(32))).status_code == 200
  assert worker.asked[-1].stop_ids == {*range(32), served.END}
  refused(served.chat(client, stop_token_ids=list(range(33))), 400, "at most 32")


def test_a_conversation_without_a_template_is_refused_and_a_text_is_continued():
  client = served.client(template=None)
  refused(served.chat(client), 400, "/v1/completions")
  assert served.complete(client).json()["choices"][0]["text"] == "Hello"


def test_an_answer_that_was_empty_may_be_part_of_a_conversation(client):
  said = [MESSAGES[0], {"role": "assistant", "content": ""}, MESSAGES[0]]
  assert served.chat(client, messages=said).status_code == 200


def test_turns_that_the_template_does_not_take_are_a_mistake_of_the_request():
  from posttrain_jax.data import templates
  from posttrain_jax.serve.voice import Voice

  bound = templates._bound(served.TOKENIZER, "gemma")
  voice = Voice(served.TOKENIZER, bound, (served.END,), 261)
  worker = fake.Worker(served.says("Hello"))
  worker.adapters.folders["a"] = served.folder()
  client = served.client(worker, speak=lambda home: voice)
  refused(served.chat(client, model="a", messages=MESSAGES * 2), 400, "alternate")


def test_routes_and_methods_that_are_not_there_are_said_in_openais_shape(client):
  refused(client.get("/v1/embeddings"), 404, "no route")
  refused(client.get("/v1/chat/completions"), 405, "POST")
  refused(client.post("/health", json={}), 405, "GET")


def test_a_body_that_is_too_large_is_refused_unread():
  client = served.client(limits=Limits(body=1000))
  refused(served.chat(client, user="x" * 2000), 413, "1,000 bytes")
  refused(
    client.post(
      "/v1/completions",
      content=iter([b"x" * 600] * 3),
      headers={"content-type": "application/json"},
    ),
    413,
  )


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_that_is_not_called_json_is_not_read(client, kind):
  headers = {} if kind is None else {"content-type": kind}
  body = json.dumps({"model": "base", "messages": MESSAGES}).encode()
  refused(client.post("/v1/chat/completions", content=body, headers=headers), 415)


def test_an_answer_is_told_in_ids_with_the_token_that_ended_it(client):
  """As vLLM does: whoever learns from an answer reads no text again."""
  asked = dict(prompt=[39, 72], logprobs=0, max_tokens=20)
  body = served.complete(client, return_token_ids=True, **asked).json()
  (choice,) = body["choices"]
  assert len(choice["token_ids"]) == body["usage"]["completion_tokens"]
  assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
  (plain,) = served.complete(client, **asked).json()["choices"]
  assert "token_ids" not in plain
  assert choice["finish_reason"] == "stop"
  assert len(plain["logprobs"]["token_logprobs"]) == len(choice["token_ids"]) - 1
  assert plain["text"] == choice["text"]
  for also in ({"stream": True}, {"echo": True}):
    assert served.complete(client, return_token_ids=True, **asked, **also).status_code == 400
