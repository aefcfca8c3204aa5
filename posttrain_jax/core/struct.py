"""Frozen dataclasses that are pytrees, as `flax.struct` makes them, and told apart by class.

In jax 0.10 to 0.12 the structures of two registered dataclasses are equal where their fields and static values are,
whatever their classes; `jit` then may run the program that it compiled for the one on the other.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from flax import struct

field = struct.field

if TYPE_CHECKING:  # which knows of flax's decorator that it adds `replace`
  from flax.struct import dataclass as dataclass
else:

  def dataclass(cls: type) -> type:
    """`flax.struct.dataclass` with the class's name as a static field, so that no other class has its structure."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    cls.__annotations__ = {**inspect.get_annotations(cls), "_class": str}
    cls._class = struct.field(pytree_node=False, default=name, kw_only=True, repr=False)
    return struct.dataclass(cls)
