"""All that a GPU is asked, by one command: does it compute the same, need what was planned, and how fast is it?

  pip install -U 'jax[cuda12]' torch peft trl        (PyTorch's side is left out where it is not installed)
  POSTTRAIN_DATA=FOLDER python experiments/on_gpu.py [--only=numerics,steps] [--seconds=600]

Each part is a script of this folder in a process of its own, with a limit; one that fails is told, and the next goes
on.  The figures lie in experiments/results/, by the card's name.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEVICE = "--device=gpu"
# name -> (seconds, lines of a script with its arguments)
PARTS = {
  "numerics": (150, (["gpu_numerics.py"],)),
  "attention": (60, (["gpu_attention.py"],)),
  "peaks": (150, (["peaks.py", "--at_once"],)),
  "steps": (240, (["bench.py", DEVICE, "--repeats=5"],)),
  "writing": (
    180,
    (
      [
        "bench_generation.py",
        DEVICE,
        "--repeats=3",
        "--storages=float32,products",
        "--peers=float32,bfloat16",
      ],
    ),
  ),
  "grpo": (150, (["bench_grpo.py", DEVICE, "--dtype=bfloat16", "--repeats=3"],)),
  "serving": (
    240,
    (
      ["bench_serving.py", DEVICE, "--modules=all", "--requests=256"],
      ["bench_serving.py", DEVICE, "--modules=default", "--requests=256"],
      ["bench_serving.py", DEVICE, "--modules=all", "--peer", "--peer_dtype=bfloat16"],
    ),
  ),
}


def run(line: list[str], seconds: float) -> bool:
  print(f"\n--- {' '.join(line)}", flush=True)
  began = time.monotonic()
  environment = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
  }
  try:
    code = subprocess.run(
      [sys.executable, str(HERE / line[0]), *line[1:]],
      env=environment,
      timeout=seconds,
      check=False,
    ).returncode
  except subprocess.TimeoutExpired:
    code = None
  told = "took too long" if code is None else f"ended with {code}"
  print(f"--- {line[0]} {told} after {time.monotonic() - began:.0f} s", flush=True)
  return code == 0


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default=",".join(PARTS), help="parts, of: " + ", ".join(PARTS))
  parser.add_argument("--seconds", type=float, default=1200.0, help="of all parts together")
  args = parser.parse_args()
  unknown = sorted({*args.only.split(",")} - {*PARTS})
  if unknown:
    parser.error(f"--only={','.join(unknown)}: parts are {', '.join(PARTS)}")
  end, good = time.monotonic() + args.seconds, True
  for name in args.only.split(","):
    seconds, lines = PARTS[name]
    for line in lines:
      left = min(seconds, end - time.monotonic())
      good &= left > 0 and run(line, left)
  return int(not good)


if __name__ == "__main__":
  sys.exit(main())
