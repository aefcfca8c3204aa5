"""config.mesh: sizes are checked on one device as on many."""

import pathlib

import jax
import pytest

from posttrain_jax import settings
from posttrain_jax.build import mesh

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "sft.py")


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (["tensor=3", "fsdp=1"], "needs 3 devices"),
    (["data=5", "fsdp=1"], "needs 5 devices"),
    (["tensor=-1", "fsdp=-1"], "one axis may be -1"),
  ],
)
def test_sizes_that_the_devices_do_not_have_are_refused(devices, sizes, message):
  config = settings.load(CONFIG, [f"--config.mesh.{size}" for size in sizes])
  with pytest.raises(ValueError, match=message):
    mesh.make(config, jax.devices()[:devices])


def test_one_device_is_no_mesh():
  assert mesh.make(settings.load(CONFIG), jax.devices()[:1]) is None
