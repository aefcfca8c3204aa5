"""How frozen weights are stored: 4-bit NF4 and FP4 matrices, int8 by channel, and the 8-bit blockwise map.

`quantize_params(params, exclude=...)` turns the linear weights of a model's layers into one of them; `models.hf.load`
does so while it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.core import patterns, tree, weight
from posttrain_jax.quant import fp4, int8, nf4, stack

# What `base=` and `storage=` call a type -> the module with its `quantize` and `abstract`.
STORAGES: dict[str, Any] = {"nf4": nf4, "fp4": fp4, "int8": int8}


def quantize_params(
  params: Any, *, exclude: Sequence[str] = (), storage: str = "nf4", **options: Any
) -> Any:
  """params with every stacked linear weight of the layers quantised; embeddings, head, norms and biases stay.

  Args:
    exclude: patterns of weights to keep dense, matched against the path (`layers/mlp/down_proj/weight`), the
      per-layer names (`layers.3.mlp.down_proj`) and their endings (`down_proj`).
    storage: a key of `STORAGES`.
    options: of that type's `quantize`: block_size and double_quant of nf4 and fp4.

  Raises:
    ValueError: for a pattern that matches nothing or only some layers of a stack, a weight that is quantised or
      adapted already, or one that the type cannot hold (the message names it).
  """
  leaves = tree.flatten(params)
  linear = quantisable(leaves, exclude)
  quantised = lambda path, leaf: quantize(path, leaf, storage, **options)
  return tree.unflatten(
    (path, quantised(path, leaf) if path in linear else leaf) for path, leaf in leaves.items()
  )


def quantisable(leaves: Mapping[str, Any], exclude: Sequence[str] = ()) -> set[str]:
  """The paths that `quantize_params` would quantise; leaves need no more than a shape."""
  kept = {path for pattern in exclude for path in _matches(pattern, leaves)}
  linear = {path for path, leaf in leaves.items() if is_linear(path, leaf)} - kept
  if not linear and not kept:
    raise ValueError(
      f"nothing to quantise: no stacked linear weight under layers/; the paths are {', '.join(leaves)}"
    )
  return linear


def abstract(path: str, leaf: Any, storage: str) -> Any:
  """The abstract leaf at path as a base stored so holds it: for programs compiled without weights."""
  if storage == "dense" or not is_linear(path, leaf):
    return leaf
  return _storage(storage).abstract(leaf.shape, dtype=leaf.dtype)


def is_linear(path: str, leaf: Any) -> bool:
  """Whether the leaf is a stack of matrices that a type can store; a mixture's router is none: it is read exactly."""
  lead = tree.leads(path)
  is_stack = bool(lead) and path.endswith("/weight") and len(weight.shape(leaf)) == lead + 2
  return is_stack and path != tree.ROUTER


def quantize(path: str, leaf: Any, storage: str, **options: Any) -> Any:
  """The weight at path, [in, out] or a stack of such, in a type of `STORAGES`; errors name the path."""
  if isinstance(leaf, weight.Weight):
    raise ValueError(
      f"cannot quantise {path}: it is a {type(leaf).__name__} already; quantise the plain base, once, "
      f"before adapters are bound, or exclude it"
    )
  try:
    return _storage(storage).quantize(leaf, **options)
  except stack.Damaged as problem:
    raise ValueError(f"{path}: {problem}") from None
  except ValueError as problem:
    raise ValueError(f"{path}: {problem}; exclude={[path]} does that") from None


def _storage(name: str) -> Any:
  if name not in STORAGES:
    raise ValueError(f"unknown storage {name!r}: known are {', '.join(STORAGES)}")
  return STORAGES[name]


def _matches(pattern: str, leaves: Mapping[str, Any]) -> list[str]:
  """The paths that a pattern keeps dense."""
  patterns.check(pattern)
  is_kept = functools.partial(patterns.fullmatch, rf"(?:.*[./])?(?:{pattern})")
  paths = []
  for path, leaf in leaves.items():
    names = tree.expand(path, weight.shape(leaf))
    hits = [is_kept(name) for name in names]
    if is_kept(path) or (hits and all(hits)):
      paths.append(path)
    elif any(hits):
      raise ValueError(
        f"exclude={pattern!r} matches {sum(hits)} of the {len(hits)} layers of {path}; layers are stacked and "
        f"quantised together: write {path.split('/')[-2]!r} to keep all of them dense"
      )
  if not paths:
    raise ValueError(tree.unknown(pattern, leaves))
  return paths
