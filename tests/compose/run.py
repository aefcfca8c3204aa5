"""`make compose`: hundreds of draws in worker processes, a line each as it ends, and a table at the end.

  python -m tests.compose.run --draws=500 --workers=2 --out=.cache/compose/draws.jsonl
  python -m tests.compose.run --draw=123

Run again it goes on: what `--out` holds is not drawn again (`--again` draws anew what failed).  With `--online` the
draws are of runs that write their own answers (`tests/compose/online.py`).
"""

import argparse
import collections
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 400  # of a draw, until its process is ended
DRAWS = 25  # of a process, until another takes its place
AXES = (
  *("method", "family", "adapter", "base", "optimizer", "offload", "remat", "accumulate"),
  *("packing", "share_prompt", "mesh", "mixture", "truncate", "evaluated", "held"),
  "attention",
)
ONLINE_AXES = (
  *("kind", "method", "family", "adapter", "base", "optimizer", "storage", "score", "turns"),
  "mesh",
)
ONLINE = "--online"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--draws", type=int, default=500, help="how many")
  parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
  parser.add_argument("--workers", type=int, default=2, help="processes")
  parser.add_argument("--out", help="a line for each draw; default .cache/compose/draws.jsonl")
  parser.add_argument(ONLINE, action="store_true", help="runs that write their own answers")
  parser.add_argument("--draw", type=int, help="this draw alone, in this process")
  parser.add_argument("--again", action="store_true", help="draw anew what failed")
  parser.add_argument("--table", action="store_true", help="the table of --out, and no draw")
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.worker:
    return _worker(given.online)
  if given.draw is not None:
    return _alone(given.draw, given.online)
  out = pathlib.Path(given.out or f".cache/compose/{'online' if given.online else 'draws'}.jsonl")
  out.parent.mkdir(parents=True, exist_ok=True)
  done = read(out)
  wanted = [
    seed
    for seed in range(given.first, given.first + given.draws)
    if seed not in done or (given.again and done[seed]["outcome"] == "failed")
  ]
  if not given.table and wanted:
    _all(wanted, given.workers, out, given.online)
  results = read(out)
  print(table(results.values(), given.online))
  return int(any(result["outcome"] == "failed" for result in results.values()))


def read(path: pathlib.Path) -> dict[int, dict[str, Any]]:
  """{seed: result}, the last of each."""
  lines = path.read_text().splitlines() if path.exists() else []
  results = map(json.loads, lines)
  return {result["draw"]["seed"]: result for result in results}


# --- processes -------------------------------------------------------------------------------------------------------


def _all(seeds: list[int], workers: int, out: pathlib.Path, online: bool) -> None:
  waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
  for seed in seeds:
    waiting.put(seed)
  lock = threading.Lock()
  count = 0

  def ended(result: dict[str, Any]) -> None:
    nonlocal count
    with lock, out.open("a") as lines:
      count += 1
      lines.write(json.dumps(result) + "\n")
      seconds = sum(result["seconds"].values())
      print(
        f"{count}/{len(seeds)} draw {result['draw']['seed']}: {result['outcome']} {seconds:.0f} s"
      )
      for why in result["why"]:
        print(f"  {why[:200]}", flush=True)

  # made before there are several to make it
  subprocess.run(
    _line(online),
    input="",
    cwd=ROOT,
    text=True,
    check=True,
  )
  threads = [threading.Thread(target=_serve, args=(waiting, ended, online)) for _ in range(workers)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


def _line(online: bool) -> list[str]:
  """The command of a worker."""
  return [sys.executable, "-m", "tests.compose.run", "--worker", *([ONLINE] if online else [])]


def _serve(waiting: "queue.SimpleQueue[int]", ended, online: bool) -> None:
  """One process after the other, each for some draws."""
  process, given = None, 0
  while True:
    try:
      seed = waiting.get_nowait()
    except queue.Empty:
      break
    if process is None or given == DRAWS:
      _end(process)
      process, given = _started(online), 0
    given += 1
    asked, answered = process.stdin, process.stdout
    assert asked is not None
    assert answered is not None
    asked.write(f"{seed}\n")
    asked.flush()
    began = time.monotonic()
    timer = threading.Timer(SECONDS, process.kill)
    timer.start()
    line = answered.readline()
    timer.cancel()
    if not line:
      seconds = time.monotonic() - began
      why = (
        f"no end after {seconds:.0f} s"
        if seconds >= SECONDS
        else f"the process ended with {process.wait()}"
      )
      _end(process)
      process = None
      ended(
        {
          "draw": _drawn(seed, online),
          "outcome": "failed",
          "why": [why],
          "seconds": {"train": seconds},
        }
      )
      continue
    ended(json.loads(line))
  _end(process)


def _drawn(seed: int, online: bool) -> dict[str, Any]:
  from tests.compose import draws
  from tests.compose import online as online_lib

  return online_lib.draw(seed) if online else draws.draw(seed)


def _started(online: bool) -> subprocess.Popen:
  return subprocess.Popen(
    _line(online),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    cwd=ROOT,
  )


def _end(process: subprocess.Popen | None) -> None:
  if process is not None and process.stdin is not None:
    process.stdin.close()
    process.wait()


def _worker(online: bool) -> int:
  """Seeds in, a line each; results go to the first stdout, whatever else is printed to none."""
  lines = os.fdopen(os.dup(1), "w")
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  result_of = _checker(online)
  for seed in sys.stdin:
    print(json.dumps(result_of(int(seed))), file=lines, flush=True)
  return 0


def _checker(online: bool):
  """seed -> result; jax starts here, with the tests' devices and compile cache."""
  import tests.conftest  # noqa: F401
  from tests.compose import check, check_online, folders

  shared = folders.make(ROOT / ".cache" / "compose")
  checked = check_online.check if online else check.check

  def result_of(seed: int) -> dict[str, Any]:
    d, began = _drawn(seed, online), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
      result = checked(d, shared, pathlib.Path(scratch))
    return {"draw": d, **result, "core_seconds": round(time.process_time() - began, 1)}

  return result_of


def _alone(seed: int, online: bool) -> int:
  import tests.conftest  # noqa: F401
  from tests.compose import draws, folders
  from tests.compose import online as online_lib

  d = _drawn(seed, online)
  print(draws.shown(d))
  command = online_lib.command if online else draws.command
  config, overrides = command(d, folders.make(ROOT / ".cache" / "compose"))
  print(" ".join(["posttrain train", f"--config=configs/{config}", *overrides]), flush=True)
  result = _checker(online)(seed)
  print(f"{result['outcome']} {result['seconds']}")
  print("\n".join([*result["why"], result.get("trace", "")]))
  return int(result["outcome"] == "failed")


# --- the table -------------------------------------------------------------------------------------------------------


def table(results: Iterable[Mapping[str, Any]], online: bool = False) -> str:
  """Counts by axis and value, the sentences of refusals, and each failure with the command that repeats it."""
  results = list(results)
  count = lambda some: " ".join(
    f"{sum(r['outcome'] == outcome for r in some):>8}"
    for outcome in ("passed", "refused", "failed")
  )
  lines = [f"{'':34} {'passed':>8} {'refused':>8} {'failed':>8}", f"{'all':34} {count(results)}"]
  for axis in ONLINE_AXES if online else AXES:
    values = {str(r["draw"].get(axis)): None for r in results if axis in r["draw"]}
    lines.append(axis)
    for value in sorted(values):
      here = [r for r in results if str(r["draw"].get(axis)) == value]
      lines.append(f"  {value:32} {count(here)}")
  refusals = collections.Counter(_kind(r["why"][0]) for r in results if r["outcome"] == "refused")
  lines.append("\nrefused")
  lines += [f"{n:>5}  {sentence}" for sentence, n in refusals.most_common()]
  lines.append("\nfailed")
  for r in results:
    if r["outcome"] == "failed":
      lines.append(f"make compose DRAW={r['draw']['seed']}{' ONLINE=1' if online else ''}")
      lines += [f"    {why}" for why in r["why"]]
  core = [r["core_seconds"] for r in results if "core_seconds" in r]
  lines.append(f"\n{len(results)} draws, {sum(core) / max(len(core), 1):.1f} s of a core each")
  return "\n".join(lines)


def _kind(sentence: str) -> str:
  """A sentence without its numbers and names of files."""
  return re.sub(r"\S*\.\.\./\S*", "FILE", re.sub(r"\d+", "N", sentence))[:160]


if __name__ == "__main__":
  sys.exit(main())
