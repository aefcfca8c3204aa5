"""A GGUF file that is written is the model: every number, every token, and nothing that the file cannot say."""

import dataclasses
import json
import weakref

import gguf as gguf_package
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as tokenizers_package
import transformers
from tokenizers import pre_tokenizers

from posttrain_jax.core import shards, tree
from posttrain_jax.models import decoder, gguf, gguf_tokenizer, gguf_write, hf
from tests.marks import few
from tests.models import families, tiny_gguf

LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)


def make_folder(tmp_path, arch="llama", tied=True, **metadata):
  extra = {"qwen3__attention__key_length": tiny_gguf.HEAD_DIM} if arch == "qwen3" else {}
  if arch != "llama":  # transformers cuts text as Qwen does, whatever the folder of a Qwen says
    extra["tokenizer__ggml__pre"] = "qwen2"
  path = tiny_gguf.write(tmp_path / "first.gguf", arch=arch, tied=tied, **{**extra, **metadata})
  return gguf.convert(path, tmp_path / "folder")


def described(folder, rows=None, **options):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = dict(
    bos=tokenizer.bos_token_id,
    eos=tokenizer.eos_token_id,
    unknown=tokenizer.unk_token_id,
    padding=tokenizer.pad_token_id,
  )
  given = dict(ids=ids, stops=[], template=tokenizer.chat_template, **options)
  return gguf_tokenizer.describe(
    tokenizer.backend_tokenizer, rows or hf.read_config(folder).vocab_size, **given
  )


def write(folder, path, kind="f16", config=None):
  gguf_write.write(
    path,
    shards.Reader(folder),
    config or hf.read_config(folder),
    described(folder),
    kind=kind,
    about={"general.name": "tiny"},
  )
  return path


def logits(params, config):
  return np.asarray(decoder.forward(params, jnp.asarray([[5, 9, 2, 40, 77, 3]]), config))


def rounded(params):
  """Matrices in float16, norms and biases as they are."""
  matrix = lambda path: path.endswith("_proj/weight") or path[:5] in ("embed", "lm_he")
  return tree.unflatten(
    (path, leaf.astype(jnp.float16).astype(jnp.float32) if matrix(path) else leaf)
    for path, leaf in tree.items(params)
  )


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", few([True, False], True), ids=["tied", "untied"])
def test_f16_is_the_model_rounded_to_float16(tmp_path, arch, tied):
  folder = make_folder(tmp_path, arch, tied)
  again = gguf.convert(write(folder, tmp_path / "again.gguf"), tmp_path / "again")
  first, second = shards.Reader(folder), shards.Reader(again)
  assert first.where.keys() == second.where.keys()
  for name in first.where:
    wanted = first.get(name)
    if wanted.ndim == 2:
      wanted = wanted.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(second.get(name), wanted, err_msg=name)
  params, config = hf.load(folder)
  found, found_config = hf.load(again)
  np.testing.assert_allclose(
    logits(found, found_config), logits(rounded(params), config), rtol=1e-5
  )
  assert dataclasses.replace(found_config, source="") == dataclasses.replace(config, source="")
  for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    assert (again / name).read_text() == (folder / name).read_text()


def blocks_of(tensor):
  """What the bytes of a tensor say, written out block by block: {type: numbers}."""
  raw = np.asarray(tensor.data).reshape(-1)
  rows = []
  if tensor.tensor_type == gguf_package.GGMLQuantizationType.Q8_0:
    for block in raw.view(np.uint8).reshape(-1, 34):
      rows.append(block[2:].view(np.int8) * np.float32(block[:2].view(np.float16)[0]))
  if tensor.tensor_type == gguf_package.GGMLQuantizationType.Q4_0:
    for block in raw.view(np.uint8).reshape(-1, 18):
      codes = [b & 15 for b in block[2:]] + [b >> 4 for b in block[2:]]
      rows.append((np.array(codes, np.float32) - 8) * np.float32(block[:2].view(np.float16)[0]))
  return np.concatenate(rows).reshape(tuple(reversed(tensor.shape.tolist())))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_quantised_file_reads_back_as_its_bytes_say(tmp_path, kind):
  folder = make_folder(tmp_path)
  file = gguf.File(write(folder, tmp_path / "m.gguf", kind))
  dense = shards.Reader(folder)
  types = {name: file.tensors[theirs].tensor_type.name for name, theirs in file.where.items()}
  assert types["model.embed_tokens.weight"] == "Q8_0"
  assert types["model.layers.0.mlp.up_proj.weight"] == kind.upper()
  assert types["model.norm.weight"] == "F32"
  for name, theirs in file.where.items():
    if types[name] == "F32":
      continue
    stored = blocks_of(file.tensors[theirs])
    if "q_proj" in name or "k_proj" in name:
      heads = tiny_gguf.HEADS if "q_proj" in name else tiny_gguf.KV_HEADS
      np.testing.assert_array_equal(tiny_gguf.interleave(file.get(name), heads), stored)
    else:
      np.testing.assert_array_equal(file.get(name), stored)
    off = np.linalg.norm(file.get(name) - dense.get(name)) / np.linalg.norm(dense.get(name))
    assert (0.002 < off < 0.01) if types[name] == "Q8_0" else (0.05 < off < 0.13)


def test_rows_that_blocks_do_not_divide_are_float16(tmp_path):
  folder = make_folder(tmp_path)
  narrow = dataclasses.replace(hf.read_config(folder), intermediate_size=40)

  class Narrow(shards.Reader):
    def shape(self, name):
      return tuple(40 if n == 64 else n for n in super().shape(name))

    def get(self, name):
      return super().get(name)[tuple(slice(n) for n in self.shape(name))]

  path = tmp_path / "m.gguf"
  gguf_write.write(path, Narrow(folder), narrow, described(folder), kind="q4_0", about={})
  file = gguf.File(path)
  assert file.tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
  assert file.tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"


def test_one_matrix_is_in_memory_at_a_time(tmp_path):
  folder = make_folder(tmp_path)
  given = []

  class Reader(shards.Reader):
    def get(self, name):
      assert not any(array() is not None for array in given), name
      array = super().get(name)
      given.append(weakref.ref(array))
      return array

  gguf_write.write(
    tmp_path / "m.gguf",
    Reader(folder),
    hf.read_config(folder),
    described(folder),
    kind="q4_0",
    about={},
  )
  assert len(given) == 20


def test_rope_scalings_return(tmp_path):
  folder = make_folder(tmp_path, llama__rope__freq_base=500000.0)
  for scaling in (LLAMA3, dict(rope_type="linear", factor=4.0)):
    config = json.loads((folder / "config.json").read_text()) | {"rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    file = gguf.File(write(folder, tmp_path / "m.gguf"))
    assert file.described["rope_scaling"] == scaling
    assert file.described["rope_theta"] == 500000.0


def test_a_mistral_without_a_window_is_a_llama(tmp_path):
  folder = make_folder(tmp_path)
  config = json.loads((folder / "config.json").read_text())
  config |= dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
  (folder / "config.json").write_text(json.dumps(config))
  again = gguf.convert(write(folder, tmp_path / "m.gguf"), tmp_path / "again")
  params, config = hf.load(folder)
  np.testing.assert_allclose(logits(*hf.load(again)), logits(rounded(params), config), rtol=1e-5)


@pytest.mark.parametrize(
  ("family", "changes", "message"),
  [
    ("gemma2", {}, "'gemma2' is not written as GGUF; those that are: llama, mistral, qwen2, qwen3"),
    ("mistral", dict(sliding_window=8), "layers that see a sliding window"),
    ("llama", dict(attention_bias=True), "biases in its attention"),
    ("llama", dict(mlp_bias=True), "biases in its MLP"),
    ("llama", dict(rope_scaling={**LLAMA3, "low_freq_factor": 2.0}), "other than Meta's"),
    ("qwen2", dict(rope_scaling=LLAMA3), "which no other architecture has"),
    ("qwen2", dict(head_dim=16), "heads of another width"),
    (
      "qwen3",
      dict(architectures=["Qwen3ForSequenceClassification"], num_labels=1),
      "a reward model's head has no place in a GGUF file",
    ),
  ],
)
def test_what_a_file_cannot_hold_is_named(family, changes, message):
  with pytest.raises(ValueError, match=message):
    gguf_write.check(families.config(family, **changes))


def test_numbers_beyond_float16_and_lacking_tensors_leave_no_file(tmp_path):
  folder = make_folder(tmp_path)

  class Reader(shards.Reader):
    def get(self, name):
      return super().get(name) * (1e5 if "layers.1.mlp.up_proj" in name else 1)

  def attempt(reader):
    path = tmp_path / "out" / "m.gguf"
    gguf_write.write(path, reader, hf.read_config(folder), described(folder), kind="f16", about={})

  with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight holds .*, which float16 cannot"):
    attempt(Reader(folder))
  lacking = shards.Reader(folder)
  del lacking.where["model.norm.weight"]
  with pytest.raises(ValueError, match=r"no tensor 'model\.norm\.weight'"):
    attempt(lacking)
  assert not list((tmp_path / "out").iterdir())


# Tokenizers


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_kind_of_a_tokenizer_is_seen(tmp_path, pre, bos):
  folder = make_folder(tmp_path, tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=bos)
  fields = described(folder)
  assert fields["tokenizer.ggml.pre"] == pre
  assert fields["tokenizer.ggml.add_bos_token"] is bos
  tokens, merges = tiny_gguf.vocabulary()
  assert fields["tokenizer.ggml.tokens"] == tokens
  assert fields["tokenizer.ggml.merges"] == merges
  assert fields["tokenizer.ggml.token_type"] == [3] * 3 + [1] * (len(tokens) - 3)
  assert fields["tokenizer.chat_template"] == tiny_gguf.TEMPLATE


def test_ids_without_a_token_are_unused(tmp_path):
  folder = make_folder(tmp_path)
  count = len(tiny_gguf.vocabulary()[0])
  fields = described(folder, rows=count + 2)
  assert fields["tokenizer.ggml.tokens"][count:] == [f"[PAD{count}]", f"[PAD{count + 1}]"]
  assert fields["tokenizer.ggml.token_type"][count:] == [5, 5]
  with pytest.raises(ValueError, match=f"{count} tokens, the model's embedding {count - 1} rows"):
    described(folder, rows=count - 1)


def test_every_end_of_an_answer_has_its_place(caplog):
  tokenizer = tokenizers_package.Tokenizer.from_str(byte_tokenizer().to_str())
  tokenizer.add_special_tokens(["<end>", "<turn>", "<message>", "<more>"])
  ids = {
    token: tokenizer.token_to_id(token) for token in ("<end>", "<turn>", "<message>", "<more>")
  }
  named = dict(bos=None, eos=ids["<end>"], unknown=None, padding=None)
  fields = gguf_tokenizer.describe(
    tokenizer, 300, ids=named, stops=[ids["<turn>"], *ids.values()], template=None
  )
  got = {x: fields[f"tokenizer.ggml.{x}_token_id"] for x in ("eos", "eot", "eom")}
  assert got == dict(eos=ids["<end>"], eot=ids["<turn>"], eom=ids["<message>"])
  assert "tokenizer.ggml.bos_token_id" not in fields
  assert "tokenizer.chat_template" not in fields
  assert "'<more>' is not among them" in caplog.text


def byte_tokenizer():
  """A byte-level BPE with one merge."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {letter: i for i, letter in enumerate([*alphabet, "ab"])}
  tokenizer = tokenizers_package.Tokenizer(tokenizers_package.models.BPE(vocab, [("a", "b")]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  return tokenizer


def with_prefix_space():
  tokenizer = byte_tokenizer()
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  return tokenizer


def with_greedy_token():
  tokenizer = byte_tokenizer()
  tokenizer.add_tokens([tokenizers_package.AddedToken("<tool>", lstrip=True)])
  return tokenizer


def with_end():
  tokenizer = byte_tokenizer()
  tokenizer.add_special_tokens(["<end>"])
  tokenizer.post_processor = tokenizers_package.processors.TemplateProcessing(
    single="$A <end>", special_tokens=[("<end>", 257)]
  )
  return tokenizer


def without_merges():
  vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  tokenizer = tokenizers_package.Tokenizer(tokenizers_package.models.BPE(vocab, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  return tokenizer


def of_pieces():
  return tokenizers_package.Tokenizer(
    tokenizers_package.models.BPE({"<unk>": 0}, [], unk_token="<unk>", byte_fallback=True)
  )


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (with_prefix_space, "cuts text into words in none of the ways.* gpt-2, llama-bpe"),
    (with_greedy_token, "cuts 'one <tool> two<tool>three' otherwise"),
    (with_end, "cuts '' otherwise"),
    (without_merges, "merges nothing"),
    (of_pieces, "the tokenizer is a BPE with unk_token; what is written"),
  ],
)
def test_a_tokenizer_that_a_file_cannot_hold_is_refused(make, message):
  ids = dict(bos=None, eos=0, unknown=None, padding=None)
  with pytest.raises(ValueError, match=message):
    gguf_tokenizer.describe(make(), 300, ids=ids, stops=[], template=None)
