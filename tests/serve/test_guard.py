"""Who may ask, and what never leaves: keys, names of hosts, limits, faults of ours."""

import asyncio
import hmac

import pytest

from posttrain_jax.commands import serve as command
from posttrain_jax.serve import guard
from posttrain_jax.serve.limits import Limits
from posttrain_jax.settings import ConfigError
from tests.serve import fake, served

KEY = "k" * 24


def with_key(client, header):
  headers = {} if header is None else {"authorization": header}
  body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
  return client.post("/v1/chat/completions", json=body, headers=headers)


@pytest.mark.parametrize(
  "header", [None, "", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer é"]
)
def test_a_request_without_the_key_is_401(header):
  encoded = header.encode("utf-8") if header else header
  response = with_key(served.client(keys=(KEY,)), encoded)
  assert response.status_code == 401
  assert response.json()["error"]["code"] == "invalid_api_key"
  assert KEY not in response.text


def test_either_of_two_keys_opens_and_health_needs_none():
  client = served.client(keys=("other" * 5, KEY))
  assert with_key(client, f"Bearer {KEY}").status_code == 200
  assert with_key(client, f"bearer {'other' * 5}").status_code == 200
  assert client.get("/health").status_code == 200
  assert client.get("/metrics").status_code == 401


def test_each_key_is_compared_in_constant_time(monkeypatch):
  compared = []
  same = hmac.compare_digest

  def watched(a, b):
    compared.append((a, b))
    return same(a, b)

  monkeypatch.setattr(guard.hmac, "compare_digest", watched)
  client = served.client(keys=(KEY, "other" * 5))
  with_key(client, f"Bearer {KEY}")
  assert [key for _, key in compared] == [KEY.encode(), b"other" * 5]


@pytest.mark.parametrize(
  "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1"]
)
def test_a_name_that_was_made_to_point_here_opens_nothing(host):
  response = served.client().get("/v1/models", headers={"host": host})
  assert response.status_code == 403


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_this_machines_names_are_answered(host):
  assert served.client().get("/v1/models", headers={"host": host}).status_code == 200


def test_no_cross_origin_question_is_answered():
  asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
  response = served.client().options("/v1/chat/completions", headers=asked)
  assert response.status_code == 405
  assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_fault_of_ours_is_500_without_a_traceback(monkeypatch, caplog):
  worker = fake.Worker(served.says("Hello"))

  def broken(asked, deliver):
    raise RuntimeError("secret detail")

  monkeypatch.setattr(worker, "submit", broken)
  response = served.chat(served.client(worker))
  assert response.status_code == 500
  assert response.json()["error"]["type"] == "server_error"
  assert "secret" not in response.text
  assert "secret detail" in caplog.text


def test_an_answer_that_fails_is_500_and_in_a_stream_an_event_and_the_next_is_served(monkeypatch):
  from posttrain_jax.serve.asked import Failed

  worker = fake.Worker(served.says("Hello"))
  client = served.client(worker)
  told = worker._told
  monkeypatch.setattr(worker, "_told", lambda *_: Failed(RuntimeError("secret detail")))
  whole = served.chat(client)
  assert (whole.status_code, "secret" in whole.text) == (500, False)
  *_, last = served.pieces(served.chat(client, stream=True))
  assert last["error"]["type"] == "server_error"
  monkeypatch.setattr(worker, "_told", told)
  assert served.chat(client).status_code == 200


def test_a_full_queue_is_429_with_retry_after():
  worker = fake.Worker(served.says("Hello"), most=2)
  worker.go.clear()  # nothing is written
  response = served.chat(served.client(worker), n=3)
  assert response.status_code == 429
  assert response.headers["retry-after"] == "2"
  assert response.json()["error"]["type"] == "rate_limit_error"
  assert len(worker.cancelled) == 2  # what was taken of it before is given back


def test_too_many_requests_at_once_are_429_before_their_bodies_are_read():
  client = served.client(limits=Limits(requests=0))
  response = served.chat(client)
  assert response.status_code == 429
  assert "retry-after" in response.headers


def test_what_can_never_be_answered_tells_clients_not_to_retry():
  response = served.chat(served.client(), n=0)
  assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("state", ["warming", "draining"])
def test_until_it_is_warm_and_while_it_ends_it_is_503(state):
  worker = fake.Worker(served.says("Hello"))
  worker.state = state
  client = served.client(worker)
  assert client.get("/health").status_code == 503
  response = served.chat(client)
  assert response.status_code == 503
  assert "retry-after" in response.headers


def test_a_body_that_does_not_come_is_408():
  async def never():
    await asyncio.sleep(10)

  with pytest.raises(guard.Refused) as refused:
    asyncio.run(guard.body(never, Limits(body_seconds=0.01)))
  assert refused.value.status == 408


def parsed(*argv):
  import argparse

  parser = argparse.ArgumentParser()
  command.add(parser)
  return parser.parse_args(argv)


def test_other_machines_are_served_with_a_key_or_by_a_word(monkeypatch):
  monkeypatch.delenv(command.KEY, raising=False)
  with pytest.raises(ConfigError, match="nobody needs a key"):
    command._check_host(parsed("--host=0.0.0.0"), ())
  command._check_host(parsed("--host=0.0.0.0"), (KEY,))
  command._check_host(parsed("--host=0.0.0.0", "--without_key"), ())
  command._check_host(parsed("--host=127.0.0.1"), ())


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
  path = tmp_path / "keys"
  path.write_text(f"{KEY}\n\n{'x' * 16}\n")
  monkeypatch.setenv(command.KEY, "e" * 20)
  assert command._keys(parsed(f"--api_key_file={path}")) == (KEY, "x" * 16, "e" * 20)
  path.write_text("short\n")
  with pytest.raises(ConfigError, match="5 characters"):
    command._keys(parsed(f"--api_key_file={path}"))
  path.write_text("\n")
  with pytest.raises(ConfigError, match="holds no key"):
    command._keys(parsed(f"--api_key_file={path}"))


def test_an_adapter_is_named_with_its_folder():
  assert command._named("a=b=c") == ("a", "b=c")
  with pytest.raises(ConfigError, match="NAME=DIR"):
    command._named("folder")


@pytest.mark.parametrize("option", ["port=70000", "rows=0", "slots=-1", "waiting=-1", "drain=-1"])
def test_a_number_that_cannot_be_is_refused_before_anything_is_read(option):
  name = option.partition("=")[0]
  with pytest.raises(ConfigError, match=f"--{name}=.*: write a number from"):
    command.run(parsed("--model=x", f"--{option}"), ())


def test_without_its_libraries_the_command_says_what_to_install(monkeypatch):
  monkeypatch.setattr(command, "_is_there", lambda name: name != "uvicorn")
  with pytest.raises(
    ConfigError, match=r"uvicorn is not installed: pip install 'posttrain-jax\[serve\]'"
  ):
    command.run(parsed("--model=x"), ())
