"""A GGUF file becomes a Hugging Face folder: dequantised weights, configs and tokenizer.

`gguf_write` goes the other way, by the same table of families.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from posttrain_jax.core import files
from posttrain_jax.models import gguf_tokenizer
from posttrain_jax.models.config import ModelConfig

EMBEDDING, HEAD, ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
LORA_A, LORA_B = ".lora_a", ".lora_b"
LLAMA3 = (
  1.0,
  4.0,
  8192,
)  # low_freq_factor, high_freq_factor, original length: Meta's for every model
_DTYPES = ("float32", "float16", "bfloat16")

_PROJECTIONS = {
  "attn_norm.weight": "input_layernorm.weight",
  "attn_q.weight": "self_attn.q_proj.weight",
  "attn_k.weight": "self_attn.k_proj.weight",
  "attn_v.weight": "self_attn.v_proj.weight",
  "attn_output.weight": "self_attn.o_proj.weight",
  "ffn_gate.weight": "mlp.gate_proj.weight",
  "ffn_up.weight": "mlp.up_proj.weight",
  "ffn_down.weight": "mlp.down_proj.weight",
}
_PRE_NORM = _PROJECTIONS | {"ffn_norm.weight": "post_attention_layernorm.weight"}
_QKV_BIAS = {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}
_QK_NORM = {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}


@dataclasses.dataclass(frozen=True)
class Family:
  """What sets one GGUF architecture apart from the others."""

  model_type: str
  architecture: str
  layer: dict[str, str]  # GGUF name -> Hugging Face name, within a layer
  permuted: bool = False  # Q and K rows stored in the order of interleaved RoPE
  explicit_head_dim: bool = True  # the config class has a head_dim key


FAMILIES = {
  "llama": Family("llama", "LlamaForCausalLM", _PRE_NORM, permuted=True),
  "qwen2": Family("qwen2", "Qwen2ForCausalLM", _PRE_NORM | _QKV_BIAS, explicit_head_dim=False),
  "qwen3": Family("qwen3", "Qwen3ForCausalLM", _PRE_NORM | _QK_NORM),
}


def convert(gguf_path: str | Path, out_dir: str | Path, *, dtype: str = "float32") -> Path:
  """Writes `out_dir`, a Hugging Face folder of the model in `gguf_path`, and returns it.

  Tensors pass one at a time.  The folder appears whole or not at all.
  """
  out_dir = Path(out_dir)
  if out_dir.exists():
    raise FileExistsError(f"{out_dir} exists already; remove it or name another folder")
  with files.publish(out_dir) as folder:
    convert_into(gguf_path, folder, dtype=dtype)
  return out_dir


def convert_into(gguf_path: str | Path, folder: Path, *, dtype: str = "float32") -> None:
  """Writes the files of `convert` into a folder that exists."""
  if dtype not in _DTYPES:
    raise ValueError(f"dtype={dtype!r}: write one of {', '.join(_DTYPES)}")
  file = File(gguf_path, dtype=dtype)
  config = file.described
  try:
    gguf_tokenizer.write(file.fields, folder, max_length=config["max_position_embeddings"])
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "generation_config.json", _generation(file.fields))
    weights = {
      name: (file.shape(name), dtype, functools.partial(file.get, name)) for name in file.where
    }
    files.write_safetensors(folder / "model.safetensors", weights)
  except ValueError as e:
    raise ValueError(f"{gguf_path}: {e}") from e


class File:
  """The model in a GGUF file under the names of a Hugging Face folder, each tensor dequantised when it is asked for.

  fields: the metadata by key.
  described: the `config.json` of the model.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: it is cut short, or holds a model that is not read; the message names it.
  """

  def __init__(self, path: str | Path, *, dtype: str = "float32"):
    reader, self.fields = _read(Path(path))
    arch = self.fields.get("general.architecture")
    if arch not in FAMILIES:
      raise ValueError(
        f"{path} holds a model of architecture {arch!r}; supported: {', '.join(FAMILIES)}"
      )
    self.family = FAMILIES[arch]
    self.tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
      self.described = _config(self.family, arch, self.fields, self.tensors, dtype)
      names = _names(self.family, self.described, self.tensors)
    except ValueError as e:
      raise ValueError(f"{path}: {e}") from e
    self.where = dict(sorted(names.items()))  # the name of each tensor in the file

  def shape(self, name: str) -> tuple[int, ...]:
    return _shape(name, self.described)

  def get(self, name: str) -> np.ndarray:
    """The tensor as Hugging Face stores it under `name`, in float32."""
    return _weight(name, self.tensors[self.where[name]], self.family, self.described)


def read_adapter(path: str | Path, config: ModelConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{Hugging Face name of a matrix [out, in]: (a [rank, in], b [out, rank])} of a GGUF LoRA, which adds b @ a to it.

  The scale is in b.  An embedding [vocab, out] has a: [rank, out] and b: [vocab, rank].

  Args:
    config: of the base; the file does not say how many heads there are.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: it is cut short, or no LoRA of a model that is read; the message names it.
  """
  reader, fields = _read(Path(path))
  kind = tuple(fields.get(key) for key in ("general.type", "adapter.type"))
  arch = fields.get("general.architecture")
  if kind != ("adapter", "lora") or arch not in FAMILIES:
    raise ValueError(f"{path} holds no LoRA of {', '.join(FAMILIES)}: {kind}, {arch!r}")
  factors: dict[str, np.ndarray] = {
    t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape.tolist()[::-1]))
    for t in reader.tensors
  }
  alpha = _field(fields, "adapter.lora.alpha")
  names = {theirs: ours for ours, theirs in tensor_names(FAMILIES[arch], config.num_layers).items()}
  pairs = {}
  for theirs in (name.removesuffix(LORA_A) for name in factors if name.endswith(LORA_A)):
    a, b = factors[theirs + LORA_A], factors[theirs + LORA_B]
    b = b * np.float32(alpha / b.shape[1])
    ours = names[theirs]
    if theirs == EMBEDDING:  # a row of its first factor is a token's
      a, b = b.T, a
    if FAMILIES[arch].permuted:
      b = _over_heads(unpermute, ours, b, config.num_heads, config.num_kv_heads)
    pairs[ours] = (a, b)
  return pairs


def _read(path: Path) -> tuple[gguf.GGUFReader, dict]:
  if not path.is_file():
    raise FileNotFoundError(f"no GGUF file at {path}")
  try:
    reader = gguf.GGUFReader(path)
    return reader, {key: field.contents() for key, field in reader.fields.items()}
  except (ValueError, IndexError, KeyError, TypeError, OverflowError) as e:
    # The reader maps the file and finds out by slices that come back short.
    raise ValueError(
      f"{path} is no whole GGUF file ({path.stat().st_size:,} bytes; {e}); "
      "it may be truncated: download it again"
    ) from e


def _config(family, arch: str, fields: dict, tensors: dict, dtype: str) -> dict:
  def get(key, *default):
    if f"{arch}.{key}" not in fields and default:
      return default[0]
    return _field(fields, f"{arch}.{key}")

  if get("expert_count", 0):
    raise ValueError(f"a mixture of {get('expert_count')} experts; only dense models are supported")
  heads = get("attention.head_count")
  kv_heads = get("attention.head_count_kv", heads)
  if isinstance(heads, list) or isinstance(kv_heads, list):
    raise ValueError("head counts that differ by layer are not supported")
  hidden = get("embedding_length")
  head_dim = get("attention.key_length", hidden // heads)
  if get("attention.value_length", head_dim) != head_dim:
    raise ValueError("keys and values of different width are not supported")
  if get("rope.dimension_count", head_dim) != head_dim:
    raise ValueError("RoPE on a part of each head is not supported")
  theta = _shortest(get("rope.freq_base", 10000.0))
  config = {
    "architectures": [family.architecture],
    "model_type": family.model_type,
    "vocab_size": _tensor(tensors, EMBEDDING).shape[1],
    "hidden_size": hidden,
    "intermediate_size": get("feed_forward_length"),
    "num_hidden_layers": get("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "hidden_act": "silu",
    "max_position_embeddings": get("context_length"),
    "initializer_range": 0.02,
    "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
    "use_cache": True,
    "tie_word_embeddings": HEAD not in tensors,
    "rope_theta": theta,
    "rope_scaling": _rope_scaling(get, tensors, theta, head_dim),
    "attention_dropout": 0.0,
    "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
    "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    "torch_dtype": dtype,
    "dtype": dtype,
  }
  if family.explicit_head_dim:
    config["head_dim"] = head_dim
  if family.model_type == "llama":
    config |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
  if family.model_type == "qwen3":
    config["attention_bias"] = False
  if family.model_type.startswith("qwen"):
    config |= {"use_sliding_window": False, "sliding_window": None}
  config = {key: _plain(value) for key, value in config.items()}
  tokens = len(fields.get("tokenizer.ggml.tokens", ()))
  if tokens > config["vocab_size"]:
    raise ValueError(f"{tokens} tokens but only {config['vocab_size']} rows of embeddings")
  return config


def _rope_scaling(get: Callable, tensors: dict, theta: float, head_dim: int) -> dict | None:
  """`rope_scaling` as transformers writes it, or None.

  Llama 3.1 and later keep only the resulting factor of each frequency (`rope_freqs`); the four
  numbers behind it are Meta's except for the factor, which is the largest entry, and what they
  give is compared with the file.
  """
  kind = get("rope.scaling.type", "none")
  if kind == "linear":
    return {"rope_type": "linear", "factor": _shortest(get("rope.scaling.factor"))}
  if kind != "none":
    raise ValueError(f"RoPE scaling {kind!r} is not supported; supported: none, linear, llama3")
  if ROPE not in tensors:
    return None
  stored = np.asarray(tensors[ROPE].data, np.float32).reshape(-1)
  factor, low, high, original = float(stored.max()), *LLAMA3
  expected = rope_factors(theta, factor, head_dim)
  if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
    raise ValueError("rope_freqs.weight is not the RoPE scaling of Llama 3; cannot express it")
  return {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": low,
    "high_freq_factor": high,
    "original_max_position_embeddings": original,
  }


def rope_factors(theta: float, factor: float, head_dim: int) -> np.ndarray:
  """What Llama 3.1 and later divide each of RoPE's frequencies by."""
  low, high, original = LLAMA3
  turns = original / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _generation(fields: dict) -> dict:
  """generation_config.json: end-of-turn and end-of-message also stop."""
  stops = [fields.get(f"tokenizer.ggml.{x}_token_id") for x in ("eos", "eot", "eom")]
  stops = list(dict.fromkeys(_plain(x) for x in stops if x is not None))
  ids = {
    "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
    "eos_token_id": stops[0] if len(stops) == 1 else stops,
    "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
  }
  return {"_from_model_config": True} | {
    key: _plain(value) for key, value in ids.items() if value not in (None, [])
  }


def tensor_names(family: Family, layers: int) -> dict[str, str]:
  """Hugging Face name -> GGUF name of every tensor, a head of its own included."""
  names = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": HEAD,
  }
  for i in range(layers):
    for theirs, ours in family.layer.items():
      names[f"model.layers.{i}.{ours}"] = f"blk.{i}.{theirs}"
  return names


def _names(family: Family, config: dict, tensors: dict) -> dict[str, str]:
  """Hugging Face name -> GGUF name, after checking that the file holds exactly these shapes."""
  names = tensor_names(family, config["num_hidden_layers"])
  if config["tie_word_embeddings"]:
    del names["lm_head.weight"]
  # Frequencies of RoPE: a function of the config, checked where they say more than it does.
  unread = {t for t in tensors if t == ROPE or t.endswith(".attn_rot_embd.weight")}
  if unknown := sorted(tensors.keys() - set(names.values()) - unread):
    raise ValueError(
      f"tensors that {family.architecture} has no place for: {', '.join(unknown[:8])}"
    )
  for ours, theirs in names.items():
    shape = tuple(reversed(_tensor(tensors, theirs).shape.tolist()))
    if shape != _shape(ours, config):
      raise ValueError(f"{theirs} has shape {shape} where its metadata say {_shape(ours, config)}")
  return names


def _shape(name: str, config: dict) -> tuple[int, ...]:
  hidden, inner = config["hidden_size"], config["intermediate_size"]
  head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
  queries = head_dim * config["num_attention_heads"]
  keys = head_dim * config["num_key_value_heads"]
  module, kind = name.split(".")[-2:]
  matrix = {
    "embed_tokens": (config["vocab_size"], hidden),
    "lm_head": (config["vocab_size"], hidden),
    "q_proj": (queries, hidden),
    "k_proj": (keys, hidden),
    "v_proj": (keys, hidden),
    "o_proj": (hidden, queries),
    "gate_proj": (inner, hidden),
    "up_proj": (inner, hidden),
    "down_proj": (hidden, inner),
    "q_norm": (head_dim,),
    "k_norm": (head_dim,),
  }.get(module, (hidden,))
  return matrix[:1] if kind == "bias" else matrix


def _weight(name: str, tensor, family: Family, config: dict) -> np.ndarray:
  """The tensor as Hugging Face stores it under `name`, in float32."""
  array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(_shape(name, config))
  if not family.permuted:
    return array
  return _over_heads(
    unpermute, name, array, config["num_attention_heads"], config["num_key_value_heads"]
  )


def permuted(name: str, array: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
  """The rows of a query's or key's matrix, or of a factor of its change, as files of `permuted` families have them."""
  return _over_heads(permute, name, array, heads, kv_heads)


def _over_heads(turn, name: str, array: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
  if ".q_proj." in name:
    return turn(array, heads)
  return turn(array, kv_heads) if ".k_proj." in name else array


def permute(array: np.ndarray, heads: int) -> np.ndarray:
  """Rows of each head from halves to pairs; the inverse of `unpermute`."""
  split = array.reshape(heads, 2, -1, *array.shape[1:])
  return split.swapaxes(1, 2).reshape(array.shape)


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
  """Rows of each head from pairs (x0, y0, x1, y1, ...) to halves (x0, x1, ..., y0, y1, ...)."""
  split = array.reshape(heads, -1, 2, *array.shape[1:])
  return split.swapaxes(1, 2).reshape(array.shape)


def _tensor(tensors: dict, name: str):
  if name not in tensors:
    raise ValueError(f"no tensor {name!r}")
  return tensors[name]


def _field(fields: dict, key: str):
  if key not in fields:
    raise ValueError(f"no metadata {key!r}")
  return fields[key]


def _shortest(x: float) -> float:
  """The shortest decimal that is the same float32: 9.99999975e-06 was written as 1e-05."""
  return float(str(np.float32(x)))


def _plain(value):
  return value.item() if isinstance(value, np.generic) else value
