"""The models that are served: names, adapters loaded by requests, and each spoken to in its own way."""

import argparse
import json
import pathlib
import shutil
import types

import pytest

from posttrain_jax.commands import serve as command
from posttrain_jax.data import templates
from posttrain_jax.serve import start
from posttrain_jax.serve.voice import Voice
from tests import tiny
from tests.serve import fake, served


def folder(path, **files):
  """An adapter's folder."""
  path.mkdir(parents=True)
  (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
  (path / "adapter_model.safetensors").write_bytes(b"")
  for name, text in files.items():
    (path / name.replace("_jinja", ".jinja")).write_text(text)
  return path


def spoken(worker, base, **options):
  """A client whose adapters are spoken to as their folders say."""
  return served.client(worker, speak=speech(base).of, template=None, **options)


def speech(base, voice=None):
  used = types.SimpleNamespace(folder=base, config=tiny.config())
  return start.Speech(used, voice or served.voice(None), None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  path = tmp_path_factory.mktemp("base")
  tiny.tokenizer().save_pretrained(path)
  return path


SHOUTS = "{% for m in messages %}!{{ m.content }}!{% endfor %}{% if add_generation_prompt %}>{% endif %}<|im_end|>"


def test_what_is_the_bases_own_is_shared_with_it(tmp_path, base):
  own = templates.bind(served.TOKENIZER)
  voice = Voice(served.TOKENIZER, own, (served.END,), 261)
  spoken_to = speech(base, voice)
  assert spoken_to.of(folder(tmp_path / "a")) is voice
  same = folder(tmp_path / "same")
  tiny.tokenizer().save_pretrained(same)
  assert spoken_to.of(same) is voice
  loud = spoken_to.of(folder(tmp_path / "loud", chat_template_jinja=SHOUTS))
  assert (loud.tokenizer, loud.template.text) == (served.TOKENIZER, SHOUTS)
  other = folder(tmp_path / "other")
  grown = tiny.tokenizer()
  grown.add_tokens(["<mood>"])
  grown.save_pretrained(other)
  assert spoken_to.of(other).tokenizer is not served.TOKENIZER


def test_an_adapters_own_template_applies_to_its_requests(tmp_path, base):
  worker = fake.Worker(served.says("Hello"))
  client = spoken(worker, base)
  worker.adapters.folders["loud"] = folder(tmp_path / "loud", chat_template_jinja=SHOUTS)
  worker.adapters.folders["plain"] = folder(tmp_path / "plain")
  body = served.chat(client, model="loud").json()
  assert body["model"] == "loud"
  assert worker.asked[-1].adapter == "loud"
  assert served.TOKENIZER.decode(worker.asked[-1].prompt) == "!Hi!><|im_end|>"
  served.chat(client, model="plain")
  assert served.TOKENIZER.decode(worker.asked[-1].prompt).startswith("<|im_start|>user")


def test_a_template_that_changes_is_read_anew(tmp_path, base):
  worker = fake.Worker(served.says("Hello"))
  client = spoken(worker, base)
  home = worker.adapters.folders["a"] = folder(tmp_path / "a", chat_template_jinja=SHOUTS)
  served.chat(client, model="a")
  (home / "chat_template.jinja").write_text(SHOUTS.replace("!", "??"))
  served.chat(client, model="a")
  assert served.TOKENIZER.decode(worker.asked[-1].prompt) == "??Hi??><|im_end|>"


def test_an_adapters_own_tokens_are_whole_in_its_prompts(tmp_path, base):
  worker = fake.Worker(served.says("Hello"))
  client = spoken(worker, base)
  home = worker.adapters.folders["a"] = folder(tmp_path / "a")
  own = tiny.tokenizer()
  own.add_tokens(["<mood>"])
  own.save_pretrained(home)
  served.complete(client, model="a", prompt="<mood>")
  assert list(worker.asked[-1].prompt) == [259]
  served.complete(client, prompt="<mood>")
  assert len(worker.asked[-1].prompt) == 6


def test_the_system_message_of_its_training_stands_before_what_has_none(tmp_path, base):
  worker = fake.Worker(served.says("Hello"))
  client = spoken(worker, base)
  home = worker.adapters.folders["a"] = folder(tmp_path / "a")
  (home / "posttrain.json").write_text(json.dumps({"format": 1, "use": {"system": "Be brief."}}))
  served.chat(client, model="a")
  assert "Be brief." in served.TOKENIZER.decode(worker.asked[-1].prompt)
  own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hi"}]
  served.chat(client, model="a", messages=own)
  assert "Be brief." not in served.TOKENIZER.decode(worker.asked[-1].prompt)


def test_a_template_that_runs_for_ever_or_reaches_out_is_a_refusal(tmp_path, base):
  worker = fake.Worker(served.says("Hello"))
  client = spoken(worker, base)
  reaching = "{{ ''.__class__.__mro__[1].__subclasses__() }}<|im_end|>"
  worker.adapters.folders["a"] = folder(tmp_path / "a", chat_template_jinja=reaching)
  response = served.chat(client, model="a")
  assert response.status_code == 400
  assert "subclasses" not in response.text.lower() or "unsafe" in response.text
  assert served.complete(client).status_code == 200


def test_an_adapter_that_cannot_be_served_is_refused_with_its_reason():
  worker = fake.Worker(served.says("Hello"))
  worker.adapters.bad["a"] = "rank 900 is more than 16"
  response = served.chat(served.client(worker), model="a")
  assert response.status_code == 400
  assert "rank 900" in response.json()["error"]["message"]


def test_an_adapter_whose_folder_is_gone_is_spoken_to_as_it_was(tmp_path, base):
  worker = fake.Worker(served.says("Hello"))
  client = spoken(worker, base)
  home = worker.adapters.folders["a"] = folder(tmp_path / "a", chat_template_jinja=SHOUTS)
  served.chat(client, model="a")
  shutil.rmtree(home)
  assert served.chat(client, model="a").status_code == 200
  assert worker.asked[0].prompt == worker.asked[1].prompt
  worker.adapters.folders["b"] = tmp_path / "b"
  assert served.chat(client, model="b").status_code == 400


def test_what_is_wrong_with_a_tokenizer_is_told_without_its_place(tmp_path, base):
  worker = fake.Worker(served.says("Hello"))
  worker.adapters.folders["broken"] = folder(tmp_path / "broken")
  (tmp_path / "broken" / "tokenizer.json").write_text("{}")
  response = served.complete(spoken(worker, base), model="broken")
  assert response.status_code == 400
  assert "broken: its tokenizer cannot be read" in response.json()["error"]["message"]
  assert str(tmp_path) not in response.text


def test_an_adapter_has_the_room_that_its_virtual_tokens_leave(monkeypatch, tmp_path):
  worker = fake.Worker(served.says("Hello"))
  worker.adapters.folders["a"] = folder(tmp_path / "a")
  monkeypatch.setattr(worker.adapters, "acquire", lambda name: fake.Version(bound=100))
  client = served.client(worker)
  response = served.complete(client, model="a", prompt="x" * 20, max_tokens=20)
  assert response.json()["error"]["code"] == "context_length_exceeded"
  assert served.complete(client, model="a", prompt="x" * 8, max_tokens=20).status_code == 200


def loading(tmp_path, **options):
  worker = fake.Worker(served.says("Hello"))
  worker.adapters.root = (tmp_path / "root").resolve()
  return served.client(worker, **options), folder(tmp_path / "root" / "a")


def test_requests_load_and_unload_adapters_where_that_is_allowed(tmp_path):
  client, home = loading(tmp_path, allow_loading=True)
  asked = {"lora_name": "a", "lora_path": str(home)}
  assert client.post("/v1/load_lora_adapter", json=asked).status_code == 200
  ids = [card["id"] for card in client.get("/v1/models").json()["data"]]
  assert ids == ["base", "a"]
  assert client.get("/v1/models/a").json()["parent"] == "base"
  assert served.chat(client, model="a").status_code == 200
  assert client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 200
  assert served.chat(client, model="a").status_code == 404
  assert client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 404


def test_requests_load_nothing_where_nobody_allowed_it(tmp_path):
  client, home = loading(tmp_path)
  asked = {"lora_name": "a", "lora_path": str(home)}
  response = client.post("/v1/load_lora_adapter", json=asked)
  assert response.status_code == 403
  assert "--allow_loading" in response.json()["error"]["message"]
  assert client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 403


@pytest.mark.parametrize(
  "fields",
  [
    {"lora_name": "base", "lora_path": "a"},
    {"lora_name": "a"},
    {"lora_path": "a"},
    {"lora_name": "a", "lora_path": "/nowhere"},
    {"lora_name": "a", "lora_path": "a", "lora_rank": 3},
  ],
  ids=str,
)
def test_a_load_that_cannot_be_is_refused(tmp_path, fields):
  client, _ = loading(tmp_path, allow_loading=True)
  response = client.post("/v1/load_lora_adapter", json=fields)
  assert response.status_code == 400
  assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("how", ["..", "absolute", "a link", "a link within", "null", "a circle"])
def test_no_path_leaves_the_root(tmp_path, how):
  client, home = loading(tmp_path, allow_loading=True)
  outside = folder(tmp_path / "outside")
  root = home.parent
  (root / "link").symlink_to(outside)
  (root / "circle").symlink_to(root / "circle")
  folder(root / "within")
  (root / "within" / "secret").symlink_to(outside / "adapter_config.json")
  path = {
    "..": "../outside",
    "absolute": str(outside),
    "a link": "link",
    "a link within": "within",
    "null": "a\0b",
    "a circle": "circle",
  }[how]
  asked = {"lora_name": "x", "lora_path": path}
  response = client.post("/v1/load_lora_adapter", json=asked)
  assert response.status_code == 400
  assert "leads out" in response.json()["error"]["message"]
  assert str(outside) not in response.text


def test_a_slot_has_room_for_the_largest_adapter_that_there_is(tmp_path):
  parser = argparse.ArgumentParser()
  command.add(parser)
  large, prompt = folder(tmp_path / "large"), folder(tmp_path / "prompt")
  (large / "adapter_config.json").write_text(
    '{"peft_type": "LORA", "r": 8, "rank_pattern": {"a": 40}}'
  )
  told = '{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20}'
  (prompt / "adapter_config.json").write_text(told)
  found = {"large": large, "prompt": prompt}
  room = lambda *argv: start._room(parser.parse_args(argv), (), found)
  assert room() == {"rank": 40, "prompt_slots": 20, "prefix_slots": 0}
  assert room("--max_rank=64", "--prompt_slots=0")["rank"] == 64
  assert room("--max_rank=64", "--prompt_slots=0")["prompt_slots"] == 0
  assert start._room(parser.parse_args([]), (), {})["rank"] == 16
  (large / "adapter_config.json").write_text("[1")  # is told when it is asked for
  assert room() == {"rank": 16, "prompt_slots": 20, "prefix_slots": 0}
  (large / "adapter_config.json").write_text(
    '{"peft_type": "LORA", "r": 8, "rank_pattern": ["a", 40]}'
  )
  assert room()["rank"] == 16


def test_an_adapter_of_huge_rank_that_lies_in_the_folder_widens_no_slot(tmp_path, caplog):
  parser = argparse.ArgumentParser()
  command.add(parser)
  huge = folder(tmp_path / "huge")
  (huge / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 512}')
  room = lambda named, *argv: start._room(parser.parse_args(argv), named, {"huge": huge})
  assert room(())["rank"] == 16
  assert "adapter huge is not served" in caplog.text
  assert "--max_rank=512" in caplog.text
  assert room((huge,))["rank"] == 512  # the operator named it
  caplog.clear()
  assert room((), "--max_rank=512")["rank"] == 512
  assert not caplog.text


def test_the_first_request_that_is_printed_names_a_model_that_answers(tmp_path):
  worker = fake.Worker(served.says("Hello"))
  worker.adapters.folders |= {"zzz": folder(tmp_path / "zzz"), "read": folder(tmp_path / "read")}
  worker.adapters.bad["zzz"] = "it is of another base"
  of = served.app(worker).models
  for first in ("base", "read"):
    told = start._opening(("127.0.0.1", 80), of, (), first)
    assert f'{{"model": "{first}", "messages"' in told
    assert "models: base, read, zzz" in told


def test_where_the_folder_of_adapters_lies_is_told_to_nobody(tmp_path):
  client = served.client(worker := fake.Worker(served.says("Hello")))
  worker.adapters.root = tmp_path
  for text in (f"{tmp_path}/x/y has no tensors", f"{tmp_path} holds several adapters"):
    worker.adapters.bad["x"] = text
    response = served.chat(client, model="x")
    assert response.status_code == 400
    assert str(tmp_path) not in response.text


def test_a_bases_name_is_its_own_or_its_folders():
  assert start._name("smollm2") == "smollm2"
  assert start._name(str(pathlib.Path(__file__).parent)) == "serve"
