"""Where each dimension of a parameter lives on the mesh: (pattern, PartitionSpec) rules over every path."""

from __future__ import annotations

from jax.sharding import PartitionSpec as P

from posttrain_jax.models.before import PREFIX, PROMPT

DECODER = (
  (r"embed_tokens/weight", P("tensor", "fsdp")),
  (r"lm_head/weight", P("fsdp", "tensor")),
  (r"score/weight", P("fsdp", None)),
  (r"layers/self_attn/[qkv]_proj/weight", P(None, "fsdp", "tensor")),
  (r"layers/self_attn/o_proj/weight", P(None, "tensor", "fsdp")),
  (r"layers/mlp/(gate|up)_proj/weight", P(None, "fsdp", "tensor")),
  (r"layers/mlp/down_proj/weight", P(None, "tensor", "fsdp")),
  (r"layers/self_attn/[qkv]_proj/bias", P(None, "tensor")),
  (r"layers/mlp/(gate|up)_proj/bias", P(None, "tensor")),
  # an expert's matrix is never cut by `tensor`: the axis has experts of its own
  (r"layers/mlp/experts/(gate|up)_proj/weight", P(None, ("expert", "tensor"), "fsdp", None)),
  (r"layers/mlp/experts/down_proj/weight", P(None, ("expert", "tensor"), None, "fsdp")),
  (r"layers/mlp/gate/weight", P()),
  (r"layers/.*(bias|norm/weight)", P()),
  (r"norm/weight", P()),
)
# what stands before the tokens of every text
STANDING = (
  (PROMPT, P()),
  (PREFIX, P(None, None, "tensor")),
)
RULES = (*DECODER, *STANDING)
