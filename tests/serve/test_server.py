"""The command as users run it: a server in a process of its own, OpenAI's client, adapters that come and go."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx2
import openai
import pytest

from tests import tiny
from tests.serve import models

ROOT = pathlib.Path(__file__).parents[2]
KINDS = ("lora", "thin", "rslora", "dora", "adalora", "prompt", "prefix", "uneven")
LONGEST = 600  # seconds, on a busy machine
pytestmark = pytest.mark.timeout(2 * LONGEST)


class Served:
  """A server in a child process."""

  def __init__(self, folder, *options, devices=1):
    self.folder = folder
    argv = [sys.executable, "-m", "posttrain_jax", "serve", f"--model={folder / 'base'}"]
    argv += [f"--adapters={folder / 'adapters'}", "--port=0", "--length=96", "--max_rank=8"]
    argv += [
      "--prompt_slots=6",
      "--prefix_slots=4",
      "--rows=3",
      "--slots=2",
      "--prefix_cache=1",
      *options,
    ]
    flags = os.environ.get("XLA_FLAGS", "")
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    flags += f" --xla_force_host_platform_device_count={devices}"
    env = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    env["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax-commands")
    self.log = open(folder / "log", "w+")  # noqa: SIM115
    self.process = subprocess.Popen(argv, stdout=self.log, stderr=subprocess.STDOUT, env=env)
    self.url = self._address()

  def said(self):
    return (self.folder / "log").read_text()

  def _address(self):
    end = time.monotonic() + LONGEST
    while time.monotonic() < end and self.process.poll() is None:
      if found := re.search(r"serving at (\S+)/v1", self.said()):
        return found[1]
      time.sleep(0.05)
    raise AssertionError(self.said())

  def client(self, kind=openai.OpenAI, **options):
    return kind(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

  def streamed(self, tokens, **options):
    """The chunks of answers of so many tokens."""
    return self.client().completions.create(
      model="base", prompt="abc", max_tokens=tokens, stream=True, temperature=0,
      extra_body={"ignore_eos": True}, **options,
    )  # fmt: skip

  def metric(self, name):
    text = self.client()._client.get(f"{self.url}/metrics").text
    (line,) = re.findall(rf"^posttrain:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    return float(line)

  def kill(self):
    if self.process.poll() is None:
      self.process.kill()
    self.end()

  def end(self):
    """The exit code."""
    code = self.process.wait(LONGEST)
    self.log.close()
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("serve")
  model = path / "base"
  model.mkdir()
  from posttrain_jax.models import hf

  hf.save(model, models.params(), models.CONFIG)
  tiny.tokenizer().save_pretrained(model)
  for seed, kind in enumerate(KINDS):
    models.write(path / "adapters" / kind, kind, seed + 1)
  return path


@pytest.fixture(scope="module")
def served(folder):
  made = Served(folder, "--allow_loading", "--drain=20")
  try:
    yield made
  finally:
    made.kill()


MESSAGES = [{"role": "user", "content": "Say something"}]


def answer(client, model, text="Say something", **options):
  asked = [{"role": "user", "content": text}]
  made = client.chat.completions.create(
    model=model, messages=asked, max_tokens=12, temperature=0, logprobs=True, **options
  )
  return [token.token for token in made.choices[0].logprobs.content]


@pytest.mark.slow
def test_the_openai_client_is_a_user_like_any_other(served):
  client = served.client()
  assert [model.id for model in client.models.list()] == ["base", *sorted(KINDS)]
  whole = answer(client, "base")
  assert len(whole) > 0
  streamed = client.chat.completions.create(
    model="base", messages=MESSAGES, max_tokens=12, temperature=0, stream=True,
    stream_options={"include_usage": True},
  )  # fmt: skip
  *chunks, last = list(streamed)
  assert last.usage.completion_tokens == 12
  one = client.chat.completions.create(
    model="base", messages=MESSAGES, max_tokens=12, temperature=0
  )
  text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
  assert text == one.choices[0].message.content
  with pytest.raises(openai.NotFoundError, match="does not exist"):
    answer(client, "nobody")
  with pytest.raises(openai.BadRequestError, match="n must be"):
    client.chat.completions.create(model="base", messages=MESSAGES, n=1000)


@pytest.mark.slow
def test_the_same_seed_is_the_same_text_in_any_company(served):
  client = served.client()
  drawn = lambda **options: [
    choice.text
    for choice in client.completions.create(
      model="lora", prompt="abc", temperature=1, seed=7, max_tokens=10, **options
    ).choices
  ]
  alone = drawn()
  assert drawn(n=3)[0] == alone[0]
  assert len({*drawn(n=3)}) == 3


@pytest.mark.slow
def test_an_answer_follows_its_schema_on_a_model_that_knows_nothing(served):
  import json

  schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
  schema["additionalProperties"] = False
  asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
  made = served.client().chat.completions.create(
    model="thin", messages=MESSAGES, response_format=asked, max_tokens=40, temperature=1, seed=3
  )
  if made.choices[0].finish_reason == "stop":
    assert isinstance(json.loads(made.choices[0].message.content)["a"], bool)


async def _storm(served, alone):
  """64 clients at once ask for every adapter, while adapters are loaded and unloaded every 50 ms."""
  client = served.client(openai.AsyncOpenAI, timeout=LONGEST)
  names = ["base", *KINDS]
  over = asyncio.Event()

  async def churn():
    at = 0
    while not over.is_set():
      name, kind = f"extra{at % 3}", KINDS[at % len(KINDS)]
      body = {"lora_name": name, "lora_path": kind}
      await client.post("/load_lora_adapter", body=body, cast_to=str)
      with contextlib.suppress(openai.NotFoundError):
        await client.post("/unload_lora_adapter", body={"lora_name": name}, cast_to=str)
      at += 1
      await asyncio.sleep(0.05)
    return at

  async def one(at):
    name = names[at % len(names)]
    text = f"Say something {at % 5}"
    made = await client.chat.completions.create(
      model=name, messages=[{"role": "user", "content": text}], max_tokens=12, temperature=0,
      logprobs=True,
    )  # fmt: skip
    return [t.token for t in made.choices[0].logprobs.content] == alone[name, text]

  churning = asyncio.ensure_future(churn())
  same = await asyncio.gather(*(one(at) for at in range(64)))
  over.set()
  return same, await churning


@pytest.mark.slow
def test_greedy_answers_among_64_of_mixed_adapters_are_those_alone(served):
  client = served.client()
  alone = {
    (name, f"Say something {at}"): answer(client, name, f"Say something {at}")
    for name in ("base", *KINDS)
    for at in range(5)
  }
  assert len({str(alone[name, "Say something 0"]) for name in ("base", *KINDS)}) > 4
  programs = served.metric("compiled_programs")
  same, churned = asyncio.run(_storm(served, alone))
  assert all(same)
  assert churned > 1
  assert served.metric("compiled_programs") == programs
  assert served.metric("num_requests_running") == 0


@pytest.mark.slow
def test_a_reload_under_one_name_is_a_new_adapter_with_a_warm_prefix_cache_too(served):
  client = served.client()
  home = served.folder / "adapters" / "changing"
  models.write(home, "lora", 50)
  first = answer(client, "changing", "the same beginning " * 2)
  assert answer(client, "changing", "the same beginning " * 2) == first
  models.write(served.folder / "new", "lora", 51)
  shutil.copytree(served.folder / "new", home, dirs_exist_ok=True)
  second = answer(client, "changing", "the same beginning " * 2)
  assert second != first
  models.write(served.folder / "adapters" / "fresh", "lora", 51)
  assert answer(client, "fresh", "the same beginning " * 2) == second
  shutil.rmtree(home)
  shutil.rmtree(served.folder / "adapters" / "fresh")


def load(client, name, path):
  return client.post("/load_lora_adapter", body={"lora_name": name, "lora_path": path}, cast_to=str)


@pytest.mark.slow
def test_an_adapter_that_is_unloaded_in_use_finishes_its_answers(served):
  client = served.client()
  load(client, "leaving", "dora")
  asked = dict(prompt="abc", max_tokens=60, temperature=0, extra_body={"ignore_eos": True})
  whole = client.completions.create(model="dora", **asked).choices[0].text
  stream = client.completions.create(model="leaving", stream=True, **asked)
  told = next(iter(stream)).choices[0].text
  client.post("/unload_lora_adapter", body={"lora_name": "leaving"}, cast_to=str)
  assert told + "".join(chunk.choices[0].text for chunk in stream) == whole
  with pytest.raises(openai.NotFoundError):
    client.completions.create(model="leaving", **asked)


@pytest.mark.slow
def test_loads_of_one_name_at_once_leave_one_of_them(served):
  client = served.client()
  kinds = ["lora", "thin", "rslora", "dora"] * 3
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    list(pool.map(lambda kind: load(client, "contested", kind), kinds))
  told = answer(client, "contested")
  assert told in [answer(client, kind) for kind in set(kinds)]
  client.post("/unload_lora_adapter", body={"lora_name": "contested"}, cast_to=str)


FAULTS = {
  "another base": (lambda home: models_of_another_base(home), "base is"),
  "a rank over the limit": (lambda home: models_of_rank(home, 12), "rank"),
  "truncated": (lambda home: truncated(home), ""),
  "no weights": (lambda home: (home / "adapter_model.safetensors").unlink(), ""),
  "a pickle": (lambda home: pickled(home), ""),
  "NaN": (lambda home: not_finite(home), "NaN"),
}


def models_of_another_base(home):
  import jax

  from posttrain_jax import adapters
  from posttrain_jax.adapters import peft_format
  from posttrain_jax.models import decoder

  config = tiny.config(hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
  params = decoder.init(jax.random.key(0), config, std=tiny.STD)
  chosen = adapters.AdapterConfig(r=2)
  shutil.rmtree(home)
  peft_format.save(home, adapters.init(jax.random.key(0), params, chosen)[1], chosen, config)


def models_of_rank(home, rank):
  import jax

  from posttrain_jax import adapters
  from posttrain_jax.adapters import peft_format

  chosen = adapters.AdapterConfig(r=rank)
  shutil.rmtree(home)
  made = adapters.init(jax.random.key(0), models.params(), chosen)[1]
  peft_format.save(home, made, chosen, models.CONFIG)


def truncated(home):
  file = home / "adapter_model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])


def pickled(home):
  (home / "adapter_model.safetensors").rename(home / "adapter_model.bin")


def not_finite(home):
  import numpy as np
  from safetensors.numpy import load_file, save_file

  file = home / "adapter_model.safetensors"
  save_file({name: np.full_like(x, np.nan) for name, x in load_file(file).items()}, file)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_no_adapter_of_this_base_is_refused_and_the_next_is_served(served, fault):
  spoil, word = FAULTS[fault]
  home = models.write(served.folder / "adapters" / "broken", "lora", 9)
  try:
    spoil(home)
    with pytest.raises(openai.BadRequestError) as refused:
      answer(served.client(), "broken")
    assert word in str(refused.value)
    assert "Traceback" not in str(refused.value)
    assert str(served.folder) not in str(refused.value)
    assert answer(served.client(), "lora")
  finally:
    shutil.rmtree(home)


@pytest.mark.slow
def test_a_link_out_of_the_root_is_no_adapter(served):
  outside = models.write(served.folder / "outside", "lora", 9)
  link = served.folder / "adapters" / "link"
  link.symlink_to(outside)
  try:
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
      answer(served.client(), "link")
    for name in ("../outside", "%2e%2e/outside", "/etc"):
      with pytest.raises(openai.NotFoundError):
        answer(served.client(), name)
  finally:
    link.unlink()


def drawn_request(draw):
  """Fields of a random request that is right."""
  fields = dict(
    model=draw.choice(["base", *KINDS]),
    max_tokens=draw.randint(1, 10),
    temperature=draw.choice([0, 0.7, 1.3]),
    top_p=draw.choice([1, 0.8]),
    n=draw.randint(1, 2),
    stop=draw.choice([None, ["a"], ["xyz", "\n"]]),
    logit_bias=draw.choice([None, {"70": 5}]),
    presence_penalty=draw.choice([0, 0.5]),
    frequency_penalty=draw.choice([0, -0.5]),
    extra_body=draw.choice([{}, {"top_k": 5}, {"min_p": 0.05}, {"repetition_penalty": 1.3}]),
  )
  if draw.random() < 0.5:
    text = "x" * draw.randint(1, 40)
    return "completions", dict(
      fields, prompt=text, logprobs=draw.choice([None, 0, 3]), echo=draw.random() < 0.3
    )
  return "chat", dict(fields, messages=[{"role": "user", "content": "y" * draw.randint(1, 30)}])


@pytest.mark.slow
def test_random_requests_compile_nothing(served):
  draw = random.Random(0)
  programs = served.metric("compiled_programs")

  async def all_of_them():
    client = served.client(openai.AsyncOpenAI, timeout=LONGEST)
    room = asyncio.Semaphore(24)

    async def one(kind, fields):
      of = client.completions if kind == "completions" else client.chat.completions
      async with room:
        return await of.create(**fields)

    return await asyncio.gather(*(one(*drawn_request(draw)) for _ in range(500)))

  assert len(asyncio.run(all_of_them())) == 500
  assert served.metric("compiled_programs") == programs
  assert "compiled after" not in served.said()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_leaves_its_rows_to_others(served, stream):
  client = served.client(timeout=0.5)
  drawn = served.metric("generation_tokens_total")
  with pytest.raises(openai.APITimeoutError):  # noqa: PT012  (either line may be the one)
    made = client.completions.create(
      model="base", prompt="abc", max_tokens=90, n=50, stream=stream, extra_body={"ignore_eos": True}
    )  # fmt: skip
    time.sleep(0.3)
    made.close()
    raise openai.APITimeoutError(None)
  end = time.monotonic() + LONGEST
  while served.metric("num_requests_running") or served.metric("num_requests_waiting"):
    assert time.monotonic() < end
  assert served.metric("generation_tokens_total") - drawn < 50 * 90


@pytest.mark.slow
def test_until_it_is_warm_health_says_so_and_a_signal_ends_it_with_0(folder):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  argv = [sys.executable, "-m", "posttrain_jax", "serve", f"--model={folder / 'base'}"]
  env = dict(
    os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="0"
  )
  own = subprocess.Popen(
    [*argv, f"--port={port}", "--length=96"], stdout=subprocess.PIPE, env=env, text=True
  )
  status = None
  while status is None:
    assert own.poll() is None
    with contextlib.suppress(OSError):
      status = _status(port)
    time.sleep(0.05)
  assert status == 503
  own.send_signal(signal.SIGTERM)
  told, _ = own.communicate(timeout=LONGEST)
  assert (own.returncode, told) == (0, "")


def _status(port):
  """That of /health."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
  connection.request("GET", "/health")
  return connection.getresponse().status


@pytest.mark.slow
def test_sigterm_finishes_what_is_under_way_and_leaves_with_0(folder):
  own = Served(folder, "--drain=60")
  stream = own.streamed(60)
  first = next(iter(stream))
  own.process.send_signal(signal.SIGTERM)
  rest = list(stream)
  assert rest[-1].choices[0].finish_reason == "length"
  assert first.choices[0].finish_reason is None
  assert own.end() == 0


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_what_is_under_way(folder):
  own = Served(folder, "--drain=3000")
  stream = own.streamed(90, n=60)
  next(iter(stream))
  own.process.send_signal(signal.SIGTERM)
  time.sleep(0.05)
  own.process.send_signal(signal.SIGTERM)
  assert own.end() == 128 + signal.SIGTERM
  assert own.said().count("ended at once; answers under way are lost") == 1
  with pytest.raises((openai.APIConnectionError, httpx2.HTTPError)):
    list(stream)


@pytest.mark.slow
def test_what_is_not_done_by_the_deadline_is_cut_and_says_so(folder):
  own = Served(folder, "--drain=0")
  stream = own.streamed(90, n=30)
  next(iter(stream))
  own.process.send_signal(signal.SIGTERM)
  reasons = [chunk.choices[0].finish_reason for chunk in stream]
  assert "abort" in reasons
  assert len([reason for reason in reasons if reason]) == 30
  assert own.end() == 0


@pytest.mark.slow
def test_a_base_that_is_cut_over_a_mesh_answers_as_on_one_device(folder, served):
  own = Served(folder, "--mesh=data=2,tensor=2", "--rows=4", devices=4)
  try:
    assert "'data': 2" in own.said()
    for model in ("base", "lora", "dora", "prefix"):
      assert answer(own.client(), model) == answer(served.client(), model)
  finally:
    own.kill()


HANGS = """
import time, types
from posttrain_jax.serve import server
from posttrain_jax.serve.limits import Limits
server.AFTER = 0.1
worker = types.SimpleNamespace(state="ready", error=None, drain=lambda seconds: time.sleep(600))
async def app(scope, receive, send): pass
ready = lambda: print("ready", flush=True)
server.run(app, worker, server.listening("127.0.0.1", 0), limits=Limits(), drain_seconds=0.1, ready=ready)
"""


def test_what_does_not_end_is_left_by_a_deadline():
  env = dict(os.environ, PYTHONPATH=str(ROOT))
  own = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, env=env)
  try:
    assert own.stdout.readline() == b"ready\n"
    own.send_signal(signal.SIGTERM)
    assert own.wait(60) == 0
  finally:
    own.kill()


def test_the_port_of_another_is_refused_in_words(tmp_path):
  from posttrain_jax.serve import server

  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    with pytest.raises(OSError, match="--port=0 takes a free one"):
      server.listening(*taken.getsockname())
