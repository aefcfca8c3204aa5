"""Log-probabilities under the reference, computed once: no second model is there while the policy trains."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from posttrain_jax.core import distributed, files
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
    cache: a folder; the file in it is named by what it depends on: tokens, parameters, dtype.
  """
  every = [*examples, *(e.companion for e in examples if e.companion is not None)]
  path = (
    cache
    / f"reference-{_digest(every, f'{_identity(params)} {scorer.dtype} {scorer.model}')}.safetensors"
  )
  if path.exists():
    flat = safetensors_numpy.load_file(path)["logps"]
    say(f"reference: log-probabilities of {len(examples):,} examples read from {path}")
  else:
    say(f"reference: computing log-probabilities of {len(examples):,} examples")
    flat = np.concatenate(_computed(every, scorer, params, mesh))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".partial-{os.getpid()}")
    files.write_safetensors(scratch, {"logps": (flat.shape, "float32", lambda: flat)})
    scratch.replace(path)
  ends = np.cumsum([len(e.tokens) for e in every])
  if len(flat) != ends[-1]:
    raise ValueError(f"{path} holds {len(flat)} values for {ends[-1]} tokens; delete it")
  per_example = np.split(flat, ends[:-1])
  of_examples, of_companions = per_example[: len(examples)], iter(per_example[len(examples) :])
  with_logps = []
  for example, ref_logps in zip(examples, of_examples):
    companion = example.companion
    if companion is not None:
      companion = dataclasses.replace(companion, ref_logps=next(of_companions))
    with_logps.append(dataclasses.replace(example, ref_logps=ref_logps, companion=companion))
  return with_logps


def _identity(params: Any) -> str:
  """A digest of the values of all parameters, from two sums of each."""

  @jax.jit
  def sums(params: Any) -> list[tuple[jax.Array, jax.Array]]:
    floats = [x.astype(jnp.float32) for x in jax.tree.leaves(params)]
    return [(jnp.sum(x), jnp.sum(jnp.abs(x))) for x in floats]

  return hashlib.sha256(repr(jax.device_get(sums(params))).encode()).hexdigest()


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
    placed = batch if mesh is None else distributed.global_batch(mesh, batch)
    values = np.roll(np.asarray(logps(params, placed)), 1, axis=1)  # where the token stands
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
  shares = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
  bucket = np.searchsorted(edges, lengths)
  for at, edge in enumerate(edges):
    here = np.flatnonzero(bucket == at).tolist()
    size = shares * max(1, TOKENS // edge // shares)
    for start in range(0, len(here), size):
      rows = here[start : start + size]
      filled = [[i] for i in rows] + [[]] * (size - len(rows))
      yield rows, pack_answers(bare, filled, edge, slots)
