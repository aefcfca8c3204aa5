"""A folder's tensors, read as they were written."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from posttrain_jax.core import files, shards


def written(folder, tensors):
  entries = ((name, (x.shape, str(x.dtype), lambda x=x: x)) for name, x in tensors.items())
  shards.write(folder, entries)
  return shards.Reader(folder)


@pytest.mark.parametrize("dtype", list(files.DTYPES))
def test_every_dtype_is_read_back(dtype, tmp_path):
  x = np.arange(6).reshape(2, 3).astype(files.numpy_dtype(dtype))
  tensors = {"b": np.ones(3, np.uint8), "a": x, "none": x[:0], "number": x[1, 1]}
  reader = written(tmp_path, tensors)
  for name, expected in tensors.items():
    found = reader.get(name)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert reader.shape(name) == expected.shape
  if "float8" not in dtype:  # which that library's numpy side cannot read
    for name, found in safetensors.numpy.load_file(tmp_path / shards.SINGLE).items():
      np.testing.assert_array_equal(found, tensors[name])


def test_what_is_read_begins_where_xla_takes_it_over(tmp_path):
  reader = written(tmp_path, {"a": np.ones(3, np.uint8), "b": np.ones((300, 7), np.float32)})
  assert all(reader.get(name).ctypes.data % files.ALIGNMENT == 0 for name in "ab")


def test_a_file_cut_while_it_is_read_is_named(tmp_path):
  reader = written(tmp_path, {"a": np.ones(8, np.float32), "b": np.ones(8, np.float32)})
  path = tmp_path / shards.SINGLE
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(ValueError, match=r"model\.safetensors ends after .* bytes"):
    reader.get("b")


def test_a_dtype_that_no_array_has_is_named(tmp_path):
  x = np.arange(4, dtype=np.complex64)
  safetensors.numpy.save_file({"x": x}, tmp_path / shards.SINGLE)
  with pytest.raises(ValueError, match="'x' is stored as C64"):
    shards.Reader(tmp_path).get("x")


def test_bfloat16_is_ml_dtypes():
  assert files.numpy_dtype("bfloat16") == np.dtype(ml_dtypes.bfloat16)
