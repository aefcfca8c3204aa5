"""An API that answers in drops, in halves, late or not at all; its callers have tests of their own."""

import contextlib
import http.server
import json
import threading
import time

import pytest

from posttrain_jax.core import api, words
from posttrain_jax.core.api import Api, Failed, Patience


@contextlib.contextmanager
def server(answer):
  """(url of a server that answers its n-th request by answer(n, handler), paths with methods that were asked)."""
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      self.rfile.read(int(self.headers.get("Content-Length", 0)))
      asked.append((self.command, self.path))
      with contextlib.suppress(OSError):  # whoever asked has left
        answer(len(asked), self)

    do_GET = do_POST

    def log_message(self, *_):
      pass

  made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  made.daemon_threads = True
  threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
  try:
    yield f"http://127.0.0.1:{made.server_port}/v1", asked
  finally:
    made.shutdown()
    made.server_close()


def sends(body, status=200, **headers):
  def answer(_, handler):
    handler.send_response(status)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in ({"Content-Length": len(body)} | given).items():
      handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)

  return answer


def asked(url, patience, body=None, read=json.loads, **fields):
  return Api(url, **fields).asked("/x", body, read, patience, "number")


def test_without_a_body_it_is_a_get():
  with server(sends(b"7")) as (url, paths):
    assert asked(url, Patience(tries=1)) == 7
    assert asked(url, Patience(tries=1), {}) == 7
  assert paths == [("GET", "/v1/x"), ("POST", "/v1/x")]


def test_a_user_and_a_password_in_the_address_are_sent_and_not_told(monkeypatch):
  """urllib by itself would look for a host of that name."""
  sent = []

  def answer(n, handler):
    sent.append(handler.headers["Authorization"])
    sends(b"7")(n, handler)

  monkeypatch.setenv("THE_KEY", "secret")
  with server(answer) as (url, _):
    mine = url.replace("//", "//me:p%40ss@")
    assert asked(mine, Patience(tries=1)) == 7
    assert asked(mine, Patience(tries=1), key="THE_KEY") == 7
  assert sent == ["Basic bWU6cEBzcw==", "Bearer secret"]
  assert Api(mine).name == url


def test_a_reply_that_breaks_off_is_none():
  """Its beginning may be valid JSON: the text 12 of 1234."""
  broken = sends(b"12", Content_Length=4)
  replies = [broken, sends(b"1234")]
  with server(lambda n, handler: replies[n - 1](n, handler)) as (url, paths):
    assert asked(url, Patience(tries=2, unread=1, wait=0.01)) == 1234
  assert len(paths) == 2
  with server(broken) as (url, _), pytest.raises(Failed, match="IncompleteRead") as caught:
    asked(url, Patience(tries=1))
  assert (caught.value.ended, caught.value.status) == (api.SPENT, None)


@pytest.mark.parametrize("cuts", [False, True])
def test_a_reply_in_drops_ends_with_its_time(cuts):
  def drops(_, handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
      handler.wfile.write(b" ")
      time.sleep(0.02)

  whole = dict(seconds=0.2, cuts=True) if cuts else dict(tries=1)
  began = time.monotonic()
  with server(drops) as (url, _), pytest.raises(Failed, match="timed out") as caught:
    asked(url, Patience(**whole), seconds=60.0 if cuts else 0.2)
  assert caught.value.ended == (api.LATE if cuts else api.SPENT)
  assert time.monotonic() - began < 1.5


def test_what_cannot_be_read_is_asked_for_as_often_as_is_said():
  with server(sends(b"{}")) as (url, paths), pytest.raises(Failed, match="is no number") as caught:
    asked(url, Patience(tries=9, unread=3, wait=0.01), read=lambda said: json.loads(said)["n"])
  assert caught.value.why == "sent what is no number: KeyError: 'n'"
  assert (len(paths), caught.value.ended) == (3, api.UNREAD)


@pytest.mark.parametrize(
  ("said", "kind"),
  [
    (b"[" * 100_000, "RecursionError"),
    (b'{"choices": []}', "IndexError"),
    (b'{"choices": [7]}', "TypeError"),
    (b'{"choices": {}}', "KeyError"),
    (b'{"choices": [{"message": {"content": [1]}}]}', "its content is"),
  ],
)
def test_a_reply_may_be_anything(said, kind):
  with server(sends(said)) as (url, _), pytest.raises(Failed, match=kind) as caught:
    asked(url, Patience(tries=1), read=api.completion)
  assert caught.value.ended == api.SPENT


def test_a_text_with_half_of_a_character_is_one_that_files_hold():
  said = b'{"choices": [{"message": {"content": "a\\ud83db"}, "finish_reason": "stop"}]}'
  with server(sends(said)) as (url, _):
    assert asked(url, Patience(tries=1), read=api.completion) == ("a?b", "stop")


def test_a_reply_that_is_too_large_is_not_read():
  with server(sends(b"1" * 2000)) as (url, _), pytest.raises(Failed, match="more than 1,000 bytes"):
    asked(url, Patience(tries=1), largest=1000)


def test_no_try_begins_once_the_time_is_over():
  with server(sends(b"", 503)) as (url, paths), pytest.raises(Failed) as caught:
    asked(url, Patience(seconds=0.3, wait=0.1))
  assert caught.value.why == "answered 503 Service Unavailable"
  assert (caught.value.ended, caught.value.status) == (api.SPENT, 503)
  assert 2 <= len(paths) <= 4


def test_a_wait_that_the_server_asks_for_is_kept_and_ends_where_nobody_waits():
  said = sends(b"", 429, Retry_After="30")
  with server(said) as (url, paths), pytest.raises(Failed) as caught:
    asked(url, Patience(stopping=lambda: True))
  assert caught.value.ended == api.STOPPED
  with server(said) as (url, paths), pytest.raises(Failed) as caught:
    asked(url, Patience(seconds=20.0))
  assert (len(paths), caught.value.ended) == (1, api.SPENT)


@pytest.mark.parametrize(
  ("said", "shown"),
  [
    (b'{"error": {"message": "no   such\\nmodel"}}', ": 'no such model'"),
    (b'{"error": "no"}', ": 'no'"),
    (b"[1]", ": '[1]'"),
    (b"\xff", ": '\ufffd'"),
    (b"[" * 3000, f": {words.shown('[' * 3000, 200)}"),
    (b"", ""),
  ],
)
def test_what_a_server_says_of_an_error_is_told(said, shown):
  with server(sends(said, 404)) as (url, paths), pytest.raises(Failed) as caught:
    asked(url, Patience(tries=5))
  assert caught.value.why == f"answered 404 Not Found{shown}"
  assert (len(paths), caught.value.ended) == (1, api.REFUSED)
