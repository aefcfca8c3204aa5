"""What to adapt and how: PEFT's names where PEFT has them."""

from __future__ import annotations

import dataclasses
import math
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
    for pattern, rank in self.rank_pattern.items():
      if rank < 1:
        raise ValueError(
          f"rank_pattern[{pattern!r}]={rank}: the rank must be at least 1; "
          "to leave modules out, name them in exclude_modules"
        )
    for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
      if not math.isfinite(alpha):
        raise ValueError(
          f"lora_alpha and the values of alpha_pattern must be finite, found {alpha}"
        )
    for name in ("target_modules", "exclude_modules"):
      if isinstance(getattr(self, name), list | set):
        object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
    layers = self.layers_to_transform
    layers = (layers,) if isinstance(layers, int) else tuple(layers or ()) or None
    object.__setattr__(self, "layers_to_transform", layers)
    self._check_expressions()

  def _check_expressions(self):
    expressions = [
      ("target_modules", self.target_modules),
      ("exclude_modules", self.exclude_modules),
      *[("rank_pattern", pattern) for pattern in self.rank_pattern],
      *[("alpha_pattern", pattern) for pattern in self.alpha_pattern],
    ]
    for option, expression in expressions:
      try:
        re.compile(expression if isinstance(expression, str) else "")
      except re.error as error:
        raise ValueError(f"{option}: {expression!r} is no regular expression: {error}") from None

  def rank(self, module: str) -> int:
    return int(_by_pattern(self.rank_pattern, module, self.r))

  def scale(self, module: str) -> float:
    """lora_alpha / rank (rsLoRA: / sqrt(rank)) of one module."""
    rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
    return alpha / rank**0.5 if self.use_rslora else alpha / rank

  def targets(self, module: str) -> bool:
    """True where this expanded module name is to be adapted; as in PEFT a full name counts whatever the layers."""
    if _matches(self.exclude_modules, module):
      return False
    if isinstance(self.target_modules, tuple) and full_name(module) in self.target_modules:
      return True
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


def full_name(module: str) -> str:
  """What transformers and PEFT call a module: all but the head live inside `model`.

  >>> full_name("layers.3.mlp.up_proj"), full_name("lm_head")
  ('model.layers.3.mlp.up_proj', 'lm_head')
  """
  return module if module == "lm_head" else f"model.{module}"


def _matches(wanted: str | tuple[str, ...], module: str) -> bool:
  """A string is a regular expression over the whole name, with or without `model.`; a tuple holds name endings."""
  names = (full_name(module), module)
  if isinstance(wanted, str):
    return bool(wanted) and any(re.fullmatch(wanted, name) for name in names)
  return any(f".{names[0]}".endswith(f".{ending}") for ending in wanted)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  """The value of the first pattern that the name is, or ends with after a dot (PEFT's rule)."""
  for pattern, value in patterns.items():
    if re.match(rf"(.*\.)?({pattern})$", full_name(module)):
      return value
  return default
