"""What prompts begin with, kept for prompts that come later: keys and values in blocks of tokens, bounded in bytes.

A block is known by what its parameters are known by and by every token up to its end, so that two adapters, or two
versions of one, never share any.  A block is as the row's own reading would have left it: prompts are read in pieces of
a block each, so what is found is bit by bit what would have been computed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import struct
from posttrain_jax.core.sharding import pinned
from posttrain_jax.models.cache import Cache
from posttrain_jax.rollout.programs import Slots, laid

Array = jax.Array


@struct.dataclass
class Pool:
  """Blocks, [blocks, size, layers, kv_heads, head_dim] each."""

  k: Array
  v: Array


class Prefixes:
  """Which blocks there are; the one that was not used for the longest time goes first.

  queries, hits: tokens of prompts that were looked for, and that were found.
  """

  def __init__(self, size_bytes: int) -> None:
    """Room for that many bytes of keys and values; less than a block is none."""
    self.size_bytes = size_bytes
    self.pool: Pool | None = None
    self.size, self.room, self.most = 0, 0, 0
    self.block_bytes = 0
    self.queries = self.hits = 0
    self._places: collections.OrderedDict[bytes, int] = collections.OrderedDict()
    self._owners: dict[bytes, Hashable] = {}
    self._free: list[int] = []

  def make(self, cache: Cache, size: int) -> None:
    """The pool, for rows of such a cache whose prompts are read in pieces of `size` tokens."""
    layers, _, _, kv_heads, head_dim, _ = cache.k.shape
    shape = (size, layers, kv_heads, head_dim)
    block = 2 * int(np.prod(shape)) * cache.k.dtype.itemsize
    self.size, self.room = size, max(1, self.size_bytes // block)
    self.most = max(1, cache.slots // size)
    self.block_bytes = block
    empty = lambda: jnp.zeros((self.room, *shape), cache.k.dtype)
    self.pool = jax.jit(lambda: Pool(_laid(empty()), _laid(empty())))()
    self.clear()

  def clear(self) -> None:
    """No block is known."""
    self._places.clear()
    self._owners.clear()
    self._free = list(range(self.room if self.size_bytes >= self.block_bytes else 0))

  def forget(self, known_by: Hashable) -> None:
    """The blocks of those parameters are free."""
    for digest in [digest for digest, owner in self._owners.items() if owner == known_by]:
      self._drop(digest)

  @property
  def used_bytes(self) -> int:
    return len(self._places) * self.block_bytes if self.pool is not None else 0

  def matching(self, known_by: Hashable, prompt: Sequence[int]) -> list[int]:
    """The places of the blocks that the prompt begins with, in order, as far as they are known."""
    found = []
    for digest in self._digests(known_by, prompt):
      if digest not in self._places:
        break
      found.append(digest)
    for digest in reversed(found):  # a block is of no use without those before it, which go later
      self._places.move_to_end(digest)
    self.queries += len(prompt)
    self.hits += len(found) * self.size
    return [self._places[digest] for digest in found]

  def to_restore(self, slots: Slots, index: int, blocks: Sequence[int]) -> tuple[Any, ...]:
    """What `restore` is called with."""
    places = np.zeros(self.most, np.int32)
    places[: len(blocks)] = blocks
    return slots, self.pool, np.int32(index), places, np.int32(len(blocks))

  def to_keep(
    self, slots: Slots, index: int, known_by: Hashable, prompt: Sequence[int]
  ) -> tuple[Any, ...] | None:
    """What `keep` is called with for the row of that index, which has read the prompt; None: all of it is known."""
    digests = list(self._digests(known_by, prompt))
    new = [at for at, digest in enumerate(digests) if digest not in self._places]
    numbers, places = [], []
    for at in new:
      place = self._place(set(digests))
      if place is None:
        break
      self._places[digests[at]], self._owners[digests[at]] = place, known_by
      numbers.append(at)
      places.append(place)
    for digest in reversed(digests):
      if digest in self._places:
        self._places.move_to_end(digest)
    return self._args(slots, index, numbers, places) if numbers else None

  def nothing(self, slots: Slots) -> tuple[Any, ...]:
    """`keep` called for no block."""
    return self._args(slots, 0, [], [])

  def _args(
    self, slots: Slots, index: int, numbers: Sequence[int], places: Sequence[int]
  ) -> tuple[Any, ...]:
    padded = np.zeros((2, self.most), np.int32)
    padded[0, : len(numbers)], padded[1, : len(places)] = numbers, places
    return self.pool, slots, np.int32(index), padded[0], padded[1], np.int32(len(numbers))

  def _digests(self, known_by: Hashable, prompt: Sequence[int]) -> Iterator[bytes]:
    """Of each whole block: what it is known by."""
    digest = repr(known_by).encode()
    for end in range(self.size, len(prompt) + 1, self.size):
      block = np.asarray(prompt[end - self.size : end], np.int32)
      digest = hashlib.blake2b(digest + block.tobytes(), digest_size=24).digest()
      yield digest

  def _place(self, kept: set[bytes]) -> int | None:
    """A free place, made where need be; None where all are of the prompt itself."""
    if not self._free:
      oldest = next((digest for digest in self._places if digest not in kept), None)
      if oldest is None:
        return None
      self._drop(oldest)
    return self._free.pop()

  def _drop(self, digest: bytes) -> None:
    self._free.append(self._places.pop(digest))
    del self._owners[digest]


def _laid(x: Array) -> Array:
  return pinned(x, "- - - heads -")


@functools.partial(jax.jit, donate_argnames=("slots",))
def restore(slots: Slots, pool: Pool, index: Array, places: Array, count: Array) -> Slots:
  """The row of that index with the first `count` blocks behind what stands before its tokens."""

  def one(at: Array, cache: Cache) -> Cache:
    block, slot = _slots_of(slots, index, at, pool.k.shape[1], cache.k.shape[-1])
    k = cache.k.at[:, block, index, :, :, slot].set(pool.k[places[at]], unique_indices=True)
    v = cache.v.at[:, block, index, :, slot].set(pool.v[places[at]], unique_indices=True)
    return Cache(k, v, cache.lengths)

  cache = jax.lax.fori_loop(0, count, one, slots.cache)
  return laid(dataclasses.replace(slots, cache=cache))


@functools.partial(jax.jit, donate_argnames=("pool",))
def keep(
  pool: Pool, slots: Slots, index: Array, numbers: Array, places: Array, count: Array
) -> Pool:
  """The pool with blocks of the row of that index: its block numbers[i] at places[i], for i below count."""
  cache = slots.cache

  def one(at: Array, pool: Pool) -> Pool:
    block, slot = _slots_of(slots, index, numbers[at], pool.k.shape[1], cache.k.shape[-1])
    k = pool.k.at[places[at]].set(cache.k[:, block, index, :, :, slot])
    return Pool(k, pool.v.at[places[at]].set(cache.v[:, block, index, :, slot]))

  pool = jax.lax.fori_loop(0, count, one, pool)
  return Pool(_laid(pool.k), _laid(pool.v))


def _slots_of(
  slots: Slots, index: Array, number: Array, size: int, block: int
) -> tuple[Array, Array]:
  """(block, place in it) in the cache of each token of the row's block of that number."""
  at = slots.begins[index] + number * size + jnp.arange(size, dtype=jnp.int32)
  return at // block, at % block
