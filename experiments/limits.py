"""What a machine reaches at all, and what a step has to do: a rate as a share of the limit.

Per token of a model with L layers of [hidden, ...] matrices, N of them in all the layers, a head of V x hidden (tied or
not), Q = heads x head_dim, and rows of S tokens, in floating-point operations (a multiply-add is two):

  base products   forward 2 N, the gradient of what goes in 2 N; a frozen matrix has no gradient of its own
  head            2 V hidden each way
  attention       forward 2 L S Q (scores and values, over the half that a causal mask leaves), backward 4 L S Q
  adapter         P numbers of LoRA: forward 2 P, backward 4 P

Nothing is counted for what a program computes twice (scores in the backward), for a mask's other half, for filling, for
DoRA's norms, and for passes that are no products.  A written token reads every weight once; of several rows together
the reading is shared and the products are not, so that both shares are told, and the larger is the one that limits.

`measured` gives the rates: products by XLA, the best of a few sizes; reading by numpy on a CPU (as many threads as
cores, each adding up its part of 1 GiB), by a sum of XLA's on another device.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_jax.models.config import ModelConfig

# [rows, in] x [in, out]: two of SmolLM2-135M's with 1,024 tokens, and two that are large
SIZES = ((1024, 576, 1536), (1024, 1536, 576), (2048, 2048, 2048), (4096, 2048, 4096))
ON_A_DEVICE = ((4096, 4096, 4096), (8192, 8192, 8192))
NATIVE_BF16 = {
  "avx512_bf16",
  "amx_bf16",
}  # without one of them a product in bfloat16 is slow, and says nothing
READ = 1 << 30  # bytes
TIMES = 5  # the best of
RESTLESS = 1.15  # times by which a machine's own rates differ where it is not at rest


@dataclasses.dataclass(frozen=True)
class Limits:
  """A machine: its name, products in GFLOP/s by type (bfloat16 and int8 accumulate in 32 bits), reading in GB/s."""

  name: str
  cores: int
  products: dict[str, float]
  reading: float

  def told(self) -> str:
    products = ", ".join(f"{rate:,.0f} GFLOP/s {dtype}" for dtype, rate in self.products.items())
    return f"{self.name}, {self.cores} cores: products {products}; reading {self.reading:.1f} GB/s"

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def apart(self, other: Limits) -> float:
    """The most by which a rate differs in the other, as a ratio from 1 on."""
    mine, theirs = (dict(one.products, reading=one.reading) for one in (self, other))
    return max(max(mine[of] / theirs[of], theirs[of] / mine[of]) for of in mine)

  def of_products(self, flops: float, seconds: float, dtype: str = "float32") -> float:
    """The share of the product rate of that type that so many operations in so many seconds are."""
    return round(flops / seconds / 1e9 / self.products[dtype], 3)

  def of_reading(self, size: float, seconds: float) -> float:
    """The share of the rate of reading that so many bytes in so many seconds are."""
    return round(size / seconds / 1e9 / self.reading, 3)


# --- what a step has to do -------------------------------------------------------------------------------------------


def matrices(config: ModelConfig) -> int:
  """N: the numbers of all matrices of the layers."""
  queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  attention = 2 * config.hidden_size * queries + 2 * config.hidden_size * keys
  return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def weights(config: ModelConfig) -> int:
  """What a written token reads: every matrix, and the head."""
  return matrices(config) + config.vocab_size * config.hidden_size


def forward(config: ModelConfig, tokens: float, length: float, adapter: float = 0) -> float:
  """FLOPs of the logits of so many tokens in rows of a length, with so many numbers in an adapter."""
  attention = 2 * config.num_layers * length * config.num_heads * config.head_dim
  return tokens * (2 * weights(config) + attention + 2 * adapter)


def training(config: ModelConfig, tokens: float, length: float, adapter: float) -> float:
  """FLOPs of a step of an adapter of so many numbers over a frozen base, forward and backward."""
  attention = 6 * config.num_layers * length * config.num_heads * config.head_dim
  return tokens * (4 * weights(config) + attention + 6 * adapter)


# --- what the machine reaches ----------------------------------------------------------------------------------------


def measured(device: str = "cpu", *, sizes: tuple[tuple[int, int, int], ...] = ()) -> Limits:
  """The rates of this machine's CPU, or of JAX's first device."""
  if device != "cpu":
    import jax

    products = _products(("float32", "bfloat16"), sizes or ON_A_DEVICE)
    return Limits(name(device), len(jax.devices()), products, _device_reads())
  dtypes = ["float32", "int8"]
  if NATIVE_BF16 & flags():
    dtypes.insert(1, "bfloat16")
  cores = len(os.sched_getaffinity(0))
  return Limits(processor(), cores, _products(dtypes, sizes or SIZES), _reads(cores))


def name(device: str) -> str:
  """The CPU's own name, or that of JAX's first device."""
  if device == "cpu":
    return processor()
  import jax

  return jax.devices()[0].device_kind


def processor() -> str:
  """The CPU's own name."""
  return _cpuinfo("model name") or platform.processor() or platform.machine()


def flags() -> set[str]:
  """What the CPU says it can do; empty where it does not say so in /proc/cpuinfo."""
  return {*_cpuinfo("flags").split()}


def _cpuinfo(field: str) -> str:
  path = Path("/proc/cpuinfo")
  if path.exists():
    for line in path.read_text().splitlines():
      if line.startswith(field):
        return line.partition(":")[2].strip()
  elif field == "model name" and platform.system() == "Darwin":
    asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
  return ""


def fastest(work: Callable[[], Any], times: int = TIMES) -> float:
  """The least seconds of some times, after a first that compiles."""
  work()
  spent = []
  for _ in range(times):
    began = time.perf_counter()
    work()
    spent.append(time.perf_counter() - began)
  return min(spent)


def _products(dtypes, sizes) -> dict[str, float]:
  import jax
  import jax.numpy as jnp

  from posttrain_jax.core.product import precision

  def rate(dtype: str, rows: int, ins: int, outs: int) -> float:
    left, right = jnp.ones((rows, ins), dtype), jnp.ones((ins, outs), dtype)
    wide = jnp.int32 if dtype == "int8" else jnp.float32
    how = precision(left, right)  # as in training: a GPU's float32 is no TF32
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=how, preferred_element_type=wide))
    seconds = fastest(lambda: jax.block_until_ready(product(left, right)))
    return 2e-9 * rows * ins * outs / seconds

  return {dtype: round(max(rate(dtype, *size) for size in sizes), 1) for dtype in dtypes}


def _reads(threads: int) -> float:
  parts = np.array_split(np.ones(READ // 4, np.float32), threads)
  with futures.ThreadPoolExecutor(threads) as pool:
    seconds = fastest(lambda: list(pool.map(np.add.reduce, parts)))
  return round(READ / seconds / 1e9, 2)


def _device_reads() -> float:
  import jax
  import jax.numpy as jnp

  table, total = jnp.ones(READ, jnp.float32), jax.jit(jnp.sum)  # 4 GiB: more than any cache
  seconds = fastest(lambda: jax.block_until_ready(total(table)))
  return round(table.nbytes / seconds / 1e9, 1)


if __name__ == "__main__":
  print(measured().told())
