"""Writes small GGUF files with known weights, as llama.cpp's converter lays them out."""

from pathlib import Path

import gguf
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 2, 4, 2, 8, 32, 64
CORPUS = ["the cat sat on the mat and the dog sat on the log", "hello world, it's 1234 and 56"] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vocabulary() -> tuple[list[str], list[str]]:
  """Tokens and merges of a byte-level BPE: specials, 256 bytes, a few words."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=SPECIAL,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(CORPUS, trainer)
  ids = tokenizer.get_vocab()
  tokens = sorted(ids, key=lambda token: ids[token])
  seen = set(SPECIAL) | set(pre_tokenizers.ByteLevel.alphabet())
  merges = []
  for token in tokens:
    if token in seen:
      continue
    cut = next(i for i in range(1, len(token)) if token[:i] in seen and token[i:] in seen)
    merges.append(f"{token[:cut]} {token[cut:]}")
    seen.add(token)
  return tokens, merges


def weights(arch: str = "llama", *, tied: bool = True) -> dict[str, np.ndarray]:
  """Random weights under their Hugging Face names, `[out, in]`."""
  rng = np.random.default_rng(0)
  vocab = len(vocabulary()[0])
  shapes = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
  if not tied:
    shapes["lm_head.weight"] = (vocab, HIDDEN)
  queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
  for i in range(LAYERS):
    layer = {
      "input_layernorm.weight": (HIDDEN,),
      "post_attention_layernorm.weight": (HIDDEN,),
      "self_attn.q_proj.weight": (queries, HIDDEN),
      "self_attn.k_proj.weight": (keys, HIDDEN),
      "self_attn.v_proj.weight": (keys, HIDDEN),
      "self_attn.o_proj.weight": (HIDDEN, queries),
      "mlp.gate_proj.weight": (INNER, HIDDEN),
      "mlp.up_proj.weight": (INNER, HIDDEN),
      "mlp.down_proj.weight": (HIDDEN, INNER),
    }
    if arch == "qwen2":
      layer |= {"self_attn.q_proj.bias": (queries,)}
      layer |= {f"self_attn.{x}_proj.bias": (keys,) for x in "kv"}
    if arch == "qwen3":
      layer |= {f"self_attn.{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(
  path: Path,
  *,
  arch: str = "llama",
  tied: bool = True,
  matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
  drop: str = "",
  replace: dict[str, np.ndarray] | None = None,
  **metadata,
) -> Path:
  """`metadata` overrides keys (dots written as `__`; None leaves the key out)."""
  tokens, merges = vocabulary()
  keys = {
    f"{arch}.block_count": LAYERS,
    f"{arch}.context_length": 128,
    f"{arch}.embedding_length": HIDDEN,
    f"{arch}.feed_forward_length": INNER,
    f"{arch}.attention.head_count": HEADS,
    f"{arch}.attention.head_count_kv": KV_HEADS,
    f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
    f"{arch}.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
    "tokenizer.ggml.merges": merges,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": TEMPLATE,
  } | {key.replace("__", "."): value for key, value in metadata.items()}
  writer = gguf.GGUFWriter(path, arch)
  for key, value in keys.items():
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    elif value is not None:
      writer.add_array(key, value)
  # The names of one architecture serve all: those that exist are the same.
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS)
  tensors: dict[str, np.ndarray] = {}
  for name, array in weights(arch, tied=tied).items():
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
      heads = HEADS if ".q_proj." in name else KV_HEADS
      array = interleave(array, heads)
    known = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert known is not None, name
    tensors[known] = array
  tensors.update(replace or {})
  for name, array in tensors.items():
    if name == drop:
      continue
    if array.ndim == 2 and matrices != gguf.GGMLQuantizationType.F32:
      writer.add_tensor(name, gguf.quants.quantize(array, matrices), raw_dtype=matrices)
    else:
      writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
  """Row i of a head's first half beside row i of its second, one row at a time."""
  out = np.empty_like(rows)
  dim = rows.shape[0] // heads
  for h in range(heads):
    for i in range(dim // 2):
      out[h * dim + 2 * i] = rows[h * dim + i]
      out[h * dim + 2 * i + 1] = rows[h * dim + dim // 2 + i]
  return out
