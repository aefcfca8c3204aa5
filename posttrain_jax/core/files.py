"""Writing what others will read, whole or not at all; and reading JSON with errors that name the file."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import io
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from posttrain_jax.core import direct, ending

log = logging.getLogger(__name__)

DTYPES = {
  "float64": "F64",
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
  "float8_e4m3fn": "F8_E4M3",
  "float8_e5m2": "F8_E5M2",
  "int64": "I64",
  "int32": "I32",
  "int16": "I16",
  "int8": "I8",
  "uint64": "U64",
  "uint32": "U32",
  "uint16": "U16",
  "uint8": "U8",
  "bool": "BOOL",
}
STORED = {stored: name for name, stored in DTYPES.items()}
ALIGNMENT = 64  # bytes: where an array begins that XLA's CPU client takes over without a copy


PARTIAL = ".partial-"  # in the name of what is being written


@contextlib.contextmanager
def publish(folder: str | Path) -> Generator[Path]:
  """A scratch folder that takes `folder`'s place when the block ends well, and vanishes when it does not.

  A folder that was there is replaced at that moment and no earlier, so a killed or failed write loses nothing; what a
  killed one has left is removed.
  """
  folder = Path(folder).absolute()
  folder.parent.mkdir(parents=True, exist_ok=True)
  remove_abandoned(folder.parent, folder.name)
  scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}{PARTIAL}", dir=folder.parent))
  try:
    with _marked(scratch):
      # Children, since mkdtemp's own folder is private (0700).
      new, old = scratch / "new", scratch / "old"
      new.mkdir()
      with ending.writing(scratch):
        yield new
      # what is whole is no longer anybody's to remove
      try:
        if folder.exists():
          folder.rename(old)
        new.rename(folder)
      except BaseException:
        if old.exists() and not folder.exists():
          old.rename(folder)
        raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
    remove_abandoned(
      folder.parent, folder.name
    )  # of a write that was killed a moment before this one


@contextlib.contextmanager
def beside(path: Path) -> Generator[Path]:
  """A folder for what is made on the way to `path`, on the same disk; it is gone when the block ends."""
  folder = path.absolute().parent
  folder.mkdir(parents=True, exist_ok=True)
  made = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=folder)
  with made as name, ending.writing(Path(name)):
    yield Path(name)


@contextlib.contextmanager
def _marked(scratch: Path) -> Generator[None]:
  """Inside, the scratch file or folder is this process's: its lock ends with the process."""
  descriptor = os.open(scratch, os.O_RDONLY)
  try:
    with contextlib.suppress(
      OSError
    ):  # a file system without locks: nothing there is ever abandoned
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(descriptor)


def remove_abandoned(folder: Path, name: str = "", *, age: float = 5.0) -> None:
  """Removes what killed processes left half-written in a folder, of one name or of all; what is being written stays.

  Args:
    age: seconds since the last change; younger ones stay, since their writer may not have locked them yet.
  """
  for leftover in folder.glob(f".{glob.escape(name) or '*'}{PARTIAL}*"):
    with contextlib.suppress(OSError):  # gone meanwhile
      if time.time() - leftover.stat().st_mtime >= age and _is_abandoned(leftover):
        _remove(leftover, folder / leftover.name[1:].rpartition(PARTIAL)[0])


def _is_abandoned(scratch: Path) -> bool:
  """Whether no process holds the lock of what it writes there."""
  descriptor = os.open(scratch, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    return False
  finally:
    os.close(descriptor)
  return True


def _remove(leftover: Path, target: Path) -> None:
  if not leftover.is_dir():
    leftover.unlink()
    return
  # killed between the two renames of `publish`: what was written is whole, and what it replaces is out of the way
  if (leftover / "old").exists() and (leftover / "new").exists() and not target.exists():
    (leftover / "new").rename(target)
  shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
  """The file's new content, by rename: a reader sees the old or the new, never a part."""
  path = Path(path)
  scratch = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")
  try:
    with ending.writing(scratch), scratch.open("w", encoding="utf-8") as f, _marked(scratch):
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
      scratch.replace(path)
  finally:
    scratch.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
  """Raises OSError, naming the path, where `write_text` could not put a file; nothing is left, nothing is changed."""
  path = Path(path)
  if path.is_dir():
    raise IsADirectoryError(f"{path} is a folder; name a file in it")
  scratch = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")
  try:
    scratch.touch()
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error.strerror}") from None
  scratch.unlink()


def write_json(path: str | Path, value: object) -> None:
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
  """The object in a file.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: it is not JSON, or no object; the message names it.
  """
  try:
    value = json.loads(Path(path).read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  except RecursionError:
    raise ValueError(f"{path} is not read: its lists are nested a thousand deep") from None
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
  return value


def write_safetensors(
  path: str | Path,
  tensors: Mapping[str, tuple[tuple[int, ...], str, Callable[[], np.ndarray]]],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """A safetensors file written as it is computed: one tensor in memory at a time.

  Args:
    tensors: name -> (shape, dtype name, function that returns the array).
    metadata: strings for the header; `{"format": "pt"}` is what other libraries look for.

  Raises:
    ValueError: a number is not finite, or becomes infinite in the dtype that it is written in; names the tensor.
  """
  with direct.appending(path) as f:
    f.write(np.frombuffer(safetensors_head(tensors, metadata), np.uint8))
    for name, (shape, dtype, make) in tensors.items():
      array = narrowed(name, make(), dtype)
      if array.shape != tuple(shape):
        raise ValueError(f"{name}: declared {tuple(shape)}, made {array.shape}")
      f.write(array.reshape(-1).view(np.uint8))


def safetensors_head(
  tensors: Mapping[str, tuple[tuple[int, ...], str, Callable[[], np.ndarray]]],
  metadata: Mapping[str, str] | None = None,
) -> bytes:
  """What stands before the data of a safetensors file, which follow in the order of the tensors."""
  header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
  end = 0
  for name, (shape, dtype, _) in tensors.items():
    start, end = (
      end,
      end + int(np.prod(shape, dtype=np.int64)) * np.dtype(numpy_dtype(dtype)).itemsize,
    )
    header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
  head = json.dumps(header, separators=(",", ":")).encode()
  head += b" " * (-len(head) % 8)  # the data must start on a multiple of 8
  return len(head).to_bytes(8, "little") + head


def narrowed(name: str, array: Any, dtype: str) -> np.ndarray:
  """The array in the dtype named.

  Raises:
    ValueError: a number of it is not finite, or is too large for the dtype; says which, and of what tensor.
  """
  whole = np.asarray(array)
  with np.errstate(over="ignore"):
    result = np.asarray(whole, numpy_dtype(dtype), order="C")
  power = largest_power(result)
  if power < math.inf:
    say_huge(name, power)
    return result
  if is_finite(whole):
    largest = float(np.abs(whole.astype(np.float64)).max())
    limit = float(ml_dtypes.finfo(result.dtype).max)
    raise ValueError(
      f"{name} holds {largest:.6g}, and {dtype} ends at {limit:.6g}: write it as bfloat16 or float32"
    )
  raise ValueError(f"{name} holds {worst(result)}")


def say_huge(name: str, power: float) -> None:
  """Warns of a tensor whose largest number reaches 2^power, where that is no weight's."""
  if power >= HUGE:
    said = "%s holds a number of 2^%d or more, whose products end in infinity: fetch its file again, or train anew"
    log.warning(said, name, power)


HUGE = 126  # a number of 2^126 or more is no weight's: four of them added are beyond float32
# of a float: its bits as a number with and without a sign, how many lie below its exponent, and what that is biased by
_EXPONENTS = {
  np.dtype(np.float64): (np.int64, np.uint64, 52, 1023),
  np.dtype(np.float32): (np.int32, np.uint32, 23, 127),
  np.dtype(np.float16): (np.int16, np.uint16, 10, 15),
  np.dtype(ml_dtypes.bfloat16): (np.int16, np.uint16, 7, 127),
}
_PART = 1 << 18  # numbers looked at at once, which stay in a cache


def is_finite(array: np.ndarray) -> bool:
  """Whether no number of it is NaN or infinite; true of integers.

  >>> is_finite(np.array([1.0, np.inf], np.float32)), is_finite(np.zeros(3, ml_dtypes.bfloat16))
  (False, True)
  """
  return largest_power(array) < math.inf


def largest_power(array: np.ndarray) -> float:
  """The power of two that the largest absolute value reaches; infinity where one is NaN or infinite.

  Of integers, and of no numbers at all, minus infinity.  At the rate of memory: numpy takes bfloat16 one by one.

  >>> largest_power(np.array([0.5, -9.0], np.float32)), largest_power(np.array([np.nan]))
  (3, inf)
  """
  if array.dtype not in _EXPONENTS or not array.size:
    return -math.inf
  signed, unsigned, below, bias = _EXPONENTS[array.dtype]
  flat = np.ascontiguousarray(array).reshape(-1)
  parts = [flat[i : i + _PART] for i in range(0, flat.size, _PART)]
  # bits with a sign have the largest positive number on top, those without one the most negative
  tops = ((int(part.view(signed).max()), int(part.view(unsigned).max())) for part in parts)
  least = np.iinfo(signed).max
  top = max(max(positive, negative & least) for positive, negative in tops) >> below
  return math.inf if top == least >> below else top - bias


def worst(array: np.ndarray) -> str:
  """How many of its numbers are NaN and how many infinite, in words."""
  wide = np.asarray(array, np.float32)
  counts = {"NaN": int(np.isnan(wide).sum()), "infinite": int(np.isinf(wide).sum())}
  said = " and ".join(f"{count:,} {what}" for what, count in counts.items() if count)
  return f"{said} of {wide.size:,} numbers"


def prune(folder: Path, most: int) -> None:
  """Deletes the files of a cache that were used longest ago, until the rest has at most so many bytes.

  Several processes may do so at once; a folder that is not there, or not ours to change, stays as it is.
  """
  with contextlib.suppress(OSError):
    known = [(entry.path, entry.stat()) for entry in os.scandir(folder) if entry.is_file()]
    total = sum(stat.st_size for _, stat in known)
    for path, stat in sorted(known, key=lambda one: max(one[1].st_atime, one[1].st_mtime)):
      if total <= most:
        return
      Path(path).unlink(missing_ok=True)
      total -= stat.st_size


def room(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An array to be filled, aligned so that jax.device_put on a CPU need not copy it."""
  wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  held = np.empty(wanted + ALIGNMENT, np.uint8)
  first = -held.ctypes.data % ALIGNMENT
  return held[first : first + wanted].view(dtype).reshape(shape)


def read_array(path: str | Path, start: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
  """The array whose bytes begin at `start`, in memory of its own.

  On CPUs jax.device_put(array, may_alias=True) takes it over without a copy, which jnp.asarray does not.

  Raises:
    ValueError: the file ends before.
  """
  array = room(shape, numpy_dtype(dtype))
  with Path(path).open("rb", buffering=0) as f:
    read_into(array, f, start)
  return array


def read_into(array: np.ndarray, file: io.FileIO, start: int) -> None:
  """Fills a contiguous array with the bytes that begin at `start`; several threads may read one file.

  Raises:
    ValueError: the file ends before.
  """
  held, count = array.reshape(-1).view(np.uint8), 0
  while count < held.size:
    size = os.preadv(file.fileno(), [held[count:].data], start + count)
    if not size:
      end = f"{start + count} bytes of {start + held.size}"
      raise ValueError(f"{file.name} ends after {end}: fetch it again")
    count += size


def numpy_dtype(name: str) -> np.dtype:
  return np.dtype(getattr(ml_dtypes, name, name))
