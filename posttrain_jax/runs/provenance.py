"""What a run was made with: command, versions of packages, git commit, devices."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

MODULE = ("posttrain_jax", "__main__.py")  # as `python -m posttrain_jax` names its program
PACKAGES = (
  "posttrain-jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "transformers",
  "numpy",
)


def command(argv: Sequence[str]) -> str:
  """The command of this process as it is typed again, however the program was found.

  >>> command(["/a/posttrain_jax/__main__.py", "train", "--config=my sft.py"])
  "posttrain train '--config=my sft.py'"
  """
  program, *rest = argv
  is_ours = Path(program).name == "posttrain" or Path(program).parts[-2:] == MODULE
  return shlex.join(["posttrain" if is_ours else program, *rest])


def provenance() -> dict[str, Any]:
  """Command, versions, commit and devices: what a figure needs beside it to be believed."""
  return {
    "command": command(sys.argv),
    "versions": {
      "python": sys.version.split()[0],
      **{p: importlib.metadata.version(p) for p in PACKAGES},
    },
    "commit": _commit(),
    "devices": [
      f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      f"{os.cpu_count()} host cores",
    ],
  }


def _commit() -> str | None:
  """The project's commit, marked where the tree differs from it; None outside a checkout."""
  root = Path(__file__).parents[2]
  git = lambda *args: subprocess.run(
    ["git", "-C", str(root), *args], capture_output=True, text=True
  )
  try:
    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
  except FileNotFoundError:
    return None
  return head.stdout.strip() + (" (modified)" if changed else "") if head.returncode == 0 else None
