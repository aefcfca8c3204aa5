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


@struct.dataclass
class Difference:
  """The difference of two means, each over a set of its own."""

  left: Mean
  right: Mean

  def __add__(self, other: Difference) -> Difference:
    return Difference(self.left + other.left, self.right + other.right)


@struct.dataclass
class Moments:
  """What a deviation is of, and an effective sample size; read as the former."""

  total: Array
  squares: Array
  count: Array

  def __add__(self, other: Moments) -> Moments:
    return type(self)(
      self.total + other.total, self.squares + other.squares, self.count + other.count
    )

  def read(self) -> float:
    """sqrt(E x^2 - (E x)^2)."""
    mean, square = np.float64(self.total) / self.count, np.float64(self.squares) / self.count
    return float(np.sqrt(max(square - mean**2, 0.0)))


@struct.dataclass
class SampleShare(Moments):
  """(E w)^2 / E w^2: as how large a share of a sample of equal weights one of these weights counts."""

  def read(self) -> float:
    return float(np.float64(self.total) ** 2 / (np.float64(self.squares) * self.count or np.inf))


@struct.dataclass
class Extreme:
  """The largest of some values, or with sign -1 the least; two of them add to that of both."""

  value: Array  # times sign
  count: Array
  sign: Array

  def __add__(self, other: Extreme) -> Extreme:
    # zeros that something is added to hold no values
    here, there = (jnp.where(one.count > 0, one.value, -jnp.inf) for one in (self, other))
    sign = jnp.where(self.count > 0, self.sign, other.sign)
    return Extreme(jnp.maximum(here, there), self.count + other.count, sign)


def largest(values: Array, mask: Array) -> Extreme:
  """The largest of values where mask is True."""
  return _extreme(values, mask, 1.0)


def least(values: Array, mask: Array) -> Extreme:
  """The least of values where mask is True."""
  return _extreme(values, mask, -1.0)


def _extreme(values: Array, mask: Array, sign: float) -> Extreme:
  signed = jnp.where(mask, sign * values.astype(jnp.float32), -jnp.inf)
  return Extreme(jnp.max(signed), jnp.sum(mask.astype(jnp.float32)), jnp.asarray(sign))


def deviation(values: Array, mask: Array) -> Moments:
  """The standard deviation of values where mask is True, dividing by n."""
  return Moments(*_moments(values, mask))


def sample_share(weights: Array, mask: Array) -> SampleShare:
  """The effective size of a sample with these weights where mask is True, over its size."""
  return SampleShare(*_moments(weights, mask))


def _moments(values: Array, mask: Array) -> tuple[Array, Array, Array]:
  values = jnp.where(mask, values.astype(jnp.float32), 0.0)
  return jnp.sum(values), jnp.sum(values**2), jnp.sum(mask.astype(jnp.float32))


@struct.dataclass
class Histogram:
  """How many values lie below each of EDGES and above the last; two of them add bin by bin."""

  counts: Array  # [len(EDGES) + 1] float32

  def __add__(self, other: Histogram) -> Histogram:
    return Histogram(self.counts + other.counts)


_STEPS = np.geomspace(0.01, 100, 17)  # four to a factor of ten
EDGES = np.concatenate([-_STEPS[::-1], [0.0], _STEPS])


def histogram(values: Array, mask: Array) -> Histogram:
  """The histogram of the values where mask is True."""
  where = jnp.searchsorted(jnp.asarray(EDGES), values.ravel())
  counts = jnp.zeros(len(EDGES) + 1).at[where].add(mask.ravel().astype(jnp.float32))
  return Histogram(counts)


def add(left: Mapping[str, Mean], right: Mapping[str, Mean]) -> dict[str, Mean]:
  return {name: left[name] + right[name] for name in left}


def zeros_like(metrics: Any) -> Any:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)


def read(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Plain numbers on the host, histograms apart; a mean over nothing (a channel that no token had) is left out."""
  host = jax.device_get(dict(metrics))
  numbers = {
    name: _number(value) for name, value in host.items() if not isinstance(value, Histogram)
  }
  return {name: number for name, number in numbers.items() if number is not None}


def _number(value: Any) -> float | None:
  """The plain number of a metric; None for a mean over nothing."""
  if isinstance(value, Difference):
    left, right = _number(value.left), _number(value.right)
    return None if left is None or right is None else left - right
  if isinstance(value, Extreme):
    return float(value.value * value.sign) if value.count > 0 else None
  if isinstance(value, Moments):
    return value.read() if value.count > 0 else None
  if isinstance(value, Mean):
    if not value.count > 0:
      return None
    return float(np.float64(value.total) / np.float64(value.count))
  return float(value)


def histograms(metrics: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """{name: counts} of those metrics that are histograms, on the host."""
  counts = {name: m.counts for name, m in metrics.items() if isinstance(m, Histogram)}
  return jax.device_get(counts)
