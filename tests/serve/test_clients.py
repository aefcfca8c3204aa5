"""Clients that go, stall, crowd and send nonsense: their own requests end, and nobody else's."""

import contextlib
import http.client
import json
import socket
import threading
import time

import pytest

from posttrain_jax.serve import server
from posttrain_jax.serve.limits import Limits
from tests.serve import fake, served

PATIENCE = 20.0  # of a client on a machine that others use too


@contextlib.contextmanager
def listening(worker, **options):
  """(host, port) of a server over a fake worker, on a thread."""
  limits = options.get("limits") or Limits()
  sock = server.listening("127.0.0.1", 0)
  sock.listen(256)
  running = server.Server(served.app(worker, **options).asgi(), worker, limits)
  thread = threading.Thread(target=running.run, kwargs=dict(sockets=[sock]))
  thread.start()
  try:
    yield sock.getsockname()
  finally:
    running.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()


def request(stream=False, close=False, **fields):
  asked = [{"role": "user", "content": "Hi"}]
  body = json.dumps({"model": "base", "messages": asked, "stream": stream, **fields}).encode()
  end = b"connection: close\r\n" if close else b""
  head = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
  )
  return head + end + b"content-length: %d\r\n\r\n" % len(body) + body


def connected(address, data=b""):
  sock = socket.create_connection(address, timeout=PATIENCE)
  sock.sendall(data)
  return sock


def everything(sock):
  parts = []
  while part := sock.recv(65536):
    parts.append(part)
  return b"".join(parts)


def until(holds):
  end = time.monotonic() + PATIENCE
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.005)


def is_served(address):
  sock = connected(address, request(close=True))
  return b'"content":"Hello"' in everything(sock)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_before_its_first_token_frees_its_row(stream):
  worker = fake.Worker(served.says("Hello"))
  worker.go.clear()
  with listening(worker) as address:
    sock = connected(address, request(stream=stream, n=3))
    until(lambda: worker.under_way == 3)
    sock.close()
    until(lambda: worker.under_way == 0)
    assert len(worker.cancelled) == 3
    worker.go.set()
    assert is_served(address)


def test_a_client_that_goes_in_the_midst_of_a_stream_frees_its_row():
  worker = fake.Worker(served.says("Hello " * 15), window=1, pause=0.02)
  with listening(worker) as address:
    sock = connected(address, request(stream=True))
    assert sock.recv(200)
    until(lambda: worker.under_way == 1)
    sock.close()
    until(lambda: worker.under_way == 0)
    assert len(worker.cancelled) == 1


def test_an_answer_whose_stop_string_the_worker_does_not_see_is_cancelled():
  worker = fake.Worker(served.says("Hello World"), window=1, pause=0.01)
  with listening(worker) as address:
    sock = connected(address, request(stop="lo", close=True))
    assert b'"content":"Hel"' in everything(sock)
  assert len(worker.cancelled) == 1


def test_a_reader_that_takes_nothing_stalls_nobody_and_is_cut_off():
  text = "x" * 4000
  worker = fake.Worker(lambda asked: [*served.ids(text), served.END], window=1)
  limits = Limits(write_seconds=0.5)
  with listening(worker, limits=limits, length=8192) as address:
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(address)
    slow.sendall(request(stream=True, n=8))
    until(lambda: len(worker.asked) == 8)
    began = time.monotonic()
    worker.script = served.says("Hello")
    assert is_served(address)
    assert time.monotonic() - began < PATIENCE
    until(lambda: worker.under_way == 0)  # the worker waited for nobody
    slow.settimeout(PATIENCE)
    with pytest.raises(OSError):  # noqa: PT012  (which of the two raises depends on the system)
      while True:
        slow.sendall(b"x")
        time.sleep(0.05)
    slow.close()


def test_two_hundred_arrivals_at_once_are_answered_or_told_to_come_again():
  worker = fake.Worker(served.says("Hello"), most=20, pause=0.05)
  with listening(worker) as address:
    each = [connected(address, request(close=True)) for _ in range(200)]
    answers = [everything(sock) for sock in each]
    told = [(int(answer[9:12]), b"retry-after" in answer) for answer in answers]
    assert set(told) == {(200, False), (429, True)}
    assert is_served(address)


NONSENSE = {
  "no HTTP": (b"nonsense\r\n\r\n", b"400"),
  "bytes": (bytes(range(256)) * 4, b"400"),
  "a header of 64 kB": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 65536, b"400"),
  "a path of 64 kB": (b"GET /" + b"y" * 65536, b"400"),
  "two lengths": (
    b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\ncontent-length: 5\r\n\r\nabc",
    b"400",
  ),
  "a negative length": (
    b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: -3\r\n\r\n",
    b"400",
  ),
  "a length of a gigabyte": (
    b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1073741824\r\n\r\n",
    b"413",
  ),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_what_is_no_request_is_refused_in_json_and_the_next_is_served(name):
  data, status = NONSENSE[name]
  limits = Limits(unread_seconds=0.2)  # it takes the rest of such a body for no longer
  with listening(fake.Worker(served.says("Hello")), limits=limits) as address:
    sock = connected(address)
    with contextlib.suppress(OSError):  # the server may close before all is sent
      sock.sendall(data)
    answer = b""
    with contextlib.suppress(OSError):
      answer = everything(sock)
    assert answer.split(b" ")[1:2] == [status]
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert is_served(address)


def test_a_head_that_does_not_come_is_not_waited_for():
  limits = Limits(head_seconds=0.2)
  with listening(fake.Worker(served.says("Hello")), limits=limits) as address:
    for data in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nhost: loc"):
      sock = connected(address, data)
      assert b" 408 " in everything(sock)
    assert is_served(address)


def test_a_body_that_does_not_come_is_not_waited_for():
  limits = Limits(body_seconds=0.2)
  with listening(fake.Worker(served.says("Hello")), limits=limits) as address:
    sock = connected(address, request(close=True)[:-5])
    assert b" 408 " in everything(sock)
    assert is_served(address)


def test_more_connections_than_there_may_be_are_refused():
  limits = Limits(connections=3)
  with listening(fake.Worker(served.says("Hello")), limits=limits) as address:
    held = [connected(address) for _ in range(3)]
    assert b" 503 " in everything(connected(address))
    for sock in held:
      sock.close()
    until(lambda: is_served(address))


def test_requests_one_behind_another_on_a_connection_are_answered_in_order():
  with listening(fake.Worker(served.says("Hello"))) as address:
    sock = connected(address, request() + request(n=0) + request(close=True))
    answer = everything(sock)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400", b"200"]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_client_whose_body_is_too_large_hears_so_while_it_is_still_sending(chunked):
  size = 40 << 20  # more than sockets hold
  limits = Limits(unread_seconds=60)
  with listening(fake.Worker(served.says("Hello")), limits=limits) as address:
    connection = http.client.HTTPConnection(*address, timeout=60)
    part = b"x" * (1 << 20)
    body = (part for _ in range(size >> 20))
    headers = {"content-type": "application/json"}
    if not chunked:
      headers["content-length"] = str(size)
    connection.request("POST", "/v1/completions", body, headers, encode_chunked=chunked)
    response = connection.getresponse()
    assert (response.status, response.getheader("connection")) == (413, "close")
    assert "more than" in json.loads(response.read())["error"]["message"]
    assert is_served(address)


def test_a_body_that_is_too_large_and_never_comes_is_refused_all_the_same():
  with listening(fake.Worker(served.says("Hello")), limits=Limits(unread_seconds=0.2)) as address:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sock = connected(address, head + b"content-length: 99999999\r\n\r\n{")
    assert b" 413 " in everything(sock)
    assert is_served(address)


def test_an_idle_connection_is_closed():
  limits = Limits(idle_seconds=1)
  with listening(fake.Worker(served.says("Hello")), limits=limits) as address:
    sock = connected(address, request())
    assert b'"content":"Hello"' in everything(sock)  # which returns once the server closes
