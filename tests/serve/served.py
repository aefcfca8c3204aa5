"""An application over the fake worker, on the tiny tokenizer, and clients of it."""

import functools
import json
import pathlib
import tempfile

from starlette.testclient import TestClient

from posttrain_jax.data import templates
from posttrain_jax.serve.app import App
from posttrain_jax.serve.limits import Limits
from posttrain_jax.serve.metrics import Metrics
from posttrain_jax.serve.models import Models
from posttrain_jax.serve.voice import Voice
from tests import tiny
from tests.serve import fake

TOKENIZER = tiny.tokenizer()
END = int(TOKENIZER.eos_token_id)
TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "weather",
      "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
      },
    },
  }
]


@functools.cache
def folder():
  """Of an adapter that says nothing of how it is spoken to."""
  path = pathlib.Path(tempfile.mkdtemp())
  (path / "adapter_config.json").write_text("{}")
  return path


def ids(text):
  return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def says(text, *, ends=True):
  """A script: every answer is this text."""
  return lambda asked: [*ids(text), *([END] if ends else [])]


def voice(template="chatml", **changes):
  bound = None if template is None else templates.bind(TOKENIZER, template)
  return Voice(TOKENIZER, bound, (END,), 261, **changes)


def app(
  worker, *, limits=None, allow_loading=False, speak=None, template="chatml", length=128, own=None
):
  base = own or voice(template)
  models = Models(worker, "base", base, length, speak or (lambda home: voice()))
  return App(
    models, limits=limits or Limits(), metrics=Metrics("base"), allow_loading=allow_loading
  )


def client(worker=None, *, keys=(), **options):
  made = app(worker or fake.Worker(says("Hello")), **options)
  return TestClient(
    made.asgi(keys=keys), base_url="http://localhost", raise_server_exceptions=False
  )


def chat(client, **fields):
  body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], **fields}
  return client.post("/v1/chat/completions", json=body)


def complete(client, **fields):
  return client.post("/v1/completions", json={"model": "base", "prompt": "Hi", **fields})


def pieces(response):
  """The events of a stream; the last must be [DONE]."""
  lines = [line for line in response.text.split("\n\n") if line]
  assert all(line.startswith("data: ") for line in lines)
  assert lines[-1] == "data: [DONE]"
  return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
