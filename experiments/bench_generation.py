"""Generation of SmolLM2-135M-Instruct here and by transformers, in turn on the same cores, in float32.

  .venv-oracle/bin/python experiments/bench_generation.py --repeats=3

`equal`: 1, 16 and 64 answers of 128 tokens each.  `unequal`: 64 answers of 16 to 256 tokens; here a row that ends is
given the next prompt, there a batch of 16 goes on until its longest answer is whole.  The ratio is the median over
pairs of neighbours.  Compilation is left out on our side, by a first run of each job.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

NEW, PROMPT, SHORTEST, LONGEST, BATCH, MANY = 128, 40, 16, 256, 16, 64
RESULTS = Path(__file__).parent / "results"
Job = Callable[[], int]  # does the job once, and returns the tokens that were asked for


def prompts(count: int) -> list[list[int]]:
  return np.random.default_rng(count).integers(1000, 40000, (count, PROMPT)).tolist()


def lengths() -> list[int]:
  """Of MANY answers, most of them short."""
  drawn = np.random.default_rng(0).beta(0.8, 2.0, MANY)
  return (SHORTEST + (LONGEST - SHORTEST) * drawn).astype(int).tolist()


def ours() -> dict[str, Job]:
  from posttrain_jax.models import hf
  from posttrain_jax.rollout import engine

  params, config = hf.load("smollm2", dtype=np.float32)
  ready = engine.prepare(params, config)

  def write(count: int, most: int | list[int], rows: int) -> int:
    drawn = engine.generate(ready, config, prompts(count), max_new_tokens=most, batch_size=rows)
    return sum(map(len, drawn.tokens))

  equal = {f"equal {n}": lambda n=n: write(n, NEW, n) for n in (1, 16, 64)}
  return {**equal, "unequal": lambda: write(MANY, lengths(), BATCH)}


def theirs() -> dict[str, Job]:
  import torch
  import transformers

  from posttrain_jax.models import fetch

  model = transformers.AutoModelForCausalLM.from_pretrained(
    fetch.resolve("smollm2"), dtype=torch.float32
  ).eval()

  def write(ids: list[list[int]], new: int) -> None:
    some = torch.tensor(ids)
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    model.generate(some, attention_mask=torch.ones_like(some), **how)

  def equal(count: int) -> int:
    write(prompts(count), NEW)
    return count * NEW

  def unequal() -> int:
    asked, most = prompts(MANY), lengths()
    for start in range(0, MANY, BATCH):
      write(asked[start : start + BATCH], max(most[start : start + BATCH]))
    return sum(most)

  return {**{f"equal {n}": lambda n=n: equal(n) for n in (1, 16, 64)}, "unequal": unequal}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--jobs", default="equal 1,equal 16,equal 64,unequal")
  args = parser.parse_args()
  here, there = ours(), theirs()
  results = {}
  for name in args.jobs.split(","):
    here[name]()
    rates: list[tuple[float, float]] = []
    for _ in range(args.repeats):
      pair = []
      for job in (here[name], there[name]):
        began = time.monotonic()
        tokens = job()
        pair.append(tokens / (time.monotonic() - began))
      rates.append((pair[0], pair[1]))
    ratios = [a / b for a, b in rates]
    results[name] = {
      "tokens_per_second": statistics.median(a for a, _ in rates),
      "transformers": statistics.median(b for _, b in rates),
      "ratio": statistics.median(ratios),
      "ratios": [min(ratios), max(ratios)],
    }
    print(
      name, {key: np.round(value, 2).tolist() for key, value in results[name].items()}, flush=True
    )
  machine = {"processor": platform.processor() or platform.machine(), "repeats": args.repeats}
  (RESULTS / "bench-generation-cpu.json").write_text(
    json.dumps({"machine": machine, "results": results}, indent=1) + "\n"
  )


if __name__ == "__main__":
  main()
