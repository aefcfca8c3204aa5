"""LoRA and DoRA training steps and a batch of mixed adapters, here and in PyTorch + PEFT, in turn on the same cores.

On a GPU, LoRA and QLoRA steps of an 8B model too.

  make bench                 (POSTTRAIN_DATA names the folder that holds gsm8k/, for the second comparison)
  .venv/bin/python experiments/bench.py --device=gpu      the same rows on JAX's accelerator, in bfloat16
  ... experiments/bench.py --before=FOLDER                a checkout of an earlier version takes its turn beside both

Each row is told as a ratio, and as a share of the product rate of the machine (`limits.py`, measured first and last).
Where PyTorch is not installed, or sees no such accelerator, the rows are ours alone, and it is said.

Two worker processes hold the two libraries; one works while the other waits, step by step, so that both see the same
machine.  The ratio is the median over pairs of neighbours.  Compilation is timed apart and left out of the steps.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import limits

RANK, ALPHA, LR = 16, 32, 1e-4
ROWS, LENGTH = 4, 256  # the fixed shape: rows of tokens, every one real and trained
MIXED_RANKS = (4, 8, 16, 16, 32, 8, 4, 64)  # of the adapters that serve one batch
MIXED_ROWS, MIXED_LENGTH = 16, 64  # every adapter has two rows
GSM8K_BATCH, GSM8K_LENGTH = 8, 512  # padded examples a batch there; tokens of a packed row here
GSM8K_ROWS = 4 * ROWS  # as many examples as these rows hold, so that no batch here is part empty
RESULTS = Path(__file__).parent / "results"
SINGLE = ("fixed", "dora", "mixed")  # jobs of one step
DTYPE = "POSTTRAIN_BENCH_DTYPE"  # likewise: float32 or bfloat16
BEFORE = "before"  # the worker of an earlier version
DEVICE = "POSTTRAIN_BENCH_DEVICE"  # in the environment of a worker: cpu, gpu or tpu


class Done(NamedTuple):
  """What a job did: tokens (pairs, answers), and the FLOPs that they take at least where it counts them."""

  count: int
  flops: float = 0.0


Jobs = dict[str, Callable[[], Done]]


def device() -> str:
  return os.environ.get(DEVICE, "cpu")


def use(device: str) -> None:
  """Has both libraries, here and in workers, use a CPU or JAX's accelerator; called before they begin."""
  os.environ[DEVICE] = device
  # a few rows share an accelerator: none may take three quarters of its memory at once
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  if device == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
    return
  import jax

  if jax.default_backend() != device:
    sys.exit(f"--device={device}: JAX finds {jax.default_backend()}, install jax for it")


def torch_device() -> str:
  return "cpu" if device() == "cpu" else "cuda"


def dtype() -> str:
  """What both libraries multiply in."""
  return os.environ.get(DTYPE) or ("float32" if device() == "cpu" else "bfloat16")


# --- the two workers -------------------------------------------------------------------------------------------------


def jax_jobs() -> Jobs:
  """name -> function that does the job once over its data and returns the real tokens it saw."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from posttrain_jax import adapters, objectives
  from posttrain_jax.adapters import layout
  from posttrain_jax.build import decisions
  from posttrain_jax.core import tree
  from posttrain_jax.data import loader
  from posttrain_jax.models import decoder, hf
  from posttrain_jax.objectives import Context
  from posttrain_jax.optim import chain
  from posttrain_jax.train import state as state_lib
  from posttrain_jax.train import step

  params, config = hf.load("smollm2", dtype=jnp.dtype(dtype()), place=layout.place)
  fresh = lambda seed, **options: adapters.init(
    jax.random.key(seed), params, adapters.AdapterConfig(lora_alpha=ALPHA, **options)
  )[1]
  optimizer, _ = chain.chain("adamw", lr=LR, steps=1000, schedule="constant", clip=None)
  between = decisions.between(jnp.dtype(dtype()))
  objective = objectives.Sft(config, dtype=between, remat="names")
  update = jax.jit(step.make(objective, optimizer), donate_argnums=0)

  @functools.cache  # made when its job first runs: the peak memory of the jobs before is their own
  def trainer(**options):
    trainable, fixed = tree.partition(fresh(0, r=RANK, **options))
    # of a DoRA the LoRA: its norms are not counted
    size = adapters.count(fresh(0, r=RANK))
    state, context = state_lib.start(trainable, optimizer, fixed), Context(params)

    def train(batches, length: float) -> Done:
      nonlocal state
      tokens = 0
      for batch in batches:
        state, _ = update(state, context, batch)
        tokens += int((batch["segment_ids"] > 0).sum())
      jax.block_until_ready(state)
      return Done(tokens, limits.training(config, tokens, length, size))

    return train

  rows = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
  everywhere = np.ones_like(rows)
  fixed_batch = dict(
    tokens=rows,
    loss_mask=(np.arange(LENGTH) > 0) & (everywhere > 0),
    segment_ids=everywhere,
    positions=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    channel=-everywhere,
  )

  @functools.cache
  def served():
    return adapters.stack([fresh(i, r=rank) for i, rank in enumerate(MIXED_RANKS)], params)

  @jax.jit
  def serve(params, stacked, index, tokens):
    return decoder.forward(
      adapters.bind(params, stacked, rows=index), tokens, config, dtype=between
    )

  per_rank = adapters.count(fresh(0, r=1))

  def mixed() -> Done:
    tokens = rows.reshape(MIXED_ROWS, MIXED_LENGTH)
    adapter = per_rank * sum(MIXED_RANKS) / len(MIXED_RANKS)
    index = np.arange(MIXED_ROWS) % len(MIXED_RANKS)
    jax.block_until_ready(serve(params, served(), index, tokens))
    return Done(tokens.size, limits.forward(config, tokens.size, MIXED_LENGTH, adapter))

  jobs: Jobs = {"fixed": lambda: trainer()([fixed_batch], LENGTH)}
  if examples := gsm8k_examples():
    packed = list(loader.eval_batches(examples, batch_size=ROWS, length=GSM8K_LENGTH))
    mean = statistics.mean(map(len, examples))
    jobs["gsm8k"] = lambda: trainer()(packed, mean)
  return {**jobs, "dora": lambda: trainer(use_dora=True)([fixed_batch], LENGTH), "mixed": mixed}


def peft_lora(r: int = RANK, **options: Any) -> Any:
  """The peers' LoRA, on every linear layer."""
  import peft

  return peft.LoraConfig(
    r=r, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **options
  )


def torch_jobs() -> Jobs:
  """The same in PyTorch + PEFT: eager, SDPA attention, batches padded to their longest row."""
  import peft
  import torch
  import transformers

  from posttrain_jax.models import fetch

  torch.set_num_threads(os.cpu_count() or 1)
  where = torch_device()
  base = lambda: transformers.AutoModelForCausalLM.from_pretrained(
    fetch.fetch(), dtype=getattr(torch, dtype())
  ).to(where)
  rounded = lambda: torch.autocast(where, torch.bfloat16, enabled=dtype() == "bfloat16")
  wait = torch.cuda.synchronize if where == "cuda" else lambda: None

  @functools.cache
  def trainer(**options):
    model = peft.get_peft_model(base(), peft_lora(r=RANK, **options)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)

    def train(batches) -> Done:
      tokens = 0
      for ids, labels, attention in batches:
        with rounded():
          out = model(input_ids=ids, labels=labels, attention_mask=attention, use_cache=False)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(attention.sum())
      wait()
      return Done(tokens)

    return train

  names = [f"adapter_{i}" for i in range(len(MIXED_RANKS))]

  @functools.cache
  def served():
    model = peft.get_peft_model(base(), peft_lora(r=MIXED_RANKS[0]), adapter_name=names[0])
    for name, rank in zip(names[1:], MIXED_RANKS[1:]):
      model.add_adapter(name, peft_lora(r=rank))
    return model.eval()

  vocabulary = transformers.AutoConfig.from_pretrained(fetch.fetch()).vocab_size
  drawn = torch.Generator().manual_seed(0)
  rows = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=drawn).to(where)
  fixed_batch = (rows, rows, torch.ones_like(rows))

  def mixed() -> Done:
    """PEFT takes the rows of one adapter after another in every layer, and refuses DoRA among them."""
    tokens = rows.reshape(MIXED_ROWS, MIXED_LENGTH)
    of_rows = [names[i % len(names)] for i in range(MIXED_ROWS)]
    with torch.no_grad():
      served()(input_ids=tokens, adapter_names=of_rows, use_cache=False)
    wait()
    return Done(tokens.numel())

  jobs: Jobs = {"fixed": lambda: trainer()([fixed_batch])}
  if examples := gsm8k_examples():
    padded = []
    for start in range(0, len(examples), GSM8K_BATCH):
      batch = examples[start : start + GSM8K_BATCH]
      longest = max(map(len, batch))
      ids, labels, attention = (torch.full((len(batch), longest), fill) for fill in (0, -100, 0))
      for i, example in enumerate(batch):
        here = torch.as_tensor(example.tokens, dtype=torch.long)
        ids[i, : len(here)], attention[i, : len(here)] = here, 1
        labels[i, : len(here)] = torch.where(torch.as_tensor(example.mask), here, -100)
      padded.append(tuple(part.to(where) for part in (ids, labels, attention)))
    jobs["gsm8k"] = lambda: trainer()(padded)
  return {**jobs, "dora": lambda: trainer(use_dora=True)([fixed_batch]), "mixed": mixed}


def gsm8k_examples():
  """A fixed random draw of GSM8K's training questions as chats, answers trained; [] without the data."""
  folder = os.environ.get("POSTTRAIN_DATA")
  if not folder:
    return []
  import random

  from posttrain_jax.data import chat, packing, schema
  from posttrain_jax.models import fetch

  tokenizer = chat.load_tokenizer(fetch.fetch())
  columns = {"prompt": "question", "completion": "answer"}
  rows = list(schema.read(Path(folder) / "gsm8k" / "train.jsonl", columns=columns, chat=True))
  drawn = random.Random(0).sample(rows, 4 * GSM8K_ROWS)
  template = chat.template(tokenizer)
  examples = chat.encode_all(drawn, tokenizer, template, max_length=GSM8K_LENGTH).examples
  fits = lambda n: len(packing.best_fit([*map(len, examples[:n])], GSM8K_LENGTH)) <= GSM8K_ROWS
  return examples[: max(filter(fits, range(len(examples))))]


def work(jobs: Jobs) -> None:
  """Answers each job name on standard input with its tokens and seconds on standard output."""
  out = os.fdopen(os.dup(1), "w")
  print(json.dumps(list(jobs)), file=out, flush=True)
  for line in sys.stdin:
    began = time.perf_counter()
    done = jobs[line.strip()]()
    seconds = time.perf_counter() - began
    told = {"tokens": done.count, "flops": done.flops, "seconds": seconds, "peak": peak()}
    print(json.dumps(told), file=out, flush=True)


def peak() -> int:
  """The most bytes that this worker has had: of the accelerator's memory where it has one, else of the host's."""
  if device() == "cpu":
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  if os.environ.get("JAX_PLATFORMS") == "cpu":  # PyTorch's
    import torch

    return torch.cuda.max_memory_allocated()
  import jax

  return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


class Worker:
  def __init__(self, library: str, script: str | Path = __file__, *more: str):
    command = [sys.executable, str(script), f"--worker={library}", *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # of the version that the script is of, whatever is installed
    version = str(Path(script).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
      [version, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if library == "torch" or device() == "cpu":
      environment["JAX_PLATFORMS"] = "cpu"
    if library == "torch":  # large pages, which make sets, are a gain here and none there
      environment.pop("GLIBC_TUNABLES", None)
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert self.process.stdin is not None  # both are pipes
    assert self.process.stdout is not None
    self.requests, self.answers = self.process.stdin, self.process.stdout
    self.jobs = json.loads(self.answers.readline() or "null")
    if self.jobs is None:
      raise RuntimeError(f"the {library} worker ended before it began")

  def run(self, job: str) -> dict:
    self.requests.write(f"{job}\n")
    self.requests.flush()
    line = self.answers.readline()
    if not line:
      raise RuntimeError(
        f"a worker ended in {job} with code {self.process.wait()}; -9: out of memory"
      )
    return json.loads(line)

  def close(self) -> None:
    self.requests.close()
    self.process.wait()


def turn(worker: Worker, job: str) -> dict:
  """One run; of a single step the second, as in training, where the step before has just ended.

  A virtual machine takes back what memory a library freed while it waits for its turn, and both then pay for it.
  """
  if job in SINGLE:
    worker.run(job)
  return worker.run(job)


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(
  repeats: int, workers: dict[str, Worker], machine: limits.Limits, only: Sequence[str]
) -> dict:
  """{job: {library: tokens/s, ...}}: first runs (compilation) apart, then `repeats` rounds in turn."""
  results: dict[str, dict[str, Any]] = {}
  for job in [job for job in workers["jax"].jobs if not only or job in only]:
    first = {library: worker.run(job) for library, worker in workers.items()}
    rounds = []
    for _ in range(repeats):
      rounds.append({library: turn(worker, job) for library, worker in workers.items()})
    results[job] = row(first, rounds, machine)
    show(job, results[job])
  for worker in workers.values():
    worker.close()
  if {"fixed", "dora"} <= {*results}:
    per_second = lambda job: results[job]["tokens_per_second"]
    over_lora = {
      lib: round(per_second("fixed")[lib] / per_second("dora")[lib], 2) for lib in workers
    }
    results["dora"]["step_over_lora"] = over_lora
    there = f", {over_lora['torch']} in PyTorch + PEFT" if "torch" in over_lora else ""
    print(f"a DoRA step takes {over_lora['jax']} LoRA steps here{there}", flush=True)
  return results


def row(
  first: dict[str, dict], rounds: list[dict[str, dict]], machine: limits.Limits
) -> dict[str, Any]:
  """What rounds in turn come to: rates, their ratio, and each rate as a share of the machine's products.

  The FLOPs are those that we count, for both libraries.
  """
  rate = {lib: [one[lib]["tokens"] / one[lib]["seconds"] for one in rounds] for lib in first}
  median = {lib: statistics.median(values) for lib, values in rate.items()}
  ours = rounds[0]["jax"]
  share = lambda lib: machine.of_products(ours["flops"] / ours["tokens"] * median[lib], 1, dtype())
  result: dict[str, Any] = {
    "tokens": {lib: rounds[0][lib]["tokens"] for lib in first},
    "tokens_per_second": {lib: round(value, 1) for lib, value in median.items()},
    "gflops_a_token": round(ours["flops"] / ours["tokens"] / 1e9, 4),
    "share_of_products": {lib: share(lib) for lib in first},
    "first_seconds": {lib: round(first[lib]["seconds"], 1) for lib in first},
    "peak_gb": {lib: round(rounds[-1][lib]["peak"] / 1e9, 2) for lib in first},
    "repeats": len(rounds),
  }
  for other, name in (("torch", "ratio"), (BEFORE, "over_before")):
    if other in first:
      ratios = [ours / theirs for ours, theirs in zip(rate["jax"], rate[other])]
      result[name] = round(statistics.median(ratios), 3)
      result[f"{name}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
  return result


def show(job: str, r: dict) -> None:
  rate, first, peak = r["tokens_per_second"], r["first_seconds"], r["peak_gb"]
  share = {lib: f"{part:.0%}" for lib, part in r["share_of_products"].items()}
  both = lambda values, unit="": " and ".join(str(one) for one in values.values()) + unit
  said = [f"{job}: {rate['jax']} tokens/s here"]
  if "ratio" in r:
    low, high = r["ratio_range"]
    over = f"(range {low} to {high} over {r['repeats']} pairs)"
    said[0] += f", {rate['torch']} in PyTorch + PEFT: ratio {r['ratio']} {over}"
  if "over_before" in r:
    low, high = r["over_before_range"]
    said.append(f"{rate[BEFORE]} before: now {r['over_before']} times that ({low} to {high})")
  said.append(f"{both(share)} of the product rate")
  said.append(f"first run with compilation {both(first, ' s')}")
  said.append(f"peak memory {both(peak, ' GB')}")
  print("; ".join(said), flush=True)


def peer() -> str:
  """Why PyTorch's side is left out; "" where it is there."""
  for package in ("torch", "transformers", "peft"):
    if importlib.util.find_spec(package) is None:
      return f"{package} is not installed"
  if device() == "cpu":
    return ""
  import torch

  return "" if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def gpu() -> dict:
  """Llama-3-8B shapes, random bf16 weights, LoRA and QLoRA: tokens/s, MFU at 4N FLOPs a token, peak bytes."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from posttrain_jax import adapters, objectives, quant
  from posttrain_jax.core import tree
  from posttrain_jax.models import decoder, shapes
  from posttrain_jax.objectives import Context
  from posttrain_jax.optim import chain
  from posttrain_jax.train import state as state_lib
  from posttrain_jax.train import step

  peak_flops = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
  device = jax.devices()[0]
  known = next((flops for card, flops in peak_flops.items() if card in device.device_kind), None)
  config = shapes.SHAPES["llama3-8b"]
  rows, length, results = 4, 2048, {}
  base = decoder.init(jax.random.key(0), config, jnp.bfloat16)
  for name, attention in (("dense", "xla"), ("dense, cudnn", "cudnn"), ("nf4, cudnn", "cudnn")):
    if name.startswith("nf4"):
      base = quant.quantize_params(base)
    params, adapter = adapters.init(
      jax.random.key(1), base, adapters.AdapterConfig(r=RANK, lora_alpha=ALPHA)
    )
    trainable, fixed = tree.partition(adapter)
    optimizer, _ = chain.chain("adamw", lr=LR, steps=1000, schedule="constant")
    how: dict[str, Any] = dict(dtype=jnp.bfloat16, remat="names", attention_by=attention)
    objective = objectives.Sft(config, **how)
    state, context = state_lib.start(trainable, optimizer), Context(params, fixed)
    tokens = (
      np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    )
    ones = np.ones_like(tokens)
    batch = dict(
      tokens=tokens,
      loss_mask=ones.astype(bool),
      segment_ids=ones,
      positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
      channel=-ones,
    )
    began = time.perf_counter()
    update = (
      jax.jit(step.make(objective, optimizer), donate_argnums=0)
      .lower(state, context, batch)
      .compile()
    )
    compiled, seconds = time.perf_counter() - began, []
    memory: Any = update.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    for _ in range(8):
      began = time.perf_counter()
      state, _ = update(state, context, batch)
      jax.block_until_ready(state)
      seconds.append(time.perf_counter() - began)
    rate = tokens.size / statistics.median(seconds[2:])
    used = 4 * (tree.size(params) - tree.size(params["embed_tokens"])) * rate
    results[name] = {
      "tokens_per_second": round(rate),
      "mfu_at_4N": round(used / known, 3) if known else None,
      "compile_seconds": round(compiled, 1),
      "peak_gb": round(needed / 1e9, 2),  # of this step, and not of all that the process has done
    }
    print(f"llama3-8b {name}: {results[name]}", flush=True)
  return results


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--worker", choices=("jax", "torch"))
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--jobs", default="", help="fixed, gsm8k, dora, mixed; all by default")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of products")
  parser.add_argument(
    "--before", type=Path, help="a checkout of an earlier version, to compare with"
  )
  parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default=device())
  args = parser.parse_args()
  if args.worker:
    work({"jax": jax_jobs, "torch": torch_jobs}[args.worker]())
    return
  if args.dtype:
    os.environ[DTYPE] = args.dtype
  use(args.device)
  if why := peer():
    print(f"{why}: the rows are ours alone, without a ratio")
  if not os.environ.get("POSTTRAIN_DATA"):
    print("POSTTRAIN_DATA is not set: the comparison on GSM8K is left out")
  machine = limits.measured(args.device)
  print(machine.told(), flush=True)
  workers = {library: Worker(library) for library in ("jax", *(() if why else ("torch",)))}
  if args.before:
    workers[BEFORE] = Worker("jax", args.before / "experiments" / Path(__file__).name)
  packages = ("jax", "jaxlib", *(() if why else ("torch", "peft", "transformers")))
  record = {
    "machine": machine.to_json(),
    "dtype": dtype(),
    "load": os.getloadavg()[0],
    "date": time.strftime("%Y-%m-%d"),
    "versions": versions(*packages),
    "rows": compare(args.repeats, workers, machine, args.jobs.split(",") if args.jobs else ()),
  }
  if args.device == "gpu":
    record["8b"] = gpu()
  again = limits.measured(args.device)  # a machine that is not at rest shows here
  print(f"afterwards: {again.told()}")
  if (apart := machine.apart(again)) > limits.RESTLESS:
    print(
      f"the machine changed {apart:.2f} times meanwhile: the shares are of the first; run it at rest"
    )
  record["machine_afterwards"] = again.to_json()
  write("bench" if args.dtype is None else f"bench-{args.dtype}", machine, record)


def versions(*packages: str) -> dict[str, str]:
  return {package: importlib.metadata.version(package) for package in packages}


def result(name: str, machine: limits.Limits) -> Path:
  return beside(name, machine.name)


def beside(name: str, processor: str) -> Path:
  """The file of a machine's record: named by it, so that those of two machines lie beside each other."""
  words = re.findall(r"[a-z0-9]+", re.sub(r"\([^)]*\)", "", processor.lower()))
  return RESULTS / f"{name}-{'-'.join(words)}.json"


def write(name: str, machine: limits.Limits, record: dict[str, Any]) -> None:
  RESULTS.mkdir(exist_ok=True)
  path = result(name, machine)
  path.write_text(json.dumps(record, indent=2) + "\n")
  print(f"written: {path}", flush=True)


if __name__ == "__main__":
  main()
