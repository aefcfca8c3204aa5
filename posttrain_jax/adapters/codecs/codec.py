"""What a PEFT type is to `peft_format`: its config keys, and the way from a tree of nodes to named tensors and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_jax.adapters.codecs.naming import Naming
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.core import words
from posttrain_jax.models.config import ModelConfig

# Keys of any type that change nothing in what a finished adapter computes.
UNREAD = (
  "auto_mapping",  # names a class to import: never
  "base_model_name_or_path",  # an adapter fits by shapes and fingerprint, not by name
  "inference_mode",
  "peft_type",
  "peft_version",
  "revision",
)
TASK = {"task_type": (None, "CAUSAL_LM", "SEQ_CLS")}
# Keys that other writers add, and the values with which they change nothing.
OTHERS: Mapping[str, tuple[Any, ...]] = {
  "lora_dtype": ("auto", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"),
  "lorap_emb_lr": (1e-6,),
  "lora_plus_lr_ratio": (1, 1.0),
  "merge_weights": (True,),  # old PEFT: whether to merge for inference
  "unsloth_fixed": (True,),
  "use_cache": (True,),
  "is_trainable": (True,),
}
# Keys that list what there may be, and what there is: beside that the others name nothing.
LISTS = {"layers_pattern": "layers"}
# What to do about a key that is not supported, where there is something better than to merge with peft.
HINTS = {
  "bias": "the adapter trained biases of its base as well; merge it with peft "
  "(merge_and_unload) onto that base, and load the model",
  "alora_invocation_tokens": "it adapts what comes after those tokens alone, which is in no merged "
  "model: use it in peft, or train a LoRA without them",
  "arrow_config": "it chooses between adapters token by token, which is in no merged model: use it in "
  "peft, or load one of its adapters",
  "layer_replication": "peft does not merge it either: write the base with its layers repeated "
  "(posttrain merge, slices), and train a LoRA on that",
  "num_transformer_submodules": "it is for a model with an encoder and a decoder, and such are not read",
  "use_qalora": "it is for a GPTQ base, onto which peft does not merge it: use it in peft, or train a "
  "LoRA without it",
  "task_type": "adapters of language models and of sequence classifiers are read",
}


@dataclasses.dataclass(frozen=True)
class Keys:
  """The keys of `adapter_config.json` that a PEFT type has; any other with a value is refused."""

  fields: Mapping[str, tuple[type, ...]]  # those that are fields of AdapterConfig: their JSON types
  # what we do not compute: values that switch it off, default first
  off: Mapping[str, tuple[Any, ...]]
  unread: tuple[str, ...] = UNREAD


@dataclasses.dataclass(frozen=True)
class Folder:
  """What the files of an adapter's folder hold, nothing of it checked."""

  path: Path
  tensors: Mapping[str, np.ndarray]  # as stored, float32
  described: Mapping[str, Any]  # adapter_config.json
  record: Mapping[str, Any]  # posttrain.json; {} where PEFT wrote the folder
  naming: Naming  # of the class that was trained
  # adapted modules that are none of the text model's, as that class calls them
  others: tuple[str, ...] = ()

  @property
  def config_file(self) -> Path:
    return self.path / "adapter_config.json"

  @property
  def tensor_file(self) -> Path:
    return self.path / "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Written:
  """What the files of an adapter's folder are to hold."""

  tensors: Mapping[str, np.ndarray]  # by full name, as stored
  described: Mapping[str, Any]  # keys of adapter_config.json beside those that every type has
  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of posttrain.json, ours


@dataclasses.dataclass(frozen=True)
class Codec:
  """One PEFT type; `modules` has the parts that types with tensors for each module share."""

  peft_type: str
  methods: tuple[str, ...]  # of AdapterConfig that are written as this type
  keys: Keys
  # (adapter, config, model_config) -> Written
  write: Callable[[Any, AdapterConfig, ModelConfig], Written]
  # (folder, params, model_config) -> ({path: node}, config)
  read: Callable[[Folder, Any, ModelConfig], tuple[dict[str, Any], AdapterConfig]]
  wrapped: str = "base_model.model."  # what PEFT puts before the names of the class that it wraps


def config(
  folder: Folder, keys: Keys, method: str, adapted: Sequence[str], **fields: Any
) -> AdapterConfig:
  """The AdapterConfig that the folder describes, under its class's names; `fields` are those that JSON says otherwise.

  Raises:
    ValueError: a value that cannot be meant; the message names it.
  """
  options = {key: value for key, value in folder.described.items() if key in keys.fields}
  options = {key: value for key, value in options.items() if value is not None}
  if adapted:
    options.setdefault("target_modules", [folder.naming.full(name) for name in adapted])
  try:
    return AdapterConfig(method=method, **{**options, **fields})
  except (TypeError, ValueError) as error:
    raise ValueError(f"{folder.config_file}: {error}") from error


def check_keys(described: Mapping[str, Any], keys: Keys, path: Path) -> None:
  """Raises ValueError for a key that is unknown, not supported or of another type; before any tensor is looked at."""
  for key, value in described.items():
    check_key(key, value, keys, path)


def check_key(key: str, value: Any, keys: Keys, path: Path) -> None:
  shown = words.shown(value)
  if key in keys.fields:
    if not isinstance(value, keys.fields[key]) or (
      isinstance(value, bool) and bool not in keys.fields[key]
    ):
      wanted = " or ".join(kind.__name__ for kind in keys.fields[key])
      raise ValueError(f"{path}: {key}={shown} is a {type(value).__name__}, expected {wanted}")
  elif key in keys.off:
    is_listed = key in LISTS and isinstance(value, list) and LISTS[key] in value
    if value not in keys.off[key] and not is_listed:
      why = HINTS.get(key, "merge the adapter with peft (merge_and_unload) and load the model")
      raise ValueError(
        f"{path}: {key}={shown} is not supported; PEFT's default is {keys.off[key][0]!r}: {why}"
      )
  elif key in keys.unread or value in (None, False, [], {}, ""):
    return
  elif value not in OTHERS.get(key, ()):
    raise ValueError(
      f"{path}: unknown key {words.shown(key)[1:-1]}={shown}; what it does is not supported. Where it changes nothing"
      " of what the adapter computes, take it out of the file"
    )
