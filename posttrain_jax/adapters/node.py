"""What a tree of adapters holds at a path: the verbs that `bind`, `merge`, `stack`, layout and files ask of it.

Every node is a frozen dataclass of one of three kinds, told by its class:

| kind | is | examples |
|---|---|---|
| `Change` | a change of the weight that stands at its path in the base | LoRA, DoRA, VeRA, AdaLoRA, (IA)3, Replaced |
| `Standing` | what stands before every text, at a path of its own | SoftPrompt, Prefix |
| `Common` | what nodes of its tree read in common; no path of the base | VeRA's projections |

A `PerRow` node is a stack of one kind, of which each row of a batch has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import jax

from posttrain_jax.core.leaf import Leaf
from posttrain_jax.core.weight import Adapted

Array = jax.Array


class Node(Leaf):
  """What every kind has, beside what a `Leaf` says: TRAINED and partition_specs."""

  def size(self) -> int:
    """Trained parameters in effect: a masked rank does not count."""
    raise TypeError(f"{type(self).__name__} does not say how much of it trains")


class Change(Node):
  """A change of a weight; `core.weight.Adapted` joins the two, and the base may itself be one."""

  dropout: float = 0.0  # of the adapter's input, in training

  def apply(self, x: Array, base: Any, key: Array | None = None) -> Array:
    """x: [..., in] -> [..., out], x times the changed base, in the dtype of x; key: for dropout, in training."""
    raise TypeError(f"{type(self).__name__} does not multiply")

  def ragged(self, x: Array, sizes: Array, base: Any, key: Array | None = None) -> Array:
    """`core.weight.ragged` of a stack of experts; key: one for each."""
    raise TypeError(f"{type(self).__name__} is no change of experts")

  def rows(self, ids: Array, base: Any, key: Array | None = None) -> Array:
    """Rows of the changed base, in the base's dtype: ids: [...] -> [..., out]."""
    raise TypeError(f"{type(self).__name__} is no change of an embedding")

  def dense(self, base: Any, dtype: Any = None) -> Array:
    """The changed base, [..., in, out], summed in float32 and rounded once."""
    raise TypeError(f"{type(self).__name__} has no dense form")

  def settled(self, base: Any) -> Any:
    """The changed base as what multiplies cheapest where nothing trains; plain, or with the change beside it."""
    return Adapted(base, self)

  def completed(self, adapter: Any) -> Self:
    """The node with what it reads elsewhere in its own tree."""
    del adapter
    return self

  def beside(self, path: str, params: Any) -> Mapping[str, Array]:
    """{path: leaf} of what else binding at `path` changes in the base."""
    del path, params
    return {}

  def at_start(self) -> Change | None:
    """What the start of training took out of the base, as a node of its own; None where nothing was taken."""
    return None


class Standing(Node):
  """Slots before every text, which `models.before` reads."""

  @property
  def slots(self) -> int:
    """How many slots a row has room for."""
    raise TypeError(f"{type(self).__name__} has no slots")

  def segments(self, batch: int) -> Array:
    """[batch, slots]: `attention.EVERYONE` in a slot that is used, else 0."""
    raise TypeError(f"{type(self).__name__} has no segments")

  def read(self, batch: int) -> Any:
    """Embeddings [batch, slots, embed], or (keys, values) [..., batch, slots, kv_heads * head_dim]."""
    raise TypeError(f"{type(self).__name__} has nothing to read")


class Common(Node):
  """What stands once in a tree of adapters and is lent to its nodes by `Change.completed`; nothing is bound there."""


class PerRow(Node):
  """Several adapters in one node, of which each row of a batch has its own."""

  def of_rows(self, index: Array) -> Self:
    """The node for a batch whose rows have these adapters, -1 for none; index: [batch]."""
    raise TypeError(f"{type(self).__name__} has no rows")
