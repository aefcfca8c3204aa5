"""Generation of SmolLM2-135M-Instruct here and by transformers, in turn on the same cores.

  .venv-oracle/bin/python experiments/bench_generation.py --repeats=3        (--device=gpu: both sides on JAX's GPU)

`equal`: 1, 16 and 64 answers of 128 tokens each. `unequal`: 64 answers of 16 to 256 tokens; here a row that ends is
given the next prompt, there a batch of 16 goes on until its longest answer is whole. Here in float32, with products
in bfloat16 (`model.dtype`), and in float32 with weights stored in bfloat16 and int8 (`--storage`), there in float32
(--peers=float32,bfloat16). A ratio is the median over rounds, in each of which every contender does the job once.
Compilation is left out on our side, by a first run.

`share of reading`: the bytes of weights a token (a step of all rows) has to read, by the seconds it took, as a part of
what this machine reads at all (`limits.py`).  `share of products`: likewise the multiplications, beside the rate of
products of that type; not told of bfloat16 on a CPU that has no products of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import bench
import limits
import numpy as np

NEW, PROMPT, SHORTEST, LONGEST, BATCH, MANY = 128, 40, 16, 256, 16, 64
ROWS = {"equal 1": 1, "equal 16": 16, "equal 64": 64, "unequal": BATCH}
BITS = {"float32": 32, "products": 16, "bfloat16": 16, "int8": 8}
PRODUCTS = {"float32": "float32", "products": "bfloat16", "bfloat16": "bfloat16", "int8": "int8"}
Job = Callable[[], int]  # does the job once, and returns the tokens that were asked for


def prompts(count: int) -> list[list[int]]:
  return np.random.default_rng(count).integers(1000, 40000, (count, PROMPT)).tolist()


def lengths() -> list[int]:
  """Of MANY answers, most of them short."""
  drawn = np.random.default_rng(0).beta(0.8, 2.0, MANY)
  return (SHORTEST + (LONGEST - SHORTEST) * drawn).astype(int).tolist()


def ours(storage: str) -> dict[str, Job]:
  import jax.numpy as jnp

  from posttrain_jax.adapters import layout
  from posttrain_jax.build import decisions
  from posttrain_jax.models import hf
  from posttrain_jax.rollout import engine

  dtype, kept = jnp.dtype("float32"), storage
  if storage in ("float32", "products"):  # as `model.dtype` says, all products
    dtype, kept = jnp.dtype(PRODUCTS[storage]), "auto"
  params, config = hf.load("smollm2", dtype=dtype, place=layout.place)
  ready = engine.prepare(params, config, kept)

  def write(count: int, most: int | list[int], rows: int) -> int:
    how: dict[str, Any] = dict(batch_size=rows, dtype=decisions.between(dtype))
    drawn = engine.generate(ready, config, prompts(count), max_new_tokens=most, **how)
    return sum(map(len, drawn.tokens))

  equal = {f"equal {n}": lambda n=n: write(n, NEW, n) for n in (1, 16, 64)}
  return {
    **equal,
    "unequal": lambda: write(MANY, lengths(), BATCH),
    "short": lambda: write(1, 4, 1),
  }


def theirs(dtype: str) -> dict[str, Job]:
  import torch
  import transformers

  from posttrain_jax.models import fetch

  where = bench.torch_device()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    fetch.resolve("smollm2"), dtype=getattr(torch, dtype)
  ).to(where)
  model.eval()

  def write(ids: list[list[int]], new: int) -> None:
    some = torch.tensor(ids).to(where)
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    model.generate(some, attention_mask=torch.ones_like(some), **how).cpu()

  def equal(count: int) -> int:
    write(prompts(count), NEW)
    return count * NEW

  def unequal() -> int:
    asked, most = prompts(MANY), lengths()
    for start in range(0, MANY, BATCH):
      write(asked[start : start + BATCH], max(most[start : start + BATCH]))
    return sum(most)

  def short() -> int:
    write(prompts(1), 4)
    return 4

  jobs = {f"equal {n}": lambda n=n: equal(n) for n in (1, 16, 64)}
  return {**jobs, "unequal": unequal, "short": short}


def shares(name: str, storage: str, rate: float, machine: limits.Limits) -> dict[str, float]:
  weights = 134_515_008  # each is used once a token, those of the embedding by the tied head
  steps = rate / ROWS[name]
  result = {"share of reading": machine.of_reading(steps * weights * BITS[storage] / 8, 1)}
  if (kind := PRODUCTS[storage]) in machine.products:
    halves = 1 if storage in ("float32", "products") else 2
    result["share of products"] = machine.of_products(rate * 2 * weights * halves, 1, kind)
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--jobs", default=",".join(ROWS))
  parser.add_argument("--peers", default="float32", help="dtypes of transformers")
  parser.add_argument("--storages", default=",".join(BITS))
  parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
  args = parser.parse_args()
  bench.use(args.device)
  mine = {storage: ours(storage) for storage in args.storages.split(",")}
  there = {f"transformers {dtype}": theirs(dtype) for dtype in args.peers.split(",")}
  everyone = {**mine, **there}
  reached = limits.measured(args.device)
  print(reached.told(), flush=True)
  machine = {
    "machine": reached.to_json(),
    "versions": bench.versions("jax", "torch", "transformers"),
    "date": time.strftime("%Y-%m-%d"),
  }
  path = bench.result("bench-generation", reached)
  # a job that is not run again keeps what is known of it
  results: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
  for name in args.jobs.split(","):
    for jobs in mine.values():
      jobs[name]()
    rates: dict[str, list[float]] = {who: [] for who in everyone}
    for _ in range(args.repeats):
      for who, jobs in everyone.items():
        jobs["short"]()  # memory that lay idle is there again
        began = time.monotonic()
        tokens = jobs[name]()
        rates[who].append(tokens / (time.monotonic() - began))
    against = rates["transformers float32"]
    results[name] = results.get(name, {}) | {
      who: {
        "rounds": len(each),
        "tokens/s": statistics.median(each),
        "ratio": statistics.median(a / b for a, b in zip(each, against)),
        "ratios": sorted(a / b for a, b in zip(each, against)),
        **(shares(name, who, statistics.median(each), reached) if who in mine else {}),
      }
      for who, each in rates.items()
    }
    for who, found in results[name].items():
      print(name, who, {key: np.round(v, 2).tolist() for key, v in found.items()}, flush=True)
    bench.write("bench-generation", reached, {**machine, "results": results})


if __name__ == "__main__":
  main()
