"""Imports run one way: the rule and its table are those of CONTRIBUTING.md."""

import ast
import functools
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "posttrain_jax"
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def layers():
  """[{folder, ...}, ...] of the line `core <- {quant, ...} <- ...`, lowest first."""
  (line,) = re.findall(r"^\s*(core <- .*)$", TEXT, re.MULTILINE)
  return [{*re.findall(r"\w+", part)} for part in line.split("<-")]


def exceptions():
  """{(importer, imported)} of the table after the rule."""
  after = TEXT[TEXT.index("core <- ") :]
  rows = re.findall(r"^\| *(\w+) *\| *(\w+) *\|", after[: after.index("\n## ")], re.MULTILINE)
  return {*rows} - {("importer", "imported")}


@functools.cache
def imports(path):
  """Dotted names of all modules that a file imports, inside functions too."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative imports hide where a name comes from"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def folder(path):
  first = path.relative_to(ROOT / PACKAGE).parts[0]
  return first.removesuffix(".py")


def folders_imported(path):
  own = (name.split(".") for name in imports(path))
  return {parts[1] for parts in own if parts[0] == PACKAGE and len(parts) > 1}


def used():
  """{(importer, imported): a file that does so} between different folders."""
  pairs = {}
  for path in FILES:
    for imported in folders_imported(path) - {folder(path)}:
      pairs[folder(path), imported] = path.relative_to(ROOT)
  return pairs


def test_every_folder_has_a_place():
  assert {folder(path) for path in FILES} == set().union(*layers(), {"__init__"})


def test_imports_run_one_way():
  level = {name: i for i, names in enumerate(layers()) for name in names}
  level["__init__"] = 0
  allowed = exceptions()
  for (importer, imported), path in used().items():
    assert level[imported] <= level[importer], f"{path} imports {imported}, which is above it"
    if level[imported] == level[importer]:
      assert (importer, imported) in allowed, f"{path} imports {imported}; is it in the table?"


def test_the_table_names_only_what_is_used():
  assert exceptions() - used().keys() == set()


def test_siblings_do_not_import_each_other_in_circles():
  graph = {}
  for importer, imported in exceptions():
    graph.setdefault(importer, set()).add(imported)

  def reachable(start, seen=frozenset()):
    for name in graph.get(start, set()) - seen:
      yield name
      yield from reachable(name, seen | {name})

  assert not [name for name in graph if name in reachable(name)]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_import_data_and_nothing_else(path):
  allowed = {"ml_collections"} | sys.stdlib_module_names
  others = {name for name in imports(path) if not name.startswith("posttrain_jax.configs.")}
  assert {name.split(".")[0] for name in others} <= allowed
