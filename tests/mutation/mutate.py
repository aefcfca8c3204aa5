"""Breaks the code a little, one fault at a time, and shows which faults no test notices.

  make mutate FOLDER=losses SAMPLE=25
  python -m tests.mutation.mutate --folder=losses --sample=0 --workers=2
  python -m tests.mutation.mutate --only=losses/kl.py:k3:arithmetic:0  # or losses/kl.py: all whose names begin so

One process imports the heavy libraries and starts no jax backend; every fault then is a fork of it, in which an import
hook serves the broken module and pytest runs the files that ran the broken function before, the mirrored one first. No
file of the package changes. Results are lines of JSON and are kept: a fault is run again when its module changed, or if
it survived, when the tests did.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.mutation import breaks

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "posttrain_jax"
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
MARKS = "not slow and not oracle"

# What is broken, and the tests asked after those of the mirrored folder.
FOLDERS = {
  "losses": (["losses"], ["objectives/test_*.py"]),
  "objectives": (
    ["objectives"],
    ["train/test_step.py", "commands/test_train_answers.py", "commands/test_train_fields.py"],
  ),
  "merge": (["merge"], ["build/test_merge.py", "evals/test_merges.py"]),
  "optim": (["optim"], ["train/test_step.py", "commands/test_train_optimizers.py"]),
  "quant": (["quant"], ["models/test_quantised.py", "plan/test_storages.py"]),
  "adapters": (["adapters"], ["train/test_kinds.py", "build/test_export.py", "train/test_step.py"]),
}
# Imported once, before any fork; nothing of the package, and nothing that starts a backend.
HEAVY = """
  pytest hypothesis jax flax.linen optax orbax.checkpoint transformers datasets grain gguf safetensors.numpy
  ml_collections matplotlib.pyplot
"""


def sources(folder: str) -> list[Path]:
  paths = [PACKAGE / name for name in FOLDERS[folder][0]]
  return [f for p in paths for f in ([p] if p.is_file() else sorted(p.rglob("*.py")))]


def test_files(folder: str) -> list[Path]:
  """Those of the mirrored folder, then the others that are known to run its code."""
  tests = ROOT / "tests"
  patterns = [f"{folder}/**/test_*.py", *FOLDERS[folder][1]]
  files = dict.fromkeys(path for pattern in patterns for path in sorted(tests.glob(pattern)))
  return [path for path in files if "oracle" not in path.parts]  # they need PyTorch


def all_breaks(folder: str) -> list[breaks.Break]:
  optional = breaks.defaults([ast.parse(f.read_text()) for f in PACKAGE.rglob("*.py")])
  return [
    one
    for path in sources(folder)
    for one in breaks.breaks(str(path.relative_to(PACKAGE)), ast.parse(path.read_text()), optional)
  ]


def sample(found: list[breaks.Break], count: int, seed: int) -> list[breaks.Break]:
  """`count` of them, 0 for all; by hash of the name, so that an edit elsewhere draws no others."""
  drawn = sorted(found, key=lambda one: _digest(f"{seed} {one.name}"))[: count or None]
  return sorted(drawn, key=lambda one: (one.name.split(":")[0], one.line))


def equivalents() -> dict[str, tuple[str, str]]:
  """{name: (change, why nothing can tell it from the code)}, of lines `name | change | why`."""
  lines = [line for line in EQUIVALENT.read_text().splitlines() if line and line[0] != "#"]
  return {name: (change, why) for name, change, why in (line.split(" | ", 2) for line in lines)}


def _digest(*texts: str | Path) -> str:
  data = (t.read_bytes() if isinstance(t, Path) else t.encode() for t in texts)
  return hashlib.sha256(b"\0".join(data)).hexdigest()[:16]


# --- in the child ---------------------------------------------------------------------------------------------------


class _Broken(importlib.machinery.SourceFileLoader):
  """Serves one module from a syntax tree; the file and its byte code are not touched."""

  def __init__(self, name, path, tree):
    super().__init__(name, path)
    self.tree = tree

  def get_code(self, fullname):
    return compile(ast.fix_missing_locations(self.tree), self.path, "exec")


class _Finder:
  def __init__(self, path: Path, tree: ast.Module):
    parts = path.relative_to(ROOT).with_suffix("").parts
    self.name = ".".join(parts).removesuffix(".__init__")
    self.path, self.tree = str(path), tree

  def find_spec(self, name, path=None, target=None):
    if name != self.name:
      return None
    loader = _Broken(name, self.path, self.tree)
    return importlib.util.spec_from_file_location(name, self.path, loader=loader)


class _Watch:
  """What pytest saw: the first failure, or none."""

  failed: str | None = None
  message = ""

  def pytest_runtest_logreport(self, report):
    if report.failed and self.failed is None:
      self.failed = report.nodeid
      lines = [line for line in report.longreprtext.splitlines() if line.strip()]
      errors = [line[1:].strip() for line in lines if line.startswith("E ")]
      self.message = (errors or lines[-1:] or [""])[0][:200]

  pytest_collectreport = pytest_runtest_logreport


def _run_tests(files: list[str], scratch: Path) -> dict:
  import pytest

  watch = _Watch()
  options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
  code = pytest.main(
    [*options, "-m", MARKS, f"--basetemp={scratch}/tests", *files], plugins=[watch]
  )
  # 5: every test of these files is marked slow
  return {
    "passed": code in (0, 5),
    "by": watch.failed or f"pytest ended with {code}",
    "why": watch.message,
  }


def _broken_run(name: str, folder: str, files: list[str], scratch: Path) -> dict:
  path = PACKAGE / name.split(":")[0]
  tree = ast.parse(path.read_text())
  optional = breaks.defaults([ast.parse(f.read_text()) for f in PACKAGE.rglob("*.py")])
  (one,) = [
    b for b in breaks.breaks(str(path.relative_to(PACKAGE)), tree, optional) if b.name == name
  ]
  one.apply()
  sys.meta_path.insert(0, _Finder(path, tree))
  return _run_tests(files, scratch)


def _traced_run(folder: str, file: str, scratch: Path) -> dict:
  """The unbroken tests of one file, and the functions of the folder that they enter."""
  names = {str(path): str(path.relative_to(PACKAGE)) for path in sources(folder)}
  entered = set()

  def trace(frame, event, arg):
    code = frame.f_code
    if code.co_filename in names:
      entered.add(
        (names[code.co_filename], code.co_qualname.split(".<")[0].replace("<module>", ""))
      )

  sys.settrace(trace)
  start = time.monotonic()
  result = _run_tests([file], scratch)
  sys.settrace(None)
  return {**result, "seconds": time.monotonic() - start, "entered": sorted(entered)}


# --- in the server --------------------------------------------------------------------------------------------------


def preload() -> None:
  for name in HEAVY.split():
    importlib.import_module(name)
  from jax._src import xla_bridge

  if xla_bridge.backends_are_initialized():
    sys.exit(
      "mutate: an import started a jax backend, which does not survive a fork; shorten HEAVY"
    )


def _fork(work, silent: bool) -> tuple[int, Path]:
  """Runs work(scratch) in a child of its own process group; its dict is scratch/result.json."""
  scratch = Path(tempfile.mkdtemp(prefix="mutate-"))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # jax warns of every fork; no backend runs here
    pid = os.fork()
  if pid:
    return pid, scratch
  try:
    os.setsid()
    if silent:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, 1)
      os.dup2(nowhere, 2)
    os.environ |= {"TMPDIR": str(scratch), "HYPOTHESIS_STORAGE_DIRECTORY": f"{scratch}/hypothesis"}
    tempfile.tempdir = None
    try:
      result = work(scratch)
    except BaseException as error:
      result = {"passed": False, "by": "while importing", "why": repr(error)[:200]}
    (scratch / "result.json").write_text(json.dumps(result))
    sys.stdout.flush()
  finally:
    os._exit(0)


def in_children(jobs, workers: int, silent: bool = True):
  """Yields (label, result) of (label, work, limit in seconds), in the order they end."""
  jobs, running = iter(jobs), {}
  while True:
    while len(running) < workers and (job := next(jobs, None)):
      label, work, limit = job
      pid, scratch = _fork(work, silent)
      running[pid] = (label, scratch, time.monotonic(), limit)
    if not running:
      return
    time.sleep(0.05)
    for pid, (label, scratch, start, limit) in list(running.items()):
      seconds = time.monotonic() - start
      ended, status = os.waitpid(pid, os.WNOHANG)
      if not ended and seconds < limit:
        continue
      with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # and what the tests have started
      if not ended:
        os.waitpid(pid, 0)
      file = scratch / "result.json"
      crashed = f"the process died ({status})" if ended else "timeout"
      result = (
        json.loads(file.read_text())
        if file.exists()
        else {"passed": False, "by": crashed, "why": ""}
      )
      shutil.rmtree(scratch, ignore_errors=True)
      del running[pid]
      yield label, {"seconds": seconds, **result}


def baseline(folder: str, workers: int, out: Path) -> dict[str, dict]:
  """{test file: seconds and functions entered} of the unbroken code; ends where a test fails."""
  kept = out.with_suffix(".baseline.json")
  known = json.loads(kept.read_text()) if kept.exists() else {}
  tests = [
    path for path in sorted((ROOT / "tests").rglob("*.py")) if path.parent != Path(__file__).parent
  ]
  common = _digest(
    *sorted(PACKAGE.rglob("*.py")), *[p for p in tests if not p.name.startswith("test_")]
  )
  keys = {str(f.relative_to(ROOT)): _digest(folder, common, f) for f in test_files(folder)}
  jobs = [
    (file, lambda scratch, file=file: _traced_run(folder, file, scratch), 1800)
    for file, key in keys.items()
    if known.get(f"{folder} {file}", {}).get("key") != key
  ]
  for file, result in in_children(jobs, workers):
    if not result["passed"]:
      sys.exit(f"mutate: the unbroken tests fail: {result['by']}: {result['why']}; mend them first")
    print(f"{folder}: {file} passes in {result['seconds']:.0f} s", flush=True)
    known[f"{folder} {file}"] = {**result, "key": keys[file]}
    kept.write_text(json.dumps(known))
  return {file: known[f"{folder} {file}"] for file in keys}


def tests_of(one: breaks.Break, runs: dict[str, dict]) -> list[str]:
  """The files that enter the broken function, the mirrored one first, then the quickest."""
  path = one.name.split(":")[0]
  mirrored = f"test_{Path(path).stem}.py"
  files = [file for file, run in runs.items() if [path, one.function] in run["entered"]]
  return sorted(files, key=lambda file: (Path(file).name != mirrored, runs[file]["seconds"]))


def measure(folder: str, chosen: list[breaks.Break], workers: int, out: Path, again: bool) -> None:
  """Runs each break and appends its line to `out`."""
  runs = baseline(folder, workers, out)
  known, jobs, facts = results(out), [], {}
  for one in chosen:
    files = tests_of(one, runs)
    fact = {
      "name": one.name,
      "folder": folder,
      "line": one.line,
      "change": one.change,
      "source": _digest(PACKAGE / one.name.split(":")[0]),
      "tests": _digest(*[ROOT / file for file in files]),
    }
    old = known.get(one.name, {})
    same = ("source", "change") + (() if old.get("status") == "killed" else ("tests",))
    if not again and old and all(old[key] == fact[key] for key in same):
      continue
    limit = 60 + 3 * sum(runs[file]["seconds"] for file in files)
    work = lambda scratch, one=one, files=files: _broken_run(one.name, folder, files, scratch)
    facts[one.name] = fact
    jobs.append(
      (one.name, work if files else (lambda scratch: {"passed": True, "by": "no test"}), limit)
    )
  for name, result in in_children(jobs, workers, silent=len(jobs) > 1 or not again):
    passed = result.pop("passed")
    fact = {**facts[name], "status": "survived" if passed else "killed", **result}
    with out.open("a") as file:
      file.write(json.dumps(fact) + "\n")
    by = "" if passed else f"  by {result['by']}"
    print(f"{fact['status']:9}{result['seconds']:5.0f} s  {name}  {fact['change']}{by}", flush=True)


# --- the table ------------------------------------------------------------------------------------------------------


def results(out: Path) -> dict[str, dict]:
  """{name: its newest line}."""
  lines = out.read_text().splitlines() if out.exists() else []
  return {fact["name"]: fact for fact in map(json.loads, lines)}


def table(
  found: dict[str, list[breaks.Break]], drawn: dict[str, list[breaks.Break]], out: Path
) -> str:
  """Counts by folder, the survivors, and the named equivalents that are no longer there."""
  known, named = results(out), equivalents()
  columns = ("breaks", "drawn", "killed", "timeout", "equal", "survived")
  rows = [f"{'folder':12}" + "".join(f"{name:>9}" for name in columns)]
  survivors = []
  for folder, chosen in drawn.items():
    ran = [(b, known[b.name]) for b in chosen if b.name in known and not is_equivalent(b, named)]
    count = collections.Counter(
      "timeout" if f.get("by") == "timeout" else f["status"] for _, f in ran
    )
    count |= {"breaks": len(found[folder]), "drawn": len(chosen)}
    count["equal"] = sum(is_equivalent(b, named) for b in chosen)
    rows.append(f"{folder:12}" + "".join(f"{count[name]:>9}" for name in columns))
    survivors += [b for b, fact in ran if fact["status"] == "survived"]
  for b in survivors:
    rows.append(f"\nposttrain_jax/{b.name.split(':')[0]}:{b.line}  {b.name}\n  {b.change}")
  there = {(b.name, b.change) for some in found.values() for b in some}
  files = {b.name.split(":")[0] for some in found.values() for b in some}
  gone = [
    n for n, (change, _) in named.items() if n.split(":")[0] in files and (n, change) not in there
  ]
  return "\n".join(
    [*rows, *(f"\n{EQUIVALENT.name} names what is not there: {name}" for name in gone)]
  )


def is_equivalent(one: breaks.Break, named: dict[str, tuple[str, str]]) -> bool:
  return one.name in named and named[one.name][0] == one.change


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--folder", choices=FOLDERS, help="one folder; default: all")
  parser.add_argument("--sample", type=int, default=25, help="breaks drawn per folder; 0: all")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument(
    "--only", help="one break by its name, run whether or not its result is known"
  )
  parser.add_argument("--list", action="store_true", help="print the drawn breaks and run nothing")
  parser.add_argument("--out", type=Path, default=ROOT / ".cache/mutation/results.jsonl")
  args = parser.parse_args()
  found = {folder: all_breaks(folder) for folder in ([args.folder] if args.folder else FOLDERS)}
  drawn = {folder: sample(some, args.sample, args.seed) for folder, some in found.items()}
  if args.only:
    drawn = {f: [b for b in some if b.name.startswith(args.only)] for f, some in found.items()}
    drawn = {folder: some for folder, some in drawn.items() if some}
    if not drawn:
      sys.exit(
        f"mutate: no break's name begins with {args.only!r}; --list --sample=0 prints the names"
      )
  if args.list:
    print(
      "\n".join(f"{b.name}  line {b.line}  {b.change}" for some in drawn.values() for b in some)
    )
    return
  os.chdir(ROOT)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  preload()
  named = equivalents()
  for folder, some in drawn.items():
    chosen = [one for one in some if args.only or not is_equivalent(one, named)]
    measure(folder, chosen, args.workers, args.out, bool(args.only))
  print(table(found, drawn, args.out))


if __name__ == "__main__":
  main()
