"""Log-probabilities under the reference, computed once: no second model is there while the policy trains."""

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

from posttrain_jax.core import distributed, files, sharding, tree
from posttrain_jax.data.answers import Answers
from posttrain_jax.data.packing import bucket_edges, pack_answers
from posttrain_jax.objectives.objective import Batch, Forward, Scorer
from posttrain_jax.objectives.rows import spans

TOKENS = 4096  # in a batch


def scored(
  examples: Sequence[Answers],
  scorer: Scorer,
  params: Any,
  *,
  cache: Path,
  mesh: jax.sharding.Mesh | None = None,
  say: Callable[[str], None] = print,
) -> list[Answers]:
  """examples with `ref_logps`, and their companions with theirs, from the cache or from params.

  Args:
    cache: a folder; the file in it is named by what it depends on: tokens, parameters, dtype.  Its content is verified,
      and a damaged file is made again.  Of several processes the main one reads and writes it, and each computes the
      rows of its devices.
  """
  every = [*examples, *(e.companion for e in examples if e.companion is not None)]
  digest = _digest(every, f"{tree.digest(params)} {scorer.dtype} {scorer.products} {scorer.model}")
  path = cache / f"reference-{digest}.safetensors"
  ends = np.cumsum([len(e.tokens) for e in every])
  flat = None
  if distributed.is_main() and path.exists():
    try:
      flat = _read(path, digest, int(ends[-1]))
      say(f"reference: log-probabilities of {len(examples):,} examples read from {path}")
    except ValueError as error:
      say(f"reference: {error}; made again")
  flat = distributed.from_main(flat)
  if flat is None:
    say(f"reference: computing log-probabilities of {len(examples):,} examples")
    flat = np.concatenate(_computed(every, scorer, params, mesh))
    if not np.isfinite(flat).all():
      bad = int(np.searchsorted(ends, np.flatnonzero(~np.isfinite(flat))[0], side="right"))
      raise ValueError(
        f"objective.reference: its log-probabilities of {every[bad].origin or f'example {bad}'} are not finite; a"
        " policy cannot be compared with it"
      )
    if distributed.is_main():
      _write(path, digest, flat)
  per_example = np.split(flat, ends[:-1])
  of_examples, of_companions = per_example[: len(examples)], iter(per_example[len(examples) :])
  with_logps = []
  for example, ref_logps in zip(examples, of_examples):
    companion = example.companion
    if companion is not None:
      companion = dataclasses.replace(companion, ref_logps=next(of_companions))
    with_logps.append(dataclasses.replace(example, ref_logps=ref_logps, companion=companion))
  return with_logps


def _read(path: Path, digest: str, count: int) -> np.ndarray:
  """The file's values, verified: what it is of is its name, and what it holds its checksum.

  Raises:
    ValueError: the file is damaged, or of something else.
  """
  try:
    with safetensors.safe_open(path, "np") as file:
      flat, written = file.get_tensor("logps"), file.metadata() or {}
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{path} cannot be read ({error})") from None
  if written.get("of") != digest or written.get("checksum") != _checksum(flat):
    raise ValueError(f"the content of {path} is not what was written")
  if flat.shape != (count,) or not np.isfinite(flat).all():
    raise ValueError(
      f"{path} holds {flat.size} values for {count} tokens, or some that are not finite"
    )
  return flat


def _write(path: Path, digest: str, flat: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  files.remove_abandoned(path.parent)
  scratch = path.with_name(f".{path.name}{files.PARTIAL}{os.getpid()}")
  try:
    files.write_safetensors(
      scratch,
      {"logps": (flat.shape, "float32", lambda: flat)},
      {"format": "np", "of": digest, "checksum": _checksum(flat)},
    )
    scratch.replace(path)
  finally:
    scratch.unlink(missing_ok=True)


def _checksum(flat: np.ndarray) -> str:
  return hashlib.blake2b(np.ascontiguousarray(flat).data, digest_size=16).hexdigest()


def _digest(examples: Sequence[Answers], of: str) -> str:
  digest = hashlib.blake2b(of.encode(), digest_size=12)
  for example in examples:
    digest.update(len(example.tokens).to_bytes(8, "little"))
    for array in (example.tokens, example.mask, example.answer, example.positions):
      digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def _computed(
  examples: Sequence[Answers], scorer: Scorer, params: Any, mesh: jax.sharding.Mesh | None
) -> list[np.ndarray]:
  """float32 [time] each; 0 where a token is not scored."""

  @jax.jit
  def logps(params: Any, batch: Batch) -> jax.Array:
    forward = Forward(params, scorer.hidden(params, batch))
    return scorer.scores(forward, batch, spans(batch).mask).logp

  computed: list[Any] = [None] * len(examples)
  for rows, batch in _batches(examples, mesh):
    made = distributed.whole(logps(params, distributed.placed(mesh, batch)), mesh)
    values = np.roll(np.asarray(made), 1, axis=1)  # where the token stands
    for row, i in enumerate(rows):
      computed[i] = values[row, : len(examples[i].tokens)]
  return computed


def _batches(
  examples: Sequence[Answers], mesh: jax.sharding.Mesh | None
) -> Iterator[tuple[list[int], Any]]:
  """One example a row, rows of a length together."""
  bare = [dataclasses.replace(e, values={}, companion=None, steps=None) for e in examples]
  lengths = np.array([len(e.tokens) for e in bare])
  edges = bucket_edges(lengths)
  slots = max(e.count for e in bare)
  shares = 1 if mesh is None else sharding.row_shares(mesh)
  bucket = np.searchsorted(edges, lengths)
  for at, edge in enumerate(edges):
    here = np.flatnonzero(bucket == at).tolist()
    size = shares * max(1, TOKENS // edge // shares)
    for start in range(0, len(here), size):
      rows = here[start : start + size]
      filled = [[i] for i in rows] + [[]] * (size - len(rows))
      yield rows, pack_answers(bare, filled, edge, slots)
