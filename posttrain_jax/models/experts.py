"""A mixture of experts: each token passes the few MLPs that its router chooses, and no token is dropped.

  y = sum over the k largest p_e of p_e * down_e(act(gate_e x) * up_e x),   p = softmax(x W_router)

with the chosen p divided by their sum where the family does so (`norm_experts`).  Shazeer et al. 2017; Mixtral: Jiang
et al. 2024; Qwen 3: Yang et al. 2025.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from posttrain_jax.core import grouped, sharding, struct, weight
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
  weights, chosen, load = route(x, p["gate"]["weight"], config, valid)
  chosen = jnp.where(valid[..., None], chosen, config.experts)
  experts = {name: part["weight"] for name, part in p["experts"].items()}
  if not sharding.active():
    return through(x, weights, chosen, experts, config), load
  return _among_devices(x, weights, chosen, experts, config), load


def _among_devices(
  x: Array, weights: Array, chosen: Array, experts: dict[str, Any], config: ModelConfig
) -> Array:
  """`through` with the experts spread over `expert` and `tensor`, whole ones, and rows over the axes of a batch.

  Devices along `expert` gather each other's rows, compute what their own experts make of them, and give each its sum
  back; along `tensor` they have the same rows.  No weight of an expert travels between those.
  """
  mesh = jax.sharding.get_abstract_mesh()
  count = mesh.shape["expert"] * mesh.shape["tensor"]
  if config.experts % count:
    raise ValueError(
      f"mesh {dict(mesh.shape)}: {config.experts} experts do not divide among expert x tensor = {count} devices; write "
      "sizes whose product divides them"
    )
  # few rows, as one prompt's, lie whole on every device
  rows = sharding.fitted(sharding.logical("batch time -"), x.shape, mesh)
  gathered = rows[0] is not None

  def one(x, weights, chosen, experts):
    if gathered:
      together = lambda x: jax.lax.all_gather(x, "expert", axis=0, tiled=True)
      x, weights, chosen = together(x), together(weights), together(chosen)
    first = jax.lax.axis_index(("expert", "tensor")) * (config.experts // count)
    y = through(x, weights, chosen, experts, config, first)
    if gathered:
      y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
    return jax.lax.psum(y, "tensor" if gathered else ("expert", "tensor"))

  of_experts = jax.tree.map(lambda _: PartitionSpec(("expert", "tensor")), experts)
  return sharding.by_device(one, (rows, rows, rows, of_experts), rows)(x, weights, chosen, experts)


def route(x: Array, router: Any, config: ModelConfig, valid: Array) -> tuple[Array, Array, Load]:
  """(weights [batch, time, k] in float32, chosen experts [batch, time, k], load) of x: [batch, time, embed]."""
  probabilities = jax.nn.softmax(linear32(x, router), axis=-1)
  weights, chosen = _likeliest(probabilities, config.experts_per_token)
  if config.norm_experts:
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
  counted = jax.nn.one_hot(chosen, config.experts) * valid[..., None, None]
  load = Load(
    chosen=jnp.sum(counted, axis=(0, 1, 2)),
    probability=jnp.sum(jnp.where(valid[..., None], probabilities, 0), axis=(0, 1)),
    tokens=jnp.sum(valid, dtype=jnp.float32),
  )
  return weights, chosen, load


def _likeliest(probabilities: Array, count: int) -> tuple[Array, Array]:
  """The largest, and whose they are, of each token; on a mesh where the token lies.

  Left to itself the compiler gathers the probabilities of all tokens on every device, from other slices too.
  """
  top = functools.partial(jax.lax.top_k, k=count)
  if not sharding.active():
    return top(probabilities)
  mesh = jax.sharding.get_abstract_mesh()
  rows = sharding.fitted(sharding.logical("batch time -"), probabilities.shape, mesh)
  return sharding.by_device(lambda p: tuple(top(p)), (rows,), (rows, rows))(probabilities)


def through(
  x: Array,
  weights: Array,
  chosen: Array,
  experts: dict[str, Any],
  config: ModelConfig,
  first: Array | int = 0,
) -> Array:
  """The weighted sum of what the chosen of these experts make of each token; x: [..., embed], chosen: [..., k].

  Rows are sorted by expert once, for all three products; those that chose none of these come last.

  Args:
    experts: some of the layer's, from number `first`.
  """
  here = weight.shape(experts["gate_proj"])[0]
  each, lead = chosen.shape[-1], x.shape[:-1]
  flat = chosen.reshape(-1) - first
  flat = jnp.where((flat >= 0) & (flat < here), flat, here)
  order = jnp.argsort(flat, stable=True)
  inverse = jnp.argsort(order)
  groups = grouped.groups(jnp.bincount(flat, length=here), len(flat) // config.experts)
  rows = jnp.repeat(x.reshape(-1, x.shape[-1]), each, axis=0)
  rows = grouped.permuted(rows, order, inverse)
  gate = checkpoint_name(grouped.product(rows, experts["gate_proj"], groups), "gate")
  up = checkpoint_name(grouped.product(rows, experts["up_proj"], groups), "up")
  out = grouped.product(ACTIVATIONS[config.activation](gate) * up, experts["down_proj"], groups)
  out = grouped.permuted(out, inverse, order).reshape(*lead, each, -1)
  return jnp.sum(out * weights[..., None].astype(out.dtype), axis=-2)
