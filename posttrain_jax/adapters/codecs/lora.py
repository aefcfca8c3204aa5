"""PEFT's LORA: two factors for each module, at its own rank."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters import dora, lora
from posttrain_jax.adapters.codecs import codec, modules, naming, saved
from posttrain_jax.adapters.codecs.codec import Codec, Folder, Keys, Written
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.core import weight
from posttrain_jax.models.config import ModelConfig

NAMES = {
  "a": ("lora_A.weight", "lora_embedding_A"),
  "b": ("lora_B.weight", "lora_embedding_B"),
}
MAGNITUDE = {"magnitude": ("lora_magnitude_vector", "lora_magnitude_vector")}  # of DoRA
KEYS = Keys(
  fields={
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (str, list, type(None)),
    "exclude_modules": (str, list, type(None)),
    "layers_to_transform": (int, list, type(None)),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "use_rslora": (bool,),
    "init_lora_weights": (bool, str, type(None)),
    "use_dora": (bool,),
  },
  off={
    **codec.TASK,
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "corda_config": (None,),
    "ensure_weight_tying": (False,),
    "fan_in_fan_out": (False, True),  # of Conv1D: PEFT itself turns it off for linear layers
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "layers_pattern": (None, "", [], "layers", ["layers"]),  # our families' only list of layers
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None,),
    "use_qalora": (False,),
    "velora_config": (None,),
  },
  unread=(
    *codec.UNREAD,
    "eva_config",
    "loftq_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
  ),
)
LONG = ("attention_group", "context_length")  # of LongLoRA, in our record: PEFT has no such thing
# PEFT's initialisations that take their start out of the base, in folders that are read again by taking it out again
# (lora_ga does so as well, and a folder that holds its factors is of the changed base).
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def write(adapter: Any, config: AdapterConfig, model_config: ModelConfig) -> Written:
  """Each module at its effective rank, and where that is 0 not at all.

  What began with a part of its base is written as a LoRA of the original, at twice the rank; the record says so.
  """
  adapter, whole, to_save = saved.write(adapter, config, model_config)
  config = config.for_layers(model_config.num_layers)
  parts, nodes = modules.collect(adapter, model_config, (lora.LoRA,), _split, _shape)
  ranks = {name: fields["a"].shape[1] for name, fields in parts.items()}
  scales = {name: np.ravel(node.scale)[i] for name, (node, i) in nodes.items()}
  described = dict(
    lora_dropout=config.lora_dropout,
    bias="none",
    fan_in_fan_out=False,
    modules_to_save=to_save,
    # PEFT takes any other start out of the base when it loads
    init_lora_weights="gaussian" if config.init_lora_weights == "gaussian" else True,
    use_dora=any(isinstance(node, dora.DoRA) for node, _ in nodes.values()),
    use_rslora=config.use_rslora,
    **modules.targets(list(parts), model_config),
    **_patterns(config, ranks, scales, naming.of_model(model_config).full),
  )
  record = dict(began_with=config.init_lora_weights) if config.changes_base else {}
  if config.method == "longlora":
    record |= {field: vars(config)[field] for field in LONG}
  return Written(
    {**modules.tensors(parts, {**NAMES, **MAGNITUDE}, model_config), **whole}, described, record
  )


def read(
  folder: Folder, params: Any, model_config: ModelConfig
) -> tuple[dict[str, Any], AdapterConfig]:
  folder, whole, named = saved.read(folder, params)
  with_magnitude = folder.described.get("use_dora") is True
  parts = modules.parse(folder, {**NAMES, **MAGNITUDE} if with_magnitude else NAMES, params)
  method = "dora" if with_magnitude else "lora"
  config = codec.config(folder, KEYS, method, list(parts), **_start(folder))
  config = modules.settled(folder, config, parts, params, named["modules_to_save"])
  make = lambda base, names: _node(base, names, parts, config, folder.tensor_file)
  nodes = modules.nodes(parts, params, make)
  long = {field: folder.record[field] for field in LONG if field in folder.record}
  longlora = dict(method="longlora", **long) if long else {}
  return nodes | whole, config.replace(**named, **longlora)


CODEC = Codec("LORA", ("lora", "dora", "pissa", "olora", "loftq", "longlora"), KEYS, write, read)


# Writing


def _split(node: lora.LoRA) -> list[dict[str, np.ndarray]]:
  original = node.on_the_original()
  parts = [dict(a=a, b=b) if a.shape[1] else {} for a, b in original.split()]
  if isinstance(node, dora.DoRA):
    for part, magnitude in zip(parts, _rows(node.magnitude)):
      part.update(dict(magnitude=magnitude) if part else {})
  return parts


def _rows(magnitude: Any) -> np.ndarray:
  return np.asarray(magnitude).reshape(-1, magnitude.shape[-1])


def _shape(node: lora.LoRA) -> tuple[int, ...]:
  return (*node.a.shape[:-1], node.b.shape[-1])


def _patterns(
  config: AdapterConfig,
  ranks: Mapping[str, int],
  scales: Mapping[str, Any],
  full: Callable[[str], str],
) -> dict:
  """r, lora_alpha and the patterns that give PEFT these ranks and scales: the user's own where they do.

  The first pattern that matches wins, and PEFT sorts them when it saves: what depends on their order is written out.

  Args:
    full: what the class that PEFT will adapt calls a module.
  """
  config = config.replace(
    rank_pattern=dict(sorted(config.rank_pattern.items())),
    alpha_pattern=dict(sorted(config.alpha_pattern.items())),
  )
  power = 0.5 if config.use_rslora else 1
  scale = lambda name: np.float32(config.alpha(name, full(name)) / ranks[name] ** power)
  if all(
    config.rank(name, full(name)) == rank and scale(name) == scales[name]
    for name, rank in ranks.items()
  ):
    return dict(
      r=config.r,
      lora_alpha=config.lora_alpha,
      rank_pattern=dict(config.rank_pattern),
      alpha_pattern=dict(config.alpha_pattern),
    )
  alphas = {name: _alpha(scales[name], rank**power) for name, rank in ranks.items()}
  r, alpha = _commonest(ranks), _commonest(alphas)
  named = lambda values, usual: {
    modules.anchored(full(name)): value for name, value in values.items() if value != usual
  }
  return dict(
    r=r, lora_alpha=alpha, rank_pattern=named(ranks, r), alpha_pattern=named(alphas, alpha)
  )


def _alpha(scale: np.float32, divisor: float) -> float:
  """The shortest alpha with alpha / divisor == scale in float32."""
  exact = float(scale) * divisor
  rounded = (round(exact, digits) for digits in range(9))
  return next((alpha for alpha in rounded if np.float32(alpha / divisor) == scale), exact)


def _commonest(values: Mapping[str, Any]) -> Any:
  return collections.Counter(values.values()).most_common(1)[0][0]


# Reading


def _start(folder: Folder) -> dict[str, Any]:
  """init_lora_weights as AdapterConfig says it: of a finished adapter it matters only whether it moved the base."""
  said = folder.described.get("init_lora_weights")
  if str(said).lower().startswith(MOVES_BASE):
    raise ValueError(
      f"{folder.config_file}: init_lora_weights={said!r} is not supported: it moves a part of the base into the "
      "adapter; export it from peft as plain LoRA (path_initial_model_for_weight_conversion)"
    )
  return dict(init_lora_weights="gaussian" if said == "gaussian" else True)


def _node(matrix, names, parts, config, path) -> lora.LoRA:
  """The LoRA of one weight's modules, absent ones at rank 0."""
  rows, columns = weight.shape(matrix)[-2:]
  pairs, scales = [], []
  for name in names:
    if name not in parts:
      pairs.append((np.zeros((rows, 0), np.float32), np.zeros((0, columns), np.float32)))
      scales.append(0.0)
      continue
    pairs.append(_pair(name, parts[name], rows, columns, config.rank(name), path))
    scales.append(config.scale(name))
  lead = weight.shape(matrix)[:-2]
  node = lora.join(pairs, scales, lead, dropout=config.lora_dropout)
  return _with_magnitudes(node, matrix, names, parts, path) if config.use_dora else node


def _with_magnitudes(node, matrix, names, parts, path) -> dora.DoRA:
  """The DoRA of node; a module that is not adapted has the magnitude of its base."""
  dora_node = dora.over(node, matrix)
  magnitudes = list(_rows(dora_node.magnitude))
  tensor = MAGNITUDE["magnitude"][0]
  for i, name in enumerate(names):
    if name in parts:
      if "magnitude" not in parts[name]:
        raise ValueError(f"{path}: the module {name!r} has no {tensor}")
      if parts[name]["magnitude"].shape != magnitudes[i].shape:
        shape = parts[name]["magnitude"].shape
        raise ValueError(
          f"{path}: {tensor} of {name!r} has shape {shape}, expected {magnitudes[i].shape}"
        )
      magnitudes[i] = jnp.asarray(parts[name]["magnitude"])
  magnitude = jnp.stack(magnitudes).reshape(dora_node.magnitude.shape)
  return dataclasses.replace(dora_node, magnitude=magnitude)


def _pair(name, tensors, rows, columns, rank, path):
  is_embedding = name == "embed_tokens"
  for field, shape in (("a", (rows, rank)), ("b", (rank, columns))):
    tensor = NAMES[field][is_embedding]
    if field not in tensors:
      raise ValueError(f"{path}: the module {name!r} has no {tensor}")
    if tensors[field].shape != shape:
      raise ValueError(
        f"{path}: {tensor} of {name!r} has shape {tensors[field].shape[::-1]}, expected {shape[::-1]}: "
        f"rank {rank} by adapter_config.json, on a base of {columns} x {rows}"
      )
  return tensors["a"], tensors["b"]
