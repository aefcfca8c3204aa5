"""Whether the same matrices mean the same in every model that goes into a merge, by their `config.json`s.

A merge is written with the leading model's config.  Matrices of equal shapes that another model splits into other
heads, or runs through another activation, are no weights of that function: such models are refused.  What a fine-tune
may have changed on purpose, positions and special tokens among it, is said with both values.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_jax.build import merge_inputs
from posttrain_jax.core import files, words
from posttrain_jax.merge.recipe import ModelRef, Recipe, RecipeError
from posttrain_jax.models import hf
from posttrain_jax.models.config import ModelConfig

log = logging.getLogger(__name__)

# what the matrices mean: the keys of config.json, and the fields of ModelConfig that they become
STRUCTURE = {
  "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads",
  "head_dim": "head_dim",
  "hidden_act": "activation",
  "query_pre_attn_scalar": "attention_scale",
  "qk_norm": "qk_norm",
  "norm_plus_one": "norm_plus_one",
  "sandwich_norms": "sandwich_norms",
  "scale_embeddings": "scale_embeddings",
  "labels": "scores",
  "num_experts": "experts",
  "num_experts_per_tok": "experts_per_token",
  "norm_topk_prob": "norm_experts",
}
# what may be meant
SAID = {
  "model_type": "family",
  "rms_norm_eps": "norm_eps",
  "layer_types": "layer_types",
  "sliding_window": "window",
  "max_position_embeddings": "max_length",
  "attn_logit_softcapping": "attention_softcap",
  "final_logit_softcapping": "final_softcap",
  "bos_token_id": "bos_token_id",
  "eos_token_id": "eos_token_ids",
  "pad_token_id": "pad_token_id",
}
ROPES = {"": "rope", " of sliding layers": "local_rope"}
# the same of a config that the decoder does not compute, whose model is merged all the same
RAW_STRUCTURE = (
  *("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
  *("hidden_activation", "activation_function", "num_local_experts", "num_experts_per_tok"),
)
RAW_SAID = (
  *("rms_norm_eps", "layer_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
  *("partial_rotary_factor", "sliding_window", "use_sliding_window", "layer_types"),
  *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


@dataclasses.dataclass(frozen=True)
class _Config:
  """A model's config as it stands, of its text model; and as the decoder reads it, None where it does not."""

  raw: Mapping[str, Any]
  parsed: ModelConfig | None


def check(recipe: Recipe, folders: Mapping[ModelRef, Path]) -> None:
  """Compares every model with the leading one.

  Raises:
    RecipeError: the same matrices are another function in one of them.
  """
  configs = {folder: _config(folder) for folder in {folders[m] for m in recipe.models()}}
  leading = configs[folders[recipe.leading]]
  for model in recipe.models():
    structure, said = _unequal(leading, configs[folders[model]])
    if not recipe.whole:
      said.pop("layer_types", None)  # those of each slice's model are written
    if structure:
      raise RecipeError(
        f"{recipe.leading} and {model} differ in {_listed(structure)}: the same matrices are another function in each,"
        " and a merge of them is neither's; name models that were trained from one base"
      )
    if said:
      log.warning(
        "%s and %s differ in %s: the merge has the first's",
        recipe.leading,
        model,
        _listed(said),
      )


def _config(folder: Path) -> _Config:
  raw = merge_inputs.text_config(files.read_json(folder / "config.json"))
  try:
    return _Config(raw, hf.read_config(folder))
  except ValueError:  # of a family or a setting that is not computed here, and is merged as it is
    return _Config(raw, None)


Differences = dict[str, tuple[Any, Any]]


def _unequal(one: _Config, other: _Config) -> tuple[Differences, Differences]:
  """({key: both values} of structure, the same of what may be meant); of a key that one leaves out nothing is known."""
  if one.parsed is None or other.parsed is None:
    both = lambda keys: {
      key: (one.raw[key], other.raw[key])
      for key in keys
      if key in one.raw and key in other.raw and one.raw[key] != other.raw[key]
    }
    return both(RAW_STRUCTURE), both(RAW_SAID)
  fields, others = _fields(one.parsed), _fields(other.parsed)
  pairs = {key: (fields.get(key), others.get(key)) for key in fields | others}
  pairs = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
  structure = {key: pair for key, pair in pairs.items() if key in STRUCTURE}
  return structure, {key: pair for key, pair in pairs.items() if key not in STRUCTURE}


def _fields(config: ModelConfig) -> dict[str, Any]:
  values = vars(config)
  fields = {key: values[field] for key, field in (STRUCTURE | SAID).items()}
  for where, field in ROPES.items():
    rope = {} if values[field] is None else vars(values[field])
    fields |= {f"rope_{'type' if key == 'kind' else key}{where}": x for key, x in rope.items()}
  return fields


def _listed(differences: Differences) -> str:
  return ", ".join(
    f"{key} ({words.shown(one)} and {words.shown(other)})"
    for key, (one, other) in differences.items()
  )
