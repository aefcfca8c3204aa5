"""Serving adapters beside their base: requests and tokens a second, times to a token, what a swap takes.

  .venv/bin/python experiments/bench_serving.py --modules all
  .venv-oracle/bin/python experiments/bench_serving.py --modules all --peer        (--device=gpu: on JAX's GPU)

The load is closed: `--clients` clients, each of which asks again as soon as it has its answer.  A prompt is a system
message of 64 tokens that all share and a question of 24; answers have 48 tokens.  Adapters are LoRA of rank 8 on q_proj
and v_proj, which PEFT takes by default of a Llama, or on all seven matrices of a layer, drawn alike or by Zipf's law
(share of the i-th: 1 / i).  What an adapter has of the system message is in the prefix cache before anything is
counted, as the base's is.  Base and adapters take turns, round by round, so that whatever else the machine does falls
on both; ratios count, and CPU seconds a token are beside each.

`swap`: seconds until the first token of a request alone whose adapter is in a slot (hot), on the host (warm) or on the
disk (cold).  `peer`: the same requests through transformers + PEFT one by one, each adapter loaded once beforehand.
Results: experiments/results/bench-serving-PROCESSOR.json, to which a call adds what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import queue
import statistics
import tempfile
import time
from typing import Any

import bench
import limits
import numpy as np

SHARED, ASKED, NEW = 64, 24, 48
SERVING = "bench-serving"
MODULES = {
  "default": ("q_proj", "v_proj"),
  "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def requests(count: int, adapters: int, law: str, seed: int) -> list[tuple[list[int], int | None]]:
  """(prompt, number of its adapter) of each; without adapters None."""
  rng = np.random.default_rng(seed)
  shared = np.random.default_rng(0).integers(1000, 40000, SHARED).tolist()
  share = np.ones(adapters) if law == "uniform" else 1 / np.arange(1, adapters + 1)
  which = rng.choice(adapters, count, p=share / share.sum()) if adapters else [None] * count
  prompt = lambda: [*shared, *rng.integers(1000, 40000, ASKED).tolist()]
  return [(prompt(), None if at is None else int(at)) for at in which]


def write(root: pathlib.Path, count: int, rank: int, modules: tuple[str, ...]) -> None:
  """Folders of random adapters."""
  import jax

  from posttrain_jax import adapters
  from posttrain_jax.adapters import AdapterConfig, peft_format
  from posttrain_jax.core import tree
  from posttrain_jax.models import decoder, fetch, hf

  config = hf.read_config(fetch.resolve("smollm2"))
  shapes = decoder.abstract(config)
  described = AdapterConfig(r=rank, lora_alpha=rank, target_modules=modules)
  like = jax.eval_shape(lambda p: adapters.init(jax.random.key(0), p, described)[1], shapes)
  for number in range(count):
    made = tree.unflatten((path, _drawn(leaf, number)) for path, leaf in tree.items(like))
    peft_format.save(root / name(number), made, described, config, base_name="smollm2")


def _drawn(node: Any, number: int) -> Any:
  """A LoRA of such shapes, drawn."""
  rng = np.random.default_rng(number)
  a, b = (0.02 * rng.standard_normal(x.shape).astype(np.float32) for x in (node.a, node.b))
  return node.replace(a=a, b=b, scale=np.ones(node.scale.shape, np.float32))


def name(number: int) -> str:
  return f"adapter{number:02d}"


def started(args: argparse.Namespace, root: pathlib.Path | None, slots: int) -> Any:
  """A worker that is ready."""
  import jax
  import jax.numpy as jnp

  from posttrain_jax.adapters import layout
  from posttrain_jax.build import decisions
  from posttrain_jax.data import chat
  from posttrain_jax.models import fetch, hf
  from posttrain_jax.serve.worker import Worker

  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(".cache/jax-bench").absolute()))
  products = decisions.dtype(args.dtype)
  params, config = hf.load("smollm2", dtype=products, place=layout.place)
  worker = Worker(
    params,
    config,
    tokenizer=chat.load_tokenizer(fetch.resolve("smollm2")),
    rows=args.rows,
    length=256,
    dtype=jnp.dtype(decisions.between(products)),
    slots=slots,
    rank=max(16, args.rank),  # as `posttrain serve` has it, which has room on every matrix, too
    root=root,
    waiting=4096,
  )
  worker.start()
  while worker.state == "warming":
    time.sleep(0.1)
  if worker.error is not None:
    raise worker.error
  return worker


def load(
  worker: Any, asked: list[tuple[list[int], int | None]], clients: int, new: int = NEW
) -> dict[str, float]:
  """What a closed load of those requests took."""
  from posttrain_jax.serve.asked import Asked, Ended, Failed, Tokens

  events: queue.SimpleQueue[Any] = queue.SimpleQueue()
  left, first, gaps, last, sent = list(enumerate(asked)), [], [], {}, {}

  def send() -> None:
    if left:
      at, (prompt, adapter) = left.pop(0)
      sent[at] = time.perf_counter()
      told = lambda event, at=at: events.put((at, event, time.perf_counter()))
      worker.submit(Asked(prompt, new, adapter=None if adapter is None else name(adapter)), told)

  began, cpu = time.perf_counter(), time.process_time()
  for _ in range(clients):
    send()
  over = tokens = 0
  while over < len(asked):
    at, event, when = events.get()
    if isinstance(event, Failed):
      raise event.error
    if isinstance(event, Ended):
      over += 1
      send()
    elif isinstance(event, Tokens):
      tokens += len(event.ids)
      if at in last:
        gaps.append((when - last[at]) / len(event.ids))
      else:
        first.append(when - sent[at])
      last[at] = when
  seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
  at = lambda values, part: float(np.quantile(values, part))
  return dict(
    requests_per_second=len(asked) / seconds,
    tokens_per_second=tokens / seconds,
    cpu_ms_per_token=1e3 * cpu / tokens,
    first_token_p50=at(first, 0.5),
    first_token_p99=at(first, 0.99),
    next_token_p50=at(gaps or [0.0], 0.5),
    next_token_p99=at(gaps or [0.0], 0.99),
  )


def swap(worker: Any, slots: int) -> dict[str, float]:
  """Seconds to the first token of one request alone."""
  (prompt, _), *_ = requests(1, 0, "uniform", 5)

  def first(number: int) -> float:
    return load(worker, [(prompt, number)], 1, new=1)["first_token_p50"]

  took: dict[str, list[float]] = dict(hot=[], warm=[], cold=[])
  for at in range(slots + 1):  # one more than there are slots: the first is evicted
    first(at)
  for at in range(3):
    took["warm"].append(first(at))
    took["hot"].append(first(at))
    worker.adapters.unload(name(at))
    took["cold"].append(first(at))
  return {how: statistics.median(seconds) for how, seconds in took.items()}


def ours(args: argparse.Namespace) -> dict[str, Any]:
  most = max(args.adapters)
  told: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    write(root, most + 1, args.rank, MODULES[args.modules])
    base = started(args, None, 0)
    served = started(args, root, args.slots)
    for worker, count in ((base, 0), (served, 0), (served, most)):
      each = range(count) if count else (None,)
      (prompt, _), *_ = requests(1, 0, "uniform", 5)
      load(worker, [(prompt, at) for at in each], args.clients, new=1)
    jobs = {("base", "none"): (base, 0)}
    laws = lambda n: args.laws if n > 1 else args.laws[:1]  # of one they are the same
    jobs |= {(f"{n} adapters", law): (served, n) for n in args.adapters for law in laws(n)}
    jobs["base among slots", "none"] = (served, 0)
    for round_ in range(args.rounds):
      for (what, law), (worker, count) in jobs.items():
        asked = requests(args.requests, count, law, round_)
        figures = load(worker, asked, args.clients)
        for figure, value in figures.items():
          told.setdefault(f"{what}, {law}", {}).setdefault(figure, []).append(value)
        print(round_, what, law, {k: round(v, 4) for k, v in figures.items()}, flush=True)
    swaps = swap(served, args.slots)
    programs = served.numbers().compiled_programs
    for worker in (base, served):
      worker.close()
  of_base = told["base, none"]
  ratios = {
    what: {
      figure: statistics.median(np.divide(values[figure], of_base[figure]).tolist())
      for figure in ("tokens_per_second", "cpu_ms_per_token")
    }
    for what, values in told.items()
  }
  medians = {what: {k: statistics.median(v) for k, v in of.items()} for what, of in told.items()}
  names = ("rank", "slots", "rows", "clients", "requests", "rounds", "dtype")
  settings = {name: getattr(args, name) for name in names}
  return dict(figures=medians, ratios=ratios, swap=swaps, programs=programs, settings=settings)


def peer(args: argparse.Namespace) -> dict[str, Any]:
  """transformers + PEFT, one request after another."""
  import peft
  import torch
  import transformers

  from posttrain_jax.models import hf

  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    most = max(args.adapters)
    write(root, most, args.rank, MODULES[args.modules])
    params, config = hf.load("smollm2", dtype=np.float32)
    hf.save(root / "base", params, config)
    del params
    dtype = getattr(torch, args.peer_dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=dtype)
    model = model.to(bench.torch_device())
    model = peft.PeftModel.from_pretrained(model, root / name(0), adapter_name=name(0))
    for number in range(1, most):
      model.load_adapter(root / name(number), adapter_name=name(number))
    asked = requests(args.peer_requests, most, "uniform", 0)
    began, cpu = time.perf_counter(), time.process_time()
    for prompt, adapter in asked:
      model.set_adapter(name(adapter or 0))
      ids = torch.tensor([prompt]).to(model.device)
      how = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
      model.generate(input_ids=ids, **how).cpu()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
  tokens = NEW * len(asked)
  return dict(
    requests_per_second=len(asked) / seconds,
    tokens_per_second=tokens / seconds,
    cpu_ms_per_token=1e3 * cpu / tokens,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--peer", action="store_true", help="transformers + PEFT, and nothing else")
  parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32])
  parser.add_argument("--laws", nargs="+", default=["uniform", "zipf"])
  parser.add_argument("--slots", type=int, default=32)
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--clients", type=int, default=32)
  parser.add_argument("--requests", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--rank", type=int, default=8)
  parser.add_argument("--modules", choices=MODULES, default="default")
  parser.add_argument("--dtype", default="auto")
  parser.add_argument("--peer_dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--peer_requests", type=int, default=8)
  parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
  args = parser.parse_args()
  bench.use(args.device)
  told = {f"peer, {args.peer_dtype}": peer(args)} if args.peer else ours(args)
  print(json.dumps(told, indent=2))
  processor = limits.name(args.device)
  path = bench.beside(SERVING, processor)
  written = json.loads(path.read_text()) if path.exists() else {}
  written |= {"processor": processor, "cores": os.cpu_count()}
  written[args.modules] = written.get(args.modules, {}) | told
  path.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
  main()
