"""Marks of single cases."""

import pytest


def slow(*values):
  """One case of a parametrised test, for `make test-all`: the fast suite has another of its kind."""
  return pytest.param(*values, marks=pytest.mark.slow)
