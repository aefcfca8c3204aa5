"""Folders of quantised models: those that transformers and bitsandbytes write, and ours in their hands."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import quant
from posttrain_jax.core import tree
from posttrain_jax.models import decoder, hf, quantised
from posttrain_jax.quant import fp4, int8, nf4
from tests.oracle.conftest import perturb

torch = pytest.importorskip("torch", reason="needs .venv-oracle (make oracle)")
bnb = pytest.importorskip("bitsandbytes.functional", reason="needs .venv-oracle (make oracle)")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 20))
FOUR = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
KINDS = {"nf4": nf4.NF4, "fp4": fp4.FP4, "int8": int8.Int8}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """The folder of a random Llama in float32, its rows long enough for several blocks."""
  folder = tmp_path_factory.mktemp("plain")
  config = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    tie_word_embeddings=False,
  )
  perturb(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
  return folder


def load(folder, dtype="float32", **options):
  config = {"quantization_config": transformers.BitsAndBytesConfig(**options)} if options else {}
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, dtype), device_map="cpu", **config
  ).eval()


def four_bit(folder, kind, double_quant, dtype="float32", **options):
  return load(
    folder,
    dtype,
    load_in_4bit=True,
    bnb_4bit_quant_type=kind,
    bnb_4bit_use_double_quant=double_quant,
    **options,
  )


def matrices(model):
  """{(path, layer): what bitsandbytes dequantises, float32 [in, out]}; before the model has computed anything."""
  found = {}
  for name, module in model.named_modules():
    weight = getattr(module, "weight", None)
    if isinstance(module, torch.nn.Linear) and name.startswith("model.layers."):
      _, _, layer, *rest = name.split(".")
      if hasattr(weight, "quant_state"):
        values = bnb.dequantize_4bit(weight.data, weight.quant_state)
      elif weight.dtype == torch.int8:
        values = bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
      else:
        values = weight.data
      found["layers/" + "/".join([*rest, "weight"]), int(layer)] = values.float().numpy().T
  return found


def logits(model):
  """Of the model made plain: bitsandbytes' CPU kernels round the activations to bfloat16."""
  model = model.dequantize(dtype=torch.float32)
  with torch.no_grad():
    return model(input_ids=torch.tensor(TOKENS)).logits.float().numpy()


def dense(leaf, dtype=None):
  return np.asarray(jax.jit(lambda q: q.dense(dtype))(leaf).astype(jnp.float32))


def assert_equal_bits(params, model):
  theirs = matrices(model)
  assert theirs
  for (path, layer), expected in theirs.items():
    leaf = tree.get(params, path)
    ours = dense(leaf)[layer] if hasattr(leaf, "dense") else np.asarray(leaf[layer], np.float32)
    np.testing.assert_array_equal(ours.view(np.int32), expected.copy().view(np.int32), path)


def assert_near(found, expected):
  """Logits are sums over the whole width: what rounding moves is a share of their size, not of each of them."""
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "double_quant"), FOUR)
def test_a_4bit_checkpoint_is_read_bit_for_bit(tmp_path, plain, kind, double_quant, dtype):
  model = four_bit(plain, kind, double_quant, dtype)
  model.save_pretrained(tmp_path / "four")
  params, config = hf.load(tmp_path / "four")
  leaf = params["layers"]["mlp"]["down_proj"]["weight"]
  assert type(leaf) is KINDS[kind]
  assert leaf.shape == (3, 192, 128)
  assert leaf.dtype == dtype
  assert (leaf.nested_absmax is not None) == double_quant
  assert_equal_bits(params, model)
  made_plain, _ = hf.load(tmp_path / "four", storage="dense")
  assert not [leaf for _, leaf in tree.items(made_plain) if isinstance(leaf, quantised.TYPES)]
  assert_equal_bits(made_plain, model)
  if dtype == "float32":
    expected = logits(model)
    found = jax.jit(decoder.forward, static_argnums=2)(params, TOKENS, config)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_bytes_may_travel_as_bfloat16(tmp_path, plain):
  """What FSDP needs: `bnb_4bit_quant_storage=bfloat16`."""
  model = four_bit(plain, "nf4", True, bnb_4bit_quant_storage=torch.bfloat16)
  model.save_pretrained(tmp_path / "four")
  assert_equal_bits(hf.load(tmp_path / "four")[0], model)


def test_modules_left_plain_stay_plain(tmp_path, plain):
  options = dict(llm_int8_skip_modules=["lm_head", "down_proj", "self_attn.k_proj"])
  model = four_bit(plain, "nf4", True, **options)
  model.save_pretrained(tmp_path / "four")
  params, _ = hf.load(tmp_path / "four")
  held = {path for path, leaf in tree.items(params) if isinstance(leaf, nf4.NF4)}
  names = ("self_attn/q", "self_attn/v", "self_attn/o", "mlp/gate", "mlp/up")
  assert held == {f"layers/{name}_proj/weight" for name in names}
  assert_equal_bits(params, model)


def test_layers_stored_in_two_ways_are_named_and_made_plain(tmp_path, plain, caplog):
  model = four_bit(plain, "nf4", True, llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"])
  model.save_pretrained(tmp_path / "four")
  with caplog.at_level("INFO", "posttrain_jax"):
    params, _ = hf.load(tmp_path / "four")
  assert "mlp/gate_proj/weight is nf4 in layer 0 and dense in layer 1" in caplog.text
  held = {path for path, leaf in tree.items(params) if isinstance(leaf, nf4.NF4)}
  assert held == {f"layers/self_attn/{name}_proj/weight" for name in "qkvo"}
  assert_equal_bits(params, model)


def test_a_quantised_head_is_read(tmp_path, plain):
  model = four_bit(plain, "nf4", True, llm_int8_skip_modules=["down_proj"])
  model.save_pretrained(tmp_path / "four")
  params, config = hf.load(tmp_path / "four")
  assert isinstance(params["lm_head"]["weight"], nf4.NF4)
  found = decoder.forward(params, TOKENS, config)
  assert_near(found, logits(model))


def test_an_int8_checkpoint_is_read_bit_for_bit(tmp_path, plain):
  model = load(plain, load_in_8bit=True)
  model.save_pretrained(tmp_path / "eight")
  params, config = hf.load(tmp_path / "eight")
  leaf = params["layers"]["mlp"]["down_proj"]["weight"]
  assert type(leaf) is int8.Int8
  assert_equal_bits(params, model)
  expected = logits(model)
  assert_near(decoder.forward(params, TOKENS, config), expected)


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8"])
def test_what_we_save_is_read_by_transformers_and_by_us(tmp_path, plain, storage):
  params, config = hf.load(plain, storage=storage, exclude=["o_proj"])
  hf.save(tmp_path / "ours", params, config)
  again, _ = hf.load(tmp_path / "ours")
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  model = load(tmp_path / "ours")
  types = {type(module).__name__ for module in model.modules()}
  assert {"int8": "Linear8bitLt"}.get(storage, "Linear4bit") in types
  assert type(model.lm_head) is torch.nn.Linear
  assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
  assert_equal_bits(params, model)
  found = decoder.forward(params, TOKENS, config)
  assert_near(found, logits(model))


def test_single_quantisation_and_a_tied_head(tmp_path, plain):
  config = json.loads((plain / "config.json").read_text())
  params, model_config = hf.load(plain)
  tied = {**params, "embed_tokens": params["embed_tokens"]}
  del tied["lm_head"]
  model_config = hf.from_hf({**config, "tie_word_embeddings": True})
  stored = quant.quantize_params(tied, double_quant=False, block_size=32)
  hf.save(tmp_path / "ours", stored, model_config)
  model = load(tmp_path / "ours")
  assert_equal_bits(stored, model)
  assert model.lm_head.weight is model.model.embed_tokens.weight
