"""Does a step need on a GPU what `posttrain plan` says of it?  Predicted and real peaks, side by side.

  pip install -U 'jax[cuda12]'
  python experiments/peaks.py        (one GPU; some minutes; the figures go to experiments/results/peaks.{md,json})
  python experiments/peaks.py --at_once        (a GPU of 140 GB has room for all cases, and a minute is enough)

Each case is planned in a process that sees no GPU, and run in another for two steps, on parameters of zeros: their
peak is that of JAX's allocator.  The two may differ by a tenth.  Without a GPU the script says so and ends with 1.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from concurrent import futures
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "peaks"
MOST = 0.1  # of the real peak
# name -> config with its arguments, rows of 2,048 tokens, remat
CASES = {
  "8B LoRA": ("sft:model=llama3-8b,adapter=lora", 1, "full"),
  "8B LoRA, four rows": ("sft:model=llama3-8b,adapter=lora", 4, "names"),
  "8B QLoRA": ("sft:model=llama3-8b,adapter=lora,base=nf4", 1, "full"),
  "8B DPO, QLoRA": ("preference:model=llama3-8b,adapter=lora,base=nf4", 1, "full"),
  "0.6B full": ("sft:model=qwen3-0.6b,adapter=none", 1, "full"),
}
NONE = (
  "There is no GPU here: nothing was compared. `posttrain plan --topology=h100:1x1` predicts without one; run this "
  "script again on a machine that has one."
)


def main() -> int:
  if len(sys.argv) == 3:  # in a process of a case
    print(
      "\n" + json.dumps(predicted(*sys.argv[1:]) if sys.argv[2] != "run" else real(sys.argv[1]))
    )
    return 0
  card = _told(
    "import jax; print(jax.devices()[0].device_kind if jax.default_backend() == 'gpu' else '')"
  )
  if not card:
    print(NONE)
    return 1
  topology = _told(
    "import jax; from posttrain_jax.plan import chips; c = chips.of_kind(jax.devices()[0].device_kind);"
    " print(next((n for n, one in chips.GPUS.items() if c and one.kind == c.kind), ''))"
  )
  if not topology:
    print(
      f"{card} is in no table of `posttrain plan`: nothing was compared. Add it to posttrain_jax/plan/chips.py"
    )
    return 1
  at_once = len(CASES) if "--at_once" in sys.argv else 1
  with futures.ThreadPoolExecutor(at_once) as pool:
    results = list(pool.map(functools.partial(both, topology), CASES))
  write(card, results)
  return int(any(abs(apart(r)) > MOST for r in results))


def both(topology: str, name: str) -> dict[str, Any]:
  planned = _part(name, f"{topology}:1x1", JAX_PLATFORMS="cpu")
  found = {"case": name, "planned_gib": planned["peak_gib"], **_part(name, "run")}
  print(line(found), flush=True)
  return found


def _told(program: str) -> str:
  """The last line that a program prints in a process of its own: this one must not take the card's memory."""
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
  )
  return (done.stdout.strip().splitlines() or [""])[-1]


def _part(name: str, what: str, **environment: str) -> dict[str, Any]:
  """What the process of a case says: its peak is that of all that a process has done."""
  done = subprocess.run(
    [sys.executable, __file__, name, what],
    cwd=ROOT,
    env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environment},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.strip().splitlines()[-1])


def config(name: str) -> Any:
  from posttrain_jax import settings

  given, rows, remat = CASES[name]
  file, _, arguments = given.partition(":")
  fields = {
    "data.length": 2048,
    "batch.rows": rows,
    "eval.rows": rows,
    "model.remat": remat,
    **({"objective.cache_reference": False} if file == "preference" else {}),
  }
  overrides = [settings.override(field, value) for field, value in fields.items()]
  return settings.load(f"{ROOT}/configs/{file}.py:{arguments}", overrides)


def predicted(name: str, topology: str) -> dict[str, Any]:
  """By the compiler for a card that it does not see."""
  from posttrain_jax.plan import estimate

  return {"peak_gib": estimate.figures(config(name), topology=topology)["peak_gib"]}


def real(name: str) -> dict[str, Any]:
  """The same step on this card: what the compiler says of it here, and what the allocator saw in two steps."""
  import jax
  import jax.numpy as jnp

  from posttrain_jax.plan import program, topology
  from posttrain_jax.plan.chips import GIB

  built = program.build(config(name), topology.target(count=1))
  here = program.compile(built)
  zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
  state, context, batch = (zeros(part) for part in (built.state, built.context, built.batch))
  for _ in range(2):
    state, _ = built.step(state, context, batch)
  jax.block_until_ready(state)
  peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
  return {"compiled_here_gib": round(here.peak / GIB, 3), "real_gib": round(peak / GIB, 3)}


def apart(r: dict) -> float:
  """By how much of the real peak the planned one is above it."""
  return r["planned_gib"] / r["real_gib"] - 1


def line(r: dict) -> str:
  return (
    f"| {r['case']} | {r['planned_gib']:.2f} | {r['compiled_here_gib']:.2f} | {r['real_gib']:.2f} | "
    f"{100 * apart(r):+.1f} % |"
  )


def write(card: str, results: list[dict]) -> None:
  from posttrain_jax.core import files

  lines = [
    f"# Peaks predicted and real: {card}",
    "",
    "Written by `python experiments/peaks.py`. GiB: as planned where no card is seen, as compiled on the card, and as",
    "JAX's allocator saw it in two steps of rows of 2,048 tokens.",
    "",
    "| step | planned | compiled here | real | planned against real |",
    "|---|---|---|---|---|",
    *map(line, results),
  ]
  OUT.parent.mkdir(exist_ok=True)
  files.write_json(OUT.with_suffix(".json"), {"card": card, "results": results})
  files.write_text(OUT.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
  sys.exit(main())
