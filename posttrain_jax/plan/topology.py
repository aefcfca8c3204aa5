"""Devices to compile for, whether or not they are here: TPUs through libtpu, NVIDIA's through jax's CUDA plugin.

Neither needs a device or a driver, nor NVIDIA's libraries.  `cpu:8` are virtual devices of this machine, and no
topology at all are the devices that it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from posttrain_jax.plan import chips
from posttrain_jax.plan.chips import Chip

# Without these libtpu asks the cloud's metadata server what it runs on, and refuses a second process.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
# libtpu that jax 0.10.2 pins: with 0.0.52 programs of v6e cannot be printed, and so their collectives not be read
LIBTPU = "libtpu==0.0.42.*"
CUDA = (
  "jax_cuda13_plugin",
  "jax_cuda12_plugin",
)  # the plugin for either CUDA; the first that is there compiles
CHIPS_A_HOST = 4
FLAT = {"v5e": "4x4", "v6e": "4x4"}  # whose slices lie in a plane; those of the others fill space
LARGEST_FLAT = 16  # chips along a side of them
INSTALL = (
  "`make .venv-tpu/ready` installs it apart, and PYTHONPATH=.venv-tpu/site JAX_PLATFORMS=cpu in front of the command "
  "finds it; inside the environment itself JAX would look for such a device in every program"
)
WORDS = (
  "write chips and their shape, such as v5e:4x4, v5p:2x2x1 or tpu7x:2x2x1; hosts and GPUs of each, such as h100:1x8; "
  f"or cpu:8. Chips: {', '.join(chips.CHIPS)}"
)


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for."""

  name: str  # "v5p:2x2x1", or what this machine's device calls itself
  platform: str  # tpu, gpu, cpu
  devices: tuple[Any, ...]
  memory: float | None  # GiB a device; None where the table has no such chip
  compiler: str  # the library that compiles, with its version
  chip: Chip | None = None  # the rates of one device; None where they are not known
  slices: int = (
    1  # groups of devices with a slow network between them: slices of TPUs, hosts of GPUs
  )

  @property
  def slice_of(self) -> dict[int, int]:
    """{id of a device: its slice}; `devices` has one slice after the other."""
    size = len(self.devices) // self.slices
    return {device.id: place // size for place, device in enumerate(self.devices)}


def target(topology: str | None = None, count: int | None = None, slices: int = 1) -> Target:
  """The devices of a topology such as `v5p:2x2x1`, or (None) this machine's; the first `count` of them.

  slices: as many such topologies, joined by a network.

  Raises:
    ValueError: a topology that does not exist, more devices than it has, or a library that is not installed.
  """
  if slices < 1 or (topology is None and slices > 1):
    raise ValueError(f"slices={slices}: write 1 or more, of a topology")
  where = _local() if topology is None else _named(topology, slices)
  if count is None:
    return where
  if not 1 <= count <= len(where.devices) or slices > 1:
    one = f"{where.name} has 1 to {len(where.devices)}" if slices == 1 else "slices are taken whole"
    raise ValueError(f"devices={count}: {one}")
  return dataclasses.replace(where, devices=where.devices[:count])


def _local() -> Target:
  devices = tuple(jax.devices())
  kind, platform = devices[0].device_kind, devices[0].platform
  chip = chips.of_kind(kind)
  memory = None if chip is None else chip.memory
  return Target(kind, platform, devices, memory, _jaxlib(), chip)


def _named(topology: str, slices: int) -> Target:
  kind, _, shape = topology.partition(":")
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise ValueError(f"topology={topology!r}: {WORDS}")
  sizes = tuple(map(int, shape.split("x")))
  if kind == "cpu" and len(sizes) == 1:
    return _cpu(topology, sizes[0], slices)
  if kind in chips.TPUS:
    _check_shape(topology, kind, sizes)
    return _tpu(topology, chips.TPUS[kind], sizes, slices)
  if kind in chips.GPUS and len(sizes) == 2:
    return _gpu(topology, chips.GPUS[kind], (sizes[0] * slices, sizes[1]))
  raise ValueError(f"topology={topology!r}: {WORDS}")


def _check_shape(topology: str, kind: str, sizes: tuple[int, ...]) -> None:
  """libtpu compiles for shapes that no slice has: those in a plane and those in a cube are not told apart."""
  example = FLAT.get(kind, "2x2x1")
  wanted = example.count("x") + 1
  if len(sizes) != wanted:
    raise ValueError(
      f"topology={topology}: a slice of {kind} has a shape of {wanted} numbers, as in {kind}:{example}"
    )
  if kind in FLAT and max(sizes) > LARGEST_FLAT:
    raise ValueError(
      f"topology={topology}: a slice of {kind} has {LARGEST_FLAT}x{LARGEST_FLAT} chips at most; --slices=N takes more"
    )


def _cpu(topology: str, size: int, slices: int) -> Target:
  """Virtual devices: what the partitioner does with as many, and not what a CPU takes for it."""
  count = size * slices
  virtual(count)
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise ValueError(
      f"topology={topology}: JAX has begun with {len(devices)} CPU devices; set "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before it is imported"
    )
  return Target(topology, "cpu", tuple(devices[:count]), None, _jaxlib(), None, slices)


def virtual(count: int) -> None:
  """As many CPU devices, where JAX has not looked for its devices yet."""
  with contextlib.suppress(RuntimeError):  # where it has, what there is decides
    jax.config.update("jax_num_cpu_devices", count)


def _tpu(topology: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> Target:
  if not has_libtpu():
    raise ValueError(f"topology={topology}: libtpu is not installed; {INSTALL}")
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  asked: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if math.prod(sizes) < CHIPS_A_HOST:  # which libtpu would take for a slice of whole hosts
    asked["chips_per_host_bounds"] = (*sizes, 1)[:3]
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **asked)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"topology={topology}: libtpu knows no such TPU: {error}") from None
  devices = tuple(described.devices)
  cores = len(devices) // (math.prod(sizes) * slices)  # a chip of v4 counts as two devices
  version = f"libtpu {importlib.metadata.version('libtpu')}"
  return _target(topology, "tpu", devices, _share(chip, cores), version, slices)


def _gpu(topology: str, chip: Chip, sizes: tuple[int, int]) -> Target:
  """hosts x GPUs; the hosts are the slices."""
  plugin = cuda()
  if plugin is None:
    raise ValueError(f"topology={topology}: jax's CUDA plugin is not installed; {INSTALL}")
  hosts, each = sizes
  # a backend has to be there before the plugin's topologies are: the CPU's, since looking for a card makes the plugin
  # give up where there is none
  jax.config.update("jax_platforms", "cpu")
  jax.devices()
  devices = topologies.get_topology_desc(
    topology,
    platform="cuda",
    topology=f"1x{hosts}x{each}",
    target_config=chips.target_config(chip),
  ).devices
  version = f"{plugin} {importlib.metadata.version(plugin.replace('_', '-'))}"
  return _target(topology, "gpu", tuple(devices), chip, version, hosts)


def _target(name, platform, devices, chip, compiler, slices) -> Target:
  return Target(name, platform, devices, chip.memory, compiler, chip, slices)


def _share(chip: Chip, devices: int) -> Chip:
  """What one of the devices of a chip has of it."""
  rates = ("memory", "flops", "bandwidth", "links", "network", "host")
  return dataclasses.replace(chip, **{name: vars(chip)[name] / devices for name in rates})


def _jaxlib() -> str:
  return f"jaxlib {importlib.metadata.version('jaxlib')}"


def has_libtpu() -> bool:
  return importlib.util.find_spec("libtpu") is not None


def cuda() -> str | None:
  """jax's CUDA plugin, where it is installed."""
  return next((name for name in CUDA if importlib.util.find_spec(name) is not None), None)
