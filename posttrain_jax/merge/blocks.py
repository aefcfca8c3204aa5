"""Merges in which a number of the result depends on the models' numbers at its place alone: block by block of the file.

A block's inputs are read, looked at, merged and looked at again while they are in the processor's cache, so that each
byte comes from the files once and goes to the disk once.
"""

from __future__ import annotations

import collections
import contextlib
import math
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from posttrain_jax.core import direct, files, shards
from posttrain_jax.merge.recipe import ModelRef, Wanted
from posttrain_jax.merge.tensors import Operator, Tensors

NUMBERS = (
  1 << 21
)  # merged at once: fewer stay nearer to the processor, and each call of XLA costs 0.4 ms


class Tensor:
  """A tensor of the result: which bytes of the file it is, and where its inputs lie."""

  def __init__(
    self, wanted: Wanted, entry: shards.Entry, start: int, places: Sequence[shards.Place]
  ):
    self.wanted, self.places, self.start = wanted, places, start
    self.dtype = files.numpy_dtype(entry[1])
    self.end = start + shards.nbytes(entry)

  def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(first number, one past the last, first byte, one past the last) of those in the file's bytes start to end.

    A number that the bytes cut is one of them.
    """
    size = self.dtype.itemsize
    low, high = max(start, self.start) - self.start, min(end, self.end) - self.start
    first, last = low // size, -(-high // size)
    for i in range(first, last, NUMBERS):
      stop = min(i + NUMBERS, last)
      yield i, stop, max(i * size, low), min(stop * size, high)


class NotFinite(Exception):
  """A number of a tensor, or of one of its inputs, is NaN or infinite."""

  def __init__(self, wanted: Wanted):
    super().__init__(wanted.name)
    self.wanted = wanted


def places(
  wanted: Sequence[Wanted], opened: Mapping[ModelRef, Tensors]
) -> list[list[shards.Place]] | None:
  """Where each tensor's inputs lie; None where one of them is computed."""
  every = [[opened[source.model].place(name) for source, name in w.inputs] for w in wanted]
  known = [[place for place in row if place is not None] for row in every]
  return known if known == every else None


def write(
  path: Path,
  part: Mapping[str, shards.Entry],
  wanted: Sequence[Wanted],
  places: Sequence[Sequence[shards.Place]],
  operator: Operator,
  ended: Callable[[int], None],
  *,
  workers: int,
) -> None:
  """The file of a part of the result.

  Args:
    ended: told after each block how many more tensors are whole.
    workers: blocks at once.

  Raises:
    NotFinite: as it says.
  """
  head = files.safetensors_head(part)
  tensors, end = [], len(head)
  for each, at in zip(wanted, places):
    tensors.append(Tensor(each, part[each.name], end, at))
    end = tensors[-1].end
  starts = range(0, end, direct.BLOCK)
  powers: dict[str, float] = collections.defaultdict(lambda: -math.inf)
  with contextlib.ExitStack() as stack:
    paths = {place.path for row in places for place in row}
    opened = {path: stack.enter_context(path.open("rb", buffering=0)) for path in paths}
    file = stack.enter_context(direct.writing(path))
    makers: queue.SimpleQueue[_Maker] = queue.SimpleQueue()
    for _ in range(workers):
      makers.put(_Maker(head, tensors, opened, operator, end))

    def one(start: int) -> dict[str, float]:
      maker = makers.get()
      try:
        data, of_block = maker.make(start)
        file.write(start // direct.BLOCK, data)
      finally:
        makers.put(maker)
      return of_block

    with ThreadPoolExecutor(
      workers
    ) as pool:  # whose map gives up what has not begun when one fails
      for start, of_block in zip(starts, pool.map(one, starts)):
        for name, power in of_block.items():
          powers[name] = max(powers[name], power)
        ended(sum(start < tensor.end <= start + direct.BLOCK for tensor in tensors))
  for name, power in powers.items():
    files.say_huge(name, power)


class _Maker:
  """Makes blocks of the file, one after the other in the same memory."""

  def __init__(self, head: bytes, tensors: Sequence[Tensor], opened, operator: Operator, end: int):
    self.head, self.tensors, self.opened, self.end = head, tensors, opened, end
    self.operator = operator
    self.block = direct.block()
    self.inputs: dict[tuple[int, np.dtype], np.ndarray] = {}

  def make(self, start: int) -> tuple[np.ndarray, dict[str, float]]:
    """(the file's bytes from there on, the power of two that the largest number of each tensor in them reaches)."""
    stop = min(start + direct.BLOCK, self.end)
    head = self.head[start:stop]
    self.block[: len(head)] = np.frombuffer(head, np.uint8)
    powers: dict[str, float] = {}
    for tensor in self.tensors:
      if tensor.start < stop and tensor.end > start:
        powers[tensor.wanted.name] = self._fill(tensor, start, stop)
    return self.block[: stop - start], powers

  def _fill(self, tensor: Tensor, start: int, stop: int) -> float:
    largest = -math.inf
    for first, last, low, high in tensor.pieces(start, stop):
      merged = np.asarray(self.operator(tensor.wanted, self._read(tensor, first, last)))
      merged = merged[: last - first]
      largest = max(largest, files.largest_power(merged))
      if largest == math.inf:
        raise NotFinite(tensor.wanted)
      of_piece = first * tensor.dtype.itemsize
      at = tensor.start + low - start
      self.block[at : at + high - low] = merged.view(np.uint8)[low - of_piece : high - of_piece]
    return largest

  def _read(self, tensor: Tensor, first: int, last: int) -> list[np.ndarray]:
    """Numbers first to last of each input, at the beginning of arrays that always have one length: of one program."""
    arrays = []
    for i, place in enumerate(tensor.places):
      array = self.inputs.get((i, place.dtype))
      if array is None:
        array = self.inputs[i, place.dtype] = files.room((NUMBERS,), place.dtype)
      held = array[: last - first]
      files.read_into(held, self.opened[place.path], place.start + first * place.dtype.itemsize)
      if not files.is_finite(held):
        raise NotFinite(tensor.wanted)
      arrays.append(array)
    return arrays
