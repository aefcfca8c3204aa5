"""config.mesh and the option --mesh: sizes are checked on one device as on many."""

import pathlib
import re

import jax
import pytest

from posttrain_jax import settings
from posttrain_jax.build import mesh
from posttrain_jax.settings import ConfigError

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


def test_a_server_counts_its_devices_in_one_option():
  made = mesh.serving("data=2, tensor=-1", 4)
  assert dict(made.shape) == dict(data=2, fsdp=1, expert=1, context=1, tensor=4)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("tensor", "'tensor' is no axis with its devices; write AXIS=N of data, fsdp, expert, tensor"),
    ("rows=2", "'rows=2' is no axis"),
    ("tensor=0", "'tensor=0' is no axis"),
    ("tensor=2,", "'' is no axis"),
    ("tensor=2,tensor=4", "tensor is there twice"),
    ("context=8", "write tensor or data"),
    ("tensor=2", "needs 2 devices, found 8; write -1"),
    ("data=-1", "--rows=4: the mesh data=-1 splits them over data x fsdp x expert; write a multiple of 8"),
  ],
)  # fmt: skip
def test_a_servers_mesh_that_cannot_be_is_refused(text, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    mesh.serving(text, 4)
