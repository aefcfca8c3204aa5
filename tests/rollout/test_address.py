"""A model behind an address that answers, is busy, sends garbage, or is not there; and the rows that come of it."""

import contextlib
import http.server
import json
import socket
import threading

import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.core import api
from posttrain_jax.rollout.address import Address, Unanswered
from tests import tiny

MESSAGES = [{"role": "user", "content": "2 + 3?"}]


def said(text, why="stop"):
  choice = {"message": {"role": "assistant", "content": text}, "finish_reason": why}
  return 200, json.dumps({"choices": [choice]}).encode(), {}


@contextlib.contextmanager
def server(answer):
  """(address of a server whose answer to the n-th request is answer(n, body), the bodies that it was sent)."""
  bodies, lock = [], threading.Lock()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      with lock:
        bodies.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
        status, reply, headers = answer(len(bodies), body)
      self.send_response(status)
      for name, value in {"Content-Length": str(len(reply)), **headers}.items():
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(reply)

    def log_message(self, *_):
      pass

  made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=made.serve_forever, daemon=True).start()
  try:
    yield f"http://127.0.0.1:{made.server_port}/v1", bodies
  finally:
    made.shutdown()
    made.server_close()


@pytest.fixture
def waits(monkeypatch):
  """How long each pause was; none is waited for."""
  paused = []
  monkeypatch.setattr(api.time, "sleep", paused.append)
  return paused


def test_an_answer_is_asked_for_as_the_protocol_says(monkeypatch):
  monkeypatch.setenv("THE_KEY", "secret")
  with server(lambda n, body: said("5.", "length")) as (url, bodies):
    given = Address(url, "big", key="THE_KEY").answer(MESSAGES, max_tokens=7, temperature=0.5)
  assert (given.text, given.finished) == ("5.", False)
  assert bodies == [
    {
      "model": "big",
      "messages": MESSAGES,
      "max_tokens": 7,
      "temperature": 0.5,
      "path": "/v1/chat/completions",
      "key": "Bearer secret",
    }
  ]


def test_what_may_pass_is_asked_again_and_waited_for_as_the_server_says(waits):
  replies = [(429, b"", {"Retry-After": "7"}), (503, b"", {}), (200, b"no json", {}), said("5")]
  with server(lambda n, body: replies[n - 1]) as (url, bodies):
    assert Address(url, "big").answer(MESSAGES).text == "5"
  assert len(bodies) == 4
  assert waits[0] == 7
  assert 1.5 <= waits[1] <= 2.5
  assert 3 <= waits[2] <= 5


@pytest.mark.parametrize(
  ("reply", "sentence"),
  [
    ((500, b"", {}), "answered 500 .*, 5 times in a row"),
    ((200, b'{"choices": []}', {}), "sent what is no chat completion"),
    ((200, b'{"choices": [{"message": {"content": null}}]}', {}), "its content is None"),
    ((404, b"no such model", {}), "answered 404 .*no such model"),
  ],
)
def test_an_address_without_an_answer_says_what_it_did(reply, sentence, waits):
  with server(lambda n, body: reply) as (url, bodies), pytest.raises(Unanswered, match=sentence):
    Address(url, "big").answer(MESSAGES)
  assert len(bodies) == (1 if reply[0] == 404 else 5)


def test_where_nothing_listens_it_is_said(waits):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    port = taken.getsockname()[1]
  with pytest.raises(Unanswered, match=r"does not answer: Connection refused, 5 times in a row"):
    Address(f"http://user:pass@127.0.0.1:{port}/v1", "big").answer(MESSAGES)
  assert Address("http://user:pass@host/v1", "big").api.name == "http://host/v1"


def test_a_server_that_says_nothing_is_not_waited_for_forever(waits):
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    there = Address(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "big", seconds=0.05, tries=2)
    with pytest.raises(Unanswered, match=r"does not answer: .*timed out, 2 times in a row"):
      there.answer(MESSAGES)


@pytest.mark.parametrize(
  ("options", "sentence"),
  [
    (dict(url="host/v1", model="m"), "begins with http"),
    (dict(url="http://host/v1", model=""), "needs --model"),
    (dict(url="http://host/v1", model="m", key="NOT_THERE"), "has no NOT_THERE"),
  ],
)
def test_what_is_no_address_is_refused(options, sentence):
  with pytest.raises(ValueError, match=sentence):
    Address(**options)


def sums(tmp_path):
  rows = [{"prompt": f"What is {i} + {i}?", "completion": f"{2 * i}"} for i in range(1, 5)]
  return tiny.write_jsonl(tmp_path / "sums.jsonl", rows)


def sample(url, tmp_path, *more):
  return main(
    [
      *("sample", f"--address={url}", "--model=big", f"--data={sums(tmp_path)}"),
      *(
        "--reward=number",
        "--max_new_tokens=9",
        "--n=2",
        f"--out={tmp_path / 'traces.jsonl'}",
        *more,
      ),
    ]
  )


def right_at_first(n, body):
  """The right sum where the seed is even, else a wrong one."""
  number = int(body["messages"][-1]["content"].split()[2])
  return said(f"It is {2 * number if body['seed'] % 2 else 7}.")


def test_traces_that_a_verifier_finds_right_become_rows_to_train_on(tmp_path, capsys):
  with server(right_at_first) as (url, bodies):
    assert sample(url, tmp_path) == 0
  assert len(bodies) == 8
  assert len({body["seed"] for body in bodies}) == 8
  rows = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
  assert len(rows) == 4
  for row in rows:
    number = int(row["prompt"][-1]["content"].split()[2])
    assert row["completion"][-1]["content"] == f"It is {2 * number}."
    assert row["weights"] == "big"
    assert "completion_ids" not in row


def test_an_address_that_fails_in_the_middle_is_gone_on_with(tmp_path, capsys, waits):
  fails = lambda n, body: right_at_first(n, body) if n <= 3 else (500, b"", {})
  with server(fails) as (url, bodies):
    assert sample(url, tmp_path) in (1, 2)
    kept = 3
  told = " ".join(capsys.readouterr().err.split())
  assert "What was answered is kept: run the same command again" in told
  with server(right_at_first) as (url, bodies):
    assert sample(url, tmp_path) == 0
    assert len(bodies) == 8 - kept


@pytest.mark.parametrize(
  ("more", "sentence"),
  [
    (("--top_k=5",), "--top_k=5 is of a model that is loaded here"),
    (("--base=nf4",), "--base is of a model that is loaded here"),
    (("--max_new_tokens=0",), "write --max_new_tokens=N"),
  ],
)
def test_what_an_address_cannot_do_is_refused(more, sentence, tmp_path, capsys):
  assert sample("http://127.0.0.1:9/v1", tmp_path, *more) in (1, 2)
  assert sentence in " ".join(capsys.readouterr().err.split())
  assert not (tmp_path / "traces.jsonl").exists()
