"""LoRA+: the factors b of adapters learn at a higher rate than the factors a.  Hayou et al. 2024, arXiv 2402.12354."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.optim import paths

Rate = Callable[[Any], Any]


def partitioned(
  optimizer: Callable[[Rate], optax.GradientTransformation],
  rate: Rate,
  embedding: Rate,
  *,
  ratio: float,
  axes: Mapping[str, str],
) -> optax.GradientTransformation:
  """The optimizer with a rate for each of `groups`: ratio times `rate` for b, `embedding` for embeddings."""
  return optax.partition(
    {
      "a": optimizer(rate),
      "b": optimizer(lambda count: ratio * rate(count)),
      "embedding": optimizer(embedding),
    },
    lambda params: groups(params, axes),
  )


def groups(params: Any, axes: Mapping[str, str]) -> Any:
  """PEFT's groups: b for factors b and for vectors, embedding for both factors on an embedding, a for the rest."""

  def group(path, leaf):
    if paths.is_embedding(paths.module(path), axes):
      return "embedding"
    vector = jnp.ndim(leaf) - paths.stacked(path) == 1
    return "b" if vector or paths.field(path) == "b" else "a"

  return jax.tree_util.tree_map_with_path(group, params)


def check(params: Any, ratio: float) -> None:
  """Raises ValueError for a ratio below 1, or where nothing that is trained has a factor b."""
  if not ratio >= 1:
    raise ValueError(f"loraplus_lr_ratio={ratio}: write 1 or more")
  fields = {paths.field(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
  if "b" not in fields:
    raise ValueError(
      "loraplus_lr_ratio: nothing that is trained has a factor b; write 0, or train such an adapter (lora)"
    )
