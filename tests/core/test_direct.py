"""Files written past the system's cache hold what was written, whatever its size and the file system."""

import pathlib

import numpy as np
import pytest

from posttrain_jax.core import direct

SIZES = [
  0,
  1,
  direct.ALIGNED,
  direct.BLOCK - 1,
  direct.BLOCK,
  2 * direct.BLOCK + direct.ALIGNED + 5,
]


def content(size):
  return np.random.default_rng(size).integers(0, 256, size, np.uint8)


@pytest.fixture(params=["past the cache", "no such file system", "a disk that refuses"])
def disk(request, monkeypatch):
  """Where the system takes such writes, where it cannot open a file for them, and where it refuses each."""
  if request.param == "no such file system":
    monkeypatch.setattr(direct, "_past_the_cache", lambda path: None)
  if request.param == "a disk that refuses":
    monkeypatch.setattr(direct, "ALIGNED", 1)  # so that no length or place is one that it takes


@pytest.mark.parametrize("size", SIZES)
def test_what_is_appended_in_pieces_is_in_the_file(size, disk, tmp_path):
  data = content(size)
  with direct.appending(tmp_path / "x") as file:
    for part in np.split(data, [size // 3, size // 2]):
      file.write(part)
  assert (tmp_path / "x").read_bytes() == data.tobytes()


def test_blocks_come_in_any_order(disk, tmp_path):
  (tmp_path / "x").write_bytes(b"what was there before" * direct.BLOCK)
  data, memory = content(SIZES[-1]), direct.block()
  with direct.writing(tmp_path / "x") as file:
    for number in (2, 0, 1):
      part = data[number * direct.BLOCK :][: direct.BLOCK]
      memory[: part.size] = part
      file.write(number, memory[: part.size])
  assert (tmp_path / "x").read_bytes() == data.tobytes()


def test_a_full_disk_is_an_error(tmp_path):
  if not (full := pathlib.Path("/dev/full")).exists():
    pytest.skip("no /dev/full on this system")
  with pytest.raises(OSError, match="No space left"), direct.writing(full) as file:
    file.write(0, content(10))
