"""float64, for what is compared with a closed form."""

import jax
import pytest


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield
