"""What the breaks change, what they leave alone, and how one is served to an importing process."""

import ast
import functools
import importlib.util
import json
import subprocess
import sys

import pytest

from tests.marks import few
from tests.mutation import breaks, mutate

CASES = [
  ("return a + b", "arithmetic", "return a - b"),
  ("return a / b", "arithmetic", "return a * b"),
  ("a *= b", "arithmetic", "a /= b"),
  ("return a < b", "boundary", "return a <= b"),
  ("return a < b", "reversed", "return a > b"),
  ("return a == b", "negated", "return a != b"),
  ("return a is None", "negated", "return a is not None"),
  ("return a and b", "logic", "return a or b"),
  ("return not a", "sign", "return a"),
  ("return -a", "sign", "return a"),
  ("return ~a", "sign", "return a"),
  ("return a[3]", "number", "return a[4]"),
  ("return a[1]", "number", "return a[0]"),
  ("return 0.5 * a", "number", "return 1.0 * a"),
  ("return f(a, clip=True)", "flag", "return f(a, clip=False)"),
  ("return jnp.minimum(a, b)", "name", "return jnp.maximum(a, b)"),
  ("return a.sum()", "name", "return a.mean()"),
  ("return jax.lax.stop_gradient(a)", "unwrapped", "return a"),
  ("return jnp.where(c, a, b)", "swapped", "return jnp.where(c, b, a)"),
  ("return f(a, b)", "swapped", "return f(b, a)"),
  ("return jnp.sum(a, axis=n)", "keyword", "return jnp.sum(a)"),
  ("return a if c else b", "always", "return a if True else b"),
  ("return [a for a in b if c]", "never", "return [a for a in b if False]"),
  ("raise ValueError(a)", "raise", "pass"),
]

all_breaks = functools.cache(mutate.all_breaks)


def found(body, optional=()):
  tree = ast.parse(f"def f(a, b, c, n):\n  {body}\n")
  return tree, breaks.breaks("losses/f.py", tree, dict(optional))


@pytest.mark.parametrize(("body", "kind", "broken"), CASES)
def test_a_break_changes_one_thing(body, kind, broken):
  tree, several = found(body)
  (one,) = [b for b in several if b.name == f"losses/f.py:f:{kind}:0"]
  assert ast.unparse(tree.body[0].body) == body  # finding changes nothing
  one.apply()
  assert ast.unparse(tree.body[0].body) == broken


@pytest.mark.parametrize(
  "body",
  [
    '"""Adds 1 and 2."""',
    "x: Literal[1, 2]",
    "assert a, f'{a + 1} is wrong'",
    "warnings.warn(f'{a}', stacklevel=2)",
    "import numpy as np",
    "return f'{a + 1:>10}'",
    "return 'a' + b",
    "return isinstance(a, b)",
    "return f(*a, *b)",
    "return given(a, axis=n)",
  ],
)
def test_what_says_nothing_of_the_result_stays(body):
  assert found(body, {"given": set()})[1] == []


@pytest.mark.parametrize(
  "head", ["@jit(static=1)\ndef f(a: Array[1]) -> Array[1]:", "def __repr__(self):"]
)
def test_decorators_annotations_and_reprs_stay(head):
  body = "return a + 1" if "repr" in head else "return a"
  assert breaks.breaks("f.py", ast.parse(f"{head}\n  {body}"), {}) == []


def test_a_message_stays_and_its_raise_goes():
  names = [one.name for one in found("raise ValueError(f'{a} + 1', 1 + 2)")[1]]
  assert names == ["losses/f.py:f:raise:0"]


def test_names_outlive_an_edit_of_another_function():
  source = "class A:\n  def f(self, a, b):\n    return (a + b) * (a + 1)\n"
  before = [one.name for one in breaks.breaks("f.py", ast.parse(source), {})]
  after = [
    one.name
    for one in breaks.breaks("f.py", ast.parse(f"def g(a):\n  return a + 3\n\n\n{source}"), {})
  ]
  assert before[0] == "f.py:A.f:arithmetic:0"
  assert after[2:] == before


def test_keywords_are_dropped_where_the_package_says_that_they_may_be():
  source = "def f(a, b=1, *, c, d=2): ...\n\n\nf(1, b=x, c=y, d=z)"
  tree = ast.parse(source)
  optional = breaks.defaults([tree])
  assert optional == {"f": {"b", "d"}}
  changes = [one.change for one in breaks.breaks("f.py", tree, optional) if ":keyword:" in one.name]
  assert changes == [
    "f(1, b=x, c=y, d=z)  ->  f(1, c=y, d=z)",
    "f(1, b=x, c=y, d=z)  ->  f(1, b=x, c=y)",
  ]


@pytest.mark.parametrize("folder", few(mutate.FOLDERS, "losses"))
def test_every_break_of_the_package_is_seen_and_has_a_name_of_its_own(folder):
  several = all_breaks(folder)
  assert len(several) > 100
  assert len({one.name for one in several}) == len(several)
  same = [one.name for one in several if len({*one.change.split("  ->  ")}) < 2]
  assert not same
  assert len(mutate.test_files(folder)) > 1


def test_a_sample_draws_the_same_whatever_else_is_there():
  several = all_breaks("losses")
  drawn = {one.name for one in mutate.sample(several, 20, seed=0)}
  fewer = [one for one in several if one.name in drawn or one.line % 2]
  assert {one.name for one in mutate.sample(fewer, 20, seed=0)} == drawn
  assert {one.name for one in mutate.sample(several, 20, seed=1)} != drawn
  assert len(mutate.sample(several, 0, seed=0)) == len(several)


def test_an_import_gets_the_broken_module():
  path = mutate.PACKAGE / "losses" / "__init__.py"
  finder = mutate._Finder(path, ast.parse("x = 2 + 3"))
  assert finder.find_spec("posttrain_jax.losses.kl") is None
  spec = finder.find_spec("posttrain_jax.losses")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert module.x == 5
  assert module.__path__ == [str(path.parent)]


SERVER = """
import json, os, time
from tests.mutation import mutate
jobs = [
  ("passes", lambda scratch: {"passed": True}, 60),
  ("raises", lambda scratch: 1 / 0, 60),
  ("dies", lambda scratch: os.abort(), 60),
  ("hangs", lambda scratch: time.sleep(60), 0.5),
]
results = {label: result for label, result in mutate.in_children(jobs, workers=2)}
print(json.dumps(results))
"""


def test_a_child_that_raises_dies_or_hangs_kills_its_break():
  command = [sys.executable, "-c", SERVER]
  run = subprocess.run(command, cwd=mutate.ROOT, capture_output=True, text=True, check=True)
  results = json.loads(run.stdout)
  assert results["passes"]["passed"]
  assert results["raises"]["why"] == "ZeroDivisionError('division by zero')"
  assert results["dies"]["by"] == "the process died (6)"
  assert results["hangs"]["by"] == "timeout"
  assert not any(results[label]["passed"] for label in ("raises", "dies", "hangs"))


@pytest.mark.parametrize("folder", mutate.FOLDERS)
def test_what_is_broken_and_who_is_asked_are_there(folder):
  sources, tests = mutate.FOLDERS[folder]
  assert all((mutate.PACKAGE / path).exists() for path in sources)
  assert all(list((mutate.ROOT / "tests").glob(pattern)) for pattern in tests)
