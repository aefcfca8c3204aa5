"""Hugging Face folders: what is written comes back, and whatever is wrong with one is named."""

import dataclasses
import json
import logging
import re
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from posttrain_jax.core import files, shards, tree
from posttrain_jax.models import decoder, hf
from tests.models import families
from tests.models.families import FAMILIES

Q2 = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
  """A saved untied Llama, in one file."""
  config, params = families.make("llama")
  hf.save(tmp_path / "model", params, config)
  return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
  config, params = families.make("llama")
  hf.save(tmp_path / "model", params, config)
  return tmp_path / "model"


def change(folder, edit):
  """Rewrites the folder's tensors after edit(tensors)."""
  tensors = safetensors_numpy.load_file(folder / "model.safetensors")
  edit(tensors)
  safetensors_numpy.save_file(tensors, folder / "model.safetensors")


def change_index(folder, edit):
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  edit(index["weight_map"])
  path.write_text(json.dumps(index))
  return index


def assert_equal(found, expected):
  assert tree.flatten(found).keys() == tree.flatten(expected).keys()
  jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_parameters_return_exactly(tmp_path, name):
  config, params = families.make(name)
  hf.save(tmp_path / "out", params, config)
  loaded, again = hf.load(tmp_path / "out")
  assert_equal(loaded, params)
  assert dataclasses.replace(again, source="") == dataclasses.replace(config, source="")


def test_tensors_stand_under_hugging_face_names_and_turned(folder):
  _, params = families.make("llama")
  tensors = safetensors_numpy.load_file(folder / "model.safetensors")
  layers = params["layers"]
  np.testing.assert_array_equal(tensors[Q2], layers["self_attn"]["q_proj"]["weight"][2].T)
  np.testing.assert_array_equal(
    tensors["model.layers.0.mlp.down_proj.weight"], layers["mlp"]["down_proj"]["weight"][0].T
  )
  np.testing.assert_array_equal(
    tensors["model.embed_tokens.weight"], params["embed_tokens"]["weight"]
  )
  np.testing.assert_array_equal(tensors["lm_head.weight"], params["lm_head"]["weight"].T)
  np.testing.assert_array_equal(
    tensors["model.layers.1.input_layernorm.weight"], layers["input_layernorm"]["weight"][1]
  )


def test_shards_hold_each_tensor_once_and_return_exactly(sharded):
  _, params = families.make("llama")
  index = change_index(sharded, lambda _: None)
  shards = sorted(path.name for path in sharded.glob("*.safetensors"))
  assert len(shards) > 2
  assert shards == sorted(set(index["weight_map"].values()))
  assert index["metadata"]["total_size"] == tree.nbytes(params)
  held = [n for s in shards for n in safetensors_numpy.load_file(sharded / s)]
  assert sorted(held) == sorted(index["weight_map"])
  assert all((sharded / s).stat().st_size < 30_000 for s in shards)
  assert_equal(hf.load(sharded)[0], params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_types_are_kept_or_converted(tmp_path, dtype):
  config, params = families.make("qwen2")
  stored = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params)
  hf.save(tmp_path / "out", stored, config)
  assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
  kept, _ = hf.load(tmp_path / "out")
  assert {leaf.dtype for _, leaf in tree.items(kept)} == {jnp.dtype(dtype)}
  assert_equal(kept, stored)
  wide, _ = hf.load(tmp_path / "out", dtype="float32")
  assert_equal(wide, jax.tree.map(lambda x: x.astype(np.float32), stored))


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("storage", [None, "dense", "nf4", "fp4", "int8"])
def test_one_number_that_is_none_is_named_however_it_is_to_be_stored(tmp_path, storage, number):
  """XLA:CPU's maximum drops a NaN, and a block's scale with it would hide it."""
  config = families.config("llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
  hf.save(tmp_path / "model", families.params(config), config)
  name = "model.layers.0.mlp.up_proj.weight"

  def spoil(tensors):
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = number

  change(tmp_path / "model", spoil)
  with pytest.raises(ValueError, match=rf"tensor '{name}' holds 1 (NaN|infinite) of 4,096 numbers"):
    hf.load(tmp_path / "model", storage=storage)


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_numbers_beyond_a_dtype_are_named_and_not_made_infinite(tmp_path, storage):
  config = families.config("llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
  params = tree.map_weights(
    families.params(config), [("layers/mlp/up_proj/weight", lambda w: w.at[0, 3, 5].set(1e6))]
  )
  hf.save(tmp_path / "model", params, config)
  said = (
    r"model.layers.0.mlp.up_proj.weight holds 1e\+06, and float16 ends at 65504: write it as bf"
  )
  with pytest.raises(ValueError, match=said):
    hf.load(tmp_path / "model", dtype="float16", storage=storage)
  assert hf.load(tmp_path / "model", dtype="bfloat16", storage=storage)


def test_layers_of_two_types_are_stacked_in_the_wider(folder):
  def edit(tensors):
    tensors[Q2.replace(".2.", ".0.")] = tensors[Q2.replace(".2.", ".0.")].astype(ml_dtypes.bfloat16)

  change(folder, edit)
  params, _ = hf.load(folder)
  _, expected = families.make("llama")
  found = params["layers"]["self_attn"]["q_proj"]["weight"]
  assert found.dtype == jnp.float32  # layer 2 as it was, layer 0 as rounded in the file
  np.testing.assert_array_equal(found[2], expected["layers"]["self_attn"]["q_proj"]["weight"][2])


def test_place_takes_each_leaf_as_it_is_read(folder):
  seen = []

  def place(path, array):
    assert isinstance(array, np.ndarray)
    seen.append(path)
    return array.shape

  params, config = hf.load(folder, place=place)
  assert seen == list(tree.flatten(decoder.specs(config)))
  assert params["norm"]["weight"] == (32,)


def test_names_without_the_model_prefix_and_inside_a_larger_model(folder):
  _, params = families.make("llama")
  tensors = safetensors_numpy.load_file(folder / "model.safetensors")
  for rename in (
    lambda name: name.removeprefix("model."),
    lambda name: f"language_model.{name}",
    lambda name: name.replace("model.", "model.language_model."),
  ):
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    safetensors_numpy.save_file(renamed, folder / "model.safetensors")
    assert_equal(hf.load(folder)[0], params)


@pytest.mark.parametrize(
  ("extra", "reason"),
  [
    ("model.layers.0.self_attn.rotary_emb.inv_freq", "computed from rope_theta"),
    ("vision_tower.vision_model.embeddings.patch_embedding.weight", "this is the text model"),
    ("multi_modal_projector.mm_soft_emb_norm.weight", "this is the text model"),
  ],
)
def test_tensors_without_a_use_are_left_and_reported(folder, caplog, extra, reason):
  change(folder, lambda tensors: tensors.update({extra: np.ones(4, np.float32)}))
  with caplog.at_level(logging.INFO):
    params, _ = hf.load(folder)
  assert f"1 tensors left unread ({reason})" in caplog.text
  assert_equal(params, families.make("llama")[1])


def test_the_second_copy_of_a_tied_head_is_left_and_reported(tmp_path, caplog):
  config, params = families.make("qwen2")
  hf.save(tmp_path / "out", params, config)
  change(tmp_path / "out", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
  with caplog.at_level(logging.INFO):
    loaded, _ = hf.load(tmp_path / "out")
  assert "1 tensors left unread (the head is tied to the embedding)" in caplog.text
  assert "lm_head" not in loaded


def test_a_head_of_its_own_unties_the_saved_config(tmp_path):
  config, params = families.make("qwen2")
  assert config.tied
  head = {"weight": 2 * params["embed_tokens"]["weight"].T}
  hf.save(tmp_path / "out", {**params, "lm_head": head}, config)
  loaded, again = hf.load(tmp_path / "out")
  assert not again.tied
  np.testing.assert_array_equal(loaded["lm_head"]["weight"], head["weight"])


@pytest.mark.parametrize("prefix", ["model.", "language_model.model."])
def test_a_head_in_the_file_is_used_where_the_config_says_tied(tmp_path, caplog, prefix):
  """transformers keeps both; without the head the logits were off by three quarters of the largest."""
  config, params = families.make("llama")
  hf.save(tmp_path / "model", params, config)
  path = tmp_path / "model/config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
  inside = prefix.removesuffix("model.")
  change(
    tmp_path / "model",
    lambda t: t.update({inside + name: t.pop(name) for name in list(t) if inside}),
  )
  with caplog.at_level(logging.INFO):
    loaded, again = hf.load(tmp_path / "model")
  assert "config.json says tied" in caplog.text
  assert not again.tied
  assert_equal(loaded, params)
  hf.save(tmp_path / "again", loaded, again)
  assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is False


def test_a_reward_models_head_for_logits_is_read_where_its_config_says_tied(tmp_path):
  config = families.config("llama3", architectures=["LlamaForSequenceClassification"], num_labels=1)
  assert config.tied
  hf.save(tmp_path / "model", families.params(config), config)
  head = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
  change(tmp_path / "model", lambda t: t.update({"lm_head.weight": head}))
  loaded, again = hf.load(tmp_path / "model")
  assert (again.tied, again.writes, again.scores) == (False, True, 1)
  np.testing.assert_array_equal(loaded["lm_head"]["weight"], head.T)


def test_tokenizer_files_travel(tmp_path):
  config, params = families.make("llama")
  source = tmp_path / "source"
  source.mkdir()
  (source / "tokenizer.json").write_text("{}")
  (source / "chat_template.jinja").write_text("{{ messages }}")
  (source / "README.md").write_text("not this")
  hf.save(tmp_path / "out", params, config, tokenizer_from=source)
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
  ]
  assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
  with pytest.raises(FileNotFoundError, match=r"tokenizer_from=.*nowhere.* is not a folder"):
    hf.save(tmp_path / "other", params, config, tokenizer_from=tmp_path / "nowhere")


# --- broken folders --------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_named(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be read.*cut short"):
    hf.load(folder)


def test_a_file_that_is_no_safetensors_is_named(folder):
  path = folder / "model.safetensors"
  path.write_bytes(struct.pack("<Q", 10**6) + b"version https://git-lfs")
  with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be read"):
    hf.load(folder)


def test_a_missing_tensor_is_named(folder):
  change(folder, lambda tensors: tensors.pop(Q2))
  with pytest.raises(ValueError, match=rf"model does not hold .* missing {re.escape(Q2)}"):
    hf.load(folder)


def test_a_missing_head_is_named_unless_tied(folder):
  change(folder, lambda tensors: tensors.pop("lm_head.weight"))
  with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
    hf.load(folder)


def test_an_unknown_tensor_is_named(folder):
  extra = "model.layers.0.self_attn.q_proj.lora_A"
  change(folder, lambda tensors: tensors.update({extra: np.ones(4, np.float32)}))
  with pytest.raises(ValueError, match=rf"unknown {re.escape(extra)}"):
    hf.load(folder)


def test_layers_beyond_the_configs_are_unknown_and_listed_shortly(folder):
  keys = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(keys | dict(num_hidden_layers=2)))
  with pytest.raises(ValueError, match=r"unknown model\.layers\.2\..* and 4 more"):
    hf.load(folder)


def test_a_misshapen_tensor_is_named_before_anything_is_placed(folder):
  change(folder, lambda tensors: tensors.update({Q2: tensors[Q2][:-1]}))
  placed = []
  with pytest.raises(
    ValueError, match=rf"{re.escape(Q2)}' has shape \(31, 32\), config.json asks for \(32, 32\)"
  ):
    hf.load(folder, place=lambda path, array: placed.append(path))
  assert not placed


def test_a_quantised_tensor_is_named(folder):
  change(folder, lambda tensors: tensors.update({Q2: tensors[Q2].astype(np.int8)}))
  with pytest.raises(ValueError, match=rf"{re.escape(Q2)}' is I8.*quantised"):
    hf.load(folder)


def test_a_missing_shard_is_named(sharded):
  gone = sorted(sharded.glob("*.safetensors"))[1]
  gone.unlink()
  with pytest.raises(FileNotFoundError, match=f"{gone.name} is named by model.safetensors.index"):
    hf.load(sharded)


def test_a_shard_without_its_tensor_is_named(sharded):
  index = change_index(sharded, lambda _: None)
  first, *_, last = sorted(set(index["weight_map"].values()))
  name = next(n for n, file in index["weight_map"].items() if file == first)
  change_index(sharded, lambda weight_map: weight_map.update({name: last}))
  with pytest.raises(ValueError, match=rf"{last} lacks the tensor '{re.escape(name)}'"):
    hf.load(sharded)


def test_a_tensor_that_the_index_leaves_out_is_not_overlooked(sharded):
  path = sorted(sharded.glob("*.safetensors"))[0]
  tensors = safetensors_numpy.load_file(path)
  safetensors_numpy.save_file(tensors | {"surprise": np.ones(3, np.float32)}, path)
  with pytest.raises(ValueError, match="unknown surprise"):
    hf.load(sharded)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "..", ""])
def test_an_index_that_points_outside_its_folder_is_refused(sharded, file):
  change_index(sharded, lambda weight_map: weight_map.update({Q2: file}))
  with pytest.raises(ValueError, match=r"index\.json names .* outside the folder"):
    hf.load(sharded)


@pytest.mark.parametrize(
  "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_is_named(sharded, text):
  path = sharded / "model.safetensors.index.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is no index"):
    hf.load(sharded)


def test_a_folder_without_config(folder):
  (folder / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
    hf.load(folder)


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("{", " is not JSON: Expecting property name"),
    ("[]", " holds a list, expected an object"),
    ('{"model_type": "mamba"}', ": model_type 'mamba' is not supported"),
    ('{"model_type": "llama"}', ": the config of a llama model lacks the key"),
  ],
)
def test_a_broken_config_is_named(folder, text, says):
  path = folder / "config.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=rf"{re.escape(str(path))}{says}"):
    hf.load(folder)


def test_heads_that_do_not_divide_are_named(folder):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"num_key_value_heads": 3}))
  with pytest.raises(ValueError, match="heads=4 is no multiple of num_key_value_heads=3"):
    hf.load(folder)


def test_a_folder_with_pickled_weights_only(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors.*pickled"):
    hf.load(folder)


# --- saving ----------------------------------------------------------------------------------------------------------


def test_parameters_that_are_not_the_configs_are_refused(tmp_path):
  config, params = families.make("llama")
  for edit, says in [
    (lambda leaves: leaves.pop("norm/weight"), "missing norm/weight"),
    (lambda leaves: leaves.pop("lm_head/weight"), "missing lm_head/weight"),
    (lambda leaves: leaves.update({"extra": jnp.ones(3)}), "unknown extra"),
    (lambda leaves: leaves.update({"norm/weight": jnp.ones(3)}), r"norm/weight has shape \(3,\)"),
  ]:
    leaves = tree.flatten(params)
    edit(leaves)
    with pytest.raises(ValueError, match=says):
      hf.save(tmp_path / "out", tree.unflatten(leaves), config)
  assert not list(tmp_path.iterdir())


def test_weights_that_are_no_arrays_are_refused(tmp_path):
  config = families.config("llama")
  with pytest.raises(
    ValueError, match=r"embed_tokens/weight is a ShapeDtypeStruct.*adapters\.merge"
  ):
    hf.save(tmp_path / "out", decoder.abstract(config), config)


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(folder, monkeypatch):
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  config, params = families.make("llama")
  made = []

  def host(leaf, turn):
    made.append(leaf)
    if len(made) == 5:
      raise OSError(28, "No space left on device")
    return np.asarray(leaf).T if turn else np.asarray(leaf)

  monkeypatch.setattr(hf, "_host", host)
  with pytest.raises(OSError, match="No space left"):
    hf.save(folder, jax.tree.map(lambda x: np.asarray(x) + 1, params), config)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_save_replaces_the_whole_old_folder(folder):
  (folder / "stale.safetensors").write_bytes(b"")
  config, params = families.make("llama")
  hf.save(folder, params, config)
  assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_config_json_is_written_after_the_weights(tmp_path, monkeypatch):
  """A folder with a config is a folder with weights, even when only the rename was missed."""
  order = []
  tensors, texts = files.write_safetensors, files.write_json
  monkeypatch.setattr(
    files, "write_safetensors", lambda path, t: order.append(path.name) or tensors(path, t)
  )
  monkeypatch.setattr(
    files, "write_json", lambda path, value: order.append(path.name) or texts(path, value)
  )
  config, params = families.make("llama")
  hf.save(tmp_path / "out", params, config)
  assert order == ["model.safetensors", "config.json"]
