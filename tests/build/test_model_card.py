"""The README of what is exported: facts of the run, no paths of this machine, code that is Python; and the hub."""

import ast
import json
import re

import huggingface_hub
import pytest
import yaml

from posttrain_jax.build import model_card, push
from posttrain_jax.commands import export as command
from posttrain_jax.runs import record
from tests.build.test_export import adapter, base, make_run  # noqa: F401
from tests.evals import runs
from tests.evals.test_report import ONLINE, online_lines

CONFIG = dict(
  runs.CONFIG,
  objective=dict(
    name="preference", losses=dict(dpo=1.0, sft=0.5), beta=0.1, label_smoothing=0.0, sync_mix=0.6
  ),
  data=dict(train="/home/me/private/pairs.jsonl*0.7+org/set*0.3", replay="", system="Be brief."),
)


def make(folder, **changes):
  config = {**CONFIG, **{k: v for k, v in changes.items() if k in CONFIG}}
  lines = [*runs.rows(steps=12), {"step": 12, "eval_loss": 1.23456, "eval_kl": 0.5}]
  runs.write(
    folder,
    config=config,
    lines=lines,
    before=runs.result([runs.answer("a", correct=False), runs.answer("b")]),
    after=runs.result([runs.answer("a"), runs.answer("b")]),
    versions=dict(jax="0.10.2"),
    done=changes.get(
      "done", dict(steps=12, tokens=1000, final=dict(eval_loss=1.23456, eval_kl=0.5))
    ),
  )
  return record.read(folder)


def make_folder(folder, *, kind="adapter", template=True):
  folder.mkdir()
  if kind == "adapter":
    (folder / "adapter_config.json").write_text("{}")
  said = {"chat_template": "x"} if template else {}
  (folder / "tokenizer_config.json").write_text(json.dumps(said))
  return folder


def test_an_online_run_says_its_method_what_scored_and_what_was_reached(tmp_path):
  config = dict(
    ONLINE,
    reward=dict(parts=["/home/me/my own/mine.py:f", "length"], weights=[1.0, 0.5], gates=["tags"]),
    data=dict(train="/home/me/private/prompts.jsonl", replay=""),
  )
  folder = runs.write(tmp_path / "run", config=config, lines=online_lines())
  text = model_card.text(make_folder(tmp_path / "out"), record.read(folder))
  for sentence in (
    ", grpo (loss ppo)\n",
    "| loss | grpo (loss ppo), epsilon 0.2 |",
    "| reward | mine.py:f + 0.5 x length, times the gate tags |",
    "| held-out score | exact |",
    "| answers | 4 answers to each of 16 prompts a batch, at most 32 tokens, temperature 1, 2",
    "| reached | reward 0.24 -> 0.56 over 20 batches, pass@1 0.12 -> 0.28,",
    "; on prompts.jsonl, which it was trained on |",
  ):
    assert sentence in text, sentence
  assert head(text)["tags"] == ["posttrain-jax", "grpo", "reinforcement-learning"]
  assert not any(place in text for place in ("/home", "own/"))


def head(text):
  return yaml.safe_load(text.split("---\n")[1])


def code(text):
  (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  ast.parse(block)
  return block


def test_a_card_has_the_facts_and_no_paths(tmp_path):
  text = model_card.text(make_folder(tmp_path / "out"), make(tmp_path / "run"))
  assert head(text) == {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "base_model_relation": "adapter",
    "library_name": "peft",
    "license": "apache-2.0",
    "pipeline_tag": "text-generation",
    "tags": ["posttrain-jax", "dpo", "sft"],
  }
  for row in (
    "| method | lora, rank 16, alpha 32.0, on all-linear |",
    "| data | pairs.jsonl*0.7+org/set*0.3 |",
    "| loss | dpo + 0.5 sft, beta 0.1 |",
    "| steps | 12 |",
    "| tokens | 1,000 |",
    "| versions | jax 0.10.2 |",
    "| licence of the base | apache-2.0 |",
    "| loss | 1.235 |",
    "| kl | 0.5 |",
    "| sql, before training | 1 of 2 right |",
    "| sql, after training | 2 of 2 right |",
  ):
    assert row in text
  assert "/home" not in text
  assert str(tmp_path) not in text
  block = code(text)
  assert 'name = "."  # this folder' in block
  assert '{"role": "system", "content": "Be brief."}' in block
  assert "AutoPeftModelForCausalLM.from_pretrained(name" in block


def test_a_base_in_a_folder_is_named_and_not_located(tmp_path):
  folder = tmp_path / "my-base"
  folder.mkdir()
  (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
  run = make(tmp_path / "run", model={**CONFIG["model"], "name": str(folder), "base": "nf4"})
  text = model_card.text(make_folder(tmp_path / "out"), run)
  assert "base_model" not in head(text)
  assert head(text)["license"] == "mit"
  assert "| base | the folder `my-base`, its matrices stored as nf4 in training |" in text
  assert str(tmp_path) not in text


def test_an_adapter_of_the_built_in_model_says_that_the_hubs_weights_are_not_quite_its_base(
  tmp_path,
):
  text = model_card.text(
    make_folder(tmp_path / "out"), make(tmp_path / "run", model=dict(name="smollm2"))
  )
  (row,) = [line for line in text.splitlines() if line.startswith("| base |")]
  assert "huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct" in row
  assert "once stored in 4 bits, so its weights are not quite the hub's" in row


def test_what_a_merged_model_a_text_model_and_a_reward_model_are_loaded_with(tmp_path):
  run = make(tmp_path / "run")
  merged = model_card.text(make_folder(tmp_path / "merged", kind="model"), run, name="org/name")
  assert head(merged)["base_model_relation"] == "finetune"
  assert head(merged)["library_name"] == "transformers"
  assert 'name = "org/name"\n' in code(merged)
  assert "AutoModelForCausalLM.from_pretrained(name" in code(merged)
  assert "# org/name\n" in merged
  plain = model_card.text(make_folder(tmp_path / "plain", template=False), run)
  assert 'inputs = tokenizer("What is the capital of France?", return_tensors="pt")' in code(plain)
  judge = make(tmp_path / "judge", objective=dict(name="reward"))
  scored = model_card.text(make_folder(tmp_path / "reward"), judge)
  assert head(scored)["pipeline_tag"] == "text-classification"
  assert "AutoPeftModelForSequenceClassification.from_pretrained(name, num_labels=1" in code(scored)
  assert "generate" not in code(scored)


def test_an_unfinished_run_and_several_methods_are_said(tmp_path):
  several = dict(method="prompt+lora", prompt=dict(num_virtual_tokens=8), lora=dict(r=4))
  run = make(tmp_path / "run", adapter=several, done=None)
  text = model_card.text(make_folder(tmp_path / "out"), run)
  assert "The run is not finished: this is what it had saved." in text
  assert "| method | prompt, tokens 8; lora, rank 4 |" in text
  assert "which PEFT does not load together" in text


class Hub:
  """Stands in for huggingface_hub.HfApi."""

  def __init__(self):
    self.calls = []

  def create_repo(self, name, **options):
    self.calls.append(("create", name, options))
    return f"https://hub/{name}"

  def upload_folder(self, **options):
    self.calls.append(
      ("folder", options["repo_id"], sorted(p.name for p in options["folder_path"].iterdir()))
    )

  def upload_file(self, **options):
    self.calls.append(("file", options["repo_id"], options["path_in_repo"]))


@pytest.fixture
def hub(monkeypatch):
  stand_in = Hub()
  monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
  monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
  return stand_in


def arguments(**given):
  plain = dict(
    workdir=None,
    model=None,
    out=None,
    merge=False,
    merge_base="original",
    gguf=None,
    keep_base=False,
  )
  return type("Args", (), {**plain, "push": "org/name", **given})


def test_push_sends_the_folder_with_a_card_of_that_name(tmp_path, hub, base, adapter, capsys):  # noqa: F811
  run = make_run(tmp_path / "run", base, adapter)
  assert command.run(arguments(workdir=str(run), out=str(tmp_path / "out")), []) == 0
  created, (kind, name, sent) = hub.calls
  assert created == ("create", "org/name", dict(private=True, exist_ok=True))
  assert (kind, name) == ("folder", "org/name")
  assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= {*sent}
  assert "# org/name\n" in (tmp_path / "out" / "README.md").read_text()
  assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out"), "https://hub/org/name"]
  assert command.run(arguments(workdir=str(run), out=str(tmp_path / "a.gguf"), gguf="f16"), []) == 0
  assert hub.calls[-1] == ("file", "org/name", "a.gguf")


@pytest.mark.parametrize("name", ["name", "org/name/more", "org/na me", ""])
def test_an_impossible_name_is_refused_before_anything_is_written(tmp_path, hub, name):
  with pytest.raises(ValueError, match="write ORG/NAME"):
    command.run(arguments(workdir="absent", out=str(tmp_path / "out"), push=name), [])
  assert not hub.calls


def test_without_a_token_nothing_is_exported(tmp_path, hub, monkeypatch):
  monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
  with pytest.raises(PermissionError, match=r"no token for the hub .* `hf auth login`"):
    command.run(arguments(workdir="absent", out=str(tmp_path / "out")), [])
  assert not hub.calls


def test_a_hub_out_of_reach_leaves_the_export(tmp_path, monkeypatch):
  monkeypatch.setattr(
    huggingface_hub,
    "HfApi",
    lambda: huggingface_hub.hf_api.HfApi(endpoint="http://127.0.0.1:9", token="hf_x"),
  )
  with pytest.raises(ConnectionError, match=rf"could not be reached .*exported is in {tmp_path}"):
    push.push(tmp_path, "org/name")
