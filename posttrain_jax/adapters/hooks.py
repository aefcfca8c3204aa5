"""What an adapter's method adds to the training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Hooks:
  """Three functions of the whole adapter, trained and carried fields together."""

  penalty: Callable[[Any], Array]  # (adapter) -> what is added to the loss, once an optimizer batch
  after_update: Callable[[Any, Any, Array], Any]  # (adapter, gradient, step) -> adapter
  metrics: Callable[[Any], dict[str, Array]] = lambda adapter: {}  # of the adapter after the update
