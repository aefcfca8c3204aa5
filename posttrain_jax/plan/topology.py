"""Chips to compile for, whether or not they are here: TPU topologies through libtpu, else this machine's devices."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30

# Memory of one chip in GiB, by the name in a topology; https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
TPU_MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
# ... and of one GPU, by a part of what the driver calls it.
GPU_MEMORY = {"H100": 80, "H200": 141, "A100-SXM4-40GB": 40, "A100": 80}

# Without these libtpu asks the cloud's metadata server what it runs on, and refuses a second process.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
INSTALL = (
  "pip install --no-deps --target .venv-tpu/site libtpu, and then PYTHONPATH=.venv-tpu/site in front of the command "
  "(`make compile-70b` does both); inside the environment itself JAX would look for a TPU in every program"
)


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for."""

  name: str  # "v5p:2x2x1", or what this machine's device calls itself
  platform: str  # tpu, gpu, cpu
  devices: tuple[Any, ...]
  memory: float | None  # GiB a device; None where the table has no such chip
  compiler: str  # the library that compiles, with its version


def target(topology: str | None = None, count: int | None = None) -> Target:
  """The chips of a TPU topology such as `v5p:2x2x1`, or (None) this machine's; the first `count` of them.

  Raises:
    ValueError: a topology that does not exist, more devices than it has, or a library that is not installed.
  """
  chips = _local() if topology is None else _tpu(topology)
  if count is None:
    return chips
  if not 1 <= count <= len(chips.devices):
    raise ValueError(f"devices={count}: {chips.name} has 1 to {len(chips.devices)}")
  return dataclasses.replace(chips, devices=chips.devices[:count])


def _local() -> Target:
  devices = tuple(jax.devices())
  kind = devices[0].device_kind
  memory = next((size for name, size in GPU_MEMORY.items() if name in kind), None)
  compiler = f"jaxlib {importlib.metadata.version('jaxlib')}"
  return Target(kind, devices[0].platform, devices, memory, compiler)


def _tpu(topology: str) -> Target:
  named = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
  if named is None or named[1] not in TPU_MEMORY:
    raise ValueError(
      f"topology={topology!r}: write a generation and its shape in chips, such as v5p:2x2x1 or v5e:4x4; "
      f"generations: {', '.join(TPU_MEMORY)}"
    )
  if not has_libtpu():
    raise ValueError(f"topology={topology}: libtpu is not installed; {INSTALL}")
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"topology={topology}: libtpu knows no such TPU: {error}") from None
  generation, shape = named.groups()
  chips = math.prod(map(int, shape.split("x")))
  # a v4 chip counts as two devices with half the memory each
  memory = TPU_MEMORY[generation] * chips / len(devices)
  version = importlib.metadata.version("libtpu")
  return Target(topology, "tpu", tuple(devices), memory, f"libtpu {version}")


def has_libtpu() -> bool:
  return importlib.util.find_spec("libtpu") is not None
