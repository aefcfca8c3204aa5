"""A GGUF file read back: every weight in its place, a tokenizer that is the file's, clear errors."""

import json

import gguf as gguf_package
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors import numpy as safetensors_numpy
from safetensors import safe_open

from posttrain_jax.models import gguf
from tests.models import tiny_gguf

Q = gguf_package.GGMLQuantizationType


def load(folder):
  return safetensors_numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_float32_weights_return_exactly(tmp_path, arch, tied):
  extra = {"qwen3__attention__key_length": tiny_gguf.HEAD_DIM} if arch == "qwen3" else {}
  path = tiny_gguf.write(tmp_path / "m.gguf", arch=arch, tied=tied, **extra)
  found = load(gguf.convert(path, tmp_path / "out"))
  expected = tiny_gguf.weights(arch, tied=tied)
  assert found.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
  config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
  assert config.model_type == arch
  assert config.tie_word_embeddings is tied


@pytest.mark.parametrize(("kind", "bits"), [(Q.Q8_0, 8), (Q.Q4_1, 4)], ids=["q8_0", "q4_1"])
def test_quantised_weights_return_within_half_a_step(tmp_path, kind, bits):
  path = tiny_gguf.write(tmp_path / "m.gguf", matrices=kind)
  found = load(gguf.convert(path, tmp_path / "out"))
  worst = 0
  for name, expected in tiny_gguf.weights().items():
    if expected.ndim == 1:
      np.testing.assert_array_equal(found[name], expected)
      continue
    blocks = expected.reshape(-1, 32)
    # Q8_0 spans [-max, max] with 255 codes, Q4_1 [min, max] with 16; scales are float16.
    if bits == 8:
      step = 2 * np.abs(blocks).max(-1, keepdims=True) / 254
    else:
      step = np.ptp(blocks, axis=-1, keepdims=True) / 15
    error = np.abs(found[name].reshape(-1, 32) - blocks) / step
    worst = max(worst, error.max())
  assert 0.4 < worst < 0.6


def test_interleaved_rope_of_the_file_is_half_rotation_of_the_folder(tmp_path):
  """What the permutation is for: both conventions give the same attention scores."""
  path = tiny_gguf.write(tmp_path / "m.gguf")
  found = load(gguf.convert(path, tmp_path / "out"))
  stored = {t.name: t.data for t in gguf_package.GGUFReader(path).tensors}
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(2, tiny_gguf.HIDDEN))
  d = tiny_gguf.HEAD_DIM
  angles = 10000.0 ** (-np.arange(0, d, 2) / d)

  def interleaved(v, position):
    z = (v[:, 0::2] + 1j * v[:, 1::2]) * np.exp(1j * position * angles)
    return np.concatenate([z.real, z.imag], -1)

  def halves(v, position):
    z = (v[:, : d // 2] + 1j * v[:, d // 2 :]) * np.exp(1j * position * angles)
    return np.concatenate([z.real, z.imag], -1)

  def scores(q, k, rotate):
    q = rotate((q @ x).reshape(tiny_gguf.HEADS, d), 7)
    k = rotate((k @ y).reshape(tiny_gguf.KV_HEADS, d), 3)
    return q @ k.T

  theirs = scores(stored["blk.1.attn_q.weight"], stored["blk.1.attn_k.weight"], interleaved)
  layer = "model.layers.1.self_attn"
  ours = scores(found[f"{layer}.q_proj.weight"], found[f"{layer}.k_proj.weight"], halves)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_in_file_and_config(tmp_path, dtype):
  folder = gguf.convert(tiny_gguf.write(tmp_path / "m.gguf"), tmp_path / "out", dtype=dtype)
  with safe_open(folder / "model.safetensors", "numpy") as f:
    tag = f.get_slice("model.norm.weight").get_dtype()
  assert tag == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
  assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype


def test_config_holds_what_the_metadata_say(tmp_path):
  folder = gguf.convert(tiny_gguf.write(tmp_path / "m.gguf"), tmp_path / "out")
  config = transformers.AutoConfig.from_pretrained(folder)
  assert isinstance(config, transformers.LlamaConfig)
  assert (config.num_hidden_layers, config.num_attention_heads) == (2, 4)
  assert (config.num_key_value_heads, config.head_dim) == (2, 8)
  assert (config.hidden_size, config.intermediate_size) == (32, 64)
  assert config.rms_norm_eps == 1e-5  # not the float32 neighbour 9.99999974e-06
  assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
  assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_end_of_turn_also_stops_generation(tmp_path):
  path = tiny_gguf.write(tmp_path / "m.gguf", tokenizer__ggml__eot_token_id=0)
  folder = gguf.convert(path, tmp_path / "out")
  assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [2, 0]


def llama3_factors(theta, factor):
  """Plain frequencies over those of Llama 3's rule, written out case by case."""
  factors = []
  for i in range(tiny_gguf.HEAD_DIM // 2):
    f = theta ** (-2 * i / tiny_gguf.HEAD_DIM)
    wavelength = 2 * np.pi / f
    if wavelength < 8192 / 4:
      scaled = f
    elif wavelength > 8192:
      scaled = f / factor
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      scaled = (1 - smooth) * f / factor + smooth * f
    factors.append(f / scaled)
  return np.array(factors, np.float32)


# With 8 dimensions and Llama 3's base two frequencies stay, one is smoothed and one divided.
THETA = 500000.0


def test_llama3_rope_is_recovered_from_its_factors(tmp_path):
  factors = llama3_factors(THETA, 32.0)
  assert sorted(factors)[:2] == [1, 1]
  assert 1 < sorted(factors)[2] < sorted(factors)[3] == 32
  path = tiny_gguf.write(
    tmp_path / "m.gguf", replace={"rope_freqs.weight": factors}, llama__rope__freq_base=THETA
  )
  config = transformers.AutoConfig.from_pretrained(gguf.convert(path, tmp_path / "out"))
  assert config.rope_parameters == {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }


def test_tokenizer_loads_without_torch_and_is_the_files(tmp_path):
  folder = gguf.convert(tiny_gguf.write(tmp_path / "m.gguf"), tmp_path / "out")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  tokens, _ = tiny_gguf.vocabulary()
  assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
  assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
  assert (tokenizer.unk_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_end|>")
  assert tokenizer.tokenize("the cat sat, 1234") == [
    "the", "Ġcat", "Ġsat", ",", "Ġ", "1", "2", "3", "4",
  ]  # fmt: skip
  assert tokenizer.model_max_length == 128
  for text in ["", "  the\n\tcat  ", "naïve 🙂 漢字", "it's\r\n56", "\x00\ufeff"]:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert 1 not in ids  # no BOS is added


def test_chat_template_renders_special_tokens(tmp_path):
  folder = gguf.convert(tiny_gguf.write(tmp_path / "m.gguf"), tmp_path / "out")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  chat = [{"role": "user", "content": "the cat"}]
  ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
  assert tokenizer.decode(ids) == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
  assert (ids[0], ids.count(1), ids.count(2)) == (1, 2, 1)
  assert "<|im_" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_templates_beside_the_default_come_along(tmp_path):
  named = {
    "tokenizer__chat_templates": ["tool_use"],
    "tokenizer__chat_template__tool_use": "tools: {{ tools }}",
  }
  path = tiny_gguf.write(tmp_path / "m.gguf", **named)
  folder = gguf.convert(path, tmp_path / "out")
  templates = transformers.AutoTokenizer.from_pretrained(folder).chat_template
  assert templates == {"default": tiny_gguf.TEMPLATE, "tool_use": "tools: {{ tools }}"}


def test_eos_is_added_where_the_file_says_so(tmp_path):
  path = tiny_gguf.write(tmp_path / "m.gguf", tokenizer__ggml__add_eos_token=True)
  tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.convert(path, tmp_path / "out"))
  bare = tokenizer("Hi", add_special_tokens=False)["input_ids"]
  assert tokenizer("Hi")["input_ids"] == [*bare, tokenizer.eos_token_id]


def test_bos_is_added_where_the_file_says_so(tmp_path):
  path = tiny_gguf.write(tmp_path / "m.gguf", tokenizer__ggml__add_bos_token=True)
  tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.convert(path, tmp_path / "out"))
  with_bos = tokenizer("the cat").input_ids
  assert with_bos == [1, *tokenizer("the cat", add_special_tokens=False).input_ids]


@pytest.mark.parametrize(
  ("pre", "expected"),
  [
    ("gpt-2", ["it", "'s", " 1234", " a"]),
    ("smollm", ["it", "'s", " ", "1", "2", "3", "4", " a"]),
    ("llama-bpe", ["it", "'s", " ", "123", "4", " a"]),
    ("qwen2", ["it", "'s", " ", "1", "2", "3", "4", " a"]),
  ],
)
def test_pre_tokenizers_cut_words_their_way(tmp_path, pre, expected):
  path = tiny_gguf.write(tmp_path / "m.gguf", tokenizer__ggml__pre=pre)
  gguf.convert(path, tmp_path / "out")
  cut = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).pre_tokenizer
  words = cut.pre_tokenize_str("it's 1234 a")
  assert [word.replace("Ġ", " ") for word, _ in words] == expected


def test_user_defined_tokens_are_cut_out_but_shown(tmp_path):
  tokens, _ = tiny_gguf.vocabulary()
  tokens = [*tokens, "<tool>"]
  kinds = [3] * len(tiny_gguf.SPECIAL) + [1] * (len(tokens) - 4) + [4]
  embeddings = np.zeros((len(tokens), tiny_gguf.HIDDEN), np.float32)
  path = tiny_gguf.write(
    tmp_path / "m.gguf",
    tokenizer__ggml__tokens=tokens,
    tokenizer__ggml__token_type=kinds,
    replace={"token_embd.weight": embeddings},
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.convert(path, tmp_path / "out"))
  ids = tokenizer("the<tool><|im_end|>").input_ids
  assert ids[-2:] == [len(tokens) - 1, 2]
  assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool>"


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_file_is_refused_and_leaves_nothing(tmp_path, keep):
  path = tiny_gguf.write(tmp_path / "m.gguf")
  data = path.read_bytes()
  path.write_bytes(data[: int(keep * len(data))])
  with pytest.raises(ValueError, match=r"m\.gguf is no whole GGUF file.*download it again"):
    gguf.convert(path, tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_other_bytes_are_refused(tmp_path):
  (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" * 1000)
  with pytest.raises(ValueError, match="no whole GGUF file"):
    gguf.convert(tmp_path / "m.gguf", tmp_path / "out")
  with pytest.raises(FileNotFoundError, match=r"no GGUF file at .*absent\.gguf"):
    gguf.convert(tmp_path / "absent.gguf", tmp_path / "out")


WRONG_SHAPE = {"blk.1.ffn_up.weight": np.zeros((32, 32), np.float32)}
STRANGER = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
OTHER_ROPE = {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(arch="phi3"), "architecture 'phi3'; supported: llama, qwen2, qwen3"),
    (dict(drop="blk.1.attn_k.weight"), r"no tensor 'blk\.1\.attn_k\.weight'"),
    (dict(replace=WRONG_SHAPE), r"ffn_up\.weight has shape \(32, 32\).*say \(64, 32\)"),
    (dict(replace=STRANGER), r"no place for: blk\.0\.attn_q\.bias"),
    (dict(replace=OTHER_ROPE), "not the RoPE scaling of Llama 3"),
    (dict(llama__expert_count=8), "mixture of 8 experts"),
    (dict(llama__rope__scaling__type="yarn"), "RoPE scaling 'yarn'"),
    (dict(llama__rope__dimension_count=4), "part of each head"),
    (dict(llama__attention__head_count_kv=[2, 1]), "differ by layer"),
    (dict(llama__embedding_length=None), r"no metadata 'llama\.embedding_length'"),
    (dict(tokenizer__ggml__pre="falcon"), "'falcon'; supported: gpt-2, llama-bpe, qwen2, smollm"),
    (dict(tokenizer__ggml__model="llama"), "tokenizer of model 'llama'; supported: 'gpt2'"),
    (dict(tokenizer__ggml__merges=None), r"no 'tokenizer\.ggml\.merges'"),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_converted_is_named_and_leaves_nothing(tmp_path, options, message):
  path = tiny_gguf.write(tmp_path / "m.gguf", **options)
  with pytest.raises(ValueError, match=message) as error:
    gguf.convert(path, tmp_path / "out")
  assert str(path) in str(error.value)
  assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_broken_vocabulary_is_refused(tmp_path):
  tokens, merges = tiny_gguf.vocabulary()
  path = tiny_gguf.write(tmp_path / "a.gguf", tokenizer__ggml__merges=[*merges, "a zebra"])
  with pytest.raises(ValueError, match="merge 'a zebra' is not of two tokens"):
    gguf.convert(path, tmp_path / "out")
  tokens[-1] = tokens[100]
  path = tiny_gguf.write(tmp_path / "b.gguf", tokenizer__ggml__tokens=tokens)
  with pytest.raises(ValueError, match=f"twice, as 100 and {len(tokens) - 1}"):
    gguf.convert(path, tmp_path / "out")


def test_unknown_dtype_and_occupied_folder_are_refused(tmp_path):
  path = tiny_gguf.write(tmp_path / "m.gguf")
  with pytest.raises(ValueError, match="dtype='int8': write one of float32, float16, bfloat16"):
    gguf.convert(path, tmp_path / "out", dtype="int8")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine.txt").touch()
  with pytest.raises(FileExistsError, match="exists already"):
    gguf.convert(path, tmp_path / "out")
  assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
