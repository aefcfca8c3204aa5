"""A case of an experiment in a process of its own: one that takes too long or ends it says so, and others go on."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from posttrain_jax.core import files

LIMIT = 360  # seconds of processor time that a case may take


def measured(measure: Callable[..., dict], case: tuple, limit: int = LIMIT) -> dict:
  """measure(*case), or {"unfinished": why there are no figures}."""
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "figures.json"
    child = multiprocessing.get_context("spawn").Process(
      target=_run, args=(measure, case, limit, path)
    )
    child.start()
    child.join()
    if path.exists():
      return files.read_json(path)
  code = child.exitcode or 0
  if code == -signal.SIGXCPU:
    return {"unfinished": f"not compiled within {limit} s of processor time"}
  how = f"signal {-code}" if code < 0 else f"exit code {code}"
  return {"unfinished": f"the compiler ended its process with {how}"}


def processor_time(facts: dict) -> str:
  """Of the whole case, for a table: seconds on the wall are those of what else runs."""
  return f"{facts['processor_seconds']:.0f} s" if "processor_seconds" in facts else ""


def _run(measure: Callable[..., dict], case: tuple, limit: int, path: Path) -> None:
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
  try:
    facts = measure(*case)
  except Exception as problem:  # its words are what the page has of the case
    facts = {"unfinished": f"{type(problem).__name__}: {str(problem).splitlines()[0]}"}
  used = os.times()
  files.write_json(path, {**facts, "processor_seconds": round(used.user + used.system, 1)})
