"""What to adapt and how: PEFT's names where PEFT has them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """The options of an adapter; a PEFT `adapter_config.json` maps onto it key by key.

  Modules are named as in Hugging Face files, layer by layer: `layers.3.self_attn.q_proj`, `embed_tokens`, `lm_head`.
  """

  method: str = "lora"
  r: int = 8  # rank
  lora_alpha: float = 8  # the update is scaled by lora_alpha / r
  lora_dropout: float = 0.0  # of the adapter's input, in training
  # "all-linear" (every matrix of the layers), a regular expression over whole names, or name endings
  target_modules: str | tuple[str, ...] = ALL_LINEAR
  exclude_modules: str | tuple[str, ...] = ()
  layers_to_transform: tuple[int, ...] | None = None  # None: every layer
  rank_pattern: Mapping[str, int] = dataclasses.field(
    default_factory=dict
  )  # name ending or regex -> rank
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  use_rslora: bool = False  # scale by lora_alpha / sqrt(r)
  init_lora_weights: bool | str = (
    True  # True: a uniform, b zero; "gaussian": a normal(0, 1/r), b zero
  )

  def __post_init__(self):
    if self.r < 1:
      raise ValueError(f"r={self.r}: the rank must be at least 1")
    if not 0.0 <= self.lora_dropout < 1.0:
      raise ValueError(f"lora_dropout={self.lora_dropout} must be in [0, 1)")
    if self.init_lora_weights not in (True, "gaussian"):
      raise ValueError(f"init_lora_weights={self.init_lora_weights!r}: write True or 'gaussian'")
    for name in ("target_modules", "exclude_modules"):
      if isinstance(getattr(self, name), list | set):
        object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
    if isinstance(self.layers_to_transform, int):
      object.__setattr__(self, "layers_to_transform", (self.layers_to_transform,))
    elif self.layers_to_transform is not None:
      object.__setattr__(self, "layers_to_transform", tuple(self.layers_to_transform))

  def rank(self, module: str) -> int:
    return int(_by_pattern(self.rank_pattern, module, self.r))

  def scale(self, module: str) -> float:
    """lora_alpha / rank (rsLoRA: / sqrt(rank)) of one module."""
    rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
    return alpha / rank**0.5 if self.use_rslora else alpha / rank

  def targets(self, module: str) -> bool:
    """True where this expanded module name is to be adapted."""
    if _matches(self.exclude_modules, module):
      return False
    layer = re.match(r"layers\.(\d+)\.", module)
    if self.layers_to_transform is not None and (
      layer is None or int(layer[1]) not in self.layers_to_transform
    ):
      return False
    if self.target_modules == ALL_LINEAR:
      return layer is not None
    return _matches(self.target_modules, module)

  def replace(self, **changes: Any) -> AdapterConfig:
    return dataclasses.replace(self, **changes)


def _matches(wanted: str | tuple[str, ...], module: str) -> bool:
  """A string is a regular expression over the whole name, with or without `model.`; a tuple holds name endings."""
  if isinstance(wanted, str):
    return bool(wanted) and any(re.fullmatch(wanted, name) for name in (module, f"model.{module}"))
  return any(f".model.{module}".endswith(f".{ending}") for ending in wanted)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  """The value of the first pattern that the name is, or ends with after a dot (PEFT's rule)."""
  for pattern, value in patterns.items():
    if re.match(rf"(.*\.)?({pattern})$", f"model.{module}"):
      return value
  return default
