"""Folders of safetensors files, one or several with an index: read tensor by tensor, and written so."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from posttrain_jax.core import files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# the floating-point dtypes as files name them, and their names
FLOATS = {files.DTYPES[name]: name for name in ("float64", "float32", "float16", "bfloat16")}
SHARD_BYTES = 5_000_000_000

# (shape, dtype name, function that makes the array)
Entry = tuple[tuple[int, ...], str, Callable[[], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor's bytes lie: in which file, from which on, and as what dtype."""

  path: Path
  start: int
  dtype: np.dtype


class Reader:
  """Every tensor of a folder's safetensors files by name, read when it is asked for.

  Raises:
    FileNotFoundError: there are none, or a shard that the index names is missing.
    ValueError: a file that is cut short, lacks what the index says, or lies outside the folder.
  """

  def __init__(self, folder: Path):
    self.where: dict[str, Path] = {}
    self.held: dict[Path, _Held] = {}
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
      paths = [single]
    elif index.exists():
      self.where = _read_index(index)
      paths = sorted(set(self.where.values()))
    else:
      raise FileNotFoundError(
        f"{folder} holds neither {SINGLE} nor {INDEX}; pickled weights (*.bin) are not read"
      )
    for path in paths:
      self._open(path, index)

  def _open(self, path: Path, index: Path) -> None:
    if not path.exists():
      raise FileNotFoundError(f"{path} is named by {index.name} and does not exist")
    try:
      with safetensors.safe_open(path, "np"):  # which checks that the file is whole
        self.held[path] = _read_header(path)
    except safetensors.SafetensorError as error:
      raise ValueError(
        f"{path} cannot be read: {error}; it may be cut short, fetch it again"
      ) from error
    held = self.held[path].tensors
    lacking = sorted({name for name, at in self.where.items() if at == path} - held.keys())
    if lacking:
      raise ValueError(f"{path} lacks the tensor {lacking[0]!r} that {index.name} says it holds")
    for name in held:  # of which an index may name fewer
      self.where.setdefault(name, path)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._entry(name)["shape"])

  def stored(self, name: str) -> str:
    """The dtype as the file has it: F32, BF16, U8, ..."""
    return self._entry(name)["dtype"]

  def dtype(self, name: str) -> str:
    """The name of a floating-point tensor's dtype."""
    return FLOATS[self.stored(name)]

  def get(self, name: str) -> np.ndarray:
    """The tensor, in memory of its own.

    Raises:
      ValueError: it holds a NaN or an infinity, which no way of storing or merging may hide; or no array has its dtype.
    """
    array = self.bits(name)
    if not files.is_finite(array):
      raise ValueError(
        f"{self.where[name]}: tensor {name!r} holds {files.worst(array)}, and a model that computes with them answers"
        " NaN: fetch the file again, or look for the run that wrote it"
      )
    return array

  def bits(self, name: str) -> np.ndarray:
    """The tensor whatever it holds: bytes of 4-bit codes may travel as numbers, and be NaN as such.

    Raises:
      ValueError: no array has its dtype.
    """
    place = self.place(name)
    return files.read_array(place.path, place.start, self.shape(name), str(place.dtype))

  def place(self, name: str) -> Place:
    """Where the tensor lies.

    Raises:
      ValueError: no array has its dtype.
    """
    path, stored = self.where[name], self.stored(name)
    if stored not in files.STORED:
      raise ValueError(f"{path}: {name!r} is stored as {stored}, of which no array can be made")
    start = self.held[path].start + self._entry(name)["data_offsets"][0]
    return Place(path, start, files.numpy_dtype(files.STORED[stored]))

  def _entry(self, name: str) -> Mapping[str, Any]:
    return self.held[self.where[name]].tensors[name]


@dataclasses.dataclass(frozen=True)
class _Held:
  """What a file holds: where its data start, and of each tensor dtype, shape and place among them."""

  start: int
  tensors: Mapping[str, Mapping[str, Any]]


def _read_header(path: Path) -> _Held:
  with path.open("rb") as f:
    size = int.from_bytes(f.read(8), "little")
    tensors = json.loads(f.read(size))
  tensors.pop("__metadata__", None)
  return _Held(8 + size, tensors)


def _read_index(index: Path) -> dict[str, Path]:
  """{tensor name: file}; an index that points outside its own folder is refused."""
  try:
    weight_map = files.read_json(index)["weight_map"]
    where = {name: index.parent / file for name, file in weight_map.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{index} is no index of safetensors files ({error!r}); fetch it again"
    ) from error
  for path in where.values():
    if path.parent != index.parent or path.name == "..":
      raise ValueError(f"{index} names {str(path)!r}, which is outside the folder")
  return where


def nbytes(entry: Entry) -> int:
  shape, dtype, _ = entry
  return int(np.prod(shape, dtype=np.int64)) * files.numpy_dtype(dtype).itemsize


def split(
  tensors: Iterable[tuple[str, Entry]], shard_bytes: int | None = None
) -> dict[str, dict[str, Entry]]:
  """{file name: its tensors}, in order, each file as full as it may be; by default SHARD_BYTES."""
  shard_bytes = shard_bytes or SHARD_BYTES
  parts: list[dict[str, Entry]] = [{}]
  room = shard_bytes
  for name, entry in tensors:
    size = nbytes(entry)
    if size > room and parts[-1]:
      parts.append({})
      room = shard_bytes
    parts[-1][name] = entry
    room -= size
  if len(parts) == 1:
    return {SINGLE: parts[0]}
  count = len(parts)
  return {f"model-{i:05d}-of-{count:05d}.safetensors": part for i, part in enumerate(parts, 1)}


def write_index(folder: Path, parts: dict[str, dict[str, Entry]]) -> None:
  """The index of several files; nothing for one."""
  if len(parts) == 1:
    return
  total = sum(nbytes(entry) for part in parts.values() for entry in part.values())
  weight_map = {name: file for file, part in parts.items() for name in part}
  files.write_json(folder / INDEX, dict(metadata=dict(total_size=total), weight_map=weight_map))


def write(folder: Path, tensors: Iterable[tuple[str, Entry]]) -> None:
  """All tensors, each made when it is written."""
  parts = split(tensors)
  for file, part in parts.items():
    files.write_safetensors(folder / file, part)
  write_index(folder, parts)
