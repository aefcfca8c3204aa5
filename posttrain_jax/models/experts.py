"""A mixture of experts: each token passes the few MLPs that its router chooses, and no token is dropped.

  y = sum over the k largest p_e of p_e * down_e(act(gate_e x) * up_e x),   p = softmax(x W_router)

with the chosen p divided by their sum where the family does so (`norm_experts`).  Shazeer et al. 2017; Mixtral: Jiang
et al. 2024; Qwen 3: Yang et al. 2025.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from posttrain_jax.core import grouped, struct
from posttrain_jax.core.weight import linear32
from posttrain_jax.models.config import ModelConfig

Array = jax.Array
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


@struct.dataclass
class Load:
  """What the routers of some layers did with the tokens, padding left out: sums, which add up."""

  chosen: Array  # [..., experts]: tokens that chose the expert
  probability: Array  # [..., experts]: of the expert, summed over tokens
  tokens: Array  # [...]


def mlp(x: Array, p: Any, config: ModelConfig, valid: Array) -> tuple[Array, Load]:
  """(y, load); x: [batch, time, embed], valid: [batch, time], false for padding, which passes no expert."""
  rows, is_token = x.reshape(-1, x.shape[-1]), valid.reshape(-1)
  weights, chosen, load = route(rows, p["gate"]["weight"], config, is_token)
  chosen = jnp.where(is_token[:, None], chosen, config.experts)
  y = through(
    rows, weights, chosen, {name: part["weight"] for name, part in p["experts"].items()}, config
  )
  return y.reshape(x.shape), load


def route(x: Array, router: Any, config: ModelConfig, is_token: Array) -> tuple[Array, Array, Load]:
  """(weights [rows, k] in float32, chosen experts [rows, k], load) of x: [rows, embed]."""
  probabilities = jax.nn.softmax(linear32(x, router), axis=-1)
  weights, chosen = jax.lax.top_k(probabilities, config.experts_per_token)
  if config.norm_experts:
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
  told = jnp.where(is_token[:, None], chosen, config.experts)
  load = Load(
    chosen=jnp.bincount(told.reshape(-1), length=config.experts).astype(jnp.float32),
    probability=jnp.sum(jnp.where(is_token[:, None], probabilities, 0), axis=0),
    tokens=jnp.sum(is_token, dtype=jnp.float32),
  )
  return weights, chosen, load


def through(
  x: Array, weights: Array, chosen: Array, experts: dict[str, Any], config: ModelConfig
) -> Array:
  """The weighted sum of what the chosen experts make of each row; `config.experts` in `chosen` is nobody.

  Rows are sorted by expert once, for all three products.
  """
  count, each = chosen.shape
  flat = chosen.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  inverse = jnp.argsort(order)
  groups = grouped.groups(jnp.bincount(flat, length=config.experts), count * each)
  rows = grouped.permuted(jnp.repeat(x, each, axis=0), order, inverse)
  gate = checkpoint_name(grouped.product(rows, experts["gate_proj"], groups), "gate")
  up = checkpoint_name(grouped.product(rows, experts["up_proj"], groups), "up")
  out = grouped.product(ACTIVATIONS[config.activation](gate) * up, experts["down_proj"], groups)
  out = grouped.permuted(out, inverse, order).reshape(count, each, -1)
  return jnp.sum(out * weights[..., None].astype(out.dtype), axis=1)
