"""Merging folders of any size: tensor by tensor, read ahead, computed, written behind, resumable."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from posttrain_jax.core import files, progress, shards
from posttrain_jax.merge import blocks, tensors
from posttrain_jax.merge import recipe as recipes
from posttrain_jax.merge.recipe import ModelRef, Recipe, RecipeError, Wanted
from posttrain_jax.merge.tensors import Operator, Tensors

log = logging.getLogger(__name__)

RECORD = "merge.json"  # in the scratch folder: what it is the beginning of


@dataclasses.dataclass(frozen=True)
class Plan:
  """A merge that has been checked: nothing of it can fail but the disk."""

  recipe: Recipe
  wanted: tuple[Wanted, ...]
  shapes: tuple[tuple[int, ...], ...]
  dtypes: tuple[str, ...]
  layers: int

  def nbytes(self) -> int:
    entries = zip(self.shapes, self.dtypes)
    return sum(shards.nbytes((shape, dtype, _unmade)) for shape, dtype in entries)


def _unmade() -> np.ndarray:
  raise AssertionError("a tensor of a plan is made by `run`")


def plan(recipe: Recipe, opened: Mapping[ModelRef, Tensors]) -> Plan:
  """What the result holds, checked against every model that goes into it.

  Raises:
    RecipeError: a tensor that a model lacks, has beyond the others, in another shape, or not in floating point; layers
      beyond a model's.  The message names the model and the tensor.
  """
  leading = recipe.slices[0].sources[0].model
  names = list(opened[leading].where)
  counts = {model: _layers(held.where) for model, held in opened.items()}
  if recipe.whole:
    for model, count in counts.items():
      if count != counts[leading]:
        raise RecipeError(
          f"{model} has {count} layers, {leading} has {counts[leading]}: these models are not of one kind; write slices"
          " to choose layers"
        )
  for part in recipe.slices:
    for source in part.sources:
      if source.layers and source.layers[1] > counts[source.model]:
        raise RecipeError(
          f"layer_range {list(source.layers)} of {source.model}: it has {counts[source.model]} layers"
        )
  ordered = sorted(names, key=order)
  wanted = tuple(recipes.tensors(recipe, ordered, counts[leading]))
  if recipe.whole:
    _check_nothing_left(recipe, opened, set(names), leading)
  shapes, dtypes = [], []
  for tensor in wanted:
    shapes.append(_one_shape(tensor, opened))
    source, name = tensor.inputs[0]
    dtypes.append(recipe.dtype or shards.FLOATS[opened[source.model].stored(name)])
  total = sum(_count(part, counts) for part in recipe.slices)
  return Plan(recipe, wanted, tuple(shapes), tuple(dtypes), total)


def _count(part: recipes.Slice, counts: Mapping[ModelRef, int]) -> int:
  first = part.sources[0]
  return counts[first.model] if first.layers is None else first.layers[1] - first.layers[0]


def _layers(names: Mapping[str, Any]) -> int:
  numbers = [int(m[2]) for name in names if (m := recipes.LAYER.fullmatch(name))]
  return max(numbers, default=-1) + 1


def order(name: str) -> tuple[int, int, str]:
  """What tensors are sorted by: what precedes the layers, layer by layer, what follows."""
  match = recipes.LAYER.fullmatch(name)
  if match:
    return (1, int(match[2]), match[3])
  return (0 if recipes.precedes(name) else 2, 0, name)


def _check_nothing_left(recipe, opened, names, leading) -> None:
  for model, held in opened.items():
    extra = sorted(set(held.where) - names)
    if extra:
      rest = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
      raise RecipeError(
        f"{model} holds {extra[0]}{rest}, which {leading} does not: these models are not of one structure"
      )


def _one_shape(wanted: Wanted, opened: Mapping[ModelRef, Tensors]) -> tuple[int, ...]:
  shape, first = None, None
  for source, name in wanted.inputs:
    held = opened[source.model]
    if name not in held.where:
      raise RecipeError(f"{source.model} lacks the tensor {name!r}, which the merge reads")
    if held.stored(name) not in shards.FLOATS:
      raise RecipeError(
        f"{source.model}: {name!r} is {held.stored(name)}, not one of {', '.join(shards.FLOATS)}; a quantised model is"
        " merged after `posttrain export --merge`, which makes it dense"
      )
    held_shape = held.shape(name)
    if shape is not None and held_shape != shape:
      vocabulary = (
        "; their vocabularies differ: write tokenizer_source: union (or base), which merges them by token"
        if len(held_shape) == 2
        and held_shape[1] == shape[1]
        and ("embed" in name or "lm_head" in name)
        else ""
      )
      raise RecipeError(
        f"{name!r} has shape {held_shape} in {source.model} and {shape} in {first}{vocabulary}"
      )
    shape, first = held_shape, source.model
  if shape is None:
    raise RecipeError(f"{wanted.name}: its slice has no source")
  return shape


def run(
  plan: Plan,
  opened: Mapping[ModelRef, Tensors],
  operator: Operator,
  out: Path,
  *,
  finish: Callable[[Path], None],
  elementwise: bool = False,
  workers: int = 1,
  shard_bytes: int | None = None,
) -> None:
  """Writes the merge's folder; the same call again goes on after the last whole file.

  The folder appears under its name when all of it is there.  Until then it is `.NAME.merging` beside it.

  Args:
    operator: the arithmetic of a tensor.
    elementwise: it is that of each number by itself, so that any stretch of a tensor may be given to it.
    workers: tensors computed at once; the next is read and the last written meanwhile.
    finish: writes what else belongs into the folder it is given: config, tokenizer.

  Raises:
    FileExistsError: out is there already.
    OSError: the disk has too little room, said before anything is written.
  """
  if out.exists():
    raise FileExistsError(f"{out} exists; name a new folder, or remove it first")
  entries = (
    (wanted.name, (shape, dtype, _unmade))
    for wanted, shape, dtype in zip(plan.wanted, plan.shapes, plan.dtypes)
  )
  parts = shards.split(entries, shard_bytes)
  scratch = out.absolute().parent / f".{out.name}.merging"
  digest = _digest(plan, opened, parts)
  done = _done(scratch, digest, parts)
  left = {file: part for file, part in parts.items() if file not in done}
  _check_disk(scratch, sum(shards.nbytes(e) for part in left.values() for e in part.values()))
  if not done:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    files.write_json(scratch / RECORD, {"digest": digest})
  else:
    log.info("going on: %d of %d files are there", len(done), len(parts))
  by_name = {wanted.name: wanted for wanted in plan.wanted}
  try:
    with progress.counter("merging tensors") as count:
      ended = _ended(count, sum(map(len, left.values())))
      for file, part in left.items():
        wanted = [by_name[name] for name in part]
        places = blocks.places(wanted, opened) if elementwise else None
        partial = scratch / f"{file}.partial"
        if places is None:
          _write(partial, part, by_name, opened, operator, ended, workers)
        else:
          _write_blocks(partial, part, wanted, places, opened, operator, ended, workers)
        partial.rename(scratch / file)
  except ValueError:  # no call of this recipe on these files will do better
    shutil.rmtree(scratch, ignore_errors=True)
    raise
  shards.write_index(scratch, parts)
  finish(scratch)
  (scratch / RECORD).unlink()
  scratch.rename(out)


def _ended(count: Callable[[int, int | None], None], total: int) -> Callable[[int], None]:
  """A function that is told how many more tensors are whole."""
  done, lock = [0], threading.Lock()

  def ended(more: int) -> None:
    with lock:
      done[0] += more
    count(done[0], total)

  return ended


def _digest(plan: Plan, opened: Mapping[ModelRef, Tensors], parts) -> str:
  """A digest of all that the bytes follow from: the recipe, the files it reads, how the result is cut."""
  inputs = sorted({str(path.resolve()) for held in opened.values() for path in held.where.values()})
  stamps = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in inputs]
  said = [repr(plan.recipe), stamps, [(file, list(part)) for file, part in parts.items()]]
  return hashlib.blake2b(json.dumps([said, plan.dtypes]).encode(), digest_size=16).hexdigest()


def _done(scratch: Path, digest: str, parts: Mapping[str, Any]) -> set[str]:
  """The files that an earlier, interrupted merge of the same kind has finished."""
  record = scratch / RECORD
  if not record.exists() or files.read_json(record).get("digest") != digest:
    return set()
  return {file for file in parts if (scratch / file).exists()}


def _check_disk(scratch: Path, wanted: int) -> None:
  place = scratch.parent
  while not place.exists():
    place = place.parent
  free = shutil.disk_usage(place).free
  if wanted > free:
    raise OSError(
      f"{scratch.parent}: the result needs {wanted / 1e9:.2f} GB and {free / 1e9:.2f} are free; nothing was written"
    )


def _write_blocks(
  partial: Path,
  part: Mapping[str, shards.Entry],
  wanted: Sequence[Wanted],
  places: Sequence[Sequence[shards.Place]],
  opened: Mapping[ModelRef, Tensors],
  operator: Operator,
  ended: Callable[[int], None],
  workers: int,
) -> None:
  """One file, a block of it at a time; while one waits for the disk another is computed."""
  try:
    blocks.write(partial, part, wanted, places, operator, ended, workers=workers + 1)
  except blocks.NotFinite as error:  # which is then said of the whole tensor
    tensor = error.wanted
    arrays = tensors.read(tensor, opened)
    _check_finite(tensor, np.asarray(operator(tensor, arrays)), opened)
    raise


def _write(
  partial: Path,
  part: Mapping[str, shards.Entry],
  by_name: Mapping[str, Wanted],
  opened: Mapping[ModelRef, Tensors],
  operator: Operator,
  ended: Callable[[int], None],
  workers: int,
) -> None:
  """One file, tensor by tensor."""

  def make(name: str, inputs: concurrent.futures.Future) -> np.ndarray:
    merged = np.asarray(operator(by_name[name], inputs.result()))
    _check_finite(by_name[name], merged, opened)
    ended(1)
    return merged

  with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(workers) as makers:

    def results():
      waiting = collections.deque()
      for name in part:
        waiting.append(
          makers.submit(make, name, readers.submit(tensors.read, by_name[name], opened))
        )
        # of those to come so many are computed while one is written, and one is read
        if len(waiting) > workers + 1:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()

    arrays = results()
    entries = {
      name: (shape, dtype, lambda: next(arrays)) for name, (shape, dtype, _) in part.items()
    }
    try:
      files.write_safetensors(partial, entries)
    finally:
      for pool in (readers, makers):
        pool.shutdown(wait=False, cancel_futures=True)


def _check_finite(wanted: Wanted, merged: np.ndarray, opened: Mapping[ModelRef, Tensors]) -> None:
  if files.is_finite(merged):
    return
  # read anew, since the operator may have been given the arrays' own memory
  arrays = tensors.read(wanted, opened)
  largest = max(float(np.abs(x.astype(np.float32)).max(initial=0)) for x in arrays)
  raise RecipeError(_not_finite(wanted.name, merged.dtype, largest))


def _not_finite(name: str, dtype: np.dtype, largest: float) -> str:
  limit = float(ml_dtypes.finfo(dtype).max)
  cure = "write dtype: bfloat16 or float32" if dtype == np.float16 else "look at its weights"
  return f"{name} is not finite when merged: {dtype} ends at {limit:.4g}, its inputs go up to {largest:.4g}; {cure}"
