"""A judge behind an address: a local server that answers as it is told."""

import contextlib
import http.server
import json
import threading
import time

import pytest

from posttrain_jax.rewards import section
from posttrain_jax.rewards.judge import Judge
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.rewards.workers import Interrupted, Workers

TALK = [
  {"role": "system", "content": "Be short."},
  {"role": "user", "content": "Capital of France?"},
]


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.asked.append((self.path, dict(self.headers), asked))
    self.server.answer(self, asked["messages"][-1]["content"])

  def send(self, text, status=200):
    body = text.encode()
    self.send_response(status)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def say(self, content):
    self.send(json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}))

  def log_message(self, *arguments):
    pass


@pytest.fixture
def server():
  served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  served.daemon_threads = True
  served.asked, served.answer = [], lambda handler, text: handler.say("Fine. Score: 7")
  threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
  yield served
  served.shutdown()
  served.server_close()


def judge(server, **options):
  host, port = server.server_address
  return Judge(f"http://{host}:{port}/v1", "m", **{"wait": 0.01, **options})


def answer(text="Paris", **row):
  return Answer(TALK, text, row)


def test_a_score_is_read_from_the_reply(server, monkeypatch):
  monkeypatch.setenv("JUDGE_KEY", "secret")
  given = judge(server, column="gold", key="JUDGE_KEY").judged(answer("{gold}", gold="Paris"))
  assert given.value == 7
  ((path, headers, asked),) = server.asked
  assert path == "/v1/chat/completions"
  assert headers["Authorization"] == "Bearer secret"
  assert (asked["model"], asked["temperature"]) == ("m", 0)
  (message,) = asked["messages"]
  assert "Capital of France?" in message["content"]
  assert "A right answer:\nParis\n" in message["content"]
  assert "Answer:\n{gold}\n" in message["content"]  # an answer's own braces are no fields
  assert "from 1 (useless) to 10 (perfect)" in message["content"]


def test_what_cannot_be_read_is_missing(server):
  replies = {
    "no number": "the judge's reply has no score: 'no number'",
    "Score: 11": "returned 11.0, which is not within 1 and 10",
    "Score: -1": "returned -1.0, which is not within 1 and 10",
    "Score: 7/20": "has no score",
  }
  server.answer = lambda handler, text: handler.say(text)
  for reply, reason in replies.items():
    given = judge(server, template="{completion}").judged(answer(reply))
    assert given.is_missing
    assert reason in given.reason
  last = judge(server, template="{completion}").judged(answer("Score: 2? No. **Score:** 8.5"))
  assert last.value == 8.5


def test_what_fails_is_tried_again(server):
  def fails_twice(handler, text):
    if len(server.asked) < 3:
      handler.send("busy", 503)
    else:
      handler.say("Score: 3")

  server.answer = fails_twice
  assert judge(server).judged(answer()).value == 3
  assert len(server.asked) == 3
  server.asked.clear()
  asked = judge(server, tries=2)
  given = asked.judged(answer())
  assert given.reason == f"the judge at {asked.url} answered 503 Service Unavailable: 'busy'"
  server.asked.clear()
  server.answer = lambda handler, text: handler.send("who are you?", 401)
  assert judge(server).judged(answer()).reason.endswith("answered 401 Unauthorized: 'who are you?'")
  assert len(server.asked) == 1
  server.answer = lambda handler, text: handler.send('{"choices": []}')
  assert "what is no chat completion" in judge(server).judged(answer()).reason
  server.answer = lambda handler, text: handler.say(None)
  assert "its content is None" in judge(server).judged(answer()).reason


@pytest.mark.parametrize("drops", [False, True], ids=["silent", "drops"])
def test_a_deadline_is_one_of_all_of_it(server, drops):
  def slow(handler, text):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
      time.sleep(0.05)
      if drops:
        with contextlib.suppress(OSError):  # whom it was for has left
          handler.wfile.write(b" ")

  server.answer = slow
  began = time.monotonic()
  given = judge(server, seconds=0.2).judged(answer())
  assert given.reason == "the judge took longer than 0.2 s"
  assert time.monotonic() - began < 3


def test_whoever_is_to_stop_does_not_wait_for_a_judge(server):
  asked, goes_on = threading.Event(), threading.Event()

  def waits(handler, text):
    asked.set()
    goes_on.wait(20)
    with contextlib.suppress(OSError):
      handler.say("Score: 5")

  server.answer = waits
  host, port = server.server_address
  options = {"judge": {"url": f"http://{host}:{port}/v1", "model": "m", "at_once": 1}}
  spec = {"parts": ("judge",), "options": options}
  reward = section.make(spec, [], workers=Workers(stopping=asked.is_set))
  began = time.monotonic()
  with pytest.raises(Interrupted):
    reward.score([answer("a"), answer("b")])
  assert time.monotonic() - began < 10
  goes_on.set()
  assert len(server.asked) == 1


def test_several_answers_are_judged_at_once(server):
  together = threading.Barrier(3, timeout=20)  # nobody gets a reply until three ask

  def waits(handler, text):
    together.wait()
    handler.say(f"Score: {text}")

  server.answer = waits
  part = Part("judge", judge(server, template="{completion}", at_once=3))
  result = Reward([part]).score([answer(str(i)) for i in (1, 2, 3, 4, 5, 6)])
  assert [one.total.value for one in result.answers] == [1, 2, 3, 4, 5, 6]


def test_an_address_where_nobody_is(server):
  nobody = judge(server, tries=2, seconds=5)
  server.shutdown()
  server.server_close()
  assert (
    nobody.judged(answer()).reason
    == f"the judge at {nobody.url} does not answer: Connection refused"
  )


def test_a_password_in_the_address_is_not_told():
  nobody = Judge("http://me:secret@127.0.0.1:9/v1", "m", tries=1, seconds=5)
  said = nobody.judged(answer()).reason
  assert said.startswith("the judge at http://127.0.0.1:9/v1 does not answer")
  assert "secret" not in said


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"url": "localhost:8000"}, "begins with http"),
    ({"template": "How good?"}, r"has no \{completion\}"),
    ({"pattern": "Score"}, "has not one group"),
    ({"pattern": "("}, "is no regular expression"),
    ({"key": "NO_SUCH_KEY"}, "the environment has no NO_SUCH_KEY"),
  ],
)
def test_mistakes_are_told_when_it_is_made(options, message):
  with pytest.raises(ValueError, match=message):
    Judge(**{"url": "http://localhost/v1", "model": "m", **options})
