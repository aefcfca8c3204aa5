"""A model, or a LoRA of one, becomes a GGUF file: the one that llama.cpp, and what is built on it, runs.

Tensors pass one at a time.  Matrices take the kind that is asked for, norms and biases stay float32, as llama.cpp's own
converter leaves them.  In `q4_0` the embedding and the head, to which 4 bits do most harm, are `q8_0`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np

from posttrain_jax.core import ending
from posttrain_jax.models.config import SLIDING, ModelConfig
from posttrain_jax.models.gguf import (
  EMBEDDING,
  FAMILIES,
  HEAD,
  LLAMA3,
  LORA_A,
  LORA_B,
  ROPE,
  permuted,
  rope_factors,
  tensor_names,
)

Type = gguf.GGMLQuantizationType
# what the command calls it -> (type of the matrices, of the embedding and the head)
KINDS = {
  "f16": (Type.F16, Type.F16),
  "q8_0": (Type.Q8_0, Type.Q8_0),
  "q4_0": (Type.Q4_0, Type.Q8_0),
}
# what a file says of itself
FILE_TYPES = {
  "f16": gguf.LlamaFileType.MOSTLY_F16,
  "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
  "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
# The model types that there is an architecture for; a Mistral without a window computes what a Llama does.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


NO_SCORES = (
  "a reward model's head has no place in a GGUF file that others run; export it without --gguf"
)


class Tensors(Protocol):
  """Tensors by their Hugging Face names, each read when it is asked for."""

  @property
  def where(self) -> Mapping[str, Any]: ...

  def shape(self, name: str) -> tuple[int, ...]: ...

  def get(self, name: str) -> np.ndarray: ...


def check(config: ModelConfig) -> None:
  """Raises unless a GGUF file can hold a model of this config, and `models.gguf` reads it from one."""
  if config.scores:
    raise ValueError(NO_SCORES)
  if config.family not in ARCHITECTURES:
    raise ValueError(
      f"a model of type {config.family!r} is not written as GGUF; those that are: {', '.join(ARCHITECTURES)}"
    )
  arch = ARCHITECTURES[config.family]
  rope = config.rope
  for reason, applies in {
    "layers that see a sliding window": SLIDING in config.kinds,
    "biases in its attention": arch != "qwen2" and (config.qkv_bias or config.out_bias),
    "biases in its MLP": config.mlp_bias,
    f"the activation {config.activation}": config.activation != "silu",
    "an attention scale of its own": config.attention_scale is not None,
    "RoPE rescaled as llama3, which no other architecture has": (
      arch != "llama" and rope.kind == "llama3"
    ),
    f"a RoPE scaling of llama3 other than Meta's {LLAMA3}": (
      rope.kind == "llama3"
      and (rope.low_freq_factor, rope.high_freq_factor, rope.original_length) != LLAMA3
    ),
    "heads of another width than hidden_size / num_attention_heads": (
      arch == "qwen2" and config.head_dim * config.num_heads != config.hidden_size
    ),
  }.items():
    if applies:
      raise ValueError(f"this {config.family} model has {reason}; that is not written as GGUF")


def write(
  path: str | Path,
  tensors: Tensors,
  config: ModelConfig,
  tokenizer: Mapping[str, Any],
  *,
  kind: str,
  about: Mapping[str, Any],
) -> None:
  """The file at `path`, whole or not at all.

  Args:
    tensors: of the model, under the names of a Hugging Face folder.
    tokenizer: what `gguf_tokenizer.describe` says.
    kind: a key of KINDS; rows of a length that blocks of 32 do not divide are `f16` in any.
    about: further metadata, `general.name` for one.

  Raises:
    ValueError: a model that a GGUF file cannot hold, a tensor missing, misshapen or beyond float16.
  """
  check(config)
  family = FAMILIES[ARCHITECTURES[config.family]]
  names = tensor_names(family, config.num_layers)
  if config.tied:
    del names["lm_head.weight"]
  if missing := sorted(names.keys() - tensors.where.keys()):
    raise ValueError(f"no tensor {missing[0]!r}, which a {config.family} model has")
  fields = {**_fields(config), **about, **tokenizer, "general.file_type": int(FILE_TYPES[kind])}
  rope = _rope(config)

  def laid_out(name):
    array = np.asarray(tensors.get(name), np.float32)
    return (
      permuted(name, array, config.num_heads, config.num_kv_heads) if family.permuted else array
    )

  with _writing(Path(path), ARCHITECTURES[config.family], fields) as writer:
    types = {ours: _type(names[ours], tensors.shape(ours), kind) for ours in names}
    if rope is not None:
      writer.add_tensor_info(ROPE, rope.shape, rope.dtype, rope.nbytes)
    for ours, theirs in names.items():
      _declare(writer, theirs, tensors.shape(ours), types[ours])
    _begin(writer)
    if rope is not None:
      writer.write_tensor_data(rope)
    for ours, theirs in names.items():
      # nothing of it is kept while the next is read
      writer.write_tensor_data(_stored(theirs, laid_out(ours), types[ours]))


def write_adapter(
  path: str | Path,
  pairs: Mapping[str, tuple[np.ndarray, np.ndarray, float]],
  config: ModelConfig,
  *,
  about: Mapping[str, Any],
) -> None:
  """A LoRA as llama.cpp takes it beside a model: factors in float16, one alpha, ranks as they are.

  llama.cpp scales a module by alpha / rank.  Where a module's scale is another, the rest of it is in its second factor.

  Args:
    pairs: {Hugging Face name of a matrix: (a [in, rank], b [rank, out], scale)}; it gains scale * a @ b.
    config: of the base.

  Raises:
    ValueError: a base that a GGUF file cannot hold, or a number beyond float16.
  """
  check(config)
  family = FAMILIES[ARCHITECTURES[config.family]]
  names = tensor_names(family, config.num_layers)
  alphas = [scale * a.shape[1] for a, _, scale in pairs.values() if scale]
  alpha = max(set(alphas), key=alphas.count) if alphas else 1.0
  factors = {}
  for ours, (a, b, scale) in pairs.items():
    a, b = a.T, b.T * np.float32(scale * a.shape[1] / alpha)
    if family.permuted:
      b = permuted(ours, b, config.num_heads, config.num_kv_heads)
    if names[ours] == EMBEDDING:  # a row of its first factor is a token's
      a = a.T
    factors |= {names[ours] + LORA_A: a, names[ours] + LORA_B: b}
  fields = {
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": float(alpha),
    "general.file_type": int(FILE_TYPES["f16"]),
    **about,
  }
  with _writing(Path(path), ARCHITECTURES[config.family], fields) as writer:
    for name, array in factors.items():
      _declare(writer, name, array.shape, Type.F16)
    _begin(writer)
    for name, array in factors.items():
      writer.write_tensor_data(_stored(name, array, Type.F16))


def _fields(config: ModelConfig) -> dict[str, Any]:
  """The metadata that say what the model computes."""
  arch = ARCHITECTURES[config.family]
  said: dict[str, Any] = {
    "vocab_size": config.vocab_size,
    "context_length": config.max_length,
    "embedding_length": config.hidden_size,
    "block_count": config.num_layers,
    "feed_forward_length": config.intermediate_size,
    "attention.head_count": config.num_heads,
    "attention.head_count_kv": config.num_kv_heads,
    "attention.key_length": config.head_dim,
    "attention.value_length": config.head_dim,
    "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    "rope.dimension_count": config.head_dim,
    "rope.freq_base": float(config.rope.theta),
  }
  if config.rope.kind == "linear":
    said |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope.factor)}
  return {
    "general.type": "model",
    "general.quantization_version": gguf.GGML_QUANT_VERSION,
    **{f"{arch}.{key}": value for key, value in said.items()},
  }


def _rope(config: ModelConfig) -> np.ndarray | None:
  if config.rope.kind != "llama3":
    return None
  return rope_factors(config.rope.theta, config.rope.factor, config.head_dim)


def _type(name: str, shape: tuple[int, ...], kind: str) -> Type:
  if len(shape) == 1:
    return Type.F32
  wanted = KINDS[kind][name in (EMBEDDING, HEAD)]
  return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16


def _stored(name: str, array: np.ndarray, kind: Type) -> np.ndarray:
  largest = float(np.abs(array).max(initial=0.0))
  # of blocks of q8_0 and q4_0 the scale is float16, and far from its end
  if not np.isfinite(largest) or (kind == Type.F16 and largest > float(np.finfo(np.float16).max)):
    raise ValueError(f"{name} holds {largest:g}, which float16 cannot: nothing was written")
  return gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind)


def _declare(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: Type) -> None:
  plain = {Type.F32: np.float32, Type.F16: np.float16}
  stored = shape if kind in plain else gguf.quant_shape_to_byte_shape(shape, kind)
  dtype = np.dtype(plain.get(kind, np.uint8))
  nbytes = int(np.prod(stored, dtype=np.int64)) * dtype.itemsize
  writer.add_tensor_info(name, stored, dtype, nbytes, raw_dtype=kind)


def _begin(writer: gguf.GGUFWriter) -> None:
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()


@contextlib.contextmanager
def _writing(path: Path, arch: str, fields: Mapping[str, Any]) -> Generator[gguf.GGUFWriter]:
  """A writer with these metadata, whose file takes its place at `path` when the block ends well."""
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_name(f".{path.name}.partial-{os.getpid()}")
  writer = gguf.GGUFWriter(scratch, arch)
  for key, value in fields.items():
    _add(writer, key, value)
  try:
    with ending.writing(scratch):
      yield writer
    writer.close()
    with scratch.open("rb") as f:
      os.fsync(f.fileno())
    scratch.replace(path)
  finally:
    scratch.unlink(missing_ok=True)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  if isinstance(value, bool):
    writer.add_bool(key, value)
  elif isinstance(value, int):
    writer.add_uint32(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  else:
    writer.add_array(key, value)
