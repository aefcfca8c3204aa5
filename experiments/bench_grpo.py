"""A GRPO step with LoRA, here and in TRL's GRPOTrainer, in turn on the same cores: seconds of writing and of updating.

  .venv-oracle/bin/python experiments/bench_grpo.py        (`make bench` runs it too; --device=gpu: both on JAX's GPU)

SmolLM2-135M-Instruct, LoRA of rank 16 on every matrix, both in float32, or with --dtype=bfloat16 both with products of
bfloat16 (TRL by autocast); 4 prompts of the built-in task with 8 answers each, all
of 64 tokens, since nothing may end them sooner; the reward is a count of letters.  Both take the same prompts, compute
no reference, and write with the weights of the step before.  Two workers take steps in turn; the first step of each,
with what is compiled there, is left out.

Shares of what the machine reaches (`limits.py`): of products, writing has a forward over the prompts and the answers
and updating a training step over both; of reading, writing has all weights once for each of 64 tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import limits

PROMPTS, ANSWERS, NEW, LR = 4, 8, 64, 1e-5


def letters(prompt: str, completion: str, example: dict[str, Any]) -> float:
  return completion.count("e") / 64


def prompts() -> list[list[dict[str, str]]]:
  from posttrain_jax.data.tasks import sql

  return [row["prompt"] for row in sql.examples("train", n=PROMPTS)]


def jax_jobs(told: Path) -> bench.Jobs:
  """The pieces that `posttrain train` makes of a config, and its step."""
  import jax

  from posttrain_jax import adapters, settings
  from posttrain_jax.build import online, run

  folder = Path(tempfile.mkdtemp())
  rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts())
  (folder / "prompts.jsonl").write_text(rows)
  name = f"{Path(__file__).resolve()}:letters"
  fields = [f"batch.rows={PROMPTS}", f"online.samples={ANSWERS}", f"online.max_new_tokens={NEW}"]
  fields += [f"online.rows={PROMPTS * ANSWERS}", f"optimizer.lr={LR}", "data.length=768"]
  fields += [f"model.dtype={bench.dtype()}"]
  fields += [f"adapter.r={bench.RANK}", f"adapter.lora_alpha={bench.ALPHA}", "steps=1000"]
  config = settings.load(
    f"rl:data={folder / 'prompts.jsonl'},reward={name}",
    [*(f"--config.{field}" for field in fields), f"--config.reward.untested=({name!r},)"],
  )
  pieces = run.build(config, None)
  assert isinstance(pieces.batches, online.Online)
  vars(pieces.batches.writer)["_stops"] = ()  # no answer ends before its last token
  state = pieces.first_state()
  model, rows_written = pieces.model.config, PROMPTS * ANSWERS
  read = sum(map(len, pieces.data.examples))  # a prompt is read once for all its answers
  length = read / PROMPTS + NEW
  forward = limits.forward(model, read + rows_written * NEW, length)
  size = adapters.count(pieces.trees.adapter)
  needed = {
    "writing_flops": forward,
    "updating_flops": limits.training(model, rows_written * length, length, size),
    "bytes": NEW * {"float32": 4, "bfloat16": 2}[bench.dtype()] * limits.weights(model),
  }

  def step() -> bench.Done:
    nonlocal state
    began = time.perf_counter()
    batch = pieces.batches.batch(state)
    written = time.perf_counter() - began
    state, _ = pieces.step(state, state.context(pieces.trees.context), batch)
    jax.block_until_ready(state)
    told.write_text(json.dumps({"writing": written, "all": time.perf_counter() - began, **needed}))
    return bench.Done(PROMPTS * ANSWERS * NEW)

  return {"grpo": step}


def torch_jobs(told: Path) -> bench.Jobs:
  """TRL's own loop, in a thread that waits between steps."""
  import datasets
  import torch
  import transformers
  import trl

  from posttrain_jax.models import fetch

  warnings.simplefilter("ignore")
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  folder = fetch.fetch()
  go, done = threading.Semaphore(0), threading.Semaphore(0)

  class Waits(transformers.TrainerCallback):
    """A step begins when it is asked for; its batch is written after that."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
      go.acquire()

    def on_step_end(self, *_: Any, **__: Any) -> None:
      done.release()
      go.acquire()

  trainer = trl.GRPOTrainer(
    model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    reward_funcs=lambda completions, **_: [
      letters("", completion[0]["content"], {}) for completion in completions
    ],
    args=trl.GRPOConfig(
      output_dir=tempfile.mkdtemp(),
      per_device_train_batch_size=PROMPTS * ANSWERS,
      num_generations=ANSWERS,
      max_completion_length=NEW,
      generation_kwargs={"min_new_tokens": NEW},
      temperature=1.0,
      beta=0.0,
      learning_rate=LR,
      lr_scheduler_type="constant",
      max_steps=1000,
      save_strategy="no",
      logging_strategy="no",
      report_to=[],
      use_cpu=bench.device() == "cpu",
      bf16=bench.dtype() == "bfloat16",
      gradient_checkpointing=False,
      seed=0,
    ),
    train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts()]),
    processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    peft_config=bench.peft_lora(),
  )
  written = 0.0
  write: Callable[..., Any] = trainer._generate_and_score_completions

  def timed(*args: Any) -> Any:
    nonlocal written
    began = time.perf_counter()
    result = write(*args)
    written = time.perf_counter() - began
    return result

  trainer._generate_and_score_completions = timed
  trainer.add_callback(Waits())
  threading.Thread(target=trainer.train, daemon=True).start()

  def step() -> bench.Done:
    began = time.perf_counter()
    go.release()
    done.acquire()
    told.write_text(json.dumps({"writing": written, "all": time.perf_counter() - began}))
    return bench.Done(PROMPTS * ANSWERS * NEW)

  return {"grpo": step}


def compare(repeats: int, machine: limits.Limits) -> dict[str, Any]:
  """{library: seconds of a step and of its parts}, medians over steps that were taken in turn, and the ratios."""
  folder = Path(tempfile.mkdtemp())
  told = {library: folder / f"{library}.json" for library in ("jax", "torch")}
  workers = {
    library: bench.Worker(library, __file__, f"--told={told[library]}") for library in told
  }
  steps: list[dict[str, dict[str, float]]] = []
  first = {library: worker.run("grpo")["seconds"] for library, worker in workers.items()}
  for _ in range(repeats):
    one = {}
    for library, worker in workers.items():
      worker.run("grpo")
      parts = json.loads(told[library].read_text())
      one[library] = {**parts, "updating": parts["all"] - parts["writing"]}
    steps.append(one)
    print(one, flush=True)
  for worker in workers.values():
    worker.close()
  median = lambda library, part: round(statistics.median(s[library][part] for s in steps), 2)
  parts = ("all", "writing", "updating")
  ratios = {part: [s["torch"][part] / s["jax"][part] for s in steps] for part in parts}
  needed = steps[0]["jax"]
  products = functools.partial(machine.of_products, dtype=bench.dtype())
  shares = lambda lib: {
    "writing, of products": products(needed["writing_flops"], median(lib, "writing")),
    "writing, of reading": machine.of_reading(needed["bytes"], median(lib, "writing")),
    "updating, of products": products(needed["updating_flops"], median(lib, "updating")),
  }
  return {
    "shares": {lib: shares(lib) for lib in workers},
    "seconds": {lib: {part: median(lib, part) for part in parts} for lib in workers},
    "ratio": {part: round(statistics.median(ratios[part]), 2) for part in parts},
    "ratio_range": [round(min(ratios["all"]), 2), round(max(ratios["all"]), 2)],
    "first_seconds": {library: round(seconds, 1) for library, seconds in first.items()},
    "steps": repeats,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--worker", choices=("jax", "torch"))
  parser.add_argument("--told", type=Path)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of products")
  parser.add_argument("--device", choices=("cpu", "gpu"), default=bench.device())
  args = parser.parse_args()
  if args.dtype:
    os.environ[bench.DTYPE] = args.dtype
  if args.worker:
    bench.work({"jax": jax_jobs, "torch": torch_jobs}[args.worker](args.told))
    os._exit(0)  # TRL's loop waits for a step that nobody asks for
  bench.use(args.device)
  machine = limits.measured(args.device)
  print(machine.told(), flush=True)
  record = {
    "machine": machine.to_json(),
    "load": os.getloadavg()[0],
    "versions": bench.versions("jax", "torch", "peft", "trl"),
    "dtype": bench.dtype(),
    "grpo": compare(args.repeats, machine),
  }
  print(json.dumps(record["grpo"], indent=2))
  name = "bench-grpo" if bench.dtype() == "float32" else f"bench-grpo-{bench.dtype()}"
  bench.write(name, machine, record)


if __name__ == "__main__":
  main()
