"""PEFT's folders: what is written, what is read, and what is refused by name."""

import dataclasses
import json
import os
import pickle
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import AdapterConfig, peft_format, replaced
from posttrain_jax.adapters.codecs import lora as codec
from posttrain_jax.core import memory, tree
from tests.adapters.cases import lora_on_nf4, trained
from tests.marks import few
from tests.models import families

KEY = jax.random.key(0)
SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PREFIX = "base_model.model.model.layers"

CONFIGS = {
  "all_linear": AdapterConfig(r=3, lora_alpha=6, lora_dropout=0.1),
  "patterns": AdapterConfig(
    r=2, lora_alpha=5, rank_pattern={r"layers\.1\..*": 4}, alpha_pattern={"up_proj": 1.5}
  ),
  "some_layers": AdapterConfig(r=4, use_rslora=True, layers_to_transform=(0, 2)),
  "some_modules": AdapterConfig(r=4, target_modules=["1.mlp.up_proj", "0.self_attn.q_proj"]),
  "embedding_and_head": AdapterConfig(r=3, target_modules=["lm_head", "embed_tokens", "q_proj"]),
  "head_and_layer": AdapterConfig(
    r=3, target_modules=["lm_head", "model.embed_tokens", "q_proj"], layers_to_transform=[1]
  ),
  "dora": AdapterConfig(r=3, method="dora", rank_pattern={r"layers\.1\..*": 4}, use_rslora=True),
  "dora_in_places": AdapterConfig(
    r=3, method="dora", target_modules=["embed_tokens", "0.mlp.up_proj", "lm_head"]
  ),
  "by_depth": AdapterConfig(r=3, depth_ranks=(2, 6)),
  "gaussian": AdapterConfig(r=3, init_lora_weights="gaussian", exclude_modules=["k_proj"]),
}


def make(config, family="llama"):
  model, params = families.make(family)
  return model, params, trained(adapters.init(KEY, params, config)[1])


def equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
  ("family", "name"),
  few(
    [("llama", name) for name in CONFIGS] + [("llama3", "embedding_and_head")],
    ("llama", "dora"),
    ("llama", "patterns"),
    ("llama", "some_layers"),
    ("llama3", "embedding_and_head"),
  ),
)
def test_what_was_saved_is_loaded_bit_for_bit(name, family, tmp_path):
  model, params, adapter = make(CONFIGS[name], family)
  peft_format.save(tmp_path / "a", adapter, CONFIGS[name], model)
  again, config = peft_format.load(tmp_path / "a", params, model)
  equal(again, adapter)
  peft_format.save(tmp_path / "b", again, config, model)
  for file in ("adapter_config.json", "adapter_model.safetensors", "posttrain.json"):
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
  if not CONFIGS[name].rank_pattern:
    assert (config.r, config.lora_alpha) == (CONFIGS[name].r, CONFIGS[name].lora_alpha)


def test_a_magnitude_is_read_or_missed_by_name(tmp_path):
  model, params, adapter = make(CONFIGS["dora"])
  folder = tmp_path / "a"
  peft_format.save(folder, adapter, CONFIGS["dora"], model)
  name = f"{PREFIX}.1.self_attn.q_proj.lora_magnitude_vector"
  node = adapter["layers"]["self_attn"]["q_proj"]["weight"]
  tensors = load_file(folder / "adapter_model.safetensors")
  np.testing.assert_array_equal(tensors[name], node.magnitude[1])
  assert described(folder)["use_dora"] is True
  rewrite(folder, lambda tensors: {**tensors, name: np.zeros(31, np.float32)})
  with pytest.raises(ValueError, match=r"lora_magnitude_vector of 'layers.1.* has shape \(31,\)"):
    peft_format.load(folder, params, model)
  rewrite(folder, lambda tensors: drop(tensors, name))
  with pytest.raises(ValueError, match=r"q_proj' has no lora_magnitude_vector"):
    peft_format.load(folder, params, model)
  reconfigure(folder, use_dora=False)
  with pytest.raises(ValueError, match=r"unknown tensor .*lora_magnitude_vector"):
    peft_format.load(folder, params, model)


@pytest.fixture
def saved(tmp_path):
  """(folder, model config, params, adapter): every layer and kind of module."""
  config = AdapterConfig(r=3, target_modules=[*SEVEN, "embed_tokens", "lm_head"])
  model, params, adapter = make(config)
  peft_format.save(tmp_path / "a", adapter, config, model, base_name="some/base")
  return tmp_path / "a", model, params, adapter


def described(folder):
  return json.loads((folder / "adapter_config.json").read_text())


def test_tensors_have_pefts_names_and_shapes(saved):
  tensors = load_file(saved[0] / "adapter_model.safetensors")
  shapes = {name: array.shape for name, array in tensors.items()}
  assert len(shapes) == 2 * (3 * 7 + 2)
  assert shapes[f"{PREFIX}.2.mlp.down_proj.lora_A.weight"] == (3, 48)
  assert shapes[f"{PREFIX}.2.mlp.down_proj.lora_B.weight"] == (32, 3)
  assert shapes["base_model.model.model.embed_tokens.lora_embedding_A"] == (3, 96)
  assert shapes["base_model.model.model.embed_tokens.lora_embedding_B"] == (32, 3)
  assert shapes["base_model.model.lm_head.lora_A.weight"] == (3, 32)
  assert shapes["base_model.model.lm_head.lora_B.weight"] == (96, 3)
  b = saved[3]["layers"]["mlp"]["down_proj"]["weight"].b
  np.testing.assert_array_equal(tensors[f"{PREFIX}.2.mlp.down_proj.lora_B.weight"], b[2].T)


def test_the_base_is_named_as_another_program_finds_it(saved, tmp_path, monkeypatch):
  _, model, params, adapter = saved
  config = peft_format.load(saved[0], params, model)[1]
  (tmp_path / "models" / "mine").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  for name, by_others in {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",  # whose weights on the hub are not the built-in ones
    "models/mine": str(tmp_path / "models" / "mine"),
    "org/name": "org/name",
  }.items():
    peft_format.save(tmp_path / "b", adapter, config, model, base_name=name)
    assert described(tmp_path / "b")["base_model_name_or_path"] == by_others
    assert peft_format.base_of(tmp_path / "b") == ("smollm2" if name == "smollm2" else by_others)
    peft_format.load(tmp_path / "b", params, model)


def test_the_config_is_one_that_any_peft_reads(saved):
  config = described(saved[0])
  assert config["target_modules"] == sorted([*SEVEN, "embed_tokens", "lm_head"])
  assert config["peft_type"] == "LORA"
  assert config["base_model_name_or_path"] == "some/base"
  assert config["layers_to_transform"] is None
  assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {}, {})
  assert {"lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "modules_to_save"} < set(config)
  assert "posttrain" not in str(config)


@pytest.mark.parametrize(
  ("name", "targets", "layers"),
  [
    ("all_linear", SEVEN, None),
    ("some_layers", SEVEN, [0, 2]),
    ("some_modules", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"], None),
    ("embedding_and_head", ["embed_tokens", "lm_head", "q_proj"], None),
    ("head_and_layer", ["lm_head", "model.embed_tokens", "q_proj"], [1]),
    ("gaussian", [name for name in SEVEN if name != "k_proj"], None),
  ],
)
def test_targets_are_written_as_short_as_they_are_exact(name, targets, layers, tmp_path):
  model, _, adapter = make(CONFIGS[name])
  peft_format.save(tmp_path / "a", adapter, CONFIGS[name], model)
  config = described(tmp_path / "a")
  assert sorted(config["target_modules"]) == sorted(targets)
  assert config["layers_to_transform"] == layers
  assert config["layers_pattern"] == (layers and "layers")


def test_patterns_that_depend_on_their_order_are_written_out(tmp_path):
  """PEFT sorts the patterns when it saves; `.*_proj` would then come before `q_proj`."""
  config = AdapterConfig(
    r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2, ".*_proj": 3}
  )
  model, params, adapter = make(config)
  peft_format.save(tmp_path / "a", adapter, config, model)
  patterns = described(tmp_path / "a")["rank_pattern"]
  assert all(pattern.startswith(r"^model\.layers\.") for pattern in patterns)
  equal(peft_format.load(tmp_path / "a", params, model)[0], adapter)


def test_ranks_and_scales_of_the_adapter_are_written_not_those_of_the_config(tmp_path):
  config = AdapterConfig(r=3, target_modules=["q_proj"], use_rslora=True)
  model, params, adapter = make(config)
  node = adapter["layers"]["self_attn"]["q_proj"]["weight"]
  mask = jnp.asarray([[1, 0, 1], [0, 0, 0], [1, 1, 1]], jnp.float32)
  node = node.replace(mask=mask, scale=jnp.asarray([1 / 3, 2.0, 0.7], jnp.float32))
  pruned = {"layers": {"self_attn": {"q_proj": {"weight": node}}}}
  peft_format.save(tmp_path / "a", pruned, config, model)
  assert described(tmp_path / "a")["layers_to_transform"] == [0, 2]
  again, _ = peft_format.load(tmp_path / "a", params, model)
  found = again["layers"]["self_attn"]["q_proj"]["weight"]
  assert found.ranks().tolist() == [2, 0, 3]
  np.testing.assert_array_equal(found.scale, jnp.asarray([1 / 3, 0, 0.7], jnp.float32))
  for (a, b), (c, d) in zip(found.split(), node.split()):
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(b, d)


def test_a_quantised_base_takes_the_same_file(tmp_path):
  model = families.config("llama", hidden_size=64, intermediate_size=64, head_dim=16)
  params = families.params(model)
  config = AdapterConfig(r=2)
  adapter = trained(adapters.init(KEY, params, config)[1])
  peft_format.save(tmp_path / "a", adapter, config, model)
  equal(peft_format.load(tmp_path / "a", quant.quantize_params(params), model)[0], adapter)


def test_a_failed_save_leaves_what_was_there(saved, monkeypatch):
  folder, model, _, adapter = saved
  before = {path.name: path.read_bytes() for path in folder.iterdir()}

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    peft_format.save(folder, adapter, AdapterConfig(r=3), model)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_only_lora_that_fits_the_model_is_written(saved, tmp_path):
  _, model, _, adapter = saved
  config = AdapterConfig(r=3)
  wider = families.config("llama", intermediate_size=64)
  with pytest.raises(
    ValueError, match=r"fits a base of \(3, 32, 48\), model_config says \(3, 32, 64\)"
  ):
    peft_format.save(tmp_path / "x", adapter, config, wider)
  with pytest.raises(ValueError, match="written for LoRA, found NF4"):
    peft_format.save(tmp_path / "x", {"lm_head": {"weight": lora_on_nf4(KEY)[0]}}, config, model)
  node = adapter["lm_head"]["weight"]
  with pytest.raises(ValueError, match="no matrix of the model matches 'lm_tail/weight'"):
    peft_format.save(tmp_path / "x", {"lm_tail": {"weight": node}}, config, model)
  empty = node.replace(mask=jnp.zeros(3))
  with pytest.raises(ValueError, match="rank 0 everywhere"):
    peft_format.save(tmp_path / "x", {"lm_head": {"weight": empty}}, config, model)
  assert not (tmp_path / "x").exists()


# --- What PEFT and others write ---------------------------------------------------------------------------------------


def rewrite(folder, change):
  """The tensors changed in place: change(dict) -> dict."""
  path = folder / "adapter_model.safetensors"
  save_file(change(load_file(path)), path)


def reconfigure(folder, **changes):
  (folder / "adapter_config.json").write_text(json.dumps({**described(folder), **changes}))


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("base_model.model.", ""),
    ("base_model.model.", "base_model.model._orig_mod."),
    ("base_model.model.model.", "base_model.model."),
    ("base_model.model.model.", "base_model.model.model.language_model."),
    ("base_model.model.model.", "base_model.model.language_model.model."),
  ],
)
def test_module_names_are_found_behind_what_model_classes_prepend(saved, old, new):
  folder, model, params, adapter = saved
  rewrite(folder, lambda tensors: {name.replace(old, new, 1): t for name, t in tensors.items()})
  equal(peft_format.load(folder, params, model)[0], adapter)


def test_every_default_that_peft_writes_is_accepted(saved):
  folder, model, params, adapter = saved
  off = {key: values[0] for key, values in codec.KEYS.off.items()}
  unread = dict(
    auto_mapping={"base_model_class": "os", "parent_library": "subprocess"},  # is not looked at
    peft_version="0.99",
    loftq_config={},
    megatron_core="megatron.core",
    qalora_group_size=16,
  )
  newer = dict(an_option_of_tomorrow=None, another=False, more={}, still_more=[])
  reconfigure(folder, **off, **unread, **newer)
  equal(peft_format.load(folder, params, model)[0], adapter)


def test_of_several_names_of_the_list_of_layers_one_is_ours(saved):
  folder, model, params, adapter = saved
  reconfigure(folder, layers_pattern=["layers", "h"])
  equal(peft_format.load(folder, params, model)[0], adapter)


def test_targets_are_taken_from_the_tensors_where_the_config_names_none(saved):
  folder, model, params, adapter = saved
  reconfigure(folder, target_modules=None)
  again, config = peft_format.load(folder, params, model)
  equal(again, adapter)
  assert len(config.target_modules) == 23


def test_half_precision_factors_become_float32(saved):
  folder, model, params, adapter = saved
  rewrite(folder, lambda tensors: {name: t.astype(jnp.bfloat16) for name, t in tensors.items()})
  again, _ = peft_format.load(folder, params, model)
  rounded = tree.get(adapter, "lm_head/weight").a.astype(jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(tree.get(again, "lm_head/weight").a, rounded)


def test_the_bases_own_embedding_may_lie_in_the_file(saved):
  """PEFT stores it with an adapted embedding."""
  folder, model, params, adapter = saved
  embedding = np.asarray(params["embed_tokens"]["weight"])
  head = np.ascontiguousarray(params["lm_head"]["weight"].T)
  add = lambda embedding: (
    lambda tensors: {
      **tensors,
      "base_model.model.model.embed_tokens.base_layer.weight": embedding,
      "base_model.model.lm_head.base_layer.weight": head.astype(jnp.bfloat16),
    }
  )
  rewrite(folder, add(embedding))
  equal(peft_format.load(folder, params, model)[0], adapter)
  rewrite(folder, add(embedding * 1.02))
  with pytest.raises(ValueError, match=r"embed_tokens of its own that differs .* by 2.0%"):
    peft_format.load(folder, params, model)
  rewrite(folder, add(np.concatenate([embedding, embedding[:8]])))
  with pytest.raises(
    ValueError, match=r"resized embed_tokens of \(104, 32\), the base has \(96, 32\)"
  ):
    peft_format.load(folder, params, model)


def test_a_named_adapter_is_found_by_its_parent(saved):
  folder, model, params, adapter = saved
  equal(peft_format.load(folder.parent, params, model)[0], adapter)
  (folder.parent / "b").mkdir()
  (folder.parent / "b" / "adapter_config.json").write_text("{}")
  with pytest.raises(ValueError, match=r"several adapters \(a, b\)"):
    peft_format.load(folder.parent, params, model)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(peft_type="LOHA"), "peft_type='LOHA' is not supported; supported: LORA"),
    (dict(peft_type=["LORA"]), "peft_type=.* is not supported"),
    (dict(use_dora=True), "the module 'embed_tokens' has no lora_magnitude_vector"),
    (dict(bias="all"), "bias='all' is not supported; PEFT's default is 'none'"),
    (dict(lora_bias=True), "lora_bias=True is not supported"),
    (dict(modules_to_save=["norm"]), "modules_to_save=.* names .*norm., which has no weight"),
    (dict(ensure_weight_tying=True), "ensure_weight_tying=True is not supported"),
    (dict(trainable_token_indices=[1]), "trainable_token_indices=.1. is not supported"),
    (dict(layer_replication=[[0, 2]]), "layer_replication=.* is not supported.*posttrain merge"),
    (
      dict(alora_invocation_tokens=[3]),
      "alora_invocation_tokens=.*in no merged model: use it in peft",
    ),
    (dict(layers_pattern=["h", "blocks"]), "layers_pattern=.* is not supported"),
    (dict(layers_pattern="blocks"), "layers_pattern='blocks' is not supported"),
    (dict(task_type="TOKEN_CLS"), "task_type='TOKEN_CLS' is not supported"),
    (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' is not supported: it moves"),
    (dict(use_hyperbolic=True), "unknown key use_hyperbolic=True"),
    (dict(r="3"), "r='3' is a str, expected int"),
    (dict(lora_alpha=None), "lora_alpha=None is a NoneType, expected int or float"),
    (dict(rank_pattern={"q_proj": "3"}), "adapter_config.json: "),
    (dict(alpha_pattern={"q_proj": "3"}), "adapter_config.json: "),
    (dict(lora_alpha=float("nan")), "lora_alpha=nan: write a finite number"),
    (dict(target_modules="(("), "no regular expression"),
    (
      dict(r=5),
      r"'embed_tokens' has shape \(3, 96\), expected \(5, 96\): rank 5 by adapter_config",
    ),
    (dict(rank_pattern={"q_proj": 2}), r"q_proj' has shape \(3, 32\), expected \(2, 32\)"),
    (
      dict(target_modules=[*SEVEN, "embed_tokens"]),
      "safetensors adapts 1 modules that adapter_config.json does not: lm_head",
    ),
    (
      dict(layers_to_transform=[1]),
      "safetensors adapts 15 modules that adapter_config.json does not: embed_tokens",
    ),
  ],
)
def test_what_the_config_must_not_say(saved, changes, message):
  folder, model, params, _ = saved
  reconfigure(folder, **changes)
  with pytest.raises(ValueError, match=message) as error:
    peft_format.load(folder, params, model)
  assert str(folder) in str(error.value)


Q = f"{PREFIX}.1.self_attn.q_proj"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: drop(t, f"{Q}.lora_B.weight"), "'layers.1.self_attn.q_proj' has no lora_B.weight"),
    (lambda t: drop(t, f"{Q}.lora_A.weight"), "'layers.1.self_attn.q_proj' has no lora_A.weight"),
    (
      lambda t: drop(t, f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
      "adapter_config.json adapts 1 modules that .*safetensors does not: layers.1.self_attn.q_proj",
    ),
    (
      lambda t: {**t, f"{Q}.lora_B.weight": np.zeros((40, 3), np.float32)},
      r"lora_B.weight of 'layers.1.self_attn.q_proj' has shape \(40, 3\), expected \(32, 3\).*32 x 32",
    ),
    (lambda t: {**t, f"{Q}.lora_A.weight": np.zeros(3, np.float32)}, r"has shape \(3,\), expected"),
    (
      lambda t: {**t, f"{PREFIX}.3.self_attn.q_proj.lora_A.weight": np.zeros((3, 32), np.float32)},
      "no module matches 'layers.3.self_attn.q_proj'; names look like",
    ),
    (
      lambda t: {**t, f"{Q}.lora_magnitude_vector": np.zeros(32, np.float32)},
      "unknown tensor .*q_proj.lora_magnitude_vector'; an adapted module has lora_A.weight",
    ),
    (
      lambda t: {**t, "base_model.model.model.embed_tokens.lora_A.weight": np.zeros((3, 96), "f4")},
      "unknown tensor .*embed_tokens.lora_A.weight'",
    ),
    (
      lambda t: {
        **t,
        Q.removeprefix("base_model.model.") + ".lora_A.weight": t[f"{Q}.lora_A.weight"],
      },
      "two tensors .*lora_A.weight.* for the module 'layers.1.self_attn.q_proj'",
    ),
  ],
)
def test_what_the_tensors_must_not_be(saved, change, message):
  folder, model, params, _ = saved
  rewrite(folder, change)
  with pytest.raises(ValueError, match=message) as error:
    peft_format.load(folder, params, model)
  assert str(folder) in str(error.value)


def drop(tensors, *names):
  return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_cut_short_is_named(saved, size):
  folder, model, params, _ = saved
  path = folder / "adapter_model.safetensors"
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read.*cut short"):
    peft_format.load(folder, params, model)


def test_a_header_that_claims_gigabytes_is_not_read(saved):
  folder, model, params, _ = saved
  path = folder / "adapter_model.safetensors"
  path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
  with pytest.raises(ValueError, match=r"claims a header of 1,099,511,627,776 bytes"):
    peft_format.load(folder, params, model)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_config_that_is_no_object_is_named(saved, text):
  folder, model, params, _ = saved
  (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(ValueError, match=r"adapter_config.json (is not JSON|holds a list)"):
    peft_format.load(folder, params, model)


def test_a_huge_config_is_not_read(saved):
  folder, model, params, _ = saved
  (folder / "adapter_config.json").write_bytes(b" " * (peft_format.CONFIG_BYTES + 1))
  with pytest.raises(ValueError, match="larger than 4194304 bytes"):
    peft_format.load(folder, params, model)


class Trap:
  """Unpickling it leaves a file behind."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (str(self.path), "w"))


def test_pickled_weights_are_refused_unread(saved, tmp_path):
  folder, model, params, _ = saved
  (folder / "adapter_model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors does not exist"):
    peft_format.load(folder, params, model)
  (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
  with pytest.raises(ValueError, match=r"adapter_model.bin is pickled.*safe_serialization=True"):
    peft_format.load(folder, params, model)
  assert not (tmp_path / "sprung").exists()


def test_a_folder_without_an_adapter_is_named(tmp_path):
  model, params = families.make("llama")
  with pytest.raises(FileNotFoundError, match=r"nothing.adapter_config.json does not exist"):
    peft_format.load(tmp_path / "nothing", params, model)


# --- Which base an adapter fits ---------------------------------------------------------------------------------------


def test_the_fingerprint_tells_bases_apart_by_shape(saved):
  folder, model, _, _ = saved
  deeper = families.config("llama", num_hidden_layers=4)
  with pytest.raises(
    ValueError, match=r"made for a base of .*'num_layers': 3.*this base is .*'num_layers': 4"
  ):
    peft_format.load(folder, families.params(deeper), deeper)
  assert peft_format.fingerprint(model) == peft_format.fingerprint(families.config("llama"))
  tied = families.config("llama", tie_word_embeddings=True)
  assert peft_format.fingerprint(tied) == peft_format.fingerprint(model)  # merging may untie


def test_without_a_record_shapes_decide(saved):
  folder, _, _, _ = saved
  (folder / "posttrain.json").unlink()
  wider = families.config("llama", vocab_size=100)
  with pytest.raises(ValueError, match=r"'embed_tokens' has shape \(3, 96\), expected \(3, 100\)"):
    peft_format.load(folder, families.params(wider), wider)
  renamed = families.config("llama", model_type="mistral")  # another name, the same shapes
  peft_format.load(folder, families.params(renamed), renamed)


# ---------------------------------------------------------------------------------------------------------------------
# Names of the class that was trained
# ---------------------------------------------------------------------------------------------------------------------

CLASSES = {
  "causal": ("model.", ""),
  "multimodal": ("model.language_model.", ""),
  "multimodal before 4.52": ("language_model.model.", "language_model."),
  "headless": ("", ""),
}
PATTERNS = AdapterConfig(
  r=2,
  lora_alpha=5,
  target_modules=["q_proj", "up_proj", "lm_head"],
  rank_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 4, "lm_head": 3},
  alpha_pattern={"model.layers.2.mlp.up_proj": 64, "lm_head": 7},
)


def named_by(folder, inside, before_heads):
  """The folder as a class would have it that calls the modules so, in tensors and config."""
  prefix = "base_model.model."

  def named(name):
    return inside + name.removeprefix("model.") if "model." in name else before_heads + name

  rewrite(folder, lambda t: {prefix + named(name.removeprefix(prefix)): x for name, x in t.items()})
  config = described(folder)
  of = {
    "^model\\.layers": "^" + inside.replace(".", "\\.") + "layers",
    "model.layers": inside + "layers",
  }

  def renamed(table):
    for old, new in of.items():
      table = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in table.items()}
    return table

  reconfigure(
    folder,
    rank_pattern=renamed(config["rank_pattern"]),
    alpha_pattern=renamed(config["alpha_pattern"]),
  )


@pytest.mark.parametrize(
  "targets",
  [
    None,
    ["{}layers.{i}.self_attn.q_proj", "{}layers.{i}.mlp.up_proj", "lm_head"],
    r"({}layers\.\d+\.(self_attn\.q_proj|mlp\.up_proj)|.*lm_head)",
  ],
  ids=["endings", "full_names", "expression"],
)
@pytest.mark.parametrize("kind", CLASSES)
def test_config_and_tensors_are_read_by_the_names_of_one_class(kind, targets, tmp_path):
  """The alphas of a multimodal model's adapter were not found, and the default was taken."""
  model, params, adapter = make(PATTERNS)
  peft_format.save(tmp_path / "a", adapter, PATTERNS, model)
  inside, before_heads = CLASSES[kind]
  named_by(tmp_path / "a", inside, before_heads)
  if isinstance(targets, list):
    names = {t.format(inside, i=i) for t in targets for i in range(3)}
    reconfigure(tmp_path / "a", target_modules=sorted(names))
  elif targets:
    reconfigure(tmp_path / "a", target_modules=targets.replace("{}", inside.replace(".", r"\.")))
  again, config = peft_format.load(tmp_path / "a", params, model)
  equal(again, adapter)
  for name in ("layers.1.self_attn.q_proj", "layers.2.mlp.up_proj", "lm_head"):
    assert (config.rank(name), config.scale(name)) == (PATTERNS.rank(name), PATTERNS.scale(name))
    assert config.targets(name)
  peft_format.save(tmp_path / "b", again, config, model)
  equal(peft_format.load(tmp_path / "b", params, model)[0], adapter)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("kind", ["causal", "multimodal"])
def test_a_pattern_that_names_nothing_is_an_error(saved, option, kind):
  folder, model, params, _ = saved
  if kind == "multimodal":
    named_by(folder, *CLASSES[kind])
  wrong = (
    "model.layers.0.self_attn.q_prj" if kind == "causal" else "model.layers.0.self_attn.q_proj"
  )
  reconfigure(folder, **{option: {wrong: 3}})
  said = rf"adapter_config.json: {option}: no module matches '{wrong}'; names look like "
  with pytest.raises(ValueError, match=said):
    peft_format.load(folder, params, model)


def test_what_saves_put_around_names_is_read(saved):
  folder, model, params, adapter = saved
  as_they_were = load_file(folder / "adapter_model.safetensors")

  def with_adapter_name(name):
    head, dot, end = name.rpartition(".weight")
    return f"{head}.default{dot}" if dot else f"{end}.default"

  for change in (
    with_adapter_name,
    lambda name: "base_model.model." + name,
    lambda name: "module." + name,
    lambda name: name.replace("base_model.model.", "base_model.model.module."),
    lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._orig_mod."),
  ):
    save_file(
      {change(name): x for name, x in as_they_were.items()}, folder / "adapter_model.safetensors"
    )
    equal(peft_format.load(folder, params, model)[0], adapter)


def test_tensors_of_the_eyes_are_left_unread(saved, caplog):
  """PEFT adapts the q_proj of a vision tower too where it is asked for q_proj."""
  folder, model, params, adapter = saved
  named_by(folder, *CLASSES["multimodal"])
  eyes = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
  rewrite(folder, lambda t: {**t, eyes: np.zeros((3, 16), np.float32)})
  reconfigure(folder, alpha_pattern={"model.vision_tower.encoder.layers.0.self_attn.q_proj": 2})
  with caplog.at_level("INFO"):
    equal(peft_format.load(folder, params, model)[0], adapter)
  assert "1 modules left unread (this is the text model)" in caplog.text


def test_an_adapter_of_a_multimodal_folder_has_the_names_of_its_class(tmp_path):
  """What AutoModelForCausalLM makes of that folder; PEFT found none of the text class's names in it."""
  model, params, adapter = make(PATTERNS)
  adapter = {**adapter, "norm": {"weight": replaced.Replaced(params["norm"]["weight"] + 1)}}
  part = dataclasses.replace(model, part_of="gemma3")
  with_norm = PATTERNS.replace(modules_to_save=["model.norm"])
  peft_format.save(tmp_path / "a", adapter, with_norm, part)
  tensors, config = load_file(tmp_path / "a/adapter_model.safetensors"), described(tmp_path / "a")
  inside = "base_model.model.model.language_model."
  assert {name for name in tensors if not name.startswith(inside)} == {
    f"base_model.model.lm_head.lora_{x}.weight" for x in "AB"
  }
  assert f"{inside}norm.weight" in tensors
  # an ending, even one that is exact among the text model's names, is the vision tower's too
  assert config["modules_to_save"] == ["model.language_model.norm"]
  peft_format.save(
    tmp_path / "b",
    {"norm": adapter["norm"]} | {"lm_head": adapter["lm_head"]},
    PATTERNS.replace(modules_to_save=["norm"], target_modules=["lm_head"]),
    part,
  )
  assert described(tmp_path / "b")["modules_to_save"] == ["model.language_model.norm"]
  assert len(config["target_modules"]) == 7
  assert "model.language_model.layers.1.self_attn.q_proj" in config["target_modules"]
  assert config["alpha_pattern"] == {
    r"^model\.language_model\.layers\.2\.mlp\.up_proj": 64,
    "^lm_head": 7,
  }
  again, _ = peft_format.load(tmp_path / "a", params, part)
  equal(again, adapter)
  equal(peft_format.load(tmp_path / "a", params, model)[0], adapter)


# ---------------------------------------------------------------------------------------------------------------------
# Input is input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["orthogonal", "mica", "eva", "of_tomorrow", "gaussian", False])
def test_a_start_that_leaves_the_base_alone_is_read_whatever_its_name(saved, how):
  folder, model, params, adapter = saved
  reconfigure(folder, init_lora_weights=how)
  equal(peft_format.load(folder, params, model)[0], adapter)


@pytest.mark.parametrize("how", ["pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga"])
def test_a_start_that_moves_the_base_is_refused(saved, how):
  folder, model, params, _ = saved
  reconfigure(folder, init_lora_weights=how)
  with pytest.raises(ValueError, match=f"init_lora_weights='{how}' is not supported: it moves"):
    peft_format.load(folder, params, model)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(target_modules="((a|a)*)*b"), None),
    (dict(rank_pattern={"(((a{999}){999}){999})": 3}), "rank_pattern: .* repeats up to"),
    (dict(r=10**30), "r=1000.*: write a number from 1 to"),
    (dict(lora_alpha=1e200), "lora_alpha=1e.200: write a finite number"),
    (dict(layers_to_transform=[[0]]), r"layers_to_transform=\[0\]: write a whole number"),
    (dict(target_modules=[None]), r"target_modules=\[None\]: write a list of names"),
    (dict(modules_to_save=[["norm"]]), "modules_to_save=.* is no list of names"),
    (dict(r=True), "r=True is a bool, expected int"),
    (dict(alpha_pattern={"q_proj": {}}), "alpha_pattern.*: write a number"),
    (dict(peft_type=["LORA"]), "peft_type=.* is not supported"),
    (dict(bias="lora_only"), "bias='lora_only' is not supported.*trained biases of its base"),
    (dict(an_option=1.5), "unknown key an_option=1.5; .* take it out of the file"),
  ],
)
def test_what_is_absurd_is_refused_in_a_sentence_and_soon(saved, changes, message):
  folder, model, params, _ = saved
  reconfigure(folder, **changes)
  began = time.monotonic()
  with pytest.raises(ValueError, match=message) as error:
    peft_format.load(folder, params, model)
  assert time.monotonic() - began < 5
  assert str(folder) in str(error.value)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda x: x * np.nan, r"lora_B.weight holds 96 NaN of 96 numbers"),
    (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.inf, x), "holds 1 infinite of"),
    (lambda x: x.astype(np.float64) + 1e200, r"holds 1e\+200, and float32 ends at"),
    (lambda x: x.astype(np.int8), "is I8, not one of F64, F32"),
  ],
)
def test_a_tensor_that_is_no_finite_numbers_is_named(saved, change, said):
  folder, model, params, _ = saved
  rewrite(folder, lambda t: {**t, f"{Q}.lora_B.weight": change(t[f"{Q}.lora_B.weight"])})
  with pytest.raises(ValueError, match=rf"tensor '?{Q}.*{said}"):
    peft_format.load(folder, params, model)


def test_a_vocabulary_of_another_size_is_named_with_what_to_do(saved):
  folder, model, params, _ = saved
  name = "base_model.model.model.embed_tokens"
  rewrite(
    folder,
    lambda t: (
      drop(t, f"{name}.lora_embedding_A", f"{name}.lora_embedding_B")
      | dict.fromkeys(
        (f"{name}.weight", f"{name}.modules_to_save.weight", f"{name}.original_module.weight"),
        np.zeros((99, 32), np.float32),
      )
    ),
  )
  reconfigure(folder, modules_to_save=["embed_tokens"], target_modules=[*SEVEN, "lm_head"])
  said = "embed_tokens has 99 tokens, the base 96: .*Merge it with peft onto a base of 99 tokens"
  with pytest.raises(ValueError, match=said):
    peft_format.load(folder, params, model)


def test_a_saved_module_may_lie_in_the_file_three_times(saved):
  folder, model, params, _ = saved
  name = "base_model.model.model.norm"
  value = np.arange(32, dtype=np.float32)
  both = {f"{name}.weight": value, f"{name}.modules_to_save.default.weight": value}
  rewrite(folder, lambda t: {**t, **both, f"{name}.original_module.weight": 0 * value})
  reconfigure(folder, modules_to_save=["model.norm"])
  again, _ = peft_format.load(folder, params, model)
  np.testing.assert_array_equal(tree.get(again, "norm/weight").value, value)
  rewrite(folder, lambda t: {**t, f"{name}.modules_to_save.default.weight": 2 * value})
  with pytest.raises(ValueError, match=r"norm.weight.* differ, and are one module's"):
    peft_format.load(folder, params, model)


@pytest.mark.parametrize("method", few(["olora", "lora", "dora"], "olora"))
def test_what_trains_in_the_hosts_memory_is_written_as_it_is(tmp_path, method):
  config = AdapterConfig(r=3, method=method, target_modules=("q_proj", "o_proj"))
  model, _, adapter = make(config)
  trainable, fixed = tree.partition(adapter)
  away = jax.tree.map(lambda x: jax.device_put(x, memory.host(x.sharding)), trainable)
  assert memory.any_on_host(away)
  peft_format.save(tmp_path / "here", adapter, config, model)
  peft_format.save(tmp_path / "away", tree.combine(away, fixed), config, model)
  here, there = (
    load_file(tmp_path / name / "adapter_model.safetensors") for name in ("here", "away")
  )
  equal(here, there)
