"""The devices of a run, which config.mesh counts, and of a server, whose option --mesh does."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import ml_collections

from posttrain_jax.core import sharding
from posttrain_jax.settings import ConfigError

SERVING = ("data", "fsdp", "expert", "tensor")  # axes that a server has a use for


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


def serving(text: str, rows: int) -> jax.sharding.Mesh | None:
  """The mesh of `--mesh=data=2,tensor=4` over this program's devices; None on a single one.

  Args:
    rows: answers that are written at once, which lie over data x fsdp x expert.

  Raises:
    ConfigError: it counts something else, or devices that are not there, or does not divide the rows.
  """
  sizes = _sizes(text)
  try:
    mesh = sharding.mesh(**sizes)
  except ValueError as error:
    raise ConfigError(f"--mesh={text}: {error}") from error
  shares = sharding.row_shares(mesh)
  if rows % shares:
    raise ConfigError(
      f"--rows={rows}: the mesh {text} splits them over data x fsdp x expert; write a multiple of {shares}, or a larger"
      " tensor"
    )
  return None if mesh.size == 1 else mesh


def _sizes(text: str) -> dict[str, int]:
  """The option as `sharding.mesh` takes it.

  >>> _sizes("data=2,tensor=-1")
  {'data': 2, 'tensor': -1}
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    axis, _, size = (word.strip() for word in part.partition("="))
    if axis == "context":
      raise ConfigError(
        f"--mesh={text}: context cuts the rows of training; answers are written token by token, so write tensor or data"
      )
    if axis not in SERVING or not re.fullmatch(r"-1|[1-9][0-9]*", size):
      raise ConfigError(
        f"--mesh={text}: {part!r} is no axis with its devices; write AXIS=N of {', '.join(SERVING)}, as"
        " --mesh=data=2,tensor=4 or --mesh=tensor=-1"
      )
    if axis in sizes:
      raise ConfigError(f"--mesh={text}: {axis} is there twice")
    sizes[axis] = int(size)
  return sizes


def _slice(device: jax.Device) -> int:
  """The slice of a TPU in several; 0 for every device that is in none."""
  try:
    return device.slice_index if device.platform == "tpu" else 0
  except AttributeError:  # of a single slice
    return 0
