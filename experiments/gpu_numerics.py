"""Does a GPU compute what a CPU does?  Relative errors, beside the largest that the number format explains.

  python experiments/gpu_numerics.py [CHECK,...]    (one GPU; two minutes; results/gpu_numerics-CARD.{md,json})

The CPU's side is float32 in the same process, of products a float64 formula in numpy.  An error is the norm of the
difference over the norm of what is right.  The script ends with 1 where a check fails, and goes on behind it.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import bench
import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax import adapters, objectives, quant
from posttrain_jax.adapters import layout
from posttrain_jax.core import files, grouped, product, tree
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.models import attention, cudnn, decoder, hf
from posttrain_jax.objectives import Context
from posttrain_jax.optim import chain
from posttrain_jax.rollout import engine
from posttrain_jax.train import state as state_lib
from posttrain_jax.train import step

Check = tuple[
  str, float | str, float
]  # what, the error or why there is none, the largest that passes
FLOAT32, BFLOAT16 = 1e-5, 2e-2


def error(got: Any, right: Any) -> float:
  got, right = (np.asarray(x, np.float64) for x in (got, right))
  return float(np.linalg.norm(got - right) / np.linalg.norm(right))


def reason(fault: Exception) -> str:
  return f"{type(fault).__name__}: {str(fault).splitlines()[0]}"[:300]


def errors(got: Any, right: Any) -> float:
  """The largest over the leaves of two trees."""
  return max(map(error, jax.tree.leaves(got), jax.tree.leaves(right)))


def on_cpu(work: Callable[..., Any], *arguments: Any) -> Any:
  """The same on this machine's CPU, in float32 throughout."""
  cpu = jax.devices("cpu")[0]
  with jax.default_device(cpu):
    return jax.block_until_ready(work(*jax.device_put(jax.device_get(arguments), cpu)))


# --- checks ----------------------------------------------------------------------------------------------------------


def products() -> Iterator[Check]:
  rng = np.random.default_rng(0)
  x, w = (rng.standard_normal((1024, 1024)).astype(np.float32) for _ in range(2))
  right = x.astype(np.float64) @ w
  yield "product in float32, as XLA has it", error(jnp.matmul(x, w), right), 1e-3
  yield (
    "product in float32, as models have it",
    error(product.product(jnp.asarray(x), jnp.asarray(w), 0), right),
    FLOAT32,
  )
  half = lambda a: jnp.asarray(a, jnp.bfloat16)
  exact = np.asarray(half(x), np.float64) @ np.asarray(half(w), np.float64)
  got = product.product(jnp.asarray(np.asarray(half(x), np.float32)), half(w), 0)
  yield "product of bfloat16, summed in float32", error(got, exact), FLOAT32


def attended() -> Iterator[Check]:
  """Both ways, beside float32 on the CPU: heads that share keys, padding behind, windows."""
  for shape in ((9, 3, 64, 384), (8, 8, 128, 512), (4, 1, 80, 256)):
    for window in (None, 100):
      yield from _attended(*shape, window)


def _attended(
  heads: int, shared: int, size: int, length: int, window: int | None
) -> Iterator[Check]:
  rng = np.random.default_rng(1)
  draw = lambda n: rng.standard_normal((2, length, n, size)).astype(np.float32)
  segments = np.ones((2, length), np.int32)
  segments[1, length - 37 :] = 0
  real = (segments != 0)[:, :, None, None]
  positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
  given = (draw(heads), draw(shared), draw(shared), draw(heads) * real, segments, positions)

  def both(attend: Any, dtype: Any) -> Callable[..., Any]:
    def run(q, k, v, cotangent, segments, positions):
      places = attention.Places(positions, segments)
      call = lambda q, k, v: attend(q, k, v, places, places, window, scale=size**-0.5)
      out, back = jax.vjp(call, *(x.astype(dtype) for x in (q, k, v)))
      return out * (segments != 0)[:, :, None, None], *back(cotangent.astype(out.dtype))

    return jax.jit(run)

  right = on_cpu(both(attention.attend, jnp.float32), *given)
  for name, attend, dtype, most in (
    ("xla, float32", attention.attend, jnp.float32, FLOAT32),
    ("xla, bfloat16", attention.attend, jnp.bfloat16, BFLOAT16),
    ("cudnn, bfloat16", cudnn.attend, jnp.bfloat16, BFLOAT16),
  ):
    what = f"attention by {name}, {heads} heads of {size}, {shared} of keys, window {window}"
    try:
      yield what, errors(both(attend, dtype)(*given), right), most
    except Exception as fault:
      yield what, reason(fault), most


def decoded() -> Iterator[Check]:
  """Quantised matrices are read to the last bit."""
  matrix = np.random.default_rng(2).standard_normal((512, 768)).astype(np.float32)
  for kind in ("nf4", "fp4", "int8"):
    stored = quant.quantize("layers/q_proj", matrix[None], kind)
    read = jax.jit(lambda weight: weight.dense(jnp.float32))
    yield f"{kind} decoded", error(read(stored), on_cpu(read, stored)), 1e-7


def experts() -> Iterator[Check]:
  rng = np.random.default_rng(3)
  rows, matrices = rng.standard_normal((300, 64)), rng.standard_normal((8, 64, 96))
  rows, matrices = rows.astype(np.float32), matrices.astype(np.float32)
  sizes = np.asarray([0, 120, 3, 77, 0, 60, 40, 0], np.int32)
  groups = lambda sizes: grouped.groups(sizes, len(rows) // len(matrices))
  loss = lambda rows, matrices, sizes: (grouped.product(rows, matrices, groups(sizes)) ** 2).sum()
  work = jax.jit(jax.value_and_grad(loss, (0, 1)))
  right = on_cpu(work, rows, matrices, sizes)
  yield "grouped product of experts, both ways", errors(work(rows, matrices, sizes), right), FLOAT32


@functools.cache
def model() -> tuple[Any, Any]:
  """SmolLM2-135M in float32, with its config."""
  return hf.load("smollm2", dtype=jnp.float32, place=layout.place)


def logits() -> Iterator[Check]:
  params, config = model()
  tokens = np.random.default_rng(4).integers(1000, 40000, (2, 192)).astype(np.int32)
  forward = lambda dtype: jax.jit(lambda p, t: decoder.forward(p, t, config, dtype=dtype))
  right = on_cpu(forward(jnp.float32), params, tokens)
  yield "logits, float32", error(forward(jnp.float32)(params, tokens), right), 1e-4
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  yield "logits, bfloat16", error(forward(jnp.bfloat16)(half, tokens), right), 5e-2


def losses() -> Iterator[Check]:
  """Eight steps of adapters over a dense and a NF4 base."""
  params, _ = model()
  for name, base, options in (
    ("LoRA", params, {}),
    ("DoRA", params, {"use_dora": True}),
    ("LoRA over NF4", quant.quantize_params(params), {}),
  ):
    right = on_cpu(functools.partial(_trained, options, jnp.float32, "names"), base)
    for dtype, remat, most in ((jnp.float32, "names", 1e-4), (jnp.bfloat16, "full", 2e-2)):
      got = _trained(options, dtype, remat, base)
      yield (
        f"eight losses of {name}, {jnp.dtype(dtype).name}, remat {remat}",
        error(got, right),
        most,
      )


def _trained(options: dict[str, Any], dtype: Any, remat: str, base: Any) -> np.ndarray:
  """The losses of eight steps on two rows."""
  _, config = model()
  tokens = np.random.default_rng(5).integers(1000, 40000, (2, 128)).astype(np.int32)
  ones = np.ones_like(tokens)
  batch = dict(
    tokens=tokens,
    loss_mask=ones.astype(bool),
    segment_ids=ones,
    positions=np.tile(np.arange(128, dtype=np.int32), (2, 1)),
    channel=-ones,
  )
  described = adapters.AdapterConfig(r=8, lora_alpha=16, **options)
  placed, adapter = adapters.init(jax.random.key(1), base, described)
  trainable, fixed = tree.partition(adapter)
  optimizer, _ = chain.chain("adamw", lr=1e-3, steps=100, schedule="constant")
  objective = objectives.Sft(config, dtype=dtype, remat=remat)
  state, context = state_lib.start(trainable, optimizer), Context(placed, fixed)
  update, seen = jax.jit(step.make(objective, optimizer)), []
  for _ in range(8):
    state, metrics = update(state, context, batch)
    seen.append(metrics_lib.read(metrics)["loss"])
  return np.asarray(seen)


def written() -> Iterator[Check]:
  """Greedy answers, token by token: the share that differs."""
  params, config = model()
  prompts = np.random.default_rng(6).integers(1000, 40000, (4, 24)).tolist()

  def write(params: Any) -> np.ndarray:
    ready = engine.prepare(params, config, "auto")
    how: dict[str, Any] = dict(max_new_tokens=32, batch_size=4, dtype=jnp.float32)
    return np.asarray(engine.generate(ready, config, prompts, **how).tokens)

  differ = write(params) != on_cpu(write, params)
  yield "greedy tokens that differ, float32", float(differ.mean()), 0.0


CHECKS = (products, attended, decoded, experts, logits, losses, written)


def main() -> int:
  names = [check.__name__ for check in CHECKS]
  asked = sys.argv[1].split(",") if len(sys.argv) > 1 else names
  if unknown := [name for name in asked if name not in names]:
    sys.exit(f"{', '.join(unknown)}: checks are {', '.join(names)}")
  card, found = jax.devices()[0].device_kind, []
  for check in CHECKS:
    if check.__name__ not in asked:
      continue
    began = time.monotonic()
    try:
      for what, value, most in check():
        found.append(noted(what, value, most))
    except Exception as fault:  # the next check is another's
      found.append(noted(check.__name__, reason(fault), 0.0))
    print(f"       {check.__name__}: {time.monotonic() - began:.1f} s", flush=True)
  write(card, found)
  return int(not all(one["passed"] for one in found))


def noted(what: str, value: float | str, most: float) -> dict[str, Any]:
  passed = not isinstance(value, str) and bool(value <= most)
  shown = value if isinstance(value, str) else f"{value:.2e}"
  print(f"{'ok    ' if passed else 'FAILED'} {what}: {shown} (at most {most:g})", flush=True)
  return dict(what=what, error=shown, most=most, passed=passed)


def write(card: str, found: list[dict[str, Any]]) -> None:
  path = bench.beside("gpu_numerics", card)
  lines = [
    f"# What {card} computes, beside a CPU",
    "",
    "Written by `python experiments/gpu_numerics.py`.",
    "",
  ]
  lines += [f"jax {jax.__version__}.", "", "| | error | at most |", "|---|---|---|"]
  lines += [f"| {one['what']} | {one['error']} | {one['most']:g} |" for one in found]
  files.write_json(path, {"card": card, "jax": jax.__version__, "checks": found})
  files.write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
  sys.exit(main())
