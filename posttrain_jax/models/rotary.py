"""Rotary position embedding: the angles of every position, and a context that is stretched."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.models.config import FULL, ModelConfig, Rope

Array = jax.Array


def angles(positions: Array, rope: Rope, head_dim: int) -> tuple[Array, Array]:
  angles = positions[..., None].astype(jnp.float32) * jnp.asarray(
    inverse_frequencies(rope, head_dim)
  )
  return jnp.cos(angles), jnp.sin(angles)


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """theta^(-2i / head_dim) for i < head_dim / 2, rescaled by `rope.kind`; float32."""
  frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if rope.kind == "linear":
    frequencies = frequencies / rope.factor
  if rope.kind == "llama3":
    wavelengths = 2 * np.pi / frequencies
    low = rope.original_length / rope.low_freq_factor
    high = rope.original_length / rope.high_freq_factor
    blend = (rope.original_length / wavelengths - rope.low_freq_factor) / (
      rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1 - blend) * frequencies / rope.factor + blend * frequencies
    slowed = np.where(wavelengths > low, frequencies / rope.factor, smooth)
    frequencies = np.where(wavelengths < high, frequencies, slowed)
  return frequencies.astype(np.float32)


def stretched(config: ModelConfig, length: int) -> ModelConfig:
  """config with a context of `length` tokens (0: as it is), its angles divided by length / max_length.

  Position interpolation, Chen et al. 2023.  Sliding layers with a rotation of their own (Gemma 3) keep it: their
  windows do not grow.  `source` says the same, so that the saved model's `config.json` does.

  Raises:
    ValueError: a context that is no longer than the model's, or positions that are rescaled in another way already.
  """
  if not length:
    return config
  if length <= config.max_length:
    raise ValueError(
      f"context_length={length}: the model reads {config.max_length} tokens as it is; write a longer context, or 0"
    )
  if config.rope.kind not in ("default", "linear"):
    raise ValueError(
      f"context_length={length}: the model's positions are rescaled as {config.rope.kind!r} already, and no "
      "config.json can say that they are interpolated on top; write context_length=0"
    )
  factor = config.rope.factor * length / config.max_length
  rope = Rope(theta=config.rope.theta, kind="linear", factor=factor)
  source = json.loads(config.source)
  if source:
    _describe(source, rope, length)
  return dataclasses.replace(config, rope=rope, max_length=length, source=json.dumps(source))


def _describe(source: dict[str, Any], rope: Rope, length: int) -> None:
  """Writes the stretched rotation into a `config.json`, in the keys that it uses."""
  source["max_position_embeddings"] = length
  scaling = dict(rope_type="linear", factor=rope.factor)
  old = source.get("rope_parameters")
  if not old:
    source["rope_scaling"] = scaling
  elif FULL in old:
    source["rope_parameters"] = {**old, FULL: {**old[FULL], **scaling}}
  else:
    source["rope_parameters"] = {**old, **scaling}
