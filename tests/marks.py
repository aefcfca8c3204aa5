"""Marks of single cases, and of tests that need a compiler for what is not here."""

import pytest

from posttrain_jax.plan import topology

_APART = "is not installed: make test-compilers has it"


def few(cases, *fast):
  """The cases of a parametrised test, of which the fast suite has these; the others are like one of them."""
  every = list(cases)
  assert all(one in every for one in fast), f"{fast} are not among {every}"
  parts = lambda one: one if isinstance(one, tuple) else (one,)
  return [one if one in fast else slow(*parts(one)) for one in every]


def slow(*values):
  """One case of a parametrised test, for `make test-slow`: the fast suite has another of its kind."""
  return pytest.param(*values, marks=pytest.mark.slow)


def needs_libtpu(test):
  """Compiles for TPUs that are not here."""
  return _compiles(test, topology.has_libtpu(), f"libtpu {_APART}")


def needs_cuda(test):
  """Compiles for NVIDIA's cards that are not here."""
  return _compiles(test, topology.cuda() is not None, f"jax's CUDA plugin {_APART}")


def _compiles(test, is_there, reason):
  return pytest.mark.compilers(pytest.mark.skipif(not is_there, reason=reason)(test))
