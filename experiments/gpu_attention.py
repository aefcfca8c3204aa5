"""Attention on a GPU by XLA's tiles and by cuDNN: milliseconds forward and backward, and the peak of what it needs.

  python experiments/gpu_attention.py        (experiments/results/gpu_attention-CARD.{md,json})

32 heads of 128 dimensions that share 8 of keys, as Llama-3-8B has, in bfloat16; rows of one document.  Of the FLOPs the
half that a causal mask leaves is counted: 6 L^2 heads 128 for both ways, of a row of L tokens.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import bench
import jax
import jax.numpy as jnp
import limits
import numpy as np

from posttrain_jax.core import files
from posttrain_jax.models import attention, backends

HEADS, SHARED, SIZE = 32, 8, 128
SHAPES = ((4, 2048), (1, 8192), (1, 32768))


def timed(name: str, rows: int, length: int) -> dict[str, Any]:
  keys = jax.random.split(jax.random.key(0), 3)
  draw = lambda key, heads: jax.random.normal(key, (rows, length, heads, SIZE), jnp.bfloat16)
  q, k, v = draw(keys[0], HEADS), draw(keys[1], SHARED), draw(keys[2], SHARED)
  positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1))
  places = attention.Places(positions, jnp.ones_like(positions))

  def loss(q, k, v, places):
    out = backends.ATTEND[name](q, k, v, places, places, scale=SIZE**-0.5)
    return jnp.sum(jnp.square(out.astype(jnp.float32)))

  both = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, v, places).compile()
  seconds = limits.fastest(lambda: jax.block_until_ready(both(q, k, v, places)), 10)
  flops = 6 * rows * length**2 * HEADS * SIZE
  memory: Any = both.memory_analysis()
  return dict(
    attention=name,
    rows=rows,
    length=length,
    ms=round(1e3 * seconds, 2),
    tflops=round(flops / seconds / 1e12, 1),
    temporaries_gb=round(memory.temp_size_in_bytes / 1e9, 2),
  )


def main() -> None:
  found = []
  for rows, length in SHAPES:
    for name in ("xla", "cudnn"):
      try:
        found.append(timed(name, rows, length))
      except Exception as fault:  # the other one is still to be timed
        text = f"{type(fault).__name__}: {fault}"[:300]
        found.append(dict(attention=name, rows=rows, length=length, fault=text))
      print(found[-1], flush=True)
  card = jax.devices()[0].device_kind
  path = bench.beside("gpu_attention", card)
  files.write_json(path, {"card": card, "jax": jax.__version__, "rows": found})
  columns = ("attention", "rows", "length", "ms", "tflops", "temporaries_gb")
  lines = [f"# Attention on {card}", "", "Written by `python experiments/gpu_attention.py`.", ""]
  lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
  lines += [
    "| " + " | ".join(str(np.asarray(r.get(c, "failed"))) for c in columns) + " |" for r in found
  ]
  files.write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
