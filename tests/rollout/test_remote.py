"""An engine at an address: what is asked, what is read, and what becomes of errors that pass and that do not."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from posttrain_jax.rollout import remote, wires
from posttrain_jax.rollout.remote import Address, Refused, Unknown
from posttrain_jax.rollout.requests import FULL, STOPPED, Request
from posttrain_jax.rollout.sampling import Sampling

REQUEST = Request([5, 6], 4, sampling=Sampling(1.0), stop_tokens=[9], seed=1, number=2, sample=3)


def said(tokens=(7, 9), reason="stop", **changes):
  logps = {"token_logprobs": [-0.5] * len(tokens)}
  choice = {"token_ids": [*tokens], "logprobs": logps, "finish_reason": reason}
  return {"choices": [choice | changes]}


@pytest.fixture
def served():
  """Starts a server of scripted replies, (status, body) or (status, body, headers), the last again and again."""
  servers = []

  def start(*replies):
    asked, left = [], [*replies]

    class Handler(BaseHTTPRequestHandler):
      def log_message(self, format, *args):
        pass

      def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked.append((self.path, json.loads(body), dict(self.headers)))
        status, reply, *headers = left.pop(0) if len(left) > 1 else left[0]
        if status is None:
          self.connection.close()
          return
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers[0] if headers else {}).items():
          self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(
      target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    servers.append(server)
    return f"http://127.0.0.1:{server.server_address[1]}/v1", asked

  yield start
  for server in servers:
    server.shutdown()
    server.server_close()


def at(url, **fields):
  return Address(url, **{"vocab": 10, "patience": 5.0, "wait": 0.01} | fields)


def answer(url, **fields):
  return at(url, **fields).answer(REQUEST, "mine", lambda: None)


def test_a_prompt_goes_as_ids_and_an_answer_comes_as_ids(served):
  url, asked = served((200, said()))
  given = answer(url)
  assert (given.tokens, given.ended) == ([7, 9], STOPPED)
  np.testing.assert_array_equal(given.logps, np.float32([-0.5, -0.5]))
  (path, body, _), *_ = asked
  assert path == "/v1/completions"
  assert (body["prompt"], body["model"], body["max_tokens"]) == ([5, 6], "mine", 4)
  assert (body["stop_token_ids"], body["ignore_eos"]) == ([9], True)
  assert body["return_token_ids"]
  # what a model's generation_config.json would say otherwise
  assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1, 0, 0, 1)


def said_by_sglang(tokens=(7, 9), reason="stop"):
  each = [[-0.5, token, None] for token in tokens]
  about = {"finish_reason": {"type": reason}, "output_token_logprobs": each}
  return {"text": "", "output_ids": [*tokens[:-1]], "meta_info": about}


def test_sglang_is_asked_by_its_own_route_above_v1(served):
  url, asked = served((200, said_by_sglang()))
  given = answer(url, wire=wires.SGLANG)
  assert (given.tokens, given.ended) == ([7, 9], STOPPED)
  np.testing.assert_array_equal(given.logps, np.float32([-0.5, -0.5]))
  (path, body, _), *_ = asked
  assert path == "/generate"
  assert (body["input_ids"], body["lora_path"], body["return_logprob"]) == ([5, 6], "mine", True)
  drawn = body["sampling_params"]
  # ignore_eos would make it leave out stop_token_ids
  assert (drawn["max_new_tokens"], drawn["stop_token_ids"], drawn["ignore_eos"]) == (4, [9], False)
  assert (drawn["top_k"], drawn["top_p"], drawn["min_p"], drawn["temperature"]) == (-1, 1, 0, 1)


def test_an_adapter_that_a_new_sglang_does_not_know_is_given_again(served):
  none = "The following requested LoRA adapters are not loaded: mine"
  url, asked = served((400, {"error": {"message": none}}), (200, said_by_sglang()))
  given = []
  at(url, wire=wires.SGLANG).answer(REQUEST, "mine", lambda: given.append(1))
  assert given == [1]
  at(url, wire=wires.SGLANG).load("mine", "/tmp/a")
  assert asked[-1][0] == "/load_lora_adapter"
  gone = {"success": False, "error_message": "LoRA with name mine does not exist."}
  at(served((400, gone))[0], wire=wires.SGLANG).unload("mine")


@pytest.mark.parametrize(
  ("reply", "says"),
  [
    ({"text": "hello", "output_ids": [7, 9]}, "KeyError: 'meta_info'"),
    ({"meta_info": {"output_token_logprobs": [7]}}, "TypeError"),
    (said_by_sglang(reason="abort"), "finish_reason is 'abort'"),
    (said_by_sglang((7, 10)), "token 10 is none"),
    (said_by_sglang((7, 8)), "leaves out the token that ended"),
  ],
)
def test_what_is_no_answer_of_sglang_is_told(served, reply, says):
  with pytest.raises(Refused, match=says):
    answer(served((200, reply))[0], wire=wires.SGLANG)


def test_an_answer_that_was_cut_is_full(served):
  assert answer(served((200, said([7, 7, 7, 7], "length")))[0]).ended == FULL


def test_each_of_seed_number_and_sample_has_a_seed():
  some = [
    Request([1], 1, seed=s, number=n, sample=k) for s in (0, 1) for n in (0, 1) for k in (0, 1)
  ]
  assert len({wires.seed(request) for request in some}) == 8


@pytest.mark.parametrize("status", [500, 503, 408])
def test_errors_that_may_pass_are_asked_again(served, status):
  url, asked = served((status, b"oh"), (status, {"error": {"message": "no"}}), (200, said()))
  assert answer(url).tokens == [7, 9]
  assert len(asked) == 3


def test_a_server_that_is_busy_is_left_alone_as_long_as_it_says(served):
  url, asked = served((429, b"", {"Retry-After": "0.3"}), (200, said()))
  import time

  began = time.monotonic()
  answer(url)
  assert time.monotonic() - began > 0.25
  assert len(asked) == 2


def test_a_connection_that_ends_is_asked_again(served):
  url, asked = served((None, b""), (200, said()))
  assert answer(url).tokens == [7, 9]
  assert len(asked) == 2


@pytest.mark.parametrize(
  ("reply", "says"),
  [
    (b"<html>hello</html>", "JSONDecodeError"),
    (b"[" * 100_000, "RecursionError"),
    ({"object": "list"}, "KeyError: 'choices'"),
    ({"choices": ["x"]}, "AttributeError"),
    (said(token_ids=None), "it has no token_ids"),
    (said(token_ids=["a", "b"]), "token_ids are"),
    (said([7, 10], "length"), "token 10 is none of the 10 of this run's model"),
    (said([-1, 9]), "token -1 is none"),
    (said([10**30, 9]), "is none of the 10"),
    (said(logprobs={"token_logprobs": [-1.0]}), "2 token ids with 1 log-probabilities"),
    (said(logprobs={"token_logprobs": [-1.0, None]}), "no numbers up to 0"),
    (said(logprobs={"token_logprobs": [-1.0, 0.5]}), "no numbers up to 0"),
    (said([7, 7]), "leaves out the token that ended"),
    (said([7] * 5, "length"), "5 tokens, where 4 were asked"),
    (said(reason="banana"), "finish_reason is 'banana'"),
    (said([]), "0 token ids"),
  ],
)
def test_garbage_is_asked_for_a_few_times_and_told(served, reply, says):
  url, asked = served((200, reply))
  with pytest.raises(Refused, match=says):
    answer(url)
  assert len(asked) == remote.UNREAD


@pytest.mark.parametrize(
  ("status", "says"), [(400, "400 Bad Request: 'bad top_k'"), (401, "online.engine_key names")]
)
def test_a_refusal_is_told_at_once(served, status, says):
  url, asked = served((status, {"error": {"message": "bad top_k"}}))
  with pytest.raises(Refused, match=says):
    answer(url)
  assert len(asked) == 1


def test_nobody_at_the_address_is_told_once_the_patience_is_over():
  with pytest.raises(
    Refused, match=r"does not answer: Connection refused, for 0.2 s \(online.engine_patience\)"
  ):
    answer("http://127.0.0.1:9/v1", patience=0.2)


def test_whoever_is_to_stop_does_not_wait():
  with pytest.raises(Refused, match="nobody waits"):
    answer("http://127.0.0.1:9/v1", patience=60.0, wait=20.0, stopping=lambda: True)


def test_an_adapter_that_a_new_server_does_not_know_is_given_again(served):
  url, _ = served((404, {"error": {"message": "no model"}}), (200, said()))
  given = []
  at(url).answer(REQUEST, "mine", lambda: given.append(1))
  assert given == [1]
  with pytest.raises(Unknown):
    answer(served((404, b""))[0])


def test_loading_says_what_a_server_needs_for_it(served):
  url, asked = served((400, {"error": {"message": "not enabled"}}))
  with pytest.raises(Refused, match=r"not enabled'?; adapters are given to a server while it runs"):
    at(url).load("a", "/tmp/a")
  assert asked[0][1] == {"lora_name": "a", "lora_path": "/tmp/a"}


def test_a_key_is_sent_and_a_password_is_not_told(served, monkeypatch):
  monkeypatch.setenv("ENGINE_KEY", "secret")
  url, asked = served((200, said()))
  answer(url, key="ENGINE_KEY")
  assert asked[0][2]["Authorization"] == "Bearer secret"
  assert at("http://me:pass@host/v1").name == "http://host/v1"
  with pytest.raises(ValueError, match="has no OTHER"):
    at(url, key="OTHER")
  with pytest.raises(ValueError, match="begins with http"):
    at("localhost:8000")


def test_once_is_once_for_all_who_saw_the_same():
  times = []
  once = remote.Once(lambda: times.append(1))
  once.of(0)
  once.of(0)
  assert len(times) == 1
  once.of(once.done)
  assert len(times) == 2
