"""Optimizers as optax chains, by name: clip, adapt, decay, step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.optim import adam8bit, adam_mini, galore, lora_plus, offload, paths, schedules

WHOLE = ("adafactor",)  # their state mixes layers: nothing of them can be moved layer by layer


def chain(
  name: str,
  *,
  lr: float,
  steps: int,
  warmup: float = 0.0,
  schedule: str = "cosine",
  weight_decay: float = 0.0,
  clip: float | None = 1.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float | None = None,
  rank: int = 128,
  update_gap: int = 200,
  scale: float = 0.25,
  projection: str = "std",
  target: str = galore.LAYERS,
  embeddings_in_float32: bool = True,
  loraplus_lr_ratio: float | None = None,
  loraplus_lr_embedding: float = 1e-6,
  offloaded: bool = False,
  axes: Mapping[str, str] | None = None,
  head_dim: int = 1,
) -> tuple[optax.GradientTransformation, schedules.Rate]:
  """(transformation, schedule).

  Args:
    name: adamw, adafactor, lion or sgd: optax's own; adamw8bit, adam_mini, galore, galore8bit: see their modules.
    lr: peak learning rate.
    steps: optimizer updates in the run.
    warmup: share of steps over which the rate rises linearly from 0.
    schedule: what follows: constant, or linear or cosine to 0.
    weight_decay: decoupled, on matrices only (adapters' factors are matrices; norms and biases are not).
    clip: largest global norm of the gradient; None for no clipping.
    eps: beside the root of the second moment; None: 1e-8, and 1e-6 for galore, as its authors have it.
    rank, update_gap, scale, projection, target: GaLore's, as `galore.adamw` says.
    embeddings_in_float32: moments of embeddings stay in float32 in the 8-bit optimizers.
    loraplus_lr_ratio: the factors b and the vectors of adapters learn at this many times lr (LoRA+, Hayou et al. 2024,
      arXiv 2402.12354; at least 1, 16 is usual); None for one rate.
    loraplus_lr_embedding: then the rate of adapters on embeddings, as PEFT has it.
    offloaded: state in the host's memory, moved layer by layer within the update.
    axes: path of a parameter -> its axis names (`layers embed heads`): what Adam-mini's blocks and the word
      "embedding" are read from.
    head_dim: entries of a `heads` axis in one head.
  """
  rate = schedules.Rate(schedules.learning_rate(lr, steps=steps, warmup=warmup, schedule=schedule))
  axes = axes or {}
  small = lambda path: embeddings_in_float32 and paths.is_embedding(path, axes)
  adam: dict[str, Any] = dict(b1=b1, b2=b2, weight_decay=weight_decay)
  near_zero = 1e-8 if eps is None else eps

  def low_rank(rate, eight_bit):
    return galore.adamw(
      rate,
      rank=rank,
      update_gap=update_gap,
      scale=scale,
      projection=projection,
      target=target,
      eight_bit=eight_bit,
      in_float32=small,
      is_embedding=lambda path: paths.is_embedding(path, axes),
      eps=(1e-8 if eight_bit else 1e-6) if eps is None else eps,
      mask=matrices,
      **adam,
    )

  mask = matrices if weight_decay else None
  optimizers: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "adamw": lambda rate: optax.adamw(rate, eps=near_zero, mask=mask, **adam),
    "adamw8bit": lambda rate: adam8bit.adamw(
      rate, eps=near_zero, mask=matrices, in_float32=small, **adam
    ),
    "adam_mini": lambda rate: optax.chain(
      adam_mini.scale_by_adam_mini(axes=axes, head_dim=head_dim, b1=b1, b2=b2, eps=near_zero),
      optax.add_decayed_weights(weight_decay, matrices),
      optax.scale_by_learning_rate(rate),
    ),
    "galore": lambda rate: low_rank(rate, eight_bit=False),
    "galore8bit": lambda rate: low_rank(rate, eight_bit=True),
    "adafactor": lambda rate: optax.adafactor(
      rate, weight_decay_rate=weight_decay or None, weight_decay_mask=matrices
    ),
    "lion": lambda rate: optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask),
    "sgd": lambda rate: optax.chain(
      optax.add_decayed_weights(weight_decay, matrices), optax.sgd(rate, momentum=b1)
    ),
  }
  if name not in optimizers:
    raise ValueError(f"name={name!r}: known are {', '.join(optimizers)}")
  if offloaded and name in WHOLE:
    raise ValueError(
      f"offload: the state of {name} is not kept by layer; write offload=none (it is small), or one of "
      f"{', '.join(other for other in optimizers if other not in WHOLE)}"
    )
  optimizer = optimizers[name](rate)
  checks = []
  if name.startswith("galore"):
    checks.append(lambda params: galore.check(params, rank=rank, target=target))
  if loraplus_lr_ratio is not None:
    embedding = schedules.learning_rate(
      loraplus_lr_embedding, steps=steps, warmup=warmup, schedule=schedule
    )
    optimizer = lora_plus.partitioned(
      optimizers[name], rate, embedding, ratio=loraplus_lr_ratio, axes=axes
    )
    checks.append(lambda params: lora_plus.check(params, loraplus_lr_ratio))
  if offloaded:
    optimizer = offload.layerwise(optimizer, clip=clip)
  elif clip:
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
  return _checked(optimizer, checks), rate


def _checked(optimizer, checks):
  """optimizer, whose `init` looks at the parameters first."""

  def init(params):
    for check in checks:
      check(params)
    return optimizer.init(params)

  return type(optimizer)(init, optimizer.update)


def matrices(params: Any) -> Any:
  """True for leaves that weight decay applies to: those with two axes or more besides the stacked layers'."""

  def decays(path, leaf):
    return jnp.ndim(leaf) - paths.stacked(path) >= 2

  return jax.tree_util.tree_map_with_path(decays, params)
