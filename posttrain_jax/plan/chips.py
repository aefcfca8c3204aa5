"""Accelerators by name: memory, arithmetic and links, each figure with its source.

Rates are the vendors' peaks for dense bfloat16 products, which no program reaches; steps on real chips take 1.5 to 3
times what they allow.  Bytes are counted a device: a chip of v4, v5p or TPU7x with two cores may be one device or two.
"""

from __future__ import annotations

import dataclasses

GIB, GB, TERA = 2**30, 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator, as a data sheet has it."""

  memory: float  # GiB that programs can have
  flops: float  # bfloat16, a second
  bandwidth: float  # bytes a second of its memory
  links: (
    float  # bytes a second that it sends to chips of its slice or host, over all links together
  )
  network: (
    float  # bytes a second that it sends to other slices or hosts: its share of the host's network
  )
  host: float  # bytes a second from or to its host's memory
  source: str
  kind: str = ""  # what the driver calls it
  cores: int = 0  # streaming multiprocessors, of a GPU
  cache: int = 0  # bytes of its second level, of a GPU
  clock: float = 0.0  # GHz, of a GPU
  capability: tuple[int, int] = (0, 0)  # CUDA's, of a GPU


_TPU = "cloud.google.com/tpu/docs/{}; jax pallas tpu_info; network: 2 x 100 Gb/s a host (v4, v5e: 8 or 4 chips)"
# Links: interchip interconnect, one direction, all links of a chip together.
TPUS = {
  "v4": Chip(32, 275 * TERA, 1228 * GB, 300 * GB, 6.25 * GB, 16 * GB, _TPU.format("v4")),
  "v5e": Chip(16, 197 * TERA, 819 * GB, 200 * GB, 3.1 * GB, 16 * GB, _TPU.format("v5e")),
  "v5p": Chip(95, 459 * TERA, 2765 * GB, 600 * GB, 6.25 * GB, 16 * GB, _TPU.format("v5p")),
  "v6e": Chip(32, 918 * TERA, 1640 * GB, 448 * GB, 12.5 * GB, 32 * GB, _TPU.format("v6e")),
  "tpu7x": Chip(192, 2307 * TERA, 7380 * GB, 600 * GB, 12.5 * GB, 32 * GB, _TPU.format("tpu7x")),
}
_GPU = "nvidia.com data sheets; XLA's target_config/specs; network: 400 Gb/s a GPU"
# Links: NVLink, one direction.  What CUDA and its libraries take of the memory is left out of it.
GPUS = {
  "a100": Chip(
    79.1, 312 * TERA, 2039 * GB, 300 * GB, 25 * GB, 25 * GB, _GPU,
    "NVIDIA A100-SXM4-80GB", 108, 41_943_040, 1.41, (8, 0),
  ),
  "h100": Chip(
    79.1, 989 * TERA, 3352 * GB, 450 * GB, 50 * GB, 50 * GB, _GPU,
    "NVIDIA H100 80GB HBM3", 132, 52_428_800, 1.98, (9, 0),
  ),
  "h200": Chip(
    139.8, 989 * TERA, 4800 * GB, 450 * GB, 50 * GB, 50 * GB, _GPU,
    "NVIDIA H200", 132, 52_428_800, 1.98, (9, 0),
  ),
  "b200": Chip(
    178.3, 2225 * TERA, 7672 * GB, 900 * GB, 50 * GB, 50 * GB, _GPU,
    "NVIDIA B200", 148, 132_644_864, 1.965, (10, 0),
  ),
}  # fmt: skip
CHIPS = {**TPUS, **GPUS}


def of_kind(kind: str) -> Chip | None:
  """The GPU whose driver's name begins like that, or None: what a machine itself has."""
  if "A100" in kind and "40GB" in kind:
    return dataclasses.replace(GPUS["a100"], memory=39.4, bandwidth=1555 * GB)
  return next((chip for name, chip in GPUS.items() if name.upper() in kind), None)


def target_config(chip: Chip) -> str:
  """The GPU in XLA's words (a GpuTargetConfigProto as text), so that it compiles for one that is not here."""
  major, minor = chip.capability
  accelerated = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
  shared = 232_448 if major >= 9 else 166_912
  fields = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49_152,
    "shared_memory_per_core": shared + 1024,
    "threads_per_core_limit": 2048,
    "core_count": chip.cores,
    "fpus_per_core": 128 if major >= 9 else 64,
    "block_dim_limit_x": 2_147_483_647,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "memory_bandwidth": int(chip.bandwidth),
    "l2_cache_size": chip.cache,
    "clock_rate_ghz": chip.clock,
    "device_memory_size": int(chip.memory * GIB),
    "shared_memory_per_block_optin": shared,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
  }
  listed = " ".join(f"{name}: {value}" for name, value in fields.items())
  capability = f"cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}"
  return (
    f'gpu_device_info {{ {listed} {capability} runtime_version: "12.8.0" }} platform_name: "CUDA" '
    f'dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{chip.kind}"'
  )
