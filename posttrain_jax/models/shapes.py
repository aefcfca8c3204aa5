"""Shapes of well-known models by name, for planning and compiling without a file of theirs.

Each has the number of parameters that its published files have (`tests/models/test_shapes.py`).
"""

from __future__ import annotations

from typing import Any

from posttrain_jax.models.config import FULL, SLIDING, ModelConfig, Rope


def _llama3(hidden: int, mlp: int, layers: int, heads: int, **other: Any) -> ModelConfig:
  shape: dict[str, Any] = dict(
    family="llama",
    vocab_size=128_256,
    num_kv_heads=8,
    head_dim=128,
    max_length=8192,
    norm_eps=1e-5,
    rope=Rope(theta=500_000.0),
    bos_token_id=128_000,
    eos_token_ids=(128_001,),
  )
  sizes: dict[str, Any] = dict(
    hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads
  )
  return ModelConfig(**{**shape, **sizes, **other})


def _llama31(*sizes: int, factor: float = 8.0, **other: Any) -> ModelConfig:
  """Llama 3.1 and 3.2: positions stretched to 131,072."""
  rope = Rope(theta=500_000.0, kind="llama3", factor=factor)
  return _llama3(*sizes, rope=rope, max_length=131_072, **other)


def _qwen3(
  hidden: int, mlp: int, layers: int, heads: int, *, tied: bool = False, **other: Any
) -> ModelConfig:
  shape: dict[str, Any] = dict(
    family="qwen3",
    vocab_size=151_936,
    num_kv_heads=8,
    head_dim=128,
    max_length=40_960,
    rope=Rope(theta=1_000_000.0),
    qk_norm=True,
    eos_token_ids=(151_645,),
  )
  sizes: dict[str, Any] = dict(
    hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads
  )
  return ModelConfig(**{**shape, **sizes, **other}, tied=tied)


def _gemma3(hidden: int, mlp: int, layers: int, heads: int, kv: int, **other: Any) -> ModelConfig:
  """Of six layers five slide; the sizes with pictures have 64 rows more in their table."""
  shape: dict[str, Any] = dict(
    family="gemma3_text",
    vocab_size=262_208,
    head_dim=256,
    max_length=131_072,
    rope=Rope(theta=1_000_000.0, kind="linear", factor=8.0),
    local_rope=Rope(theta=10_000.0),
    layer_types=tuple(FULL if i % 6 == 5 else SLIDING for i in range(layers)),
    window=1024,
    tied=True,
    qk_norm=True,
    norm_plus_one=True,
    sandwich_norms=True,
    activation="gelu_tanh",
    scale_embeddings=True,
    attention_scale=256**-0.5,
    bos_token_id=2,
    eos_token_ids=(1,),
    pad_token_id=0,
  )
  sizes: dict[str, Any] = dict(
    hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads
  )
  return ModelConfig(**{**shape, **sizes, **other}, num_kv_heads=kv)


_SMALL_GEMMA: dict[str, Any] = dict(
  vocab_size=262_144, window=512, max_length=32_768, rope=Rope(theta=1_000_000.0)
)

SHAPES = {
  "llama2-7b": ModelConfig(
    family="llama",
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_length=4096,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_ids=(2,),
  ),
  "llama3.2-1b": _llama31(2048, 8192, 16, 32, factor=32.0, head_dim=64, tied=True),
  "llama3.2-3b": _llama31(3072, 8192, 28, 24, factor=32.0, tied=True),
  "llama3-8b": _llama3(4096, 14_336, 32, 32),
  "llama3-70b": _llama3(8192, 28_672, 80, 64),
  "llama3.1-8b": _llama31(4096, 14_336, 32, 32),
  "llama3.1-70b": _llama31(8192, 28_672, 80, 64),
  "llama3.1-405b": _llama31(16_384, 53_248, 126, 128),
  "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
  "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
  "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
  "qwen3-8b": _qwen3(4096, 12_288, 36, 32),
  "qwen3-14b": _qwen3(5120, 17_408, 40, 40),
  "qwen3-32b": _qwen3(5120, 25_600, 64, 64),
  "gemma3-270m": _gemma3(640, 2048, 18, 4, 1, **_SMALL_GEMMA),
  "gemma3-1b": _gemma3(1152, 6912, 26, 4, 1, **_SMALL_GEMMA),
  "gemma3-4b": _gemma3(2560, 10_240, 34, 8, 4),
  "gemma3-12b": _gemma3(3840, 15_360, 48, 16, 8),
  "gemma3-27b": _gemma3(5376, 21_504, 62, 32, 16, head_dim=128, attention_scale=168**-0.5),
  "mixtral-8x7b": ModelConfig(
    family="mixtral",
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_length=32_768,
    norm_eps=1e-5,
    rope=Rope(theta=1_000_000.0),
    experts=8,
    experts_per_token=2,
    norm_experts=True,
    bos_token_id=1,
    eos_token_ids=(2,),
  ),
  "qwen3-30b-a3b": ModelConfig(
    family="qwen3_moe",
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=768,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    max_length=40_960,
    rope=Rope(theta=1_000_000.0),
    qk_norm=True,
    experts=128,
    experts_per_token=8,
    norm_experts=True,
    eos_token_ids=(151_645,),
  ),
}
