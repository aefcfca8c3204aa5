"""Where do a LoRA step's and a decode window's seconds go, by part, now and in an earlier checkout?

  .venv/bin/python experiments/parts.py [--before=FOLDER] [--dtype=bfloat16]

`step` is the LoRA step of `make bench` (4 x 256 tokens), `window` 16 answers of 32 tokens, both of SmolLM2-135M on one
core with one thread, so that seconds are of work and not of waiting.  JAX's profiler tells when each operation began
and ended; the compiled program says what it multiplies and of which line it came.  An operation that several lines were
fused into counts for the last of them.  Results: experiments/results/parts-PROCESSOR.{json,md}.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bench
import numpy as np

from posttrain_jax.core import files

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = "49152"
OF_BASE, OF_ADAPTER = "products with the base", "products of the adapter"
ANSWERS, PROMPT, NEW = 16, 40, 32
# the innermost of our files that an operation came of -> what it is part of
OF_FILES = {
  "attention.py": "attention",
  "cache.py": "attention",
  "logprob.py": "loss",
  "supervised.py": "loss",
  "sampling.py": "drawing tokens",
  "programs.py": "drawing tokens",
  "optim": "optimizer",
  "optax": "optimizer",
  "adapters": "adapter, no products",
  "decoder.py": "norms, rotations, activations",
  "rotary.py": "norms, rotations, activations",
}
MOVES = re.compile(r"copy|transpose|broadcast|slice|concatenate|pad|bitcast")
CONTROL = re.compile(r"while|call|conditional|tuple")


# --- the program ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Operation:
  text: str  # its line, and those of what it calls
  name: str  # JAX's path of it
  files: tuple[str, ...]  # that it came of, the innermost first

  @functools.cached_property
  def part(self) -> str:
    of_file = next((OF_FILES[f] for f in self.files if f in OF_FILES), "")
    products = [line for line in self.text.splitlines() if re.search(r" dot\(", line)]
    if of_file == "attention":
      return "attention"
    if products:
      return self._product("".join(products))
    if of_file:
      return of_file
    return "moving" if MOVES.search(self.text.partition("(")[0]) else "other"

  def _product(self, line: str) -> str:
    sizes = set(re.findall(r"\d+", " ".join(re.findall(r"\[([\d,]+)\]", self.text))))
    if VOCABULARY in sizes:
      return "products with the head"
    return OF_ADAPTER if str(bench.RANK) in sizes else OF_BASE

  @property
  def is_backward(self) -> bool:
    return "transpose(jvp" in self.name


def operations(text: str) -> Iterator[tuple[str, Operation]]:
  """(name, operation) of all that a compiled program does."""
  table = lambda title: dict(
    re.findall(r"^(\d+) (.*)$", text.partition(f"\n{title}\n")[2].partition("\n\n")[0], re.M)
  )
  names = {key: value.strip('"') for key, value in table("FileNames").items()}
  places = {k: names[_field(v, "file_name_id")] for k, v in table("FileLocations").items()}
  frames = table("StackFrames")

  @functools.cache
  def came_of(frame: str) -> tuple[str, ...]:
    found = []
    while frame in frames:
      path = Path(places[_field(frames[frame], "file_location_id")])
      found += [path.name, path.parent.name]
      parent = _field(frames[frame], "parent_frame_id")
      frame = "" if parent == frame else parent
    return tuple(found)

  bodies = dict(re.findall(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S))
  for line in text.splitlines():
    if found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
      called = re.search(r"calls=%?([\w.-]+)", line)
      inner = bodies.get(called[1], "") if called else ""
      said = re.search(r'op_name="([^"]*)"', line)
      frame = re.search(r"stack_frame_id=(\d+)", line)
      whole = f"{line.strip()}\n{inner}"
      yield found[1], Operation(whole, said[1] if said else "", came_of(frame[1]) if frame else ())


def _field(text: str, name: str) -> str:
  found = re.search(rf"{name}=(\d+)", text)
  return found[1] if found else ""


def programs(folder: Path) -> dict[str, dict[str, Operation]]:
  """{module: {operation: what it is}} of what XLA dumped; of two modules of a name the last."""
  found: dict[str, dict[str, Operation]] = {}
  for path in sorted(folder.glob("*cpu_after_optimizations.txt")):
    text = path.read_text()
    module = re.match(r"HloModule ([\w.-]+)", text)
    found[module[1] if module else path.name] = dict(operations(text))
  return found


# --- the time --------------------------------------------------------------------------------------------------------


def spent(
  trace: Path, known: Mapping[str, Mapping[str, Operation]], is_adapted: bool
) -> dict[str, float]:
  """{part: milliseconds}, `, backward` behind a part's name where it is of the backward pass.

  is_adapted: whether there is an adapter, whose products are told by its rank: 16, which rows may be too.
  """
  import jax

  (path,) = trace.rglob("*.xplane.pb")
  total: collections.Counter[str] = collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      for event in line.events:
        module = dict(event.stats).get("hlo_module")
        if module is None or CONTROL.match(event.name):
          continue
        operation = known.get(str(module), {}).get(event.name)
        part = "other" if operation is None else operation.part
        if part == OF_ADAPTER and not is_adapted:
          part = OF_BASE
        back = ", backward" if operation is not None and operation.is_backward else ""
        total[part + back] += event.duration_ns / 1e6
  return dict(total)


def window(dtype: str) -> Any:
  """Writes some answers; on a CPU what lies between products is float32."""
  import jax.numpy as jnp

  from posttrain_jax.adapters import layout
  from posttrain_jax.models import hf
  from posttrain_jax.rollout import engine

  params, config = hf.load("smollm2", dtype=jnp.dtype(dtype), place=layout.place)
  ready = engine.prepare(params, config, "auto")
  prompts = np.random.default_rng(0).integers(1000, 40000, (ANSWERS, PROMPT)).tolist()
  how: dict[str, Any] = dict(max_new_tokens=NEW, batch_size=ANSWERS, dtype=jnp.float32)
  return lambda: engine.generate(ready, config, prompts, **how)


def work(job: str, dtype: str, dump: str) -> None:
  """In a process of its own, whose `bench` is that of the version it is of: what a job spends, as JSON."""
  import jax

  do = bench.jax_jobs()["fixed"] if job == "step" else window(dtype)
  do()
  do()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      do()
    found = spent(Path(folder), programs(Path(dump)), is_adapted=job == "step")
  print("\n" + json.dumps(found))


def profiled(tree: Path, job: str, dtype: str) -> dict[str, float]:
  with tempfile.TemporaryDirectory() as dump:
    flags = f"--xla_cpu_multi_thread_eigen=false --xla_dump_to={dump} --xla_dump_hlo_as_text"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, bench.DTYPE: dtype}
    environment["PYTHONPATH"] = os.pathsep.join([str(tree), str(tree / "experiments")])
    core = {max(os.sched_getaffinity(0))}
    done = subprocess.run(
      [sys.executable, "-P", __file__, f"--work={job}", f"--dtype={dtype}", f"--dump={dump}"],
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
      check=True,
      preexec_fn=lambda: os.sched_setaffinity(0, core),
    )
  return json.loads(done.stdout.splitlines()[-1])


def table(job: str, sides: Mapping[str, Mapping[str, float]]) -> list[str]:
  parts = sorted(
    {part for side in sides.values() for part in side}, key=lambda p: -sides["now"].get(p, 0)
  )
  whole = {name: sum(side.values()) for name, side in sides.items()}
  cell = lambda name, part: (
    f"{sides[name].get(part, 0):,.0f} | {100 * sides[name].get(part, 0) / whole[name]:.1f}"
  )
  titles = " | ".join(f"{name}, ms | %" for name in sides)
  lines = [f"## {job}", "", f"| part | {titles} |", "|---|" + "---:|" * 2 * len(sides)]
  lines += [f"| {part} | {' | '.join(cell(name, part) for name in sides)} |" for part in parts]
  return [*lines, f"| all | {' | '.join(f'{value:,.0f} | 100' for value in whole.values())} |", ""]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--before", type=Path, help="a checkout of an earlier version")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--work", choices=("step", "window"), help=argparse.SUPPRESS)
  parser.add_argument("--dump", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.work:
    work(args.work, args.dtype, args.dump)
    return
  import limits

  trees = {**({"before": args.before.absolute()} if args.before else {}), "now": ROOT}
  path = bench.beside("parts", limits.processor())
  found = {
    job: {name: profiled(tree, job, args.dtype) for name, tree in trees.items()}
    for job in ("step", "window")
  }
  written = json.loads(path.read_text()) if path.exists() else {}
  written |= {"processor": limits.processor(), args.dtype: found}
  lines = [
    "# Where the seconds go",
    "",
    f"Written by `experiments/parts.py` on one core of {limits.processor()}.",
    "",
  ]
  for dtype in ("float32", "bfloat16"):
    for job, sides in written.get(dtype, {}).items():
      lines += table(f"{job}, {dtype}", sides)
  files.write_json(path, written)
  files.write_text(path.with_suffix(".md"), "\n".join(lines))
  print("\n".join(lines))


if __name__ == "__main__":
  main()
