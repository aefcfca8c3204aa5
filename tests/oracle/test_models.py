"""Every decoder family against transformers: same files, same logits, both ways."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from posttrain_jax.core import shards, tree
from posttrain_jax.models import decoder, fetch, hf
from tests.models import families
from tests.models.families import FAMILIES, LONGEST, VOCAB
from tests.oracle.conftest import perturb

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make oracle`")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

# Logits here have a standard deviation near 1.5.
TOLERANCE = dict(rtol=0, atol=1e-4)


def forward(params, tokens, config):
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  run = jax.jit(lambda p, t, i: decoder.forward(p, t, config, positions=i))
  return np.asarray(run(params, tokens, positions))


def read_in_steps(params, tokens, config, lengths, new):
  """Logits [row, place, vocab]: of each row its first `lengths` tokens read at once, `new` more one by one."""
  rows = len(tokens)

  @jax.jit
  def step(params, tokens, cache, counts):
    x, cache = decoder.step(params, tokens, config, cache, counts=counts)
    return decoder.logits(params, x, config), cache

  cache = decoder.empty_cache(config, rows, 128, jnp.float32)  # some slots stay empty
  out, cache = step(params, tokens[:, : max(lengths)], cache, np.asarray(lengths))
  found = [[*out[row, :n]] for row, n in enumerate(lengths)]
  for i in range(new):
    following = np.stack([tokens[row, n + i] for row, n in enumerate(lengths)])[:, None]
    out, cache = step(params, following, cache, np.ones(rows, np.int32))
    for row in range(rows):
      found[row].append(out[row, 0])
  return found


def test_embedded_model_on_real_text(torch_logits):
  folder = fetch.fetch("smollm2")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  text = (Path(__file__).parent / "public_domain.txt").read_text()
  tokens = np.asarray(tokenizer(text).input_ids, np.int32)[None, :512]
  assert tokens.shape == (1, 512)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  expected = torch_logits(model.eval(), tokens)
  params, config = hf.load("smollm2", dtype=jnp.float32)
  found = forward(params, tokens, config)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
  # The text is read as text: about 2.5 nats a token, where a guess would be 10.8.
  logps = jax.nn.log_softmax(found[0, :-1])[np.arange(511), tokens[0, 1:]]
  assert -logps.mean() < 3.0
  print("largest difference of logits:", np.abs(found - expected).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(tmp_path, tiny_model, torch_logits, name):
  model = tiny_model(name)
  model.save_pretrained(tmp_path)
  params, config = hf.load(tmp_path)
  tokens = families.tokens(2, LONGEST)
  np.testing.assert_allclose(
    forward(params, tokens, config), torch_logits(model, tokens), **TOLERANCE
  )


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_cached_decode_of_ragged_prompts_equal_transformers(
  tmp_path, tiny_model, torch_logits, name
):
  model = tiny_model(name)
  model.save_pretrained(tmp_path)
  params, config = hf.load(tmp_path)
  new = 20
  lengths = (LONGEST - new, 3, LONGEST - new - 9)  # the first row has no padding
  tokens = families.tokens(3, LONGEST)
  found = read_in_steps(params, tokens, config, lengths, new)
  for row, n in enumerate(lengths):
    alone = torch_logits(model, tokens[row : row + 1, : n + new])[0]
    np.testing.assert_allclose(np.stack(found[row]), alone, **TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("described", [False, True], ids=["keys kept", "keys from nothing"])
def test_saved_folder_loads_in_transformers_with_equal_logits(
  tmp_path, torch_logits, name, described
):
  config, params = families.make(name)
  config = dataclasses.replace(config, source="{}") if described else config
  hf.save(tmp_path / "out", params, config)
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", attn_implementation="eager", output_loading_info=True
  )
  assert not report["missing_keys"]
  assert not report["unexpected_keys"]
  assert model.config.model_type == config.family
  tokens = families.tokens(2, LONGEST)
  found = forward(params, tokens, config)
  np.testing.assert_allclose(found, torch_logits(model.eval(), tokens), **TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_config_key_survives_a_round_trip(tmp_path, tiny_model, name):
  tiny_model(name).save_pretrained(tmp_path / "in")
  before = json.loads((tmp_path / "in/config.json").read_text())
  before["a_key_from_the_future"] = {"kept": [1, None]}
  (tmp_path / "in/config.json").write_text(json.dumps(before))
  params, config = hf.load(tmp_path / "in")
  hf.save(tmp_path / "out", params, config)
  after = json.loads((tmp_path / "out/config.json").read_text())
  assert after == before
  again = hf.load(tmp_path / "out")
  assert again[1] == config
  jax.tree.map(np.testing.assert_array_equal, again[0], params)


@pytest.mark.parametrize("name", ["qwen2", "mistral"], ids=["tied", "untied"])
def test_sharded_folder_equals_single(tmp_path, tiny_model, name):
  model = tiny_model(name)
  model.save_pretrained(tmp_path / "one")
  model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
  assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
  one, _ = hf.load(tmp_path / "one")
  many, _ = hf.load(tmp_path / "many")
  jax.tree.map(np.testing.assert_array_equal, many, one)


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2"])
def test_an_untied_head_is_read_where_the_family_usually_ties(
  tmp_path, tiny_model, torch_logits, name
):
  model = tiny_model(name, tie_word_embeddings=False)
  model.save_pretrained(tmp_path)
  params, config = hf.load(tmp_path)
  assert "lm_head" in params
  tokens = families.tokens(2, 12)
  np.testing.assert_allclose(
    forward(params, tokens, config), torch_logits(model, tokens), **TOLERANCE
  )


def test_a_saved_sharded_folder_loads_in_transformers(tmp_path, torch_logits, monkeypatch):
  monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
  config, params = families.make("qwen3")
  hf.save(tmp_path / "out", params, config)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  tokens = families.tokens(1, 12)
  np.testing.assert_allclose(
    forward(params, tokens, config), torch_logits(model.eval(), tokens), **TOLERANCE
  )


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bfloat16_files_load_in_bfloat16_and_in_float32(tmp_path, tiny_model, torch_logits, name):
  model = tiny_model(name).to(torch.bfloat16)
  model.save_pretrained(tmp_path)
  stored, config = hf.load(tmp_path)
  assert {str(leaf.dtype) for _, leaf in tree.items(stored)} == {"bfloat16"}
  wide, _ = hf.load(tmp_path, dtype=jnp.float32)
  assert {str(leaf.dtype) for _, leaf in tree.items(wide)} == {"float32"}
  tokens = families.tokens(2, LONGEST)
  # Read again, not converted: conversion would keep rotary frequencies rounded to bfloat16.
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  exact = torch_logits(model.eval(), tokens)
  np.testing.assert_allclose(forward(wide, tokens, config), exact, **TOLERANCE)
  # bfloat16 keeps 8 bits: products of 7 layers drift by some per cent, not more.
  drift = np.sqrt(np.mean((forward(stored, tokens, config) - exact) ** 2))
  assert 1e-4 < drift / exact.std() < 0.05


def test_a_multimodal_gemma3_folder_gives_its_text_model(tmp_path, torch_logits, caplog):
  text = {**FAMILIES["gemma3"], "num_attention_heads": 4}
  vision = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    model_type="siglip_vision_model",
  )
  config = transformers.Gemma3Config(
    text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=VOCAB - 1
  )
  model = transformers.Gemma3ForConditionalGeneration._from_config(
    config, attn_implementation="eager"
  )
  perturb(model).save_pretrained(tmp_path)
  names = safetensors_numpy.load_file(tmp_path / "model.safetensors").keys()
  assert any("vision_tower" in name for name in names)
  with caplog.at_level(logging.INFO):
    params, config = hf.load(tmp_path)
  assert "tensors left unread (this is the text model)" in caplog.text
  tokens = families.tokens(2, LONGEST)
  tokens = np.where(tokens == VOCAB - 1, 5, tokens)
  np.testing.assert_allclose(
    forward(params, tokens, config), torch_logits(model, tokens), **TOLERANCE
  )
  # Saved again it is a text model, which transformers reads as one.
  hf.save(tmp_path / "text", params, config)
  alone = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "text", attn_implementation="eager"
  )
  assert isinstance(alone, transformers.Gemma3ForCausalLM)
  np.testing.assert_allclose(
    torch_logits(alone.eval(), tokens), torch_logits(model, tokens), **TOLERANCE
  )
