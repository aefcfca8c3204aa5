"""Whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from posttrain_jax.core import files


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_what_cannot_be_written_is_told_beforehand(tmp_path):
  path = tmp_path / "a.json"
  path.write_text("before")
  files.check_writable(path)
  files.check_writable(tmp_path / "new.json")
  assert (names(tmp_path), path.read_text()) == (["a.json"], "before")
  for wrong in (tmp_path, tmp_path / "no" / "a.json", path / "b.json"):
    with pytest.raises(OSError, match=str(wrong)):
      files.check_writable(wrong)


def test_publish_makes_the_folder_at_the_end(tmp_path):
  with files.publish(tmp_path / "deep" / "out") as new:
    (new / "a").write_text("1")
    assert not (tmp_path / "deep/out").exists()
  assert (tmp_path / "deep/out/a").read_text() == "1"
  assert names(tmp_path / "deep") == ["out"]
  assert (tmp_path / "deep/out").stat().st_mode & 0o055  # not as private as a scratch folder


def test_publish_replaces_the_old_folder_whole(tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (out / "old").write_text("old")
  with files.publish(out) as new:
    (new / "a").write_text("1")
    assert names(out) == ["old"]
  assert names(out) == ["a"]
  assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path, error):
  out = tmp_path / "out"
  out.mkdir()
  (out / "old").write_text("old")

  def write():
    with files.publish(out) as new:
      (new / "a").write_text("half")
      raise error

  with pytest.raises(type(error)):
    write()
  assert (out / "old").read_text() == "old"
  assert names(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
  out = tmp_path / "out"
  out.mkdir()
  (out / "old").write_text("old")
  rename = Path.rename

  def failing(self, target):
    if self.name == "new":
      raise OSError("no rename")
    return rename(self, target)

  monkeypatch.setattr(Path, "rename", failing)
  with pytest.raises(OSError, match="no rename"), files.publish(out) as new:
    (new / "a").write_text("1")
  assert (out / "old").read_text() == "old"
  assert names(tmp_path) == ["out"]


def test_a_killed_write_leaves_the_old_folder(tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (out / "old").write_text("old")
  code = f"""
from posttrain_jax.core import files
with files.publish({str(out)!r}) as new:
  (new / "a").write_text("half")
  print("writing", flush=True)
  time.sleep(60)
"""
  writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
  try:
    assert writer.stdout.readline() == "writing\n"
  finally:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
  assert names(out) == ["old"]
  leftover = [name for name in names(tmp_path) if name != "out"]
  assert all(name.startswith(".out.partial-") for name in leftover)  # hidden, and clearly partial
  with files.publish(out) as new:  # and no obstacle to the next
    (new / "b").write_text("2")
  assert names(out) == ["b"]


def test_text_replaces_or_stays(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  files.write_json(path, {"é": [1, None]})
  assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None]}
  assert files.read_json(path) == {"é": [1, None]}
  assert path.read_bytes().endswith(b"\n")

  def full(_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files.os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    files.write_json(path, {})
  assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None]}
  assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
  ("content", "says"),
  [
    (b"{", "a.json is not JSON: Expecting property name"),
    (b"\xff", "a.json is not JSON: 'utf-8' codec"),
    (b"[1]", "a.json holds a list, expected an object"),
  ],
)
def test_json_that_is_no_object_is_named(tmp_path, content, says):
  (tmp_path / "a.json").write_bytes(content)
  with pytest.raises(ValueError, match=says):
    files.read_json(tmp_path / "a.json")


def entry(array, dtype=None):
  return tuple(array.shape), dtype or array.dtype.name, lambda: array


def test_safetensors_are_read_by_the_library(tmp_path):
  draw = np.random.default_rng(0)
  arrays = {
    "matrix": draw.standard_normal((3, 5)).astype(np.float32),
    "turned": draw.standard_normal((3, 5)).astype(np.float32).T,
    "half": draw.standard_normal((2, 2)).astype(ml_dtypes.bfloat16),
    "odd": np.arange(3, dtype=np.uint8),
    "scalar": np.float32(2.5).reshape(()),
    "empty": np.zeros((0, 4), np.float16),
    "long": np.arange(4, dtype=np.int64),
  }
  path = tmp_path / "x.safetensors"
  files.write_safetensors(path, {k: entry(v) for k, v in arrays.items()}, {"format": "pt"})
  found = safetensors_numpy.load_file(path)
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype, name
    assert found[name].shape == array.shape, name
    np.testing.assert_array_equal(found[name], array, err_msg=name)
  size = int.from_bytes(path.read_bytes()[:8], "little")
  assert size % 8 == 0
  assert json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"] == {"format": "pt"}


def test_safetensors_convert_to_the_declared_type_and_refuse_another_shape(tmp_path):
  array = np.array([1.0, 1.01], np.float32)
  files.write_safetensors(tmp_path / "a", {"x": entry(array, "bfloat16")})
  found = safetensors_numpy.load_file(tmp_path / "a")["x"]
  np.testing.assert_array_equal(found, array.astype(ml_dtypes.bfloat16))
  with pytest.raises(ValueError, match=r"x: declared \(3,\), made \(2,\)"):
    files.write_safetensors(tmp_path / "b", {"x": ((3,), "float32", lambda: array)})


def test_safetensors_are_made_one_at_a_time(tmp_path):
  alive = []

  class Array(np.ndarray):
    def __del__(self):
      alive.remove(1)

  def make():
    alive.append(1)
    assert len(alive) <= 2  # the one before is dropped when the next stands
    return np.ones(4, np.float32).view(Array)

  files.write_safetensors(tmp_path / "a", {str(i): ((4,), "float32", make) for i in range(5)})
  assert len(safetensors_numpy.load_file(tmp_path / "a")) == 5


def test_what_a_killed_write_left_is_removed_and_what_is_being_written_stays(tmp_path):
  dead = tmp_path / ".model.partial-dead"
  (dead / "new").mkdir(parents=True)
  files.remove_abandoned(tmp_path, "model")
  assert dead.exists()  # a moment old: its writer may be about to lock it
  with files.publish(tmp_path / "model") as folder:
    files.remove_abandoned(tmp_path, age=0)
    assert folder.exists()
    assert not dead.exists()
  files.write_text(tmp_path / "a.txt", "whole")
  assert {p.name for p in tmp_path.iterdir()} == {"model", "a.txt"}


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
  """The old folder was out of the way, the new one not in its place yet."""
  for name in ("new", "old"):
    (tmp_path / ".model.partial-dead" / name).mkdir(parents=True)
    (tmp_path / ".model.partial-dead" / name / "which").write_text(name)
  files.remove_abandoned(tmp_path, age=0)
  assert (tmp_path / "model" / "which").read_text() == "new"
  assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_seen_wherever_it_stands(monkeypatch, dtype, number):
  monkeypatch.setattr(files, "_PART", 8)
  for size, place in ((1, 0), (20, 0), (20, 7), (20, 19)):
    array = np.full(size, -float(ml_dtypes.finfo(dtype).max)).astype(files.numpy_dtype(dtype))
    assert files.is_finite(array)
    array[place] = number
    assert not files.is_finite(array)
  assert files.is_finite(np.zeros(0, files.numpy_dtype(dtype)))
  assert files.is_finite(array.reshape(2, 10).T[:3, :1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_whose_products_are_not_finite_is_said(caplog, dtype):
  """A base with one 3e38 was loaded unsaid, and its logits were not finite."""
  files.narrowed("w", np.array([1.0, 8e37], np.float32), dtype)
  assert not caplog.records
  files.narrowed("w", np.array([1.0, -3e38], np.float32), dtype)
  assert "w holds a number of 2^127 or more" in caplog.text


@pytest.mark.parametrize(
  ("array", "dtype", "said"),
  [
    (np.array([1, 1e6], np.float32), "float16", r"w holds 1e\+06, and float16 ends at 65504: "),
    (np.array([-1e300]), "bfloat16", r"w holds 1e\+300, and bfloat16 ends at 3.3"),
    (np.array([1, np.nan, np.inf], np.float32), "float32", "w holds 1 NaN and 1 infinite of 3 num"),
  ],
)
def test_what_is_not_finite_is_not_written(tmp_path, array, dtype, said):
  with pytest.raises(ValueError, match=said):
    files.write_safetensors(tmp_path / "x", {"w": (array.shape, dtype, lambda: array)})


def test_json_that_is_nested_without_end_is_refused(tmp_path):
  (tmp_path / "x.json").write_text("[" * 100_000)
  with pytest.raises(ValueError, match=r"x.json is not read: its lists are nested"):
    files.read_json(tmp_path / "x.json")


def test_a_cache_is_pruned_of_what_was_used_longest_ago(tmp_path):
  for age, name in enumerate(["newest", "middle", "oldest"]):
    (tmp_path / name).write_bytes(bytes(100))
    os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
  files.prune(tmp_path, 300)
  assert {p.name for p in tmp_path.iterdir()} == {"newest", "middle", "oldest"}
  files.prune(tmp_path, 299)
  assert {p.name for p in tmp_path.iterdir()} == {"newest", "middle"}
  files.prune(tmp_path, 0)
  assert not [*tmp_path.iterdir()]
  files.prune(tmp_path / "absent", 0)


@pytest.mark.parametrize("shape", [(3, 5), (), (1000, 77)])
def test_room_begins_where_a_cpu_takes_it_over(shape):
  array = files.room(shape, np.dtype(np.float32))
  assert (array.shape, array.dtype) == (shape, np.float32)
  assert array.ctypes.data % files.ALIGNMENT == 0
  array[...] = 3
  np.testing.assert_array_equal(array, np.full(shape, 3, np.float32))
