"""How frozen weights are stored: 4-bit NF4 matrices and the 8-bit blockwise map.

`quantize_params(params, exclude=...)` turns the linear weights of a model's layers into NF4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from posttrain_jax.core import tree, weight
from posttrain_jax.quant import nf4


def quantize_params(
  params: Any,
  *,
  exclude: Sequence[str] = (),
  double_quant: bool = True,
  block_size: int = 64,
) -> Any:
  """params with every stacked linear weight of the layers as NF4; embeddings, head, norms and biases stay.

  Args:
    exclude: patterns of weights to keep dense, matched against the path (`layers/mlp/down_proj/weight`), the
      per-layer names (`layers.3.mlp.down_proj`) and their endings (`down_proj`).

  Raises:
    ValueError: for a pattern that matches nothing or only some layers of a stack, a weight that is quantised or
      adapted already, or one that NF4 cannot hold (the message names it).
  """
  leaves = tree.flatten(params)
  kept = {path for pattern in exclude for path in _matches(pattern, leaves)}
  linear = [path for path, leaf in leaves.items() if is_linear(path, leaf) and path not in kept]
  if not linear and not kept:
    raise ValueError(
      f"nothing to quantise: no stacked linear weight under layers/; the paths are {', '.join(leaves)}"
    )
  return tree.unflatten(
    (path, _quantized(path, leaf, block_size, double_quant) if path in linear else leaf)
    for path, leaf in leaves.items()
  )


def is_linear(path: str, leaf: Any) -> bool:
  return path.startswith("layers/") and path.endswith("/weight") and len(weight.shape(leaf)) == 3


def _quantized(path: str, leaf: Any, block_size: int, double_quant: bool) -> Any:
  if hasattr(leaf, "apply"):
    raise ValueError(
      f"cannot quantise {path}: it is a {type(leaf).__name__} already; quantise the plain base, once, "
      f"before adapters are bound, or exclude it"
    )
  try:
    return nf4.quantize(leaf, block_size=block_size, double_quant=double_quant)
  except ValueError as problem:
    raise ValueError(f"{path}: {problem}; exclude={[path]} does that") from None


def _matches(pattern: str, leaves: dict[str, Any]) -> list[str]:
  """The paths that a pattern keeps dense."""
  ending = re.compile(rf"(?:.*[./])?(?:{pattern})")
  paths = []
  for path, leaf in leaves.items():
    shape = weight.shape(leaf)
    names = tree.expand(path, shape[0] if shape else 0)
    hits = [bool(ending.fullmatch(name)) for name in names]
    if ending.fullmatch(path) or (hits and all(hits)):
      paths.append(path)
    elif any(hits):
      raise ValueError(
        f"exclude={pattern!r} matches {sum(hits)} of the {len(hits)} layers of {path}; layers are stacked and "
        f"quantised together: write {path.split('/')[-2]!r} to keep all of them dense"
      )
  if not paths:
    raise ValueError(tree.unknown(pattern, leaves))
  return paths
