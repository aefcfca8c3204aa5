"""PEFT's PROMPT_TUNING and PREFIX_TUNING: one tensor, `prompt_embeddings`, and what trains whole beside it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters.codecs import codec, saved
from posttrain_jax.adapters.codecs.codec import Codec, Folder, Keys, Written
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.prefix import Prefix
from posttrain_jax.adapters.prompt import SoftPrompt
from posttrain_jax.core import tree
from posttrain_jax.models import before
from posttrain_jax.models.config import ModelConfig

TENSOR = "prompt_embeddings"
PREFIX = "base_model."  # of the names of what trains whole: PEFT puts no tuner around the model
OFF = {**codec.TASK, "modules_to_save": (None, []), "num_transformer_submodules": (None, 1)}
SIZES = ("token_dim", "num_attention_heads", "num_layers")  # of the base, which its tensor says too
PROMPT_KEYS = Keys(
  fields={
    "num_virtual_tokens": (int,),
    "prompt_tuning_init": (str,),
    "prompt_tuning_init_text": (str, type(None)),
  },
  off=OFF,
  unread=(*codec.UNREAD, *SIZES, "tokenizer_kwargs", "tokenizer_name_or_path"),
)
PREFIX_KEYS = Keys(
  fields={"num_virtual_tokens": (int,)},
  # PEFT saves the keys and values that came out of the projection, and not the projection
  off={**OFF, "prefix_projection": (False, True)},
  unread=(*codec.UNREAD, *SIZES, "encoder_hidden_size", "init_weights"),
)


def write_prompt(adapter: Any, config: AdapterConfig, model_config: ModelConfig) -> Written:
  """The embeddings [slots, embed] as they are.

  PEFT would want the tokenizer of a prompt that began as a text, so a text stands in our record alone.
  """
  adapter, whole, to_save = saved.write(adapter, config, model_config, prefix=PREFIX)
  node = _only(adapter, before.PROMPT, SoftPrompt)
  if node.shape[1] != model_config.hidden_size:
    raise ValueError(
      f"adapter at {before.PROMPT} has width {node.shape[1]}, model_config says {model_config.hidden_size}"
    )
  started = dict(
    prompt_tuning_init=config.prompt_tuning_init,
    prompt_tuning_init_text=config.prompt_tuning_init_text,
  )
  is_text = config.prompt_tuning_init == "TEXT"
  described = dict(
    num_virtual_tokens=node.shape[0],
    token_dim=model_config.hidden_size,
    num_attention_heads=model_config.num_heads,
    **(dict(prompt_tuning_init="RANDOM", prompt_tuning_init_text=None) if is_text else started),
    **_common(model_config, to_save),
  )
  tensors = {TENSOR: np.asarray(node.embeddings), **whole}
  return Written(tensors, described, started if is_text else {})


def read_prompt(
  folder: Folder, params: Any, model_config: ModelConfig
) -> tuple[dict[str, Any], AdapterConfig]:
  folder, whole, named = saved.read(folder, params)
  started = {key: folder.record[key] for key in PROMPT_KEYS.fields if key in folder.record}
  config = codec.config(folder, PROMPT_KEYS, "prompt", (), **started)
  shape = (config.num_virtual_tokens, model_config.hidden_size)
  node = SoftPrompt(jnp.asarray(_tensor(folder, shape)))
  return {before.PROMPT: node, **whole}, config.replace(**named)


def write_prefix(adapter: Any, config: AdapterConfig, model_config: ModelConfig) -> Written:
  """[slots, layers * 2 * kv_heads * head_dim]: a layer's keys, its values, then the next layer's."""
  adapter, whole, to_save = saved.write(adapter, config, model_config, prefix=PREFIX)
  node = _only(adapter, before.PREFIX, Prefix)
  wanted = (model_config.num_layers, node.k.shape[1], _width(model_config))
  if node.k.shape != wanted:
    raise ValueError(f"adapter at {before.PREFIX} is {node.k.shape}, model_config says {wanted}")
  both = np.stack([np.asarray(node.k), np.asarray(node.v)], axis=1)  # [layers, 2, slots, width]
  described = dict(
    num_virtual_tokens=node.k.shape[1],
    token_dim=_width(model_config),
    num_attention_heads=model_config.num_kv_heads,
    encoder_hidden_size=_width(model_config),
    prefix_projection=False,
    **_common(model_config, to_save),
  )
  stored = both.transpose(2, 0, 1, 3).reshape(len(both[0, 0]), -1)
  return Written({TENSOR: stored, **whole}, described)


def read_prefix(
  folder: Folder, params: Any, model_config: ModelConfig
) -> tuple[dict[str, Any], AdapterConfig]:
  folder, whole, named = saved.read(folder, params)
  config = codec.config(folder, PREFIX_KEYS, "prefix", ())
  layers, slots, width = model_config.num_layers, config.num_virtual_tokens, _width(model_config)
  both = _tensor(folder, (slots, layers * 2 * width)).reshape(slots, layers, 2, width)
  k, v = (jnp.asarray(both[:, :, i].swapaxes(0, 1)) for i in range(2))
  return {before.PREFIX: Prefix(k, v), **whole}, config.replace(**named)


CODECS = (
  Codec("PROMPT_TUNING", ("prompt",), PROMPT_KEYS, write_prompt, read_prompt, PREFIX),
  Codec("PREFIX_TUNING", ("prefix",), PREFIX_KEYS, write_prefix, read_prefix, PREFIX),
)


def _only(adapter, path, kind):
  nodes = tree.flatten(adapter)
  if list(nodes) != [path] or not isinstance(nodes[path], kind):
    listed = ", ".join(f"{type(node).__name__} at {at}" for at, node in nodes.items())
    raise ValueError(
      f"PEFT's file of this kind holds one {kind.__name__} at {path}, found {listed}"
    )
  return nodes[path]


def _tensor(folder: Folder, shape: tuple[int, ...]) -> np.ndarray:
  unknown = [name for name in folder.tensors if name != TENSOR]
  if unknown or TENSOR not in folder.tensors:
    raise ValueError(
      f"{folder.tensor_file}: expected the tensor {TENSOR!r} alone, found {', '.join(folder.tensors) or 'none'}"
    )
  tensor = folder.tensors[TENSOR]
  if tensor.shape != shape:
    raise ValueError(
      f"{folder.tensor_file}: {TENSOR} has shape {tensor.shape}, expected {shape}: "
      f"num_virtual_tokens={shape[0]} by {folder.config_file.name}, on this base"
    )
  return tensor


def _width(model_config: ModelConfig) -> int:
  return model_config.num_kv_heads * model_config.head_dim


def _common(model_config: ModelConfig, to_save: list[str] | None) -> dict[str, Any]:
  return dict(
    num_layers=model_config.num_layers, num_transformer_submodules=1, modules_to_save=to_save
  )
