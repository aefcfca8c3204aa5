"""Marks of single cases."""

import pytest


def few(cases, *fast):
  """The cases of a parametrised test, of which the fast suite has these; the others are like one of them."""
  every = list(cases)
  assert all(one in every for one in fast), f"{fast} are not among {every}"
  parts = lambda one: one if isinstance(one, tuple) else (one,)
  return [one if one in fast else slow(*parts(one)) for one in every]


def slow(*values):
  """One case of a parametrised test, for `make test-slow`: the fast suite has another of its kind."""
  return pytest.param(*values, marks=pytest.mark.slow)
