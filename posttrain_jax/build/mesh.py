"""config.mesh: the devices of a run."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import ml_collections

from posttrain_jax.core import sharding
from posttrain_jax.settings import ConfigError


def make(
  config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh | None:
  """The mesh of config.mesh over the devices, all of this program's by default; None on a single one."""
  devices = jax.devices() if devices is None else devices
  m = config.mesh
  mesh = sharding.mesh(**m.to_dict(), devices=devices)
  if len(devices) == 1:
    return None
  shares = sharding.row_shares(mesh)
  for field, rows, unit in (
    ("batch.rows", config.batch.rows, shares * config.batch.accumulate),
    ("eval.rows", config.eval.rows, shares),
  ):
    if rows % unit:
      raise ConfigError(
        f"{field}={rows}: the mesh {dict(mesh.shape)} splits the rows of each micro-batch over data x fsdp x expert; "
        f"write a multiple of {unit}, or a larger mesh.context or mesh.tensor"
      )
  return mesh
