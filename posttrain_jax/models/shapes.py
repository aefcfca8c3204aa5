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
}
