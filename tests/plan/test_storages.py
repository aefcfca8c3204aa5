"""No layer's weights are dequantised but its own: a train step compiled at two depths, for every stored type."""

import dataclasses
import functools

import pytest

from posttrain_jax import quant
from posttrain_jax.models import shapes
from posttrain_jax.plan import program
from tests.marks import slow
from tests.plan.test_estimate import TINY, config, one_cpu

WIDE = dataclasses.replace(TINY, hidden_size=256, head_dim=64, intermediate_size=1024)
# bytes of the matrices of one, in float32
LAYER = 4 * ((2 * 4 + 2 * 2) * 64 * 256 + 3 * 256 * 1024)


@functools.cache
def growth(storage, remat):
  """Bytes of temporaries that twelve layers more add to a train step."""

  def temporaries(layers):
    shapes.SHAPES["deep"] = dataclasses.replace(WIDE, num_layers=layers)
    fields = {"data.length": 16, "batch.rows": 1, "model.remat": remat, "model.name": "deep"}
    fields["adapter.target_modules"] = ".*[qv]_proj"  # fewer compile sooner
    return program.compile(
      program.build(config(f",base={storage}", **fields), one_cpu())
    ).temporaries

  try:
    return temporaries(16) - temporaries(4)
  finally:
    del shapes.SHAPES["deep"]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("storage", "remat"),
  [
    case if case == ("nf4", "none") else slow(*case)
    for case in (*((storage, "none") for storage in quant.STORAGES), ("nf4", "full"))
  ],
)
def test_depth_adds_no_dequantised_matrix(storage, remat):
  """What a dense base takes for activations, and less than a tenth of one layer; kept matrices would take twelve."""
  assert growth(storage, remat) < growth("dense", remat) + 0.1 * LAYER
