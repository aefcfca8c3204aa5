"""config.json to ModelConfig and back: old keys, new keys, keys left out, keys refused."""

import dataclasses
import json

import pytest
import transformers

from posttrain_jax.models import config as model_config
from posttrain_jax.models.config import FULL, SLIDING, ModelConfig, Rope, from_hf, to_hf
from tests.models import families
from tests.models.families import FAMILIES, WINDOW

NOT_COMPARED = dict(source="", bos_token_id=None, eos_token_ids=(), pad_token_id=None)


def meaning(config: ModelConfig) -> ModelConfig:
  """config without the ids and the text it came from, its kinds of layers written out."""
  return dataclasses.replace(config, layer_types=config.kinds, **NOT_COMPARED)


def read_by_transformers(keys):
  return json.loads(transformers.AutoConfig.for_model(**keys).to_json_string(use_diff=False))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_own_writing_of_a_config_reads_the_same(name):
  assert meaning(from_hf(read_by_transformers(FAMILIES[name]))) == meaning(families.config(name))


# What any file says; the rest has a meaning where it is absent.
NEEDED = {
  "model_type",
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
}
OPTIONAL = [(name, key) for name in FAMILIES for key in FAMILIES[name] if key not in NEEDED]


@pytest.mark.parametrize(("name", "key"), OPTIONAL)
def test_an_absent_key_means_what_transformers_takes_it_for(name, key):
  keys = {k: v for k, v in FAMILIES[name].items() if k != key}
  assert meaning(from_hf(keys)) == meaning(from_hf(read_by_transformers(keys)))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen2_sliding", "qwen3", "gemma2"])
def test_a_file_with_only_sizes_means_what_transformers_takes_it_for(name):
  keys = {k: FAMILIES[name][k] for k in NEEDED} | dict(num_attention_heads=8, hidden_size=64)
  assert meaning(from_hf(keys)) == meaning(from_hf(read_by_transformers(keys)))


def gemma3_4b():
  """The keys of the 4B release: a text model that leaves nearly everything out."""
  text = dict(
    hidden_size=2560,
    intermediate_size=10240,
    model_type="gemma3_text",
    num_hidden_layers=34,
    rope_scaling=dict(factor=8.0, rope_type="linear"),
    sliding_window=1024,
  )
  return dict(
    architectures=["Gemma3ForConditionalGeneration"],
    model_type="gemma3",
    eos_token_id=[1, 106],
    text_config=text,
    torch_dtype="bfloat16",
    vision_config=dict(model_type="siglip_vision_model"),
  )


def test_gemma3_leaves_most_of_its_config_out():
  found = from_hf(gemma3_4b())
  expected = from_hf(read_by_transformers(gemma3_4b()["text_config"]))
  assert (found.part_of, expected.part_of) == ("gemma3", "")
  assert meaning(dataclasses.replace(found, part_of="")) == meaning(expected)
  assert (found.num_heads, found.num_kv_heads, found.head_dim) == (8, 4, 256)
  assert found.rope == Rope(theta=1e6, kind="linear", factor=8.0)
  assert found.local_rope == Rope(theta=1e4)
  assert found.kinds == ((SLIDING,) * 5 + (FULL,)) * 5 + (SLIDING,) * 4
  assert found.eos_token_ids == (1, 106)


def test_the_text_model_of_a_multimodal_one_is_saved_as_a_text_model():
  saved = to_hf(from_hf(gemma3_4b()), tied=True, dtype="float32")
  assert saved["model_type"] == "gemma3_text"
  assert saved["architectures"] == ["Gemma3ForCausalLM"]
  assert saved["eos_token_id"] == [1, 106]
  assert "vision_config" not in saved
  assert from_hf(saved).kinds == from_hf(gemma3_4b()).kinds


@pytest.mark.parametrize(
  ("name", "old", "new"),
  [
    ("llama", dict(rope_theta=5e5), dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    (
      "llama",
      dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0)),
      dict(rope_parameters=dict(rope_type="linear", rope_theta=5e5, factor=2.0)),
    ),
    (
      "gemma3",
      dict(
        rope_parameters=None,
        rope_theta=1e6,
        rope_local_base_freq=100.0,
        rope_scaling=dict(rope_type="linear", factor=8.0),
        layer_types=None,
        sliding_window_pattern=6,
      ),
      {},
    ),
  ],
)  # fmt: skip
def test_old_and_new_rope_keys_mean_the_same(name, old, new):
  assert meaning(families.config(name, **old)) == meaning(families.config(name, **new))


def test_windows_and_kinds():
  assert families.config("mistral").kinds == (SLIDING,) * 3
  assert families.config("mistral", sliding_window=None).kinds == (FULL,) * 3
  assert families.config("qwen2").window is None
  assert families.config("qwen2_sliding").kinds == (FULL, SLIDING, SLIDING)
  assert families.config("qwen2_sliding").window == WINDOW
  assert families.config("qwen2_sliding", use_sliding_window=False).kinds == (FULL,) * 3
  assert families.config("gemma2").kinds == (SLIDING, FULL, SLIDING)


def test_numbers_that_families_differ_in():
  gemma2 = families.config("gemma2")
  assert gemma2.softmax_scale == pytest.approx(24**-0.5)
  assert (gemma2.attention_softcap, gemma2.final_softcap) == (2.0, 3.0)
  assert families.config("gemma2", attn_logit_softcapping=None).attention_softcap is None
  assert families.config("qwen3").softmax_scale == 0.25
  assert families.config("llama").head_dim == 8
  assert families.config("llama", eos_token_id=[2, 5]).eos_token_ids == (2, 5)
  assert families.config("llama", eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize(
  ("name", "change", "says"),
  [
    ("llama", dict(model_type="mamba"), "model_type 'mamba' is not supported.*llama, mistral"),
    ("llama", dict(model_type=None), "model_type None is not supported"),
    ("llama", dict(hidden_act="relu"), "activation 'relu'"),
    ("gemma2", dict(hidden_activation="gelu"), "activation 'gelu'"),
    ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=2)), "rope_type 'yarn'.*llama3"),
    ("llama", dict(rope_scaling=dict(type="dynamic", factor=2)), "rope_type 'dynamic'"),
    ("llama", dict(rope_scaling=dict(type="linear")), "lacks the key 'factor'"),
    ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "lacks .*'low_freq_factor'"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("qwen3", dict(layer_types=[FULL]), "layer_types must be 3 of"),
    ("qwen3", dict(layer_types=["chunked_attention"] * 3), "layer_types must be 3 of"),
    ("qwen3", dict(layer_types=[SLIDING] * 3), "no sliding_window is set"),
  ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(name, change, says):
  with pytest.raises(ValueError, match=says):
    families.config(name, **change)


@pytest.mark.parametrize("key", sorted(NEEDED - {"model_type"}))
def test_a_missing_size_is_named(key):
  keys = {k: v for k, v in FAMILIES["llama"].items() if k != key}
  with pytest.raises(ValueError, match=f"llama model lacks the key '{key}'"):
    from_hf(keys)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_that_came_from_no_file_is_described_in_full(name):
  bare = dataclasses.replace(families.config(name), source="{}")
  described = to_hf(bare, tied=bare.tied, dtype="float32")
  assert meaning(from_hf(described)) == meaning(bare)
  assert from_hf(described).eos_token_ids == bare.eos_token_ids
  assert meaning(from_hf(read_by_transformers(described))) == meaning(bare)


def test_only_what_changed_is_written_over_the_keys_it_came_with():
  keys = FAMILIES["llama"] | dict(
    torch_dtype="bfloat16", unheard_of=[1], quantization_config=dict(bits=4)
  )
  written = to_hf(from_hf(keys), tied=True, dtype="float32")
  expected = keys | dict(torch_dtype="float32", tie_word_embeddings=True)
  del expected["quantization_config"]
  assert written == expected
  resized = dataclasses.replace(from_hf(keys), vocab_size=100)
  assert to_hf(resized, tied=True, dtype="float32")["vocab_size"] == 100


def test_every_family_has_its_defaults_and_architecture():
  assert (
    model_config.FAMILIES.keys()
    == model_config.DEFAULTS.keys()
    == model_config.ARCHITECTURES.keys()
    == {FAMILIES[name]["model_type"] for name in FAMILIES}
  )


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(num_hidden_layers=10**30), "num_hidden_layers=1000.*: expected a whole number from 1 to"),
    (dict(hidden_size="64"), "hidden_size='64': expected a whole number"),
    (dict(num_attention_heads=0), "num_attention_heads=0: expected a whole number"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan: expected a positive number"),
    (dict(rope_theta=[1]), r"rope_theta=\[1\]: expected a positive number"),
    (dict(rope_scaling="linear"), "rope_scaling='linear': expected an object"),
    (dict(rope_scaling=dict(type="linear", factor="4")), "factor='4' of the RoPE"),
    (dict(rope_scaling=dict(type=["linear"])), r"rope_type \['linear'\] is not supported"),
    (dict(eos_token_id={"a": 1}), "eos_token_id={'a': 1}: expected a token's number"),
    (dict(eos_token_id=[2, "x"]), r"eos_token_id=\[2, 'x'\]: expected a token's number"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings='no': expected true or false"),
    (dict(architectures="x"), "architectures='x': expected a list of names"),
    (dict(model_type=["llama"]), r"model_type \['llama'\] is not supported"),
    (dict(hidden_act=["silu"]), r"activation \['silu'\] is not supported"),
    (dict(layer_types=3), "layer_types=3: expected a list of names"),
  ],
)
def test_values_of_another_kind_are_named(changes, said):
  with pytest.raises(ValueError, match=said):
    families.config("llama", **changes)
