"""A leaf of a tree that is more than one array: a stored weight, an adapter's node, an optimizer's moment."""

from __future__ import annotations

from typing import Self

from jax.sharding import PartitionSpec


class Leaf:
  """Several arrays that stand where one array could: what trains of it, and how it lies on a mesh.

  A class that is one inherits from it; a plain array is no Leaf, trains whole and lies as its path says.
  """

  TRAINED: tuple[str, ...] = ()  # the fields that an optimizer sees

  def partition_specs(self, spec: PartitionSpec) -> Self:
    """The leaf with a PartitionSpec in the place of each array, given that of the dense array it stands for."""
    raise TypeError(f"{type(self).__name__} does not say how it lies on a mesh")
