"""What isolates programs on this machine, for tests that need it."""

import functools

import pytest

from posttrain_jax.rewards.sandbox import INSTALL, isolation

trouble = functools.cache(isolation.trouble)


def needs(name):
  """Skips the test, and says what is missing, where an isolation is not to be had."""
  if trouble(name):
    pytest.skip(f"{name} does not work here ({trouble(name)}); {INSTALL}")
