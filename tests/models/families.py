"""One tiny model of each decoder family, as its `config.json` says it: what every test of models runs over.

  @pytest.mark.parametrize("name", FAMILIES)
  def test_something(name):
    config, params = families.make(name)

Settings are chosen so that a mistake shows: windows shorter than the texts, head_dim that is not hidden / heads, fewer
key than query heads, norms, biases and embeddings far from their neutral values.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import tree
from posttrain_jax.models import decoder
from posttrain_jax.models.config import FULL, SLIDING, ModelConfig, from_hf

VOCAB = 96
LONGEST = 48  # tokens; longer than every window, and long enough for RoPE scaling to matter
WINDOW = 7

_SIZES = dict(
  vocab_size=VOCAB,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  rms_norm_eps=1e-5,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=0,
  tie_word_embeddings=False,
)
_GEMMA = dict(
  head_dim=16,
  query_pre_attn_scalar=24,
  hidden_activation="gelu_pytorch_tanh",
  tie_word_embeddings=True,
  sliding_window=WINDOW,
)

# RoPE settings stand here in the old keys and in the new ones (`rope_parameters`); transformers reads both.
FAMILIES: dict[str, dict[str, Any]] = {
  "llama": dict(_SIZES, model_type="llama", rope_theta=10_000.0),
  "llama_biased": dict(
    _SIZES,
    model_type="llama",
    num_key_value_heads=4,
    attention_bias=True,
    mlp_bias=True,
    rope_scaling=dict(type="linear", factor=4.0),
  ),
  "llama3": dict(
    _SIZES,
    model_type="llama",
    num_key_value_heads=1,
    tie_word_embeddings=True,
    rope_parameters=dict(
      rope_type="llama3",
      rope_theta=500.0,
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=32,
    ),
  ),
  "mistral": dict(_SIZES, model_type="mistral", head_dim=12, sliding_window=WINDOW),
  "qwen2": dict(_SIZES, model_type="qwen2", rope_theta=1e6, tie_word_embeddings=True),
  "qwen2_sliding": dict(
    _SIZES,
    model_type="qwen2",
    use_sliding_window=True,
    sliding_window=WINDOW,
    max_window_layers=1,
  ),
  "qwen3": dict(_SIZES, model_type="qwen3", head_dim=16, rope_parameters=dict(rope_theta=1e6)),
  "gemma2": dict(
    _SIZES | _GEMMA,
    model_type="gemma2",
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
  ),
  "gemma3": dict(
    _SIZES | _GEMMA,
    model_type="gemma3_text",
    num_hidden_layers=7,  # one whole period of 5 local and 1 global, and a part of the next
    layer_types=[SLIDING] * 5 + [FULL, SLIDING],
    rope_parameters={
      FULL: dict(rope_type="linear", factor=8.0, rope_theta=1e6),
      SLIDING: dict(rope_type="default", rope_theta=100.0),
    },
  ),
}

# Mixtures of experts: k of 8, weights that sum to 1 and weights that do not.
FAMILIES |= {
  "mixtral": dict(
    _SIZES, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, sliding_window=WINDOW
  ),
  "qwen3_moe": dict(
    _SIZES,
    model_type="qwen3_moe",
    head_dim=16,
    moe_intermediate_size=24,
    num_experts=8,
    num_experts_per_tok=4,
    norm_topk_prob=False,
  ),
}


def config(name: str, **changes: Any) -> ModelConfig:
  """The ModelConfig of a family, with keys of its `config.json` changed."""
  return from_hf({**FAMILIES[name], **changes})


@functools.cache
def make(name: str) -> tuple[ModelConfig, Any]:
  """(config, params) of a family."""
  made = config(name)
  return made, params(made)


def params(config: ModelConfig, seed: int = 0, dtype: Any = jnp.float32) -> Any:
  """Random parameters with norms and biases away from their neutral values."""
  draw = np.random.default_rng(seed)

  def leaf(spec: decoder.Spec):
    noise = draw.standard_normal(spec.shape)
    if spec.init == "normal":
      return jnp.asarray(noise * 1.5 / np.sqrt(config.hidden_size), dtype)
    return jnp.asarray(0.3 * noise + (spec.init == "ones"), dtype)

  return tree.unflatten((path, leaf(spec)) for path, spec in tree.items(decoder.specs(config)))


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
  """Random ids that are neither padding nor the end of a text."""
  return np.random.default_rng(seed).integers(3, VOCAB, shape, dtype=np.int32)
