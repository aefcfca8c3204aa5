"""PEFT's IA3: one vector for each module, a column where it scales outputs and a row where it scales inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain_jax.adapters import ia3
from posttrain_jax.adapters.codecs import codec, modules, naming, saved
from posttrain_jax.adapters.codecs.codec import Codec, Folder, Keys, Written
from posttrain_jax.adapters.config import AdapterConfig, full_name, picks
from posttrain_jax.core import weight
from posttrain_jax.models.config import ModelConfig

NAMES = {"gain": ("ia3_l", "ia3_l")}
KEYS = Keys(
  fields={
    "target_modules": (str, list, type(None)),
    "exclude_modules": (str, list, type(None)),
    "feedforward_modules": (str, list, type(None)),
  },
  off={**codec.TASK, "fan_in_fan_out": (False, True), "modules_to_save": (None, [])},
  unread=(*codec.UNREAD, "init_ia3_weights"),
)


def write(adapter: Any, config: AdapterConfig, model_config: ModelConfig) -> Written:
  adapter, whole, to_save = saved.write(adapter, config, model_config)
  parts, nodes = modules.collect(adapter, model_config, (ia3.IA3,), _split, _shape)
  full = naming.of_model(model_config).full
  targets = modules.targets(list(parts), model_config)
  names = targets["target_modules"]
  if targets["layers_to_transform"] is not None:  # a choice that this type does not know
    names = [full(name) for name in parts]
  within = [name for name, (node, _) in nodes.items() if node.feedforward]
  feedforward = {n for name in within for n in (full(name), name.rpartition(".")[2])}
  described = dict(
    target_modules=names,
    exclude_modules=None,
    feedforward_modules=[name for name in names if name in feedforward],
    fan_in_fan_out=False,
    modules_to_save=to_save,
  )
  return Written(modules.tensors(parts, NAMES, model_config) | whole, described)


def read(
  folder: Folder, params: Any, model_config: ModelConfig
) -> tuple[dict[str, Any], AdapterConfig]:
  del model_config
  folder, whole, named = saved.read(folder, params)
  parts = modules.parse(folder, NAMES, params)
  config = codec.config(folder, KEYS, "ia3", list(parts))
  feedforward = [n for n in parts if picks(config.feedforward_modules, folder.naming.full(n))]
  config = modules.settled(folder, config, parts, params, named["modules_to_save"])
  if feedforward != [name for name in parts if picks(config.feedforward_modules, full_name(name))]:
    config = config.replace(feedforward_modules=tuple(map(full_name, feedforward)))
  make = lambda base, names: _node(base, names, parts, config, folder)
  nodes = modules.nodes(parts, params, make)
  return nodes | whole, config.replace(**named)


CODEC = Codec("IA3", ("ia3",), KEYS, write, read)


def _split(node: ia3.IA3) -> list[dict[str, np.ndarray]]:
  gains = np.atleast_2d(node.gain)
  gains = gains[..., None] if node.feedforward else gains[:, None]
  return [
    dict(gain=gain) if there else {} for gain, there in zip(gains, np.atleast_1d(node.adapted()))
  ]


def _shape(node: ia3.IA3) -> tuple[int | None, ...]:
  *lead, size = node.gain.shape
  return (*lead, size, None) if node.feedforward else (*lead, None, size)


def _node(matrix, names, parts, config, folder) -> ia3.IA3:
  rows, columns = weight.shape(matrix)[-2:]
  feedforward = ia3.is_feedforward([name for name in names if name in parts], config)
  shapes = {"gain": (rows, 1) if feedforward else (1, columns)}
  for name in names:
    modules.check_shapes(parts.get(name, {}), shapes, NAMES, name, folder)
  gains = [parts[name]["gain"].reshape(-1) if name in parts else None for name in names]
  return ia3.join(gains, stacked=len(weight.shape(matrix)) == 3, feedforward=feedforward)
