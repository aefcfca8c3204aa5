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
from posttrain_jax.data.packing import best_fit, bucket_edges, pack_answers, slots
from posttrain_jax.objectives.objective import Batch, Forward, Scorer
from posttrain_jax.objectives.rows import spans

TOKENS = 4096  # in a batch


def scored(
  examples: Sequence[Answers],
  scorer: Scorer,
  params: Any,
  *,
  cache: Path,
  length: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  say: Callable[[str], None] = print,
) -> list[Answers]:
  """examples with `ref_logps`, and their companions with theirs, from the cache or from params.

  Args:
    cache: a folder; the file in it is named by what it depends on: tokens, parameters, dtype.  Its content is verified,
      and a damaged file is made again.  Of several processes the main one reads and writes it, and each computes the
      rows of its devices.
    length: of rows that hold several examples, as a training step's do; None: a row holds one, padded.
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
    flat = np.concatenate(_computed(every, scorer, params, length, mesh))
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
  examples: Sequence[Answers],
  scorer: Scorer,
  params: Any,
  length: int | None,
  mesh: jax.sharding.Mesh | None,
) -> list[np.ndarray]:
  """float32 [time] each; 0 where a token is not scored."""

  @jax.jit
  def logps(params: Any, batch: Batch) -> jax.Array:
    forward = Forward(params, scorer.hidden(params, batch))
    return scorer.scores(forward, batch, spans(batch).mask).logp

  computed: list[Any] = [None] * len(examples)
  for rows, batch in _batches(examples, length, mesh):
    made = distributed.whole(logps(params, distributed.placed(mesh, batch)), mesh)
    values = np.roll(np.asarray(made), 1, axis=1)  # where the token stands
    for row, of_row in zip(values, rows):
      ends = np.cumsum([len(examples[i].tokens) for i in of_row])
      for i, part in zip(of_row, np.split(row, ends)):
        computed[i] = part
  return computed


def _batches(
  examples: Sequence[Answers], length: int | None, mesh: jax.sharding.Mesh | None
) -> Iterator[tuple[list[list[int]], Any]]:
  """(the examples of each row, the batch); rows of a length together."""
  bare = [dataclasses.replace(e, values={}, companion=None, steps=None) for e in examples]
  lengths = np.array([len(e.tokens) for e in bare])
  # a companion may be longer than any example
  edges = bucket_edges(lengths) if length is None else (max(length, int(lengths.max())),)
  room = slots(bare, edges[-1], packing=length is not None)
  shares = 1 if mesh is None else sharding.row_shares(mesh)
  bucket = np.searchsorted(edges, lengths)
  for at, edge in enumerate(edges):
    alone = [[i] for i in np.flatnonzero(bucket == at).tolist()]
    here = alone if length is None else best_fit(lengths, edge)
    size = shares * max(1, min(TOKENS // edge // shares, -(-len(here) // shares)))
    for start in range(0, len(here), size):
      rows = here[start : start + size]
      yield rows, pack_answers(bare, rows + [[]] * (size - len(rows)), edge, room)
