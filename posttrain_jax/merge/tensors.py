"""What is merged: a model's tensors, and the arithmetic on those of one name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from posttrain_jax.core import shards
from posttrain_jax.merge.recipe import ModelRef, Wanted


class Tensors(Protocol):
  """A model's tensors by the names of its files."""

  @property
  def where(self) -> Mapping[str, Path]: ...
  def shape(self, name: str) -> tuple[int, ...]: ...
  def stored(self, name: str) -> str: ...
  def get(self, name: str) -> np.ndarray: ...
  def place(self, name: str) -> shards.Place | None:
    """Where `get`'s numbers lie as they are; None where they are computed."""


# (the tensor wanted, its inputs in the order of its sources) -> the merged tensor
Operator = Callable[[Wanted, Sequence[np.ndarray]], Any]


def read(wanted: Wanted, opened: Mapping[ModelRef, Tensors]) -> list[np.ndarray]:
  return [opened[source.model].get(name) for source, name in wanted.inputs]
