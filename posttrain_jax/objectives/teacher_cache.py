"""A teacher's most likely tokens, computed once and kept: no teacher is there while the student trains."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from posttrain_jax.core import distributed, files, sharding, tree
from posttrain_jax.data.encoded import Example
from posttrain_jax.data.packing import bucket_edges, pack
from posttrain_jax.losses import distillation
from posttrain_jax.losses.distillation import Likeliest
from posttrain_jax.objectives.objective import Batch, Forward, Scorer, targets

TOKENS = 4096  # in a batch


@dataclasses.dataclass(frozen=True)
class Asked:
  """How the teacher is read, and how much of what it says is kept.  vocab: the tokens that both models know."""

  reader: Scorer
  k: int
  temperature: float = 1.0
  vocab: int | None = None


def taught(
  examples: Sequence[Example],
  asked: Asked,
  params: Any,
  *,
  cache: Path,
  mesh: jax.sharding.Mesh | None = None,
  say: Callable[[str], None] = print,
) -> list[Example]:
  """examples with `teacher_ids` and `teacher_logps`, from the cache or from the teacher's params.

  Args:
    cache: a folder; the file in it is named by what it depends on.  Its content is verified, and a damaged file is made
      again.  Of several processes the main one reads and writes it, and each computes the rows of its devices.
  """
  if not examples:
    return []
  digest = _digest(examples, f"{tree.digest(params)} {asked}")
  path = cache / f"teacher-{digest}.safetensors"
  ends = np.cumsum([len(example) for example in examples])
  flat = None
  if distributed.is_main() and path.exists():
    try:
      flat = _read(path, digest, int(ends[-1]), asked.k)
      say(
        f"teacher: the {asked.k} most likely tokens of {len(examples):,} examples read from {path}"
      )
    except ValueError as error:
      say(f"teacher: {error}; made again")
  flat = distributed.from_main(flat)
  if flat is None:
    say(f"teacher: computing the {asked.k} most likely tokens in {len(examples):,} examples")
    each = _computed(examples, asked, params, mesh)
    flat = tuple(np.concatenate(arrays) for arrays in zip(*each))
    if not np.isfinite(flat[1]).all():
      at = np.flatnonzero(~np.isfinite(flat[1]).all(-1))[0]
      bad = examples[int(np.searchsorted(ends, at, side="right"))]
      raise ValueError(
        f"objective.teacher: what it says of {bad.origin or 'an example'} is not finite; nothing can be learned of it"
      )
    if distributed.is_main():
      _write(path, digest, *flat)
  ids, logps = (np.split(array, ends[:-1]) for array in flat)
  return [
    dataclasses.replace(example, teacher_ids=i, teacher_logps=p)
    for example, i, p in zip(examples, ids, logps, strict=True)
  ]


def _computed(
  examples: Sequence[Example], asked: Asked, params: Any, mesh: jax.sharding.Mesh | None
) -> list[tuple[np.ndarray, np.ndarray]]:
  """(int32 [time, k], float32 [time, k + 1]) each, where the token stands that they are predicted for."""
  reader = asked.reader

  @jax.jit
  def top(params: Any, batch: Batch) -> Likeliest:
    forward = Forward(params, reader.hidden(params, batch))
    return distillation.likeliest(
      forward.hidden,
      reader.head(forward),
      k=asked.k,
      mask=targets(batch)[1],
      softcap=reader.model.final_softcap,
      temperature=asked.temperature,
      vocab=asked.vocab,
    )

  computed: list[Any] = [None] * len(examples)
  for rows, batch in _batches(examples, mesh):
    said = distributed.whole(top(params, distributed.placed(mesh, batch)), mesh)
    ids, logps = (np.roll(np.asarray(x), 1, axis=1) for x in (said.ids, said.logps))
    for row, i in enumerate(rows):
      here = np.s_[row, : len(examples[i])]
      computed[i] = ids[here].astype(np.int32), logps[here].astype(np.float32)
  return computed


def _batches(
  examples: Sequence[Example], mesh: jax.sharding.Mesh | None
) -> Iterator[tuple[list[int], Any]]:
  """One example a row, rows of a length together."""
  bare = [dataclasses.replace(example, channel=None) for example in examples]
  lengths = np.array([len(example) for example in examples])
  edges = bucket_edges(lengths)
  shares = 1 if mesh is None else sharding.row_shares(mesh)
  bucket = np.searchsorted(edges, lengths)
  for at, edge in enumerate(edges):
    here = np.flatnonzero(bucket == at).tolist()
    size = shares * max(1, TOKENS // edge // shares)
    for start in range(0, len(here), size):
      rows = here[start : start + size]
      yield rows, pack(bare, [[i] for i in rows] + [[]] * (size - len(rows)), edge)


def _digest(examples: Sequence[Example], of: str) -> str:
  digest = hashlib.blake2b(of.encode(), digest_size=12)
  for example in examples:
    digest.update(len(example).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(example.tokens).tobytes())
    digest.update(np.ascontiguousarray(example.mask).tobytes())
  return digest.hexdigest()


def _read(path: Path, digest: str, tokens: int, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The file's arrays, verified: what it is of is its name, and what it holds its checksum.

  Raises:
    ValueError: the file is damaged, or of something else.
  """
  try:
    with safetensors.safe_open(path, "np") as file:
      ids, logps = file.get_tensor("ids"), file.get_tensor("logps")
      written = file.metadata() or {}
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{path} cannot be read ({error})") from None
  if written.get("of") != digest or written.get("checksum") != _checksum(ids, logps):
    raise ValueError(f"the content of {path} is not what was written")
  if ids.shape != (tokens, k) or logps.shape != (tokens, k + 1):
    raise ValueError(f"{path} holds arrays of another shape")
  return ids, logps


def _write(path: Path, digest: str, ids: np.ndarray, logps: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  files.remove_abandoned(path.parent)
  scratch = path.with_name(f".{path.name}{files.PARTIAL}{os.getpid()}")
  try:
    arrays = {"ids": ids, "logps": logps}
    safetensors.numpy.save_file(
      arrays, scratch, {"format": "np", "of": digest, "checksum": _checksum(ids, logps)}
    )
    scratch.replace(path)
  finally:
    scratch.unlink(missing_ok=True)


def _checksum(*arrays: np.ndarray) -> str:
  digest = hashlib.blake2b(digest_size=16)
  for array in arrays:
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()
