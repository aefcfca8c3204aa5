"""Shapes of well-known models by name, for planning and compiling without a file of theirs."""

from __future__ import annotations

from typing import Any

from posttrain_jax.models.config import ModelConfig, Rope

_LLAMA3: dict[str, Any] = dict(
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

SHAPES = {
  "llama3-8b": ModelConfig(
    hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, **_LLAMA3
  ),
  "llama3-70b": ModelConfig(
    hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64, **_LLAMA3
  ),
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
