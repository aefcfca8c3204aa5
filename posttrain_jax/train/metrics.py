"""Metrics that add up exactly over micro-batches, devices and steps: a sum and a count, divided when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import struct

Array = jax.Array


@struct.dataclass
class Mean:
  """total / count; two of them add component by component."""

  total: Array
  count: Array

  def __add__(self, other: Mean) -> Mean:
    return Mean(self.total + other.total, self.count + other.count)


def mean(values: Array, mask: Array | None = None) -> Mean:
  """The mean of values where mask is True; float32."""
  mask = jnp.ones_like(values) if mask is None else mask.astype(jnp.float32)
  return Mean(jnp.sum(values.astype(jnp.float32) * mask), jnp.sum(mask))


def add(left: Mapping[str, Mean], right: Mapping[str, Mean]) -> dict[str, Mean]:
  return {name: left[name] + right[name] for name in left}


def zeros_like(metrics: Any) -> Any:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)


def read(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Plain numbers on the host; a mean over nothing (a channel that no token had) is left out."""
  host = jax.device_get(dict(metrics))
  values = {}
  for name, value in host.items():
    if isinstance(value, Mean):
      if value.count > 0:
        values[name] = float(np.float64(value.total) / np.float64(value.count))
    else:
      values[name] = float(value)
  return values
