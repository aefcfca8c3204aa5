"""`make fuzz`: thousands of spoiled inputs, each read whole and right, or refused in a sentence, within ten seconds.

python -m tests.fuzz.run --inputs=2000 --out=.cache/fuzz.jsonl
python -m tests.fuzz.run --input=rows:123
"""

import argparse
import collections
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
KINDS = (
  "rows",
  "adapters",
  "overrides",
  "templates",
  "recipes",
  "checkpoints",
  "rewards",
  "verifiers",
)
DEADLINE = 10.0  # seconds of one input
START = 300.0  # seconds of a process's own start, with the models that its inputs are tried on
READ, REFUSED, FAILED = "read", "refused", "failed"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--inputs", type=int, default=2000, help="how many, of all kinds together")
  parser.add_argument("--kind", choices=KINDS, help="of this kind alone")
  parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
  parser.add_argument("--input", help="KIND:SEED, this input alone, in this process")
  parser.add_argument("--out", default=".cache/fuzz.jsonl", help="a line for each input")
  parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.worker:
    return _worker(given.worker)
  if given.input:
    kind, _, seed = given.input.partition(":")
    result = _trier(kind)(int(seed))
    print(json.dumps(result, indent=2))
    return int(result["outcome"] == FAILED)
  out = ROOT / given.out
  out.parent.mkdir(parents=True, exist_ok=True)
  kinds = [given.kind] if given.kind else KINDS
  results = []
  with out.open("w") as lines:
    for kind in kinds:
      for result in tried(kind, range(given.first, given.first + given.inputs // len(kinds))):
        results.append(result)
        print(json.dumps(result), file=lines, flush=True)
        if result["outcome"] == FAILED:
          print(f"{kind}:{result['seed']} {result['what']}\n    {result['why']}", flush=True)
  print(table(results))
  return int(any(result["outcome"] == FAILED for result in results))


def tried(kind: str, seeds):
  """The result of each seed; the process that tries them is ended where one takes too long, and another goes on."""
  process, wait = None, START
  for seed in seeds:
    if process is None:
      process, wait = _started(kind), START
    asked, answered = process.stdin, process.stdout
    assert asked is not None
    assert answered is not None
    asked.write(f"{seed}\n")
    asked.flush()
    ready, _, _ = select.select([answered], [], [], wait)
    line = answered.readline() if ready else ""
    wait = DEADLINE
    if line:
      yield json.loads(line)
      continue
    why = "it took more than ten seconds" if not ready else "the process died"
    process.kill()
    process.wait()
    process = None
    yield {"kind": kind, "seed": seed, "outcome": FAILED, "what": "", "why": why}
  if process is not None and process.stdin is not None:
    process.stdin.close()
    process.wait()


def _started(kind: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "tests.fuzz.run", f"--worker={kind}"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    cwd=ROOT,
  )


def _worker(kind: str) -> int:
  lines = os.fdopen(os.dup(1), "w")
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  result_of = _trier(kind)
  for seed in sys.stdin:
    print(json.dumps(result_of(int(seed))), file=lines, flush=True)
  return 0


def _trier(kind: str):
  """seed -> result."""
  import tests.conftest  # noqa: F401  the tests' devices and compile cache
  from tests.fuzz import inputs

  base = inputs.Base(pathlib.Path(tempfile.mkdtemp(prefix="fuzz-")))

  def result_of(seed: int) -> dict[str, Any]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
      spoiled = inputs.KINDS[kind](seed, base, pathlib.Path(scratch))
      result = {"kind": kind, "seed": seed, "what": spoiled.what, **outcome(spoiled)}
    return {**result, "seconds": round(time.monotonic() - began, 2)}

  return result_of


def outcome(spoiled) -> dict[str, str]:
  """Whether the input was read as what it says, or refused in a sentence that names the place."""
  try:
    wrong = spoiled.read()
  except (ValueError, OSError) as error:
    bad = _no_sentence(str(error), spoiled.names)
    return {"outcome": FAILED if bad else REFUSED, "why": f"{bad}{error}"[:1500]}
  except Exception:
    return {"outcome": FAILED, "why": traceback.format_exc()[-1500:]}
  return {"outcome": FAILED if wrong else READ, "why": wrong or ""}


def _no_sentence(message: str, names: tuple[str, ...]) -> str:
  """What is wrong with a refusal: Python's own words, or nothing of where."""
  pythonic = ("object has no attribute", "unsupported operand", "could not convert", "out of range")
  pythonic += ("not subscriptable", "invalid literal", "object is not", "must be str")
  if not message.strip():
    return "an empty message"
  if any(part in message for part in pythonic):
    return "in Python's words: "
  if not any(name in message for name in names):
    return f"names none of {', '.join(names)}: "
  return ""


def table(results: list[dict[str, Any]]) -> str:
  count = collections.Counter((result["kind"], result["outcome"]) for result in results)
  rows = [f"{'':14}" + "".join(f"{name:>10}" for name in (READ, REFUSED, FAILED))]
  for kind in dict.fromkeys(result["kind"] for result in results):
    rows.append(
      f"{kind:14}" + "".join(f"{count[kind, name]:>10}" for name in (READ, REFUSED, FAILED))
    )
  slowest = max((result.get("seconds", DEADLINE) for result in results), default=0)
  return "\n".join([*rows, f"{len(results)} inputs, the slowest {slowest:.1f} s"])


if __name__ == "__main__":
  sys.exit(main())
