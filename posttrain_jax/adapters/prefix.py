"""Prefix tuning: keys and values of no token that every layer sees before those of a text.  Li and Liang 2021."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.node import Standing
from posttrain_jax.core import struct, weight
from posttrain_jax.models import attention, before

Array = jax.Array


@struct.dataclass
class Prefix(Standing):
  """k, v: [layers, slots, kv_heads * head_dim], seen as they are: k is not rotated, positions go on behind it.

  PEFT's past_key_values, without its optional projection, which is a way to train them.
  """

  k: Array
  v: Array
  TRAINED = ("k", "v")

  def segments(self, batch: int) -> Array:
    """[batch, slots]: every document sees it."""
    return jnp.full((batch, self.k.shape[-2]), attention.EVERYONE, jnp.int32)

  def read(self, batch: int) -> tuple[Array, Array]:
    """(keys, values): [layers, batch, slots, kv_heads * head_dim], of one layer without the first axis."""
    rows = lambda x: jnp.broadcast_to(x[..., None, :, :], (*x.shape[:-2], batch, *x.shape[-2:]))
    return rows(self.k), rows(self.v)

  @property
  def slots(self) -> int:
    return self.k.shape[-2]

  @property
  def shape(self) -> tuple[int, ...]:
    return (2, *self.k.shape)

  def size(self) -> int:
    return self.k.size + self.v.size

  def partition_specs(self, spec: PartitionSpec) -> Prefix:
    return dataclasses.replace(self, k=spec, v=spec)


def init(key: Array, params: Any, config: AdapterConfig) -> dict[str, Prefix]:
  """{path: prefix} of num_virtual_tokens slots, keys and values ~ normal(0, 1) as in PEFT, float32."""
  layers, _, width = weight.shape(params["layers"]["self_attn"]["k_proj"]["weight"])
  shape = (layers, config.num_virtual_tokens, width)
  k, v = (jax.random.normal(array_key, shape) for array_key in jax.random.split(key))
  return {before.PREFIX: Prefix(k, v)}
