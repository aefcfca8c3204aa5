"""A run becomes a file that others run: the same logits, the adapter's change, and errors in words."""

import argparse
import json
import logging
import re

import jax
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.build import gguf
from posttrain_jax.commands import export as command
from posttrain_jax.core import tree, weight
from posttrain_jax.data import chat
from posttrain_jax.models import gguf as gguf_read
from posttrain_jax.models import gguf_write, hf
from tests.adapters import cases
from tests.build.test_export import logits, make_run
from tests.data.conftest import make_tokenizer
from tests.marks import slow
from tests.models import families

LORA = dict(r=4, lora_alpha=6)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """The folder of a tiny model with a ChatML tokenizer that has no template of its own."""
  folder = tmp_path_factory.mktemp("base")
  tokenizer = make_tokenizer("chatml")
  tokenizer.save_pretrained(folder / "tokenizer")
  (folder / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": 0}')
  config = families.config(
    "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2
  )
  hf.save(folder / "base", families.params(config), config, tokenizer_from=folder / "tokenizer")
  return folder / "base"


@pytest.fixture(scope="module")
def loaded(base):
  return hf.load(base)


def make_adapter(params, **options):
  chosen = adapters.AdapterConfig(**{**LORA, **options})
  _, fresh = adapters.init(jax.random.key(0), params, chosen)
  return cases.trained(fresh), chosen


def run_with(folder, base_folder, loaded, **options):
  params, config = loaded
  node, chosen = make_adapter(params, **options)
  run = make_run(folder, base_folder, (node, chosen, config))
  record = json.loads((run / "config.json").read_text())
  record["config"]["adapter"]["method"] = chosen.method
  (run / "config.json").write_text(json.dumps(record))
  return run, node


def read_back(path, tmp_path):
  return hf.load(gguf_read.convert(path, tmp_path / "read"))


def relative(a, b):
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("kind", "near"), [("f16", 5e-3), slow("q8_0", 0.1), ("q4_0", 0.6)])
def test_a_merged_run_reads_back(tmp_path, base, loaded, caplog, kind, near):
  run, node = run_with(tmp_path / "run", base, loaded)
  with caplog.at_level(logging.INFO):
    out = gguf.export(run, tmp_path / "new" / "m.gguf", kind=kind, merge=True)
  assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]
  params, config = loaded
  dense = logits(adapters.merge(params, node), config)
  found = logits(*read_back(out, tmp_path))
  assert relative(found, dense) < near
  # what is said of the file is what it computes on the probe
  (said,) = [
    r.getMessage() for r in caplog.records if "logits off from the model's" in r.getMessage()
  ]
  tokens = np.asarray(chat.load_tokenizer(base)(gguf.folders.PROBE)["input_ids"])[
    None, : config.max_length
  ]
  of = lambda params, config: np.asarray(gguf.decoder.forward(params, tokens, config))
  off = np.abs(of(adapters.merge(params, node), config) - of(*hf.load(tmp_path / "read")))
  assert float(re.search("max ([0-9.e-]+)", said)[1]) == pytest.approx(off.max(), rel=0.02)
  assert ("changes what this model answers" in caplog.text) == (kind == "q4_0")
  assert float(re.search("mean ([0-9.e-]+)", said)[1]) == pytest.approx(off.mean(), rel=0.02)


def test_full_fine_tuning_is_the_model_it_made(tmp_path, base, loaded):
  params, config = loaded
  run = make_run(tmp_path / "run", base)
  record = json.loads((run / "config.json").read_text())
  record["config"]["adapter"] = {"method": "none"}
  (run / "config.json").write_text(json.dumps(record))
  tuned = tree.put(params, "norm/weight", 2 * params["norm"]["weight"])
  hf.save(run / "model", tuned, config, tokenizer_from=base)
  out = gguf.export(run, tmp_path / "m.gguf", kind="f16")
  found = hf.load(gguf_read.convert(out, tmp_path / "read"))[0]
  np.testing.assert_array_equal(found["norm"]["weight"], tuned["norm"]["weight"])


def test_the_template_and_the_ends_that_were_trained_are_inside(tmp_path, base, loaded):
  run, _ = run_with(tmp_path / "run", base, loaded)
  record = json.loads((run / "config.json").read_text())
  record["config"]["model"]["template"] = "chatml"
  (run / "config.json").write_text(json.dumps(record))
  file = gguf_read.File(gguf.export(run, tmp_path / "m.gguf", kind="f16", merge=True))
  messages = [dict(role="user", content="Hello"), dict(role="assistant", content="there")]
  read = gguf_read.convert(tmp_path / "m.gguf", tmp_path / "read")
  tokenizer = chat.load_tokenizer(read)
  wanted = chat.template(chat.load_tokenizer(base), "chatml").render(messages)
  assert chat.template(tokenizer).render(messages) == wanted
  turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
  assert file.fields["tokenizer.ggml.eot_token_id"] == turn
  assert json.loads((read / "generation_config.json").read_text())["eos_token_id"] == [0, turn]


@pytest.mark.parametrize(
  "options",
  [
    {},
    dict(use_rslora=True),
    dict(rank_pattern={"q_proj": 8}, alpha_pattern={"layers.1.mlp.up_proj": 40}),
    dict(layers_to_transform=[1], target_modules=("k_proj", "down_proj")),
    dict(target_modules=("embed_tokens", "lm_head", "v_proj")),
  ],
  ids=["plain", "rslora", "patterns", "some layers", "both ends"],
)
def test_an_adapter_is_the_change_that_was_trained(tmp_path, base, loaded, options):
  run, node = run_with(tmp_path / "run", base, loaded, **options)
  out = gguf.export(run, tmp_path / "a.gguf", kind="f16")
  params, config = loaded
  pairs = gguf_read.read_adapter(out, config)
  changed = dict(tree.items(params))
  for path, leaf in changed.items():
    for i in hf.places(path, config):
      if hf.hf_name(path, i) in pairs:
        a, b = pairs.pop(hf.hf_name(path, i))
        change = (b @ a).T if tree.turned(path) else b @ a
        lora = weight.layer(tree.get(node, path), i) if i else tree.get(node, path)
        assert relative(change, lora.dense(0 * change)) < 1e-3
        leaf = leaf.at[i].add(change) if i else leaf + change
    changed[path] = leaf
  assert not pairs
  found = logits(tree.unflatten(changed), config)
  trained = logits(adapters.bind(params, node), config)
  assert relative(found, trained) < 5e-3
  assert relative(logits(params, config), trained) > 0.05


def test_an_adapter_file_says_what_it_is(tmp_path, base, loaded):
  run, _ = run_with(tmp_path / "run", base, loaded)
  reader, fields = gguf_read._read(gguf.export(run, tmp_path / "a.gguf", kind="f16"))
  assert fields["general.type"] == "adapter"
  assert fields["general.architecture"] == "llama"
  assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 6.0)
  names = {t.name: tuple(t.shape.tolist()) for t in reader.tensors}
  assert names["blk.0.ffn_up.weight.lora_a"] == (64, 4)  # ggml's order: in, rank
  assert names["blk.0.ffn_up.weight.lora_b"] == (4, 64)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(method="dora"), "DoRA's magnitudes have no place in a GGUF adapter; add --merge"),
    (dict(method="vera", r=4), "method 'vera' is no plain LoRA.*add --merge"),
    (dict(method="ia3"), "method 'ia3' is no plain LoRA.*add --merge"),
    (dict(method="prompt"), "in no weight either: export it as a PEFT folder"),
    (dict(modules_to_save=("lm_head",)), "lm_head trained whole .* add --merge"),
  ],
)
def test_an_adapter_that_is_no_plain_pair_is_refused(tmp_path, base, loaded, options, message):
  chosen = adapters.AdapterConfig(**options)
  params, config = loaded
  _, node = adapters.init(jax.random.key(0), params, chosen)
  run = make_run(tmp_path / "run", base, (node, chosen, config))
  record = json.loads((run / "config.json").read_text())
  record["config"]["adapter"]["method"] = chosen.method
  (run / "config.json").write_text(json.dumps(record))
  with pytest.raises(ValueError, match=message):
    gguf.export(run, tmp_path / "a.gguf", kind="f16")
  assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
  "objective", [dict(name="reward"), dict(name="preference", losses={"dpo": 1, "reward": 1})]
)
@pytest.mark.parametrize("merge", [False, True])
def test_a_reward_model_is_refused(tmp_path, base, loaded, objective, merge):
  run, _ = run_with(tmp_path / "run", base, loaded)
  record = json.loads((run / "config.json").read_text())
  record["config"]["objective"] = objective
  (run / "config.json").write_text(json.dumps(record))
  with pytest.raises(
    ValueError, match="no place in a GGUF file that others run; export it without"
  ):
    gguf.export(run, tmp_path / "a.gguf", kind="f16", merge=merge)


def test_a_tied_end_is_refused(tmp_path, base):
  config = families.config("llama", vocab_size=400, tie_word_embeddings=True, num_hidden_layers=2)
  params = families.params(config)
  node, _ = make_adapter(params, target_modules=("embed_tokens",))
  with pytest.raises(ValueError, match=r"embed_tokens, which shares its matrix.*add --merge"):
    dict(gguf.pairs(node, config))


def test_the_command_offers_every_kind():
  parser = argparse.ArgumentParser()
  command.add(parser)
  (option,) = [action for action in parser._actions if "--gguf" in action.option_strings]
  assert option.choices == tuple(gguf_write.KINDS)


@pytest.mark.parametrize(
  ("out", "kind", "message"),
  [
    ("m", "f16", r"the result is one file; write --out=.*m\.gguf"),
    ("a.gguf", "q4_0", "write --gguf=f16, or add --merge for one file .* in q4_0"),
  ],
)
def test_commands_that_were_meant_otherwise(tmp_path, base, loaded, out, kind, message):
  run, _ = run_with(tmp_path / "run", base, loaded)
  with pytest.raises(ValueError, match=message):
    gguf.export(run, tmp_path / out, kind=kind)
  (tmp_path / "here.gguf").touch()
  with pytest.raises(FileExistsError, match="name a new file"):
    gguf.export(run, tmp_path / "here.gguf", kind="f16")


def test_a_model_as_it_is(tmp_path, base, loaded):
  out = gguf.of_model(base, tmp_path / "m.gguf", kind="f16")
  assert relative(logits(*read_back(out, tmp_path)), logits(*loaded)) < 5e-3
  params, config = hf.load(base, storage="nf4")
  hf.save(tmp_path / "four", params, config, tokenizer_from=base)
  four = gguf.of_model(tmp_path / "four", tmp_path / "four.gguf", kind="f16")
  found = logits(*hf.load(gguf_read.convert(four, tmp_path / "again")))
  assert relative(found, logits(params, config)) < 5e-3
