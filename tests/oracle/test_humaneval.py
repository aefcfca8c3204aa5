"""HumanEval in the sandbox: its own solutions all pass, and solutions with a fault in them fail.

`POSTTRAIN_DATA` names a folder with `humaneval/HumanEval.jsonl.gz` (Chen et al. 2021, MIT licence).
"""

import ast
import concurrent.futures
import contextlib
import copy
import gzip
import io
import json
import os
import random
from pathlib import Path

import pytest

from posttrain_jax.rewards.python import python
from posttrain_jax.rewards.sandbox import Limits
from tests.mutation import breaks
from tests.rewards.sandbox import here

pytestmark = pytest.mark.oracle

LIMITS = Limits(seconds=5)
FAULTS = 2  # of each solution, drawn by its number


@pytest.fixture(scope="module")
def rows():
  here.needs("bubblewrap")
  folder = os.environ.get("POSTTRAIN_DATA")
  path = Path(folder or "", "humaneval", "HumanEval.jsonl.gz")
  if not folder or not path.exists():
    pytest.skip(
      "HumanEval is not part of the repository: put HumanEval.jsonl.gz (github.com/openai/human-eval, data/) into"
      " FOLDER/humaneval/ and write `make oracle POSTTRAIN_DATA=FOLDER`"
    )
  return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


def scores(pairs):
  """Of (row, completion), in order."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(lambda p: python(p[0]["prompt"], p[1], p[0], limits=LIMITS), pairs))


def test_every_canonical_solution_passes(rows):
  said = scores([(row, row["canonical_solution"]) for row in rows])
  assert len(said) == 164
  assert not {r["task_id"]: s.reason for r, s in zip(rows, said) if s.value != 1}


def test_no_empty_solution_passes(rows):
  said = scores([(row, "    return None\n") for row in rows])
  assert not {r["task_id"]: s.reason for r, s in zip(rows, said) if s.value != 0}


def faulty(row):
  """(change, the whole solution with it), a few for each row."""
  tree = ast.parse(row["prompt"] + row["canonical_solution"])
  every = [b for b in breaks.breaks("solution", tree) if b.function == row["entry_point"]]
  for drawn in random.Random(row["task_id"]).sample(every, min(FAULTS, len(every))):
    again = copy.deepcopy(tree)
    (same,) = [b for b in breaks.breaks("solution", again) if b.name == drawn.name]
    same.apply()
    yield same.change, ast.unparse(again)


def plainly(row, code):
  """Whether the row's tests pass in this process; a canonical solution with a fault does no harm."""
  names: dict = {"__name__": "solution"}
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      exec(f"{code}\n{row['test']}\ncheck({row['entry_point']})", names)
  except Exception:
    return False
  return True


def test_solutions_with_a_fault_fail_where_humanevals_tests_see_it(rows):
  """Of 308 faulty solutions 23 pass, and pass outside of the sandbox, too: nothing that they change is asked for."""
  cases = [(row, change, code) for row in rows for change, code in faulty(row)]
  said = scores([(row, code) for row, _, code in cases])
  assert not [s.reason for s in said if s.value is None]
  endless = [i for i, s in enumerate(said) if "of CPU time" in s.reason or "MiB" in s.reason]
  assert len(endless) < 20
  for i, (row, change, code) in enumerate(cases):
    if i not in endless:
      assert plainly(row, code) == (said[i].value == 1), f"{row['task_id']}: {change}"
  passing = [f"{c[0]['task_id']}: {c[1]}" for c, s in zip(cases, said) if s.value == 1]
  print(f"{len(passing)} of {len(cases)} pass:", *passing, sep="\n")
  assert len(passing) < 0.1 * len(cases)
