"""The quantised leaves of a Hugging Face folder: which there are, and one matrix at a time into or out of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from posttrain_jax import quant
from posttrain_jax.core import files, tree
from posttrain_jax.models.names import theirs
from posttrain_jax.quant import bnb, fourbit, int8, stack

log = logging.getLogger(__name__)

TYPES = (fourbit.FourBit, int8.Int8)
DENSE = "dense"


class Reader(Protocol):
  where: dict[str, Any]  # tensor name -> file

  def get(self, name: str) -> np.ndarray: ...


def storages(
  folder: Path,
  specs: Mapping[str, Any],
  located: Mapping[str, Sequence[str]],
  held: Any,
  storage: str | None,
  exclude: Sequence[str],
) -> dict[str, str]:
  """path -> how the loaded leaf is stored, of what the files hold and what was asked for.

  Args:
    specs: path -> what has the shape of the leaf.
    located: path -> the file's tensor names, one or one a layer.
    held: every tensor name of the files.

  Raises:
    ValueError: what is asked for cannot be had from what the files hold.
  """
  known = [DENSE, *quant.STORAGES]
  if storage is not None and storage not in known:
    raise ValueError(f"storage={storage!r}: known are {', '.join(known)}")
  stored = {
    path: [bnb.storage(bnb.parts(n, held)) for n in names] for path, names in located.items()
  }
  kinds = sorted({kind for of_path in stored.values() for kind in of_path} - {DENSE})
  if exclude and (storage in (None, DENSE) or kinds):
    raise ValueError(
      f"exclude={list(exclude)!r} says what storage= leaves dense, and "
      + (f"{folder} is quantised already ({kinds[0]})" if kinds else f"storage={storage!r}")
    )
  if not kinds:
    quantised = quant.quantisable(specs, exclude) if storage in quant.STORAGES else ()
    return {path: str(storage) if path in quantised else DENSE for path in located}
  if storage == DENSE:
    log.info("%s: %s weights made plain, as storage='dense' asks", folder, " and ".join(kinds))
    return dict.fromkeys(located, DENSE)
  if storage is not None and kinds != [storage]:
    raise ValueError(
      f"{folder} holds {' and '.join(kinds)} weights, and {storage} of them would lose twice; write "
      f"{kinds[0] if len(kinds) == 1 else DENSE!r}, or load the unquantised model"
    )
  return {path: _one(folder, path, of_path) for path, of_path in stored.items()}


def _one(folder: Path, path: str, kinds: Sequence[str]) -> str:
  """How the layers of a path are all stored; plain where they are stored unlike, which loses nothing."""
  if path == "embed_tokens/weight" and kinds != [DENSE]:
    log.info("%s: the embedding is %s, and made plain", folder, kinds[0])
    return DENSE
  odd = [i for i, kind in enumerate(kinds) if kind != kinds[0]]
  if odd:
    log.info(
      "%s: %s is %s in layer 0 and %s in layer %d; layers are stacked and stored alike: all are made plain",
      folder,
      path,
      kinds[0],
      kinds[odd[0]],
      odd[0],
    )
    return DENSE
  return kinds[0]


def load(
  reader: Reader,
  path: str,
  names: Sequence[str],
  shape: tuple[int, ...],
  *,
  turn: bool,
  dtype: Any,
  storage: str,
) -> Any:
  """The leaf at path in host memory: [in, out] or a stack of such, plain or of a type of `quant.STORAGES`.

  No more than one matrix is there besides the leaf itself.

  Args:
    names: of the weights in the file, one or one a layer; a part of them at least is quantised, or shall be.
    turn: whether the file has it [out, in].
    dtype: of the values; None keeps what the file says.
  """
  one = shape[-2:][::-1] if turn else shape[-2:]
  matrices = (_matrix(reader, name, one, turn, dtype) for name in names)
  if storage == DENSE:
    kept = (np.asarray(m.dense()) if isinstance(m, TYPES) else m for m in matrices)
  else:
    kept = (m if isinstance(m, TYPES) else quant.quantize(path, m, storage) for m in matrices)
  if len(shape) == 2:
    return next(kept)
  try:
    return stack.fill(kept, shape[:-2])
  except stack.Unlike as problem:
    raise ValueError(f"{path}: {problem}; write dtype= to have them alike") from None


def _matrix(reader, name, shape, turn, dtype):
  """One matrix [in, out] of the file: an array, or the weight that its parts make."""
  parts = bnb.parts(name, reader.where)
  if bnb.storage(parts) == DENSE:
    tensor = reader.get(name)
    tensor = files.narrowed(name, tensor, str(jnp.dtype(dtype or tensor.dtype)))
    return tensor.T if turn else tensor
  beside = {part: reader.get(tensor_name) for part, tensor_name in parts.items() if part}
  weight = bnb.read(name, {"": reader.bits(name), **beside}, shape)
  return weight if dtype is None else dataclasses.replace(weight, dtype=jnp.dtype(dtype))


def config(leaves: Mapping[str, Any], tied: bool, family: str) -> dict[str, Any]:
  """The `quantization_config` of these leaves; {} where all are plain.

  Raises:
    ValueError: they are of several types, which no one file can say.
  """
  stored = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, TYPES)}
  if not stored:
    return {}
  kinds = {type(leaf).__name__: path for path, leaf in stored.items()}
  if len(kinds) > 1:
    pairs = ", ".join(f"{path} is {kind}" for kind, path in kinds.items())
    raise ValueError(f"{pairs}: a folder says one type for all; quantise them alike")
  if "embed_tokens/weight" in stored:
    raise ValueError("embed_tokens/weight is quantised: a file has it plain")
  linear = [p for p in leaves if tree.turned(p) and p != "score/weight"]
  plain = [p for p in linear if p not in stored] + (["lm_head/weight"] if tied else [])
  endings = [p.removeprefix("layers").removesuffix("/weight").replace("/", ".") for p in plain]
  endings = [theirs(ending, family).removeprefix(".") for ending in endings]
  return {"quantization_config": bnb.config(next(iter(stored.values())), endings)}
