"""PEFT's adapters of fused experts (transformers 5, `target_parameters`), taken apart into a pair of factors an expert.

There a layer's experts are two parameters, gate over up and down; the adapter of one is a pair of matrices for all its
experts: A [E r, in], expert by expert, and B [out, r E], rank by rank.  The outer module's tensors are called
`experts.lora_A.weight`, those of one that it wraps `experts.base_layer.lora_A.weight`.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from posttrain_jax.adapters.codecs import naming
from posttrain_jax.adapters.config import fits
from posttrain_jax.core import weight, words
from posttrain_jax.models import names

KEY = "target_parameters"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
KNOWN = rf"(.*\.)?({GATE_UP}|{DOWN}|gate\.weight)"
TENSOR = r"layers\.(\d+)\.mlp\.experts\.((?:base_layer\.)*)lora_([AB])(?:\.[^.]+)?\.weight"
WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def without(described: Mapping[str, Any]) -> dict[str, Any]:
  """The config of the file that `apart` makes, but for its ranks: its tensors say what is adapted.

  Raises:
    ValueError: a parameter that is none of the experts'.
  """
  targets = described.get(KEY)
  if not targets:
    return dict(described)
  is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
  if not is_list or not all(re.fullmatch(KNOWN, name) for name in targets):
    raise ValueError(
      f"{KEY}={words.shown(targets)}: read are a list of experts' {GATE_UP} and {DOWN}, and of gate.weight"
    )
  return {key: value for key, value in described.items() if key not in (KEY, *WHERE)}


def apart(
  tensors: Mapping[str, np.ndarray], described: Mapping[str, Any], params: Any, family: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """(tensors, config) with a module for each expert and projection."""
  pairs: dict[tuple[str, str], dict[str, np.ndarray]] = collections.defaultdict(dict)
  rest = {}
  for key, array in tensors.items():
    match = re.fullmatch(TENSOR, naming.bare(key))
    if match:
      pairs[match[1], match[2]][match[3]] = array
    else:
      rest[key] = array
  if not pairs:
    return rest, dict(described)
  _, experts, _, width = weight.shape(params["layers"]["mlp"]["experts"]["gate_proj"]["weight"])
  split = {place: _experts(pair, experts) for place, pair in pairs.items()}
  ups = [pair for pair in split.values() if pair[1].shape[1] == 2 * width]
  halves = bool(ups) and all(_is_diagonal(b, width) for _, b in ups)
  ranks: dict[str, int] = {}
  for (layer, _), (a, b) in split.items():
    for projection, factors in _projections(a, b, width, halves).items():
      ranks[projection] = factors[0].shape[1]
      for expert, one in enumerate(zip(*factors)):
        name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
        for letter, factor in zip("AB", one):
          rest[f"base_model.model.{names.theirs(name, family)}.lora_{letter}.weight"] = factor
  return rest, _config(described, ranks, halves, family)


def _experts(pair: Mapping[str, np.ndarray], experts: int) -> tuple[np.ndarray, np.ndarray]:
  """([E, r, in], [E, out, r])."""
  if pair.keys() != {"A", "B"} or pair["A"].shape[0] % experts:
    raise ValueError(
      f"the fused adapter of a layer's experts is lora_A and lora_B of {experts} experts, found "
      + ", ".join(f"lora_{letter} {array.shape}" for letter, array in pair.items())
    )
  a, b = pair["A"], pair["B"]
  return a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts).transpose(2, 0, 1)


def _is_diagonal(b: np.ndarray, width: int) -> bool:
  """Whether gate and up have factors of their own, half of the rank each: what PEFT makes of older files."""
  half = b.shape[2] // 2
  return b.shape[2] % 2 == 0 and not b[:, :width, half:].any() and not b[:, width:, :half].any()


def _projections(a, b, width: int, halves: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  if b.shape[1] != 2 * width:
    return {DOWN: (a, b)}
  half = a.shape[1] // 2
  of_gate, of_up = (slice(half), slice(half, None)) if halves else (slice(None), slice(None))
  return {
    "gate_proj": (a[:, of_gate], b[:, :width, of_gate]),
    "up_proj": (a[:, of_up], b[:, width:, of_up]),
  }


def _config(
  described: Mapping[str, Any], ranks: Mapping[str, int], halves: bool, family: str
) -> dict[str, Any]:
  """The config with each projection's rank and alpha as patterns."""
  fused = lambda projection: f"experts.{DOWN if projection == DOWN else GATE_UP}"
  others = lambda table: {
    pattern: value
    for pattern, value in (table or {}).items()
    if not any(fits(pattern, f"model.layers.0.mlp.experts.{name}") for name in (GATE_UP, DOWN))
  }
  rank_pattern = others(described.get("rank_pattern"))
  alpha_pattern = others(described.get("alpha_pattern"))
  for projection, rank in ranks.items():
    called = f"model.layers.0.mlp.{fused(projection)}"
    table = described.get("alpha_pattern") or {}
    alpha = next((v for p, v in table.items() if fits(p, called)), described.get("lora_alpha", 8))
    share = 2 if halves and projection != DOWN else 1
    pattern = names.theirs(rf".mlp.experts.0.{projection}", family)
    pattern = pattern.lstrip(".").replace(".", r"\.").replace("0", r"\d+")
    rank_pattern[pattern], alpha_pattern[pattern] = rank, alpha / share
  return dict(described, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
