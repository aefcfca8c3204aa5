"""A linear, a TIES and a DELLA merge of three 1B models, here, in mergekit, and beside plainly copying the bytes.

  .venv-oracle/bin/python experiments/merge_speed.py [--folder=DIR] [--repeats=3]        (about 14 GB of disk)

The models are random, of Llama-3.2-1B's shapes in bfloat16 (2.5 GB each), made where they are not there yet.  Each
merge is a process of its own, in turn; seconds and peak memory are the whole process's.  Both compute in float32.
Results: experiments/results/merge_speed.{md,json}; what the page has from its first `## ` on is kept as it is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from posttrain_jax.core import files, shards

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "merge_speed"
CONFIG = dict(
  architectures=["LlamaForCausalLM"],
  model_type="llama",
  hidden_size=2048,
  intermediate_size=8192,
  num_hidden_layers=16,
  num_attention_heads=32,
  num_key_value_heads=8,
  head_dim=64,
  vocab_size=128256,
  max_position_embeddings=8192,
  rms_norm_eps=1e-5,
  rope_theta=500000.0,
  tie_word_embeddings=True,
  torch_dtype="bfloat16",
)
LINEAR = "merge_method: linear\nmodels:\n" + "".join(
  f"  - {{model: @{name}, parameters: {{weight: {w}}}}}\n" for name, w in (("a", 0.6), ("b", 0.4))
)
SPARSE = "merge_method: {}\nbase_model: @base\nmodels:\n" + "".join(
  f"  - {{{{model: @{name}, parameters: {{{{weight: {w}, density: 0.5}}}}}}}}\n"
  for name, w in (("a", 0.6), ("b", 0.4))
)
RECIPES = {"linear": LINEAR, "ties": SPARSE.format("ties"), "della": SPARSE.format("della")}
DRAWN = ("della",)  # at random, so that two libraries' results are not one


def shapes() -> dict[str, tuple[int, ...]]:
  c: dict[str, Any] = CONFIG
  d, ff, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * c["head_dim"]
  sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], d)}
  for i in range(c["num_hidden_layers"]):
    at = f"model.layers.{i}."
    sizes |= {f"{at}self_attn.{n}_proj.weight": (d, d) for n in "qo"}
    sizes |= {f"{at}self_attn.{n}_proj.weight": (kv, d) for n in "kv"}
    sizes |= {f"{at}mlp.{n}_proj.weight": (ff, d) for n in ("gate", "up")}
    sizes |= {f"{at}mlp.down_proj.weight": (d, ff)}
    sizes |= {f"{at}{n}.weight": (d,) for n in ("input_layernorm", "post_attention_layernorm")}
  return {**sizes, "model.norm.weight": (d,)}


def write_models(folder: Path) -> None:
  """base: normal(0, 0.02); a and b: small steps from it."""
  for seed, name in enumerate(("base", "a", "b")):
    if (folder / name / "config.json").exists():
      continue

    def make(i, shape, seed=seed):
      values = 0.02 * np.random.default_rng((0, i)).standard_normal(shape, np.float32)
      if seed:
        values += 0.001 * np.random.default_rng((seed, i)).standard_normal(shape, np.float32)
      return values.astype(ml_dtypes.bfloat16)

    entries = (
      (tensor, (shape, "bfloat16", lambda i=i, shape=shape: make(i, shape)))
      for i, (tensor, shape) in enumerate(shapes().items())
    )
    (folder / name).mkdir(parents=True, exist_ok=True)
    shards.write(folder / name, entries)
    files.write_json(folder / name / "config.json", CONFIG)


def commands(folder: Path, method: str, out: Path) -> dict[str, list[str]]:
  recipe = folder / f"{method}.yml"
  text = RECIPES[method].replace("@", f"{folder}/")
  recipe.write_text(text + "dtype: float32\nout_dtype: bfloat16\n")
  binary = Path(sys.executable).parent
  return {
    "here": [sys.executable, "-m", "posttrain_jax", "merge", f"--recipe={recipe}", f"--out={out}"],
    "mergekit": [str(binary / "mergekit-yaml"), str(recipe), str(out), "--lazy-unpickle"],
    "copy": [
      sys.executable,
      "-c",
      "import os, shutil, sys; shutil.copyfile(*sys.argv[1:]);"
      " f = os.open(sys.argv[2], os.O_RDWR); os.fsync(f)",
      str(folder / "a" / "model.safetensors"),
      f"{out}.copy",
    ],
  }


def timed(command: list[str], out: Path) -> dict[str, float]:
  """Wall seconds of the process, those of its CPUs, and its peak resident bytes."""
  for path in (out, Path(f"{out}.copy")):
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
  began = time.monotonic()
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
  error = process.stderr.read() if process.stderr else b""
  _, status, usage = os.wait4(process.pid, 0)
  seconds = time.monotonic() - began
  if status:
    raise RuntimeError(f"{' '.join(command)} failed:\n{error.decode()[-2000:]}")
  cpu = usage.ru_utime + usage.ru_stime
  return {"seconds": seconds, "cpu": cpu, "peak": usage.ru_maxrss * 1024}


def apart(one: Path, other: Path) -> dict[str, float]:
  """The largest difference between two merged folders over the largest value, and the share of unequal entries.

  unequal: those that differ by more than a rounding of bfloat16, and of float32 where terms of 0.02 cancel.
  """
  worst = largest = unequal = total = 0.0
  a, b = shards.Reader(one), shards.Reader(other)
  for name in a.where:
    x, y = (np.asarray(reader.get(name), np.float32) for reader in (a, b))
    differ, size = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
    worst, largest = max(worst, float(differ.max())), max(largest, float(size.max()))
    unequal, total = (
      unequal + int((differ > 2**-7 * np.maximum(size, 2**-16)).sum()),
      total + x.size,
    )
  return {"largest": worst / largest, "unequal": unequal / total}


def aside(function: Callable[..., Any], *args: Any) -> Any:
  """function(*args) in a process of its own: a child's peak memory counts from its parent's."""
  with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
    return pool.submit(function, *args).result()


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
  median = lambda who, what: statistics.median(run[what] for run in runs[who])
  pairs = list(zip(runs["here"], runs["mergekit"]))
  ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
  return {
    "seconds": {who: round(median(who, "seconds"), 1) for who in runs},
    "cpu": {who: round(median(who, "cpu"), 1) for who in runs},
    "cpu_ratio": round(statistics.median(b["cpu"] / a["cpu"] for a, b in pairs), 2),
    "peak_gb": {who: round(median(who, "peak") / 1e9, 2) for who in runs},
    "ratio": round(statistics.median(ratios), 2),
    "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
    "over_copy": round(median("here", "seconds") / median("copy", "seconds"), 2),
  }


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "merge_speed")
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  folder = args.folder.absolute()
  aside(write_models, folder)
  found: dict[str, Any] = {}
  for method in RECIPES:
    outs = {who: folder / f"out-{who}" for who in ("here", "mergekit", "copy")}
    runs: dict[str, list] = {who: [] for who in outs}
    for _ in range(args.repeats):
      for who, out in outs.items():
        runs[who].append(timed(commands(folder, method, out)[who], out))
        print(method, who, json.dumps(runs[who][-1]), flush=True)
    found[method] = summary(runs) | {"repeats": args.repeats}
    if method not in DRAWN:
      found[method]["apart"] = aside(apart, outs["here"], outs["mergekit"])
  found["versions"] = {p: importlib.metadata.version(p) for p in ("jax", "torch", "mergekit")}
  found["date"] = time.strftime("%Y-%m-%d")
  files.write_json(OUT.with_suffix(".json"), found)
  text = page(found)
  files.write_text(OUT.with_suffix(".md"), text + by_hand(OUT.with_suffix(".md")))
  print(text)
  return 0


def by_hand(path: Path) -> str:
  """What people have written below the table: a page from its first `## ` on."""
  before = path.read_text() if path.exists() else ""
  _, heading, rest = before.partition("\n## ")
  return heading + rest


def page(found: dict[str, Any]) -> str:
  versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
  lines = [
    "# How fast a merge is",
    "",
    "Written by `experiments/merge_speed.py`: two models of 1.24B parameters in bfloat16, and but for linear their"
    f" base; {os.cpu_count()} CPU cores, whole processes, {versions}.  Resident memory counts the files that mergekit"
    " maps.",
    "",
    "Unequal are entries that differ by more than a rounding.  Differences of bfloat16 numbers are often"
    " equal: of those that are just as large as the last that TIES keeps, those that come first are kept here, and in"
    " mergekit those that its sort happens to leave there.",
    "",
    "| method | pairs of runs"
    " | here, s | mergekit, s | ratio | copying a result's bytes, s | here over copying | peak here, GB |"
    " peak mergekit, GB | CPU s here | CPU s mergekit | ratio | unequal entries |",
    "|---" * 13 + "|",
  ]
  for method in RECIPES:
    f = found[method]
    low, high = f["ratio_range"]
    apart = f"{f['apart']['unequal']:.1e} of them" if "apart" in f else "draws differ"
    lines.append(
      f"| {method} | {f['repeats']}"
      f" | {f['seconds']['here']} | {f['seconds']['mergekit']} | {f['ratio']} ({low} to {high}) |"
      f" {f['seconds']['copy']} | {f['over_copy']} | {f['peak_gb']['here']} | {f['peak_gb']['mergekit']} |"
      f" {f['cpu']['here']} | {f['cpu']['mergekit']} | {f['cpu_ratio']} |"
      f" {apart} |"
    )
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  sys.exit(main())
