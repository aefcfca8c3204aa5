"""Rows cut over a context axis: every device has as much to attend to, and nothing is lost on the way back."""

import jax
import numpy as np
import pytest

from posttrain_jax.core import sharding, zigzag


@pytest.mark.parametrize("time", [16, 13, 3])
def test_what_is_cut_is_whole_again(time):
  x = np.arange(2 * time * 3).reshape(2, time, 3) + 1
  with jax.set_mesh(sharding.mesh(fsdp=2, context=4)):
    cut = jax.jit(zigzag.cut)(x)
    whole = jax.jit(lambda x: zigzag.whole(x, time))(cut)
  assert cut.shape == (2, -(-time // 8) * 8, 3)
  assert {shard.data.shape[:2] for shard in cut.addressable_shards} == {(1, cut.shape[1] // 4)}
  np.testing.assert_array_equal(whole, x)
  assert np.sum(np.asarray(cut) == 0) == (cut.shape[1] - time) * 2 * 3


def test_every_device_attends_to_as_many_tokens():
  """A causal row: a query sees as many keys as stand up to it."""
  seen = np.tile(np.arange(1, 65), (2, 1))
  with jax.set_mesh(sharding.mesh(fsdp=2, context=4)):
    cut = np.asarray(jax.jit(zigzag.cut)(seen))
  assert cut[0].reshape(4, 16).sum(axis=1).tolist() == [65 * 8] * 4


def test_parts_are_what_each_device_has():
  x = np.arange(4 * 16).reshape(4, 16)
  mesh = sharding.mesh(fsdp=2, context=4)
  with jax.set_mesh(mesh):
    parts = jax.jit(zigzag.parts)(sharding.constrain(x, "batch time"))
    joined = jax.jit(lambda x: zigzag.joined(zigzag.parts(x), 16))(x)
  np.testing.assert_array_equal(parts, np.concatenate(np.split(x, 4, axis=1)))
  np.testing.assert_array_equal(joined, x)


def test_without_the_axis_rows_stay_as_they_are():
  x = np.arange(12).reshape(2, 6)
  for mesh in (sharding.mesh(fsdp=8), sharding.mesh(devices=jax.devices()[:1])):
    with jax.set_mesh(mesh):
      assert zigzag.cut(x) is x
      assert zigzag.whole(x, 6) is x
      np.testing.assert_array_equal(zigzag.parts(x), x)
