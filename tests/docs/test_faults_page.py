"""The table of faults names tests that there are."""

import ast
import re

from tests.docs import printed

PAGE = (printed.ROOT / "docs" / "faults.md").read_text()


def test_every_test_that_is_named_is_there():
  named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
  assert len(named) > 30
  for path, name in named:
    tree = ast.parse((printed.ROOT / path).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in functions, f"{path}::{name}"


def test_each_of_the_eighteen_has_a_test():
  rows = re.findall(r"^\| (\d+) \|.*`tests/[^|]*\|$", PAGE, re.MULTILINE)
  assert [int(number) for number in rows] == [*range(1, 19)]
