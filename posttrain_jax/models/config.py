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

from posttrain_jax.core import words

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
  experts: int = 0  # of each layer's mixture, `intermediate_size` wide each; 0: one MLP, which every token passes
  experts_per_token: int = 0
  norm_experts: bool = False  # the weights of a token's experts sum to 1
  scores: int = 0  # of a reward model: numbers a token, in place of logits
  writes: bool = False  # of a reward model: it has a head for logits of its own, too
  # the model_type of a larger model whose text model this is: its classes call the modules otherwise
  part_of: str = ""
  source: str = "{}"  # the config.json it came from, as JSON

  @property
  def mlp_width(self) -> int:
    """Numbers that a token has between the MLP's products: of all its experts."""
    return self.intermediate_size * max(self.experts_per_token, 1)

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
  "gemma2": dict(norm_plus_one=True, sandwich_norms=True, scale_embeddings=True),
  "gemma3_text": dict(norm_plus_one=True, sandwich_norms=True, scale_embeddings=True, qk_norm=True),
  "mixtral": {},
  "qwen3_moe": dict(qk_norm=True),
}
# mixtures of experts that other libraries run and this one does not: what their decoders need besides
LATER = {
  "gpt_oss": "attention sinks, biases of experts and MXFP4 files",
  "deepseek_v3": "latent attention, shared experts and a router by groups",
}

# family -> what a key means that its config.json leaves out (null is a value).  Gemma 3's own files leave out most.
_ANY = dict(
  hidden_act="silu", num_key_value_heads=None, rms_norm_eps=1e-6, rope_theta=10_000.0, head_dim=None
)
_QWEN = dict(
  num_key_value_heads=32, max_position_embeddings=32_768, sliding_window=4096, max_window_layers=28
)
_GEMMA = dict(
  num_key_value_heads=4,
  head_dim=256,
  query_pre_attn_scalar=256,
  hidden_activation="gelu_pytorch_tanh",
  tie_word_embeddings=True,
  sliding_window=4096,
  bos_token_id=2,
  eos_token_id=1,
  pad_token_id=0,
)
DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": _ANY | dict(max_position_embeddings=2048),
  "mistral": _ANY
  | dict(num_key_value_heads=8, max_position_embeddings=131_072, sliding_window=4096),
  "qwen2": _ANY | _QWEN,
  "qwen3": _ANY | _QWEN | dict(head_dim=128),
  "gemma2": _ANY
  | _GEMMA
  | dict(max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
  "gemma3_text": _ANY
  | _GEMMA
  | dict(
    vocab_size=262_208,
    num_attention_heads=8,
    max_position_embeddings=131_072,
    rope_theta=1_000_000.0,
    rope_local_base_freq=10_000.0,
    sliding_window_pattern=6,
  ),
  "mixtral": _ANY
  | dict(
    rms_norm_eps=1e-5,
    rope_theta=1_000_000.0,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    sliding_window=None,
    num_local_experts=8,
    num_experts_per_tok=2,
    router_jitter_noise=0.0,
  ),
  "qwen3_moe": _ANY
  | _QWEN
  | dict(
    num_key_value_heads=4,
    moe_intermediate_size=768,
    num_experts_per_tok=8,
    norm_topk_prob=False,
    decoder_sparse_step=1,
    mlp_only_layers=(),
  ),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
SCORED = "ForSequenceClassification"
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
  "mixtral": "MixtralForCausalLM",
  "qwen3_moe": "Qwen3MoeForCausalLM",
}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
  """ModelConfig of a parsed `config.json`; both old and new RoPE keys are read.

  Raises:
    ValueError: for a family or a setting that the decoder does not compute, by name.
  """
  family = config.get("model_type")
  if family == "gemma3" and isinstance(config.get("text_config"), Mapping):
    return dataclasses.replace(from_hf(_text_model(config)), part_of=family)
  if family in tuple(LATER):
    raise ValueError(
      f"model_type {family!r} is a mixture of experts that comes after mixtral and qwen3_moe: it needs {LATER[family]}"
    )
  if family not in tuple(FAMILIES):
    raise ValueError(
      f"model_type {words.shown(family)} is not supported; supported: {', '.join(FAMILIES)}"
    )
  said = {**DEFAULTS[family], **config}
  _check(said)
  fixed = FAMILIES[family]
  if said.get("use_bidirectional_attention"):
    raise ValueError("use_bidirectional_attention is not supported: this decoder is causal")
  try:
    heads = said["num_attention_heads"]
    layers = said["num_hidden_layers"]
    rope, local_rope = _ropes(family, said)
    window = _window(family, said)
    return ModelConfig(
      family=family,
      vocab_size=said["vocab_size"],
      hidden_size=said["hidden_size"],
      intermediate_size=said[_WIDTH.get(family, "intermediate_size")],
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=said["num_key_value_heads"] or heads,
      head_dim=said["head_dim"] or said["hidden_size"] // heads,
      max_length=said["max_position_embeddings"],
      norm_eps=said["rms_norm_eps"],
      rope=rope,
      local_rope=local_rope,
      layer_types=_layer_types(family, said, layers, window),
      window=window,
      tied=bool(said.get("tie_word_embeddings", False)),
      qkv_bias=fixed.get("qkv_bias", bool(said.get("attention_bias", False))),
      out_bias=bool(said.get("attention_bias", False)) and family != "qwen2",
      mlp_bias=bool(said.get("mlp_bias", False)),
      qk_norm=fixed.get("qk_norm", False),
      norm_plus_one=fixed.get("norm_plus_one", False),
      sandwich_norms=fixed.get("sandwich_norms", False),
      activation=_activation(family, said),
      scale_embeddings=fixed.get("scale_embeddings", False),
      attention_scale=_attention_scale(said),
      attention_softcap=said.get("attn_logit_softcapping"),
      final_softcap=said.get("final_logit_softcapping"),
      bos_token_id=said.get("bos_token_id"),
      eos_token_ids=as_ids(said.get("eos_token_id")),
      pad_token_id=said.get("pad_token_id"),
      **_experts(family, said),
      scores=_scores(config),
      source=json.dumps(dict(config)),
    )
  except KeyError as error:
    raise ValueError(f"the config of a {family} model lacks the key {error}") from None


_WIDTH = {"qwen3_moe": "moe_intermediate_size"}  # family -> the key of an expert's width
# family -> the key of the count of its experts; transformers 5 writes the first one's for both
_COUNT = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}


def _experts(family: str, said: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a mixture of experts, {} for a family of one MLP a layer."""
  if family not in _COUNT:
    return {}
  if said.get("mlp_only_layers") or said.get("decoder_sparse_step", 1) != 1:
    raise ValueError(
      f"mlp_only_layers={words.shown(said.get('mlp_only_layers'))}, "
      f"decoder_sparse_step={words.shown(said.get('decoder_sparse_step'))}: layers without experts among layers with "
      "them are not supported; write [] and 1"
    )
  if said.get("router_jitter_noise"):
    raise ValueError(
      f"router_jitter_noise={words.shown(said['router_jitter_noise'])} is not supported; write 0.0"
    )
  count = said.get(_COUNT[family], said.get(_COUNT["mixtral"], 128))
  chosen = said["num_experts_per_tok"]
  if chosen > count:
    raise ValueError(f"num_experts_per_tok={chosen} of {_COUNT[family]}={count} experts")
  norm = family == "mixtral" or bool(said["norm_topk_prob"])
  return dict(experts=count, experts_per_token=chosen, norm_experts=norm)


# keys of a config.json -> the least and the most that they may say; those of OPTIONAL may be null
_WHOLE = {
  **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), (1, 2**31 - 1)),
  **dict.fromkeys(("max_position_embeddings", "sliding_window"), (1, 2**31 - 1)),
  **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), (1, 2**20)),
  **dict.fromkeys(("num_hidden_layers", "sliding_window_pattern", "num_labels"), (1, 2**16)),
  "max_window_layers": (0, 2**16),
  **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), (1, 2**16)),
  "moe_intermediate_size": (1, 2**31 - 1),
}
_POSITIVE = (
  *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
  *("attn_logit_softcapping", "final_logit_softcapping", "partial_rotary_factor"),
)
_SWITCHES = (
  *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
  "norm_topk_prob",
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OPTIONAL = (
  *("num_key_value_heads", "head_dim", "sliding_window", "num_labels", "query_pre_attn_scalar"),
  *("attn_logit_softcapping", "final_logit_softcapping", "partial_rotary_factor"),
)
_TABLES = ("rope_parameters", "rope_scaling", "id2label")


def _check(said: Mapping[str, Any]) -> None:
  """Raises ValueError for a key whose value is of another kind or size than any model's; names it."""
  whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
  ids = lambda x: x is None or (isinstance(x, list | tuple) and all(map(whole, x))) or whole(x)

  def check(key: str, fits: bool, wanted: str) -> None:
    if not fits and not (key in _OPTIONAL and said[key] is None):
      raise ValueError(f"{key}={words.shown(said[key])}: expected {wanted}")

  for key in said:
    value = said[key]
    if key in _WHOLE:
      least, most = _WHOLE[key]
      check(key, whole(value) and least <= value <= most, f"a whole number from {least} to {most}")
    elif key in _POSITIVE:
      is_number = isinstance(value, int | float) and not isinstance(value, bool)
      check(key, is_number and 0 < value < 1e30, "a positive number")
    elif key in _SWITCHES:
      check(key, value is None or isinstance(value, bool), "true or false")
    elif key in _IDS:
      check(key, ids(value), "a token's number, a list of them, or null")
    elif key in _TABLES:
      check(key, value is None or isinstance(value, Mapping), "an object, or null")
    elif key in ("architectures", "layer_types"):
      is_list = isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)
      check(key, value is None or is_list, "a list of names, or null")


def _text_model(config: Mapping[str, Any]) -> dict[str, Any]:
  """The `config.json` that the text model inside a multimodal one would have alone."""
  shared = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
  )
  return {
    **{key: config[key] for key in shared if key in config},
    **config["text_config"],
    "model_type": "gemma3_text",
    "architectures": [ARCHITECTURES["gemma3_text"]],
  }


def to_hf(config: ModelConfig, *, tied: bool, dtype: str) -> dict[str, Any]:
  """The `config.json` to write: every key it came with, and what may have changed since."""
  source = json.loads(config.source) or _described(config)
  source["tie_word_embeddings"] = tied
  source["torch_dtype" if "torch_dtype" in source else "dtype"] = dtype
  source["vocab_size"] = config.vocab_size
  source.pop("quantization_config", None)
  if config.scores:
    source["architectures"] = [ARCHITECTURES[config.family].replace("ForCausalLM", SCORED)]
    labels = {f"LABEL_{i}": i for i in range(config.scores)}
    source["label2id"] = labels
    source["id2label"] = {str(i): name for name, i in labels.items()}
    # transformers reads the last token that is not padding: EOS, which ends an answer, must not be it
    ends = as_ids(source.get("eos_token_id"))
    if source.get("pad_token_id") is None or source["pad_token_id"] in ends:
      source["pad_token_id"] = next(i for i in range(len(ends) + 1) if i not in ends)
  return source


def _scores(config: Mapping[str, Any]) -> int:
  """Numbers a token of a ...ForSequenceClassification, 0 for a model of logits."""
  architecture = (config.get("architectures") or [""])[0]
  if not architecture.endswith(SCORED):
    return 0
  labels = config.get("id2label")
  return len(labels) if labels else int(config.get("num_labels", 2))


def as_ids(value: Any) -> tuple[int, ...]:
  """The ids of a config entry that may be absent, one number or a list."""
  return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _ropes(family: str, said: Mapping[str, Any]) -> tuple[Rope, Rope | None]:
  """(of full layers, of sliding layers or None): `rope_parameters` in new files, `rope_theta` and others in old."""
  theta = said["rope_theta"]
  parameters = said.get("rope_parameters") or {}
  if FULL in parameters or SLIDING in parameters:
    local_theta = said.get("rope_local_base_freq", theta)
    local = _rope(local_theta, parameters.get(SLIDING), said)
    return _rope(theta, parameters.get(FULL), said), local
  rope = _rope(theta, parameters or said.get("rope_scaling"), said)
  return rope, Rope(theta=said["rope_local_base_freq"]) if family == "gemma3_text" else None


def _rope(theta: float, scaling: Mapping[str, Any] | None, said: Mapping[str, Any]) -> Rope:
  scaling = dict(scaling or {})
  for key, value in scaling.items():
    if key.endswith(("factor", "theta", "embeddings")) and not (
      value is None or (isinstance(value, int | float) and 0 < value < 1e30)
    ):
      raise ValueError(f"{key}={words.shown(value)} of the RoPE: expected a positive number")
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  theta = float(scaling.get("rope_theta", theta))
  if kind not in ("default", "linear", "llama3"):
    raise ValueError(
      f"rope_type {words.shown(kind)} is not supported; supported: default, linear, llama3"
    )
  if scaling.get("partial_rotary_factor", said.get("partial_rotary_factor") or 1.0) != 1.0:
    raise ValueError("partial_rotary_factor other than 1.0 is not supported")
  if kind == "default":
    return Rope(theta=theta)
  if kind == "linear":
    return Rope(theta=theta, kind=kind, factor=float(scaling["factor"]))
  original = scaling.get("original_max_position_embeddings", said["max_position_embeddings"])
  return Rope(
    theta=theta,
    kind=kind,
    factor=float(scaling["factor"]),
    low_freq_factor=float(scaling["low_freq_factor"]),
    high_freq_factor=float(scaling["high_freq_factor"]),
    original_length=int(original),
  )


def _layer_types(
  family: str, said: Mapping[str, Any], layers: int, window: int | None
) -> tuple[str, ...]:
  """One kind per layer: as listed, or by the family's rule where an older file does not list them."""
  if said.get("layer_types"):
    kinds = tuple(said["layer_types"])
    if len(kinds) != layers or set(kinds) - {FULL, SLIDING}:
      raise ValueError(f"layer_types must be {layers} of {FULL!r} and {SLIDING!r}, found {kinds}")
    if SLIDING in kinds and window is None:
      raise ValueError(f"layer_types names {SLIDING!r}, but no sliding_window is set")
    return kinds
  if window is None:
    return ()
  if family == "gemma2":
    return tuple(SLIDING if i % 2 == 0 else FULL for i in range(layers))
  if family == "gemma3_text":
    period = said["sliding_window_pattern"]
    return tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(layers))
  if family in ("mistral", "mixtral", "qwen3_moe"):
    return (SLIDING,) * layers
  full = said["max_window_layers"]  # Qwen
  return tuple(FULL if i < full else SLIDING for i in range(layers))


def _window(family: str, said: Mapping[str, Any]) -> int | None:
  if family == "llama" or (family.startswith("qwen") and not said.get("use_sliding_window")):
    return None
  return said["sliding_window"]


def _activation(family: str, said: Mapping[str, Any]) -> str:
  # Gemma files carry a `hidden_act` of `gelu` too, which nothing reads.
  name = said["hidden_activation" if family.startswith("gemma") else "hidden_act"]
  if name not in tuple(ACTIVATIONS):
    raise ValueError(
      f"activation {words.shown(name)} is not supported; supported: {', '.join(ACTIVATIONS)}"
    )
  return ACTIVATIONS[name]


def _attention_scale(config: Mapping[str, Any]) -> float | None:
  scalar = config.get("query_pre_attn_scalar")
  return None if scalar is None else 1.0 / math.sqrt(scalar)


def _described(config: ModelConfig) -> dict[str, Any]:
  """A `config.json` for a model that came from none (random weights in tests and benchmarks)."""
  described = dict(
    model_type=config.family,
    architectures=[ARCHITECTURES[config.family]],
    vocab_size=config.vocab_size,
    hidden_size=config.hidden_size,
    intermediate_size=config.intermediate_size,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    max_position_embeddings=config.max_length,
    rms_norm_eps=config.norm_eps,
    rope_parameters=_rope_keys(config.rope),
    attention_bias=config.out_bias,
    mlp_bias=config.mlp_bias,
    hidden_act={"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
    bos_token_id=config.bos_token_id,
    eos_token_id=list(config.eos_token_ids) or None,
    pad_token_id=config.pad_token_id,
  )
  if config.local_rope is not None:
    full, local = _rope_keys(config.rope), _rope_keys(config.local_rope)
    described["rope_parameters"] = {FULL: full, SLIDING: local}
  if config.family != "llama":
    described["sliding_window"] = config.window
  if config.family not in (
    "llama",
    "mistral",
    "mixtral",
  ):  # a Mistral that lists them is a Ministral to transformers
    described["layer_types"] = list(config.kinds)
  if config.family.startswith("qwen"):
    described["use_sliding_window"] = config.window is not None
  if config.family.startswith("gemma"):
    described["hidden_activation"] = described.pop("hidden_act")
    described["attn_logit_softcapping"] = config.attention_softcap
    described["final_logit_softcapping"] = config.final_softcap
    described["query_pre_attn_scalar"] = round(config.softmax_scale**-2)
  if config.experts:
    described[_WIDTH.get(config.family, "intermediate_size")] = config.intermediate_size
    described[_COUNT[config.family]] = config.experts
    described["num_experts_per_tok"] = config.experts_per_token
  if config.family == "qwen3_moe":
    described["norm_topk_prob"] = config.norm_experts
    described.pop("layer_types")  # its transformers class has no such key
  return described


def _rope_keys(rope: Rope) -> dict[str, Any]:
  keys: dict[str, Any] = dict(rope_type=rope.kind, rope_theta=rope.theta)
  if rope.kind != "default":
    keys["factor"] = rope.factor
  if rope.kind == "llama3":
    keys["low_freq_factor"] = rope.low_freq_factor
    keys["high_freq_factor"] = rope.high_freq_factor
    keys["original_max_position_embeddings"] = rope.original_length
  return keys
