"""A model of some of another's layers: where a student of half the size begins."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from posttrain_jax.models.config import FULL, ModelConfig, from_hf


def spread(layers: int, count: int) -> tuple[int, ...]:
  """Which of so many layers are kept: evenly spread, the first and the last among them; the lower of two as near.

  >>> spread(6, 3), spread(30, 15)[-3:], spread(4, 1)
  ((0, 2, 5), (25, 27, 29), (0,))
  """
  if count == 1:
    return (0,)
  step = (layers - 1) / (count - 1)
  return tuple(math.ceil(i * step - 0.5 - 1e-9) for i in range(count))


def of_layers(params: Any, config: ModelConfig, kept: Sequence[int]) -> tuple[Any, ModelConfig]:
  """(params, config) with these layers alone, in their order; all else, embeddings and head, is shared with params.

  Args:
    kept: numbers of layers, rising.

  Raises:
    ValueError: there are no such layers, or they are not in rising order.
  """
  if list(kept) != sorted({*kept}) or not kept or not 0 <= kept[0] <= kept[-1] < config.num_layers:
    raise ValueError(
      f"layers {', '.join(map(str, kept)) or '(none)'}: write some of 0 to {config.num_layers - 1}, in rising order"
    )
  at = np.asarray(kept)
  source = json.loads(config.source)
  source["num_hidden_layers"] = len(kept)
  if {*config.kinds} != {FULL} or "layer_types" in source:
    source["layer_types"] = [config.kinds[i] for i in kept]
  layers = jax.tree.map(lambda leaf: leaf[at], params["layers"])
  return {**params, "layers": layers}, from_hf(source)
