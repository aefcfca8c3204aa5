"""config.mesh: the devices of a run."""

from __future__ import annotations

import jax
import ml_collections

from posttrain_jax.core import sharding
from posttrain_jax.settings import ConfigError


def make(config: ml_collections.ConfigDict) -> jax.sharding.Mesh | None:
  """The mesh of config.mesh over every device; None on a single one."""
  if jax.device_count() == 1:
    return None
  mesh = sharding.mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
  shares = mesh.shape["data"] * mesh.shape["fsdp"]
  for field, rows, unit in (
    ("batch.rows", config.batch.rows, shares * config.batch.accumulate),
    ("eval.rows", config.eval.rows, shares),
  ):
    if rows % unit:
      raise ConfigError(
        f"{field}={rows}: the mesh {dict(mesh.shape)} splits the rows of each micro-batch over data x fsdp; "
        f"write a multiple of {unit}, or a larger mesh.tensor"
      )
  return mesh
