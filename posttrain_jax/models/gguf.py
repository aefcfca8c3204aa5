"""A GGUF file becomes a Hugging Face folder: dequantised weights, configs and tokenizer."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from posttrain_jax.core import files
from posttrain_jax.models import gguf_tokenizer

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
class _Family:
  """What sets one GGUF architecture apart from the others."""

  model_type: str
  architecture: str
  layer: dict[str, str]  # GGUF name -> Hugging Face name, within a layer
  permuted: bool = False  # Q and K rows stored in the order of interleaved RoPE
  explicit_head_dim: bool = True  # the config class has a head_dim key


_FAMILIES = {
  "llama": _Family("llama", "LlamaForCausalLM", _PRE_NORM, permuted=True),
  "qwen2": _Family("qwen2", "Qwen2ForCausalLM", _PRE_NORM | _QKV_BIAS, explicit_head_dim=False),
  "qwen3": _Family("qwen3", "Qwen3ForCausalLM", _PRE_NORM | _QK_NORM),
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
  reader, fields = _read(Path(gguf_path))
  arch = fields.get("general.architecture")
  if arch not in _FAMILIES:
    raise ValueError(
      f"{gguf_path} holds a model of architecture {arch!r}; supported: {', '.join(_FAMILIES)}"
    )
  family = _FAMILIES[arch]
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  try:
    config = _config(family, arch, fields, tensors, dtype)
    names = _names(family, config, tensors)
    gguf_tokenizer.write(fields, folder, max_length=config["max_position_embeddings"])
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "generation_config.json", _generation(fields))
    weights = {
      ours: (
        _shape(ours, config),
        dtype,
        functools.partial(_weight, ours, tensors[theirs], family, config),
      )
      for ours, theirs in sorted(names.items())
    }
    files.write_safetensors(folder / "model.safetensors", weights)
  except ValueError as e:
    raise ValueError(f"{gguf_path}: {e}") from e


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
    "vocab_size": _tensor(tensors, "token_embd.weight").shape[1],
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
    "tie_word_embeddings": "output.weight" not in tensors,
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
  if "rope_freqs.weight" not in tensors:
    return None
  stored = np.asarray(tensors["rope_freqs.weight"].data, np.float32).reshape(-1)
  factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
  turns = original / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  expected = 1 / ((1 - smooth) / factor + smooth)
  if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
    raise ValueError("rope_freqs.weight is not the RoPE scaling of Llama 3; cannot express it")
  return {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": low,
    "high_freq_factor": high,
    "original_max_position_embeddings": original,
  }


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


def _names(family: _Family, config: dict, tensors: dict) -> dict[str, str]:
  """Hugging Face name -> GGUF name, after checking that the file holds exactly these shapes."""
  names = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
  }
  if not config["tie_word_embeddings"]:
    names["lm_head.weight"] = "output.weight"
  for i in range(config["num_hidden_layers"]):
    for theirs, ours in family.layer.items():
      names[f"model.layers.{i}.{ours}"] = f"blk.{i}.{theirs}"
  # Frequencies of RoPE: a function of the config, checked where they say more than it does.
  unread = {t for t in tensors if t == "rope_freqs.weight" or t.endswith(".attn_rot_embd.weight")}
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


def _weight(name: str, tensor, family: _Family, config: dict) -> np.ndarray:
  """The tensor as Hugging Face stores it under `name`, in float32."""
  array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(_shape(name, config))
  if family.permuted and ".q_proj." in name:
    return _unpermute(array, config["num_attention_heads"])
  if family.permuted and ".k_proj." in name:
    return _unpermute(array, config["num_key_value_heads"])
  return array


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
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
