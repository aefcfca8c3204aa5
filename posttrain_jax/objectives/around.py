"""An objective around another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from posttrain_jax.objectives.objective import Context, Memory, Scorer, Totals


@dataclasses.dataclass(frozen=True)
class Around(Scorer):
  """An objective that narrows another one, or adds to it; what it does not say itself, that one says."""

  part: Scorer | None = None

  def __post_init__(self) -> None:
    if self.part is None:
      raise ValueError(f"part=None: {type(self).__name__} stands around another objective")

  @property
  def inner(self) -> Scorer:
    assert self.part is not None
    return self.part

  @property
  def needs_reference(self) -> bool:
    return self.inner.needs_reference

  def start(self, trainable: Any) -> Memory:
    return self.inner.start(trainable)

  def context(self, context: Context, memory: Memory) -> Context:
    return self.inner.context(context, memory)

  def after_update(self, trainable: Any, memory: Memory, totals: Totals) -> Memory:
    return self.inner.after_update(trainable, memory, totals)

  def check_start(self, metrics: Mapping[str, float]) -> None:
    self.inner.check_start(metrics)
