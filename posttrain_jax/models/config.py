"""What distinguishes the decoder families: one frozen record, read from a Hugging Face `config.json`.

A family is a config, never a copy of the decoder.  Keys of `config.json` that do not change the computation are kept in
`source` and written back on save; those that would change it in a way we do not compute are refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding: inverse frequencies theta^(-2i/head_dim), rescaled as `kind` says.

  `llama3`: low frequencies divided by factor, smoothly between the two wavelengths.  `linear`: all divided by factor.
  """

  theta: float = 10000.0
  kind: str = "default"  # default | linear | llama3
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shapes and switches of one decoder."""

  family: str  # the Hugging Face model_type
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_length: int = 2048
  norm_eps: float = 1e-6
  rope: Rope = Rope()
  local_rope: Rope | None = None  # Gemma 3: sliding layers rotate with a base of their own
  layer_types: tuple[str, ...] = ()  # one per layer; () means full attention everywhere
  window: int | None = None  # keys seen by a sliding layer, the query's own included
  tied: bool = False  # the head is the transposed embedding
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False  # RMS norm of each head's queries and keys (Qwen 3, Gemma 3)
  norm_plus_one: bool = False  # Gemma: norms scale by 1 + weight
  sandwich_norms: bool = False  # Gemma: norms after attention and MLP too
  activation: str = "silu"  # silu | gelu_tanh
  scale_embeddings: bool = False  # Gemma: embeddings times sqrt(hidden_size)
  attention_scale: float | None = None  # None: head_dim ** -0.5
  attention_softcap: float | None = None
  final_softcap: float | None = None
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  pad_token_id: int | None = None
  source: str = "{}"  # the config.json it came from, as JSON

  @property
  def softmax_scale(self) -> float:
    return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

  @property
  def kinds(self) -> tuple[str, ...]:
    """Attention kind of each layer."""
    return self.layer_types or (FULL,) * self.num_layers

  def sliding(self, layer: int) -> bool:
    return self.kinds[layer] == SLIDING


# family -> what it fixes that its config.json does not say
FAMILIES: dict[str, dict[str, Any]] = {
  "llama": {},
  "mistral": {},
  "qwen2": dict(qkv_bias=True),
  "qwen3": dict(qk_norm=True),
  "gemma2": dict(norm_plus_one=True, sandwich_norms=True, scale_embeddings=True, tied=True),
  "gemma3_text": dict(
    norm_plus_one=True, sandwich_norms=True, scale_embeddings=True, tied=True, qk_norm=True
  ),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
  """ModelConfig of a parsed `config.json`; both old and new RoPE keys are read.

  Raises:
    ValueError: for a family or a setting that the decoder does not compute, by name.
  """
  if config.get("model_type") == "gemma3" and "text_config" in config:
    return dataclasses.replace(
      from_hf({"model_type": "gemma3_text", **config["text_config"]}),
      source=json.dumps(dict(config)),
    )
  family = config.get("model_type")
  if family not in FAMILIES:
    raise ValueError(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
  try:
    heads = config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    fixed = FAMILIES[family]
    rope, local_rope = _ropes(family, config)
    return ModelConfig(
      family=family,
      vocab_size=config["vocab_size"],
      hidden_size=config["hidden_size"],
      intermediate_size=config["intermediate_size"],
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=config.get("num_key_value_heads") or heads,
      head_dim=config.get("head_dim") or config["hidden_size"] // heads,
      max_length=config.get("max_position_embeddings", 2048),
      norm_eps=config.get("rms_norm_eps", 1e-6),
      rope=rope,
      local_rope=local_rope,
      layer_types=_layer_types(family, config, layers),
      window=_window(family, config),
      tied=_first(config.get("tie_word_embeddings"), fixed.get("tied", False)),
      qkv_bias=fixed.get("qkv_bias", bool(config.get("attention_bias", False))),
      out_bias=bool(config.get("attention_bias", False)) and family != "qwen2",
      mlp_bias=bool(config.get("mlp_bias", False)),
      qk_norm=fixed.get("qk_norm", False),
      norm_plus_one=fixed.get("norm_plus_one", False),
      sandwich_norms=fixed.get("sandwich_norms", False),
      activation=_activation(config),
      scale_embeddings=fixed.get("scale_embeddings", False),
      attention_scale=_attention_scale(config),
      attention_softcap=config.get("attn_logit_softcapping"),
      final_softcap=config.get("final_logit_softcapping"),
      bos_token_id=config.get("bos_token_id"),
      eos_token_ids=as_ids(config.get("eos_token_id")),
      pad_token_id=config.get("pad_token_id"),
      source=json.dumps(dict(config)),
    )
  except KeyError as error:
    raise ValueError(f"config.json of a {family} model lacks the key {error}") from None


def to_hf(config: ModelConfig, *, tied: bool, dtype: str) -> dict[str, Any]:
  """The `config.json` to write: every key it came with, and what may have changed since."""
  source = json.loads(config.source) or _described(config)
  text = source.get("text_config", source)
  text["tie_word_embeddings"] = tied
  source["tie_word_embeddings"] = tied
  text.pop("torch_dtype", None)
  text["dtype"] = dtype
  text["vocab_size"] = config.vocab_size
  source.pop("quantization_config", None)
  return source


def as_ids(value: Any) -> tuple[int, ...]:
  """The ids of a config entry that may be absent, one number or a list."""
  return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _first(*values):
  return next(value for value in values if value is not None)


def _ropes(family: str, config: Mapping[str, Any]) -> tuple[Rope, Rope | None]:
  """(of full layers, of sliding layers or None): `rope_parameters` in new files, `rope_theta` and others in old."""
  theta = config.get("rope_theta", 1_000_000.0 if family == "gemma3_text" else 10_000.0)
  parameters = config.get("rope_parameters") or {}
  if FULL in parameters or SLIDING in parameters:
    return _rope(theta, parameters.get(FULL), config), _rope(
      config.get("rope_local_base_freq", 10_000.0), parameters.get(SLIDING), config
    )
  rope = _rope(theta, parameters or config.get("rope_scaling"), config)
  local = family == "gemma3_text"
  return rope, Rope(theta=config.get("rope_local_base_freq", 10_000.0)) if local else None


def _rope(theta: float, scaling: Mapping[str, Any] | None, config: Mapping[str, Any]) -> Rope:
  scaling = dict(scaling or {})
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  theta = float(scaling.get("rope_theta", theta))
  if kind not in ("default", "linear", "llama3"):
    raise ValueError(f"rope_type {kind!r} is not supported; supported: default, linear, llama3")
  if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
    raise ValueError("partial_rotary_factor other than 1.0 is not supported")
  return Rope(
    theta=theta,
    kind=kind,
    factor=float(scaling.get("factor", 1.0)),
    low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
    high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
    original_length=int(scaling.get("original_max_position_embeddings", 8192)),
  )


def _layer_types(family: str, config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
  """One kind per layer: as listed, or by the family's rule where an older file does not list them."""
  if config.get("layer_types"):
    kinds = tuple(config["layer_types"])
    if len(kinds) != layers or set(kinds) - {FULL, SLIDING}:
      raise ValueError(f"layer_types must be {layers} of {FULL!r} and {SLIDING!r}, found {kinds}")
    return kinds
  if family == "gemma2":
    return tuple(SLIDING if i % 2 == 0 else FULL for i in range(layers))
  if family == "gemma3_text":
    period = config.get("sliding_window_pattern", 6)
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(layers))
  if family == "mistral" and config.get("sliding_window"):
    return (SLIDING,) * layers
  if family in ("qwen2", "qwen3") and config.get("use_sliding_window"):
    full = config.get("max_window_layers", 28)
    return tuple(FULL if i < full else SLIDING for i in range(layers))
  return ()


def _window(family: str, config: Mapping[str, Any]) -> int | None:
  if family in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
    return None
  return config.get("sliding_window") if family != "llama" else None


def _activation(config: Mapping[str, Any]) -> str:
  name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
  if name == "gelu" and config.get("model_type", "").startswith("gemma"):
    name = "gelu_pytorch_tanh"  # Gemma files said `gelu` and meant the tanh form
  if name not in ACTIVATIONS:
    raise ValueError(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[name]


def _attention_scale(config: Mapping[str, Any]) -> float | None:
  scalar = config.get("query_pre_attn_scalar")
  return None if scalar is None else 1.0 / math.sqrt(scalar)


def _described(config: ModelConfig) -> dict[str, Any]:
  """A `config.json` for a model that came from none (random weights in tests and benchmarks)."""
  names = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
  }
  described = dict(
    model_type=config.family,
    architectures=[names[config.family]],
    vocab_size=config.vocab_size,
    hidden_size=config.hidden_size,
    intermediate_size=config.intermediate_size,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    max_position_embeddings=config.max_length,
    rms_norm_eps=config.norm_eps,
    rope_theta=config.rope.theta,
    sliding_window=config.window,
    hidden_act={"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
    bos_token_id=config.bos_token_id,
    eos_token_id=list(config.eos_token_ids) or None,
    pad_token_id=config.pad_token_id,
  )
  if config.layer_types:
    described["layer_types"] = list(config.layer_types)
  if config.rope.kind != "default":
    described["rope_scaling"] = dict(
      rope_type=config.rope.kind,
      factor=config.rope.factor,
      low_freq_factor=config.rope.low_freq_factor,
      high_freq_factor=config.rope.high_freq_factor,
      original_max_position_embeddings=config.rope.original_length,
    )
  if config.family.startswith("gemma"):
    described["hidden_activation"] = described.pop("hidden_act")
    described["attn_logit_softcapping"] = config.attention_softcap
    described["final_logit_softcapping"] = config.final_softcap
    if config.attention_scale is not None:
      described["query_pre_attn_scalar"] = config.attention_scale**-2
  if config.local_rope is not None:
    described["rope_local_base_freq"] = config.local_rope.theta
  if config.qkv_bias and config.family not in ("qwen2",):
    described["attention_bias"] = True
  if config.mlp_bias:
    described["mlp_bias"] = True
  return described
