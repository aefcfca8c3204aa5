"""The page about rewards: its code runs, and its table is the code's."""

import re

from posttrain_jax.rewards import table
from tests.docs.printed import ROOT, fences

PAGE = ROOT / "docs" / "rewards.md"


def test_the_code_of_the_page_runs(capsys):
  names = {}
  for block in fences(PAGE, "python"):
    exec(block, names)
  assert capsys.readouterr().out == "[1.0, 0.0, 0.0]\n"


def test_the_page_lists_every_verifier_with_its_options():
  rows = re.findall(r"^\| `(\w+)` \| .*\|([^|]*)\|$", PAGE.read_text(), re.MULTILINE)
  listed = {name: re.findall(r"`(\w+)`", options) for name, options in rows}
  assert listed.keys() == table.VERIFIERS.keys()
  for name, options in listed.items():
    there = list(table.VERIFIERS[name].options)
    assert options == (there[: len(options)] if name == "judge" else there), name
