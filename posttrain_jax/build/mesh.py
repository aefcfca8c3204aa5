"""config.mesh: the devices of a run."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import ml_collections

from posttrain_jax.core import sharding
from posttrain_jax.settings import ConfigError


def make(
  config: ml_collections.ConfigDict,
  devices: Sequence[jax.Device] | None = None,
  slices: int | None = None,
) -> jax.sharding.Mesh | None:
  """The mesh of config.mesh over the devices, all of this program's by default; None on a single one.

  slices: into how many a slow network cuts the devices; None: as TPUs say themselves.
  """
  devices = jax.devices() if devices is None else devices
  if slices is None:
    devices = sorted(devices, key=_slice)
    slices = len({_slice(device) for device in devices})
  m = config.mesh
  mesh = sharding.mesh(**m.to_dict(), devices=devices, slices=slices)
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


def _slice(device: jax.Device) -> int:
  """The slice of a TPU in several; 0 for every device that is in none."""
  try:
    return device.slice_index if device.platform == "tpu" else 0
  except AttributeError:  # of a single slice
    return 0
