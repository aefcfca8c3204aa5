"""DPO with LoRA on real pairs, here and in TRL's DPOTrainer, in turn on the same cores: pairs a second, peak memory.

  POSTTRAIN_DATA=... .venv-oracle/bin/python experiments/bench_dpo.py        (`make bench` runs it too)

24 (or --pairs) of the 300 pairs of demo_pairs/dpo_en_demo.json, evenly by length, once through, about four a step. Both
compute the reference (the base without its adapter) in the time that counts: TRL at each step, here once before the
steps. Here the prompt of a pair is computed once, and rows as long as the longest pair hold several, two rows a step,
as `posttrain train` packs them. There the two sequences of a pair are padded to the longer, and four pairs are
accumulated one by one: at once they end in 24 GiB of memory being full, and would be padded further. A worker is alone
in memory, so they follow one another.

The share of the product rate is by what we compute: one forward for the reference and a training step, over each
pair's prompt, once, and its two answers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import bench
import limits

A_STEP, ROWS, BETA, LONGEST = 4, 2, 0.1, 2048  # pairs of a step there, rows of a step here
ASKED = "POSTTRAIN_BENCH_PAIRS"  # in the environment of a worker
PAIRS = int(os.environ.get(ASKED, "24"))
DATA = "demo_pairs/dpo_en_demo.json"


def rows():
  """The draw, as rows with chat messages: one of every length."""
  from posttrain_jax.data import schema

  path = Path(os.environ["POSTTRAIN_DATA"]) / DATA
  columns = {"prompt": "conversations", "chosen": "chosen", "rejected": "rejected"}
  every = list(schema.read(path, columns=columns, on_error="skip"))
  long = lambda row: sum(
    len(m["content"]) for part in ("prompt", "chosen", "rejected") for m in row.fields[part]
  )
  ordered = sorted(every, key=long)
  return [ordered[i * len(ordered) // PAIRS] for i in range(PAIRS)]


def jax_jobs() -> bench.Jobs:
  import jax
  import jax.numpy as jnp

  from posttrain_jax import adapters, objectives
  from posttrain_jax.adapters import layout
  from posttrain_jax.build import decisions
  from posttrain_jax.core import tree
  from posttrain_jax.data import answers, chat, loader
  from posttrain_jax.models import fetch, hf
  from posttrain_jax.objectives import Context, reference_cache
  from posttrain_jax.optim import chain
  from posttrain_jax.train import state as state_lib
  from posttrain_jax.train import step

  # as `posttrain train` does, in a folder of this process: the second run finds what the first compiled
  jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
  products = jnp.dtype(bench.dtype())
  between = decisions.between(products)
  params, config = hf.load("smollm2", dtype=products, place=layout.place)
  tokenizer = chat.load_tokenizer(fetch.fetch())
  template = chat.template(tokenizer)
  examples = answers.encode_all(
    rows(), tokenizer, template, kind="pairs", max_length=2 * LONGEST, truncate="drop"
  ).examples
  objective = objectives.Preference(config, beta=BETA, dtype=between, remat="names")
  chosen = adapters.AdapterConfig(r=bench.RANK, lora_alpha=bench.ALPHA)
  trainable, fixed = tree.partition(adapters.init(jax.random.key(0), params, chosen)[1])
  optimizer, _ = chain.chain("adamw", lr=bench.LR, steps=1000, schedule="constant", clip=None)
  update = jax.jit(step.make(objective, optimizer), donate_argnums=0)
  state = state_lib.start(trainable, optimizer, fixed)
  context = Context(params)
  longest = max(map(len, examples))
  tokens = sum(map(len, examples))  # a pair's prompt, once, and both of its answers
  size = adapters.count(tree.combine(trainable, fixed))
  mean = tokens / len(examples)
  flops = limits.forward(config, tokens, mean) + limits.training(config, tokens, mean, size)

  def train() -> bench.Done:
    nonlocal state
    with tempfile.TemporaryDirectory() as cache:  # empty: the reference is computed each time
      scored = reference_cache.scored(
        examples, objective, params, cache=Path(cache), length=longest, say=lambda _: None
      )
    batches = loader.Loader(scored, batch_size=ROWS, length=longest)
    for _ in range(batches.batches()):
      state, _ = update(state, context, next(batches))
    jax.block_until_ready(state)
    batches.set_state({**batches.get_state(), "epoch": 0, "batch": 0})
    return bench.Done(len(examples), flops)

  return {"dpo": train}


def torch_jobs() -> bench.Jobs:
  import datasets
  import torch
  import transformers
  import trl

  from posttrain_jax.models import fetch

  warnings.simplefilter("ignore")
  torch.set_num_threads(os.cpu_count() or 1)
  folder = fetch.fetch()
  fields = [{k: row.fields[k] for k in ("prompt", "chosen", "rejected")} for row in rows()]
  trainer = trl.DPOTrainer(
    model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    args=trl.DPOConfig(
      output_dir=tempfile.mkdtemp(),
      per_device_train_batch_size=1,
      beta=BETA,
      max_length=None,
      report_to=[],
      use_cpu=True,
      bf16=bench.dtype() == "bfloat16",
      gradient_checkpointing=False,
      seed=0,
    ),
    train_dataset=datasets.Dataset.from_list(fields),
    processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    peft_config=bench.peft_lora(),
  )
  trained = [p for p in trainer.model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=bench.LR, weight_decay=0.0)
  batches = list(trainer.get_train_dataloader())

  def train() -> bench.Done:
    trainer.model.train()
    for i, batch in enumerate(batches, 1):
      with trainer.compute_loss_context_manager():  # autocast, where products are in bfloat16
        loss = trainer.compute_loss(trainer.model, batch)
      (loss / A_STEP).backward()
      if i % A_STEP == 0:
        optimizer.step()
        optimizer.zero_grad()
    return bench.Done(len(fields))

  return {"dpo": train}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--worker", choices=("jax", "torch"))
  parser.add_argument("--repeats", type=int, default=2)
  parser.add_argument("--pairs", type=int, default=PAIRS, help="a multiple of four")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of products, on both sides")
  args = parser.parse_args()
  if args.dtype:
    os.environ[bench.DTYPE] = args.dtype
  os.environ[ASKED] = str(args.pairs)
  if args.worker:
    bench.work({"jax": jax_jobs, "torch": torch_jobs}[args.worker]())
    return 0
  if not os.environ.get("POSTTRAIN_DATA"):
    print("POSTTRAIN_DATA is not set: DPO on real pairs is left out")
    return 0
  machine = limits.measured()
  print(machine.told(), flush=True)
  first, pairs = {}, []
  for _ in range(args.repeats):
    pair = {}
    for library in ("jax", "torch"):
      worker = bench.Worker(library, __file__)
      if library == "jax":  # there nothing is compiled, and a run takes minutes
        first = worker.run("dpo")
        print(json.dumps({"with compilation": first}), flush=True)
      pair[library] = worker.run("dpo")
      worker.close()
      print(json.dumps({library: pair[library]}), flush=True)
    pairs.append(pair)
  rate = {lib: [p[lib]["tokens"] / p[lib]["seconds"] for p in pairs] for lib in ("jax", "torch")}
  ratios = [ours / theirs for ours, theirs in zip(rate["jax"], rate["torch"])]
  flops = pairs[0]["jax"]["flops"] / pairs[0]["jax"]["tokens"]
  share = lambda lib: machine.of_products(flops * statistics.median(rate[lib]), 1, bench.dtype())
  found = {
    "machine": machine.to_json(),
    "dtype": bench.dtype(),
    "versions": bench.versions("jax", "torch", "peft", "trl"),
    "gflops_a_pair": round(flops / 1e9, 1),
    "pairs_per_second": {lib: round(statistics.median(r), 3) for lib, r in rate.items()},
    "ratio": round(statistics.median(ratios), 2),
    "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
    "first_seconds": round(first["seconds"], 1),
    "share_of_products": {lib: share(lib) for lib in rate},
    "peak_gb": {lib: round(pairs[-1][lib]["peak"] / 1e9, 2) for lib in rate},
    "pairs": {lib: pairs[0][lib]["tokens"] for lib in rate},
    "repeats": args.repeats,
    "date": time.strftime("%Y-%m-%d"),
  }
  rates, peak = found["pairs_per_second"], found["peak_gb"]
  parts = {lib: f"{part:.0%}" for lib, part in found["share_of_products"].items()}
  print(
    f"dpo: {rates['jax']} pairs/s here, {rates['torch']} in TRL: ratio {found['ratio']} (range"
    f" {found['ratio_range'][0]} to {found['ratio_range'][1]}); {parts['jax']} and"
    f" {parts['torch']} of the product rate; peak memory {peak['jax']} and {peak['torch']} GB"
  )
  name = "bench-dpo" if bench.dtype() == "float32" else f"bench-dpo-{bench.dtype()}"
  bench.write(name, machine, found)
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
