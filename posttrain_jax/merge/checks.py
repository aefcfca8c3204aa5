"""What operators refuse, in words: options out of range, models that do not match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def models(models: Sequence[Any], *, least: int = 1, base: Any = None) -> tuple[Any, ...]:
  """models as a tuple, each of one shape with the others (and base) and of a floating dtype."""
  arrays = tuple(models)
  if len(arrays) < least:
    raise ValueError(f"{len(arrays)} models: this operator merges at least {least}")
  first = arrays[0] if base is None else base
  for i, array in enumerate(arrays):
    if np.shape(array) != np.shape(first):
      of = "models[0]" if base is None else "the base"
      raise ValueError(
        f"models[{i}] has shape {np.shape(array)}, {of} {np.shape(first)}: shapes must agree"
      )
  for array in (first, *arrays):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"an array of {array.dtype} cannot be merged: only floating ones can")
  return arrays


def per_model(name: str, value: Any, count: int) -> tuple[Any, ...]:
  """One value a model; a number stands for all of them."""
  if not isinstance(value, list | tuple) and np.ndim(value) == 0:
    return (value,) * count
  if len(value) != count:
    raise ValueError(
      f"{name} has {len(value)} values for {count} models: write one a model, or one for all"
    )
  return tuple(value)


def weights(value: Any, count: int, *, normalize: bool, name: str = "weights") -> tuple[Any, ...]:
  """One weight a model (None: 1 each) that can be divided by their sum where normalize."""
  numbers = per_model(name, 1.0 if value is None else value, count)
  known = [float(w) for w in numbers if not _traced(w)]
  for w in known:
    if not math.isfinite(w):
      raise ValueError(f"{name}={value}: weights must be finite numbers")
  if len(known) == count and normalize and not any(known):
    raise ValueError(f"{name}={value}: all weights are zero; give one model at least a weight")
  return numbers


def divisible(values: Sequence[Any], name: str = "weights") -> None:
  """Refuses weights whose sum, by which they are divided, is zero."""
  if not any(map(_traced, values)) and abs(sum(map(float, values))) < 1e-8:
    raise ValueError(
      f"{name}={[float(w) for w in values]} sum to zero, so they have no average: "
      "change one, or write normalize=False where the operator has it"
    )


def fraction(name: str, value: Any, hint: str = "") -> Any:
  """value, which must lie in [0, 1]."""
  if not _traced(value) and not 0 <= value <= 1:
    raise ValueError(f"{name}={value}: write a number in [0, 1]{hint}")
  return value


def fractions(name: str, value: Any, count: int) -> tuple[float, ...]:
  """One number in [0, 1] a model; a number stands for all."""
  return tuple(float(fraction(name, x)) for x in per_model(name, value, count))


def choice(name: str, value: Any, known: Sequence[Any]) -> Any:
  """value, which must be one of those known."""
  if value not in known:
    raise ValueError(f"{name}={value!r}: write {' or '.join(map(repr, known))}")
  return value


def _traced(x: Any) -> bool:
  return isinstance(x, Tracer)
