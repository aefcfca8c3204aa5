"""Large files written past the system's cache of files, where the disk takes that.

Through the cache a GB costs 0.6 to 1.8 s of a CPU, for its pages and the copy into them; past it 0.05, and what others
have read stays in the cache.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

BLOCK = 1 << 23  # bytes written at once
ALIGNED = 4096  # what a disk's places and memory are multiples of


def block() -> np.ndarray:
  """BLOCK bytes of memory, aligned as the disk wants them; unused ones take no room."""
  return np.frombuffer(mmap.mmap(-1, BLOCK), np.uint8)


class File:
  """A new file, block by block, in any order and from any thread."""

  def __init__(self, path: str | Path):
    self._cached = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    self._past = _past_the_cache(path)

  def write(self, number: int, data: np.ndarray) -> None:
    """Bytes from the start of a `block()` as the file's block of that number; all but the last are whole."""
    whole = data.size // ALIGNED * ALIGNED if self._past is not None else 0
    done = self._write_past(data[:whole], number * BLOCK)
    while done < data.size:
      done += os.pwrite(self._cached, data[done:].data, number * BLOCK + done)

  def _write_past(self, data: np.ndarray, start: int) -> int:
    """How many of the bytes were written: fewer where the disk refuses."""
    done = 0
    with contextlib.suppress(
      OSError
    ):  # what is left goes through the cache, and fails there if the disk is full
      while self._past is not None and done < data.size:
        done += os.pwrite(self._past, data[done:].data, start + done)
    return done

  def sync(self) -> None:
    os.fsync(self._cached)

  def close(self) -> None:
    for descriptor in (self._cached, self._past):
      if descriptor is not None:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: str | Path) -> Generator[File]:
  """A file that is on the disk when the block has ended well."""
  file = File(path)
  try:
    yield file
    file.sync()
  finally:
    file.close()


def _past_the_cache(path: str | Path) -> int | None:
  if sys.platform != "linux":
    return None
  try:
    return os.open(path, os.O_WRONLY | os.O_DIRECT)
  except OSError:  # a file system without it
    return None


class Appended:
  """A `File` written from its start to its end; one block is written while the next is filled."""

  def __init__(self, file: File):
    self._file, self._blocks, self._count, self._filled = file, (block(), block()), 0, 0
    self._writer, self._last = ThreadPoolExecutor(1), Future()
    self._last.set_result(None)

  def write(self, data: np.ndarray) -> None:
    """Bytes, behind those before."""
    done = 0
    while done < data.size:
      size = min(BLOCK - self._filled, data.size - done)
      current = self._blocks[self._count % 2]
      current[self._filled : self._filled + size] = data[done : done + size]
      self._filled, done = self._filled + size, done + size
      if self._filled == BLOCK:
        self._hand_on()

  def _hand_on(self) -> None:
    self._last.result()
    data = self._blocks[self._count % 2][: self._filled]
    self._last = self._writer.submit(self._file.write, self._count, data)
    self._count, self._filled = self._count + 1, 0

  def finish(self) -> None:
    if self._filled:
      self._hand_on()
    self._last.result()

  def close(self) -> None:
    self._writer.shutdown(wait=True)


@contextlib.contextmanager
def appending(path: str | Path) -> Generator[Appended]:
  """A file to append to, which is on the disk when the block has ended well."""
  with writing(path) as file:
    appended = Appended(file)
    try:
      yield appended
      appended.finish()
    finally:
      appended.close()
