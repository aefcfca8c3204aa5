"""What a family's files call its modules: as ours are called, but for the experts of Mixtral."""

from __future__ import annotations

import re

_EXPERTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_OURS = {theirs: ours for ours, theirs in _EXPERTS.items()}
_BLOCK = "block_sparse_moe"


def theirs(name: str, family: str) -> str:
  """A name as the family's files have it.

  >>> theirs("model.layers.3.mlp.experts.1.up_proj.weight", "mixtral")
  'model.layers.3.block_sparse_moe.experts.1.w3.weight'
  >>> theirs("model.layers.3.mlp.experts.1.up_proj.weight", "qwen3_moe")
  'model.layers.3.mlp.experts.1.up_proj.weight'
  """
  if family != "mixtral" or ".mlp." not in name:
    return name
  inside = re.sub(r"(?<=\.)(gate|up|down)_proj\b", lambda match: _EXPERTS[match[0]], name)
  return inside.replace(".mlp.", f".{_BLOCK}.")


def ours(name: str) -> str:
  """The inverse of `theirs`, of any family's name.

  >>> ours("layers.3.block_sparse_moe.experts.1.w3.lora_A.weight")
  'layers.3.mlp.experts.1.up_proj.lora_A.weight'
  """
  if f".{_BLOCK}." not in name:
    return name
  inside = re.sub(r"(?<=\.)w[123](?=\.|$)", lambda match: _OURS[match[0]], name)
  return inside.replace(f".{_BLOCK}.", ".mlp.")
