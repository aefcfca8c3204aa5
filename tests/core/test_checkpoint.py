"""Checkpoints: whole or absent, exact, and refused with a reason where they do not fit or are damaged."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from posttrain_jax.core import sharding, tree
from posttrain_jax.core.checkpoint import Checkpoints
from tests.marks import few


@struct.dataclass
class Node:
  a: jax.Array
  b: jax.Array
  scale: jax.Array | None = None


def make(step, rank=4, modules=("q_proj", "v_proj")):
  random = np.random.default_rng(step)
  normal = lambda *shape: random.standard_normal(shape, np.float32)
  mesh = sharding.mesh(fsdp=4, tensor=2)
  put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
  adapter = {
    f"layers/{name}": Node(put(normal(2, 64, rank), None, "fsdp"), put(normal(2, rank, 64)))
    for name in modules
  }
  return {
    "step": put(np.int32(step)),
    "adapter": adapter,
    "half": put(normal(8, 6).astype(jnp.bfloat16), "fsdp", "tensor"),
    "codes": put(random.integers(0, 256, (1024,), np.uint8), "fsdp"),
    "optimizer": (None, [put(normal(16, 16))], {}),
  }


def equal(x, y):
  same = lambda a, b: a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
  return jax.tree.structure(x) == jax.tree.structure(y) and jax.tree.all(jax.tree.map(same, x, y))


def data(step):
  return {"position": [0, step], "seed": 7, "name": "é"}


def save(checkpoints, *steps):
  for step in steps:
    checkpoints.save(step, make(step), data(step))


def test_what_is_restored_is_what_was_saved_where_it_was(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() is None
    save(checkpoints, 3)
    assert checkpoints.latest() == 3
  with Checkpoints(tmp_path) as checkpoints:
    state, found, step = checkpoints.restore(make(0))
  wanted = make(3)
  assert equal(state, wanted)
  assert (found, step) == (data(3), 3)
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, wanted)


def test_the_abstract_state_decides_the_sharding(tmp_path):
  mesh = sharding.mesh(data=4, tensor=2)
  place = NamedSharding(mesh, PartitionSpec(None, "tensor"))
  abstract = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=place)}
  w = np.arange(48, dtype=np.float32).reshape(8, 6)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": w}, {})
    restored = checkpoints.restore(abstract)[0]["w"]
    plain = checkpoints.restore({"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)})[0]["w"]
  assert restored.sharding == place
  assert np.array_equal(restored, w)
  assert np.array_equal(plain, w)


def test_a_sharding_that_does_not_fit_is_not_called_damage(tmp_path):
  place = NamedSharding(sharding.mesh(fsdp=8), PartitionSpec("fsdp"))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": np.ones(6, np.float32)}, {})
    with pytest.raises(ValueError, match=r"w: float32\[6\] cannot be placed"):
      checkpoints.restore({"w": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=place)})


def test_content_is_that_of_its_step_though_the_buffers_are_donated(tmp_path):
  def next_step(state):
    return jax.tree.map(lambda x: x + jnp.ones_like(x), state)

  # large enough that a write would still be going on
  state = {"w": jax.device_put(jnp.zeros((512, 4096), jnp.float32)), "n": jnp.zeros((), jnp.int32)}
  step = jax.jit(next_step, donate_argnums=0)
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    for n in range(3):
      checkpoints.save(n, state, {})
      before, state = state, step(step(state))
      assert before["w"].is_deleted()
    for n in range(3):
      w = np.asarray(checkpoints.restore(state, step=n)[0]["w"])
      assert (w.min(), w.max()) == (2 * n, 2 * n)


def test_the_newest_stay_and_the_steps_to_keep(tmp_path):
  with Checkpoints(tmp_path, keep=2, keep_steps=[2]) as checkpoints:
    save(checkpoints, 1, 2, 3, 4, 5)
    assert checkpoints.steps() == [2, 4, 5]
    assert equal(checkpoints.restore(make(0), step=2)[0], make(2))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4", "5"]


def test_reading_changes_nothing_in_the_folder_of_a_run_under_way(tmp_path):
  with Checkpoints(tmp_path, keep=5) as checkpoints:
    save(checkpoints, 1, 2, 3)
    unfinished = tmp_path / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpoints(tmp_path, keep=1) as reader:
      assert reader.restore(make(0))[1:] == (data(3), 3)
      assert reader.steps() == [1, 2, 3]
    assert unfinished.exists()
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    save(checkpoints, 4)
  assert [p.name for p in tmp_path.iterdir()] == ["4"]


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "float16", "bfloat16", "float32"])
def test_the_sum_sees_any_bit_and_any_swap(dtype):
  x = np.array([[1, 0, 1], [0, 0, 1]], jnp.dtype(dtype))
  sums = {int(tree.checksum(x))}
  for i in range(x.nbytes):
    y = np.frombuffer(x.tobytes(), np.uint8).copy()
    y[i] ^= 1
    sums.add(int(tree.checksum(y.view(x.dtype).reshape(x.shape))))
  assert len(sums) == 1 + x.nbytes
  assert int(tree.checksum(x[::-1])) not in sums
  sharded = jax.device_put(x, NamedSharding(sharding.mesh(data=-1, fsdp=2), PartitionSpec("fsdp")))
  assert int(tree.checksum(sharded)) == int(tree.checksum(x))


def test_arguments_that_cannot_be_meant(tmp_path):
  with pytest.raises(ValueError, match="keep=0"):
    Checkpoints(tmp_path, keep=0)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
      checkpoints.restore(make(0))
    save(checkpoints, 5)
    with pytest.raises(FileNotFoundError, match=r"step 4 .*found \[5\]"):
      checkpoints.restore(make(0), step=4)
    for step in (5, 4):
      with pytest.raises(ValueError, match="is not newer than 5"):
        save(checkpoints, step)
    with pytest.raises(ValueError, match="JSON"):
      checkpoints.save(6, make(6), {"position": (1, 2)})
    with pytest.raises(TypeError, match="optimizer/1: 'adam' is no array"):
      checkpoints.save(6, {"optimizer": [np.ones(2, np.float32), "adam"]}, {})
    assert checkpoints.latest() == 5


def replace_codes(dtype):
  return lambda state: {**state, "codes": jax.ShapeDtypeStruct((1024,), dtype)}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda s: make(0, rank=8), r"q_proj/a: found float32\[2,64,4\], expected float32\[2,64,8\]"),
    (
      lambda s: make(0, modules=("q_proj",)),
      r"v_proj/a: found float32\[2,64,4\], expected nothing",
    ),
    (
      lambda s: make(0, modules=("k_proj", "q_proj", "v_proj")),
      r"k_proj/a: found nothing, expected float32\[2,64,4\]",
    ),
    (replace_codes(jnp.int8), r"codes: found uint8\[1024\], expected int8\[1024\]"),
    (
      lambda s: {**s, "half": jax.ShapeDtypeStruct((9, 6), jnp.bfloat16)},
      r"half: found bfloat16\[8,6\], expected bfloat16\[9,6\]",
    ),
    (
      lambda s: {**s, "adapter": jax.tree.map(lambda x: x, s["adapter"]) | {"x": s["codes"]}},
      "adapter/x: found nothing",
    ),
  ],
  ids=["rank", "fewer modules", "more modules", "dtype", "vocabulary", "another leaf"],
)
def test_another_state_is_refused_by_leaf(tmp_path, change, message):
  with Checkpoints(tmp_path) as checkpoints:
    save(checkpoints, 1)
    with pytest.raises(ValueError, match=message) as caught:
      checkpoints.restore(change(make(0)))
    assert str(tmp_path / "1") in str(caught.value)


def test_many_different_leaves_are_counted_not_listed(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": np.ones(2, np.float32)}, {})
    with pytest.raises(ValueError, match="and 12 more"):
      checkpoints.restore({str(i): np.ones(2, np.float32) for i in range(19)})


# Damage


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def empty(path):
  os.truncate(path, 0)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


# orbax leaves coroutines behind when a read fails
unawaited = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@unawaited
@pytest.mark.parametrize(
  "damage", few([truncate, empty, flip, os.remove], flip), ids=lambda f: f.__name__
)
def test_damage_is_an_error_or_harmless_and_never_another_state(tmp_path, damage):
  """Each file of the newest step in turn: an error that says what to do, or exactly what was saved."""
  with Checkpoints(tmp_path) as checkpoints:
    save(checkpoints, 1, 2)
  whole = tmp_path / "whole"
  shutil.copytree(tmp_path / "2", whole)
  fatal = {}
  abstract, wanted = make(0), make(2)
  names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
  for name in names:
    shutil.rmtree(tmp_path / "2")
    shutil.copytree(whole, tmp_path / "2")
    damage(tmp_path / "2" / name)
    with Checkpoints(tmp_path) as checkpoints:
      assert checkpoints.latest() == 2
      try:
        state, found, step = checkpoints.restore(abstract)
      except OSError as error:
        fatal["/".join(name.parts[:2])] = str(error)
      else:
        assert equal(state, wanted), name
        assert (found, step) == (data(2), 2), name
  for message in fatal.values():
    assert str(tmp_path / "2") in message
    assert "delete this folder to go on from step 1" in message
  assert set(fatal) >= {"state/_METADATA", "state/d", "state/manifest.ocdbt", "data/metadata"}


@unawaited
def test_deleting_the_damaged_folder_is_all_it_takes(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    save(checkpoints, 1, 2)
  empty(tmp_path / "2" / "state" / "_METADATA")
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(OSError, match="go on from step 1"):
    checkpoints.restore(make(0))
  shutil.rmtree(tmp_path / "2")
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(make(0))[1:] == (data(1), 1)
    save(checkpoints, 2)
  empty(tmp_path / "1" / "state" / "_METADATA")
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(OSError, match="start anew"):
    checkpoints.restore(make(0), step=1)


# Saves that fail


@contextlib.contextmanager
def full_disk():
  """No file may grow beyond 64 KiB: writes fail as they do on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_is_loud_and_costs_nothing_else(tmp_path, keep):
  large = lambda n: {"w": np.random.default_rng(n).standard_normal(1 << 16, np.float32)}
  with Checkpoints(tmp_path, keep=keep) as checkpoints:
    checkpoints.save(1, jax.device_put(large(1)), {})
    with full_disk(), pytest.raises(OSError, match="could not") as caught:
      checkpoints.save(2, jax.device_put(large(2)), {})
    assert str(tmp_path) in str(caught.value)
    assert "complete checkpoints there: [1]" in str(caught.value)
    assert checkpoints.latest() == 1
    assert equal(checkpoints.restore(large(1))[0], large(1))
    checkpoints.save(2, jax.device_put(large(3)), {})  # with room again
    assert checkpoints.latest() == 2
    assert equal(checkpoints.restore(large(1))[0], large(3))
  assert {p.name for p in tmp_path.iterdir()} >= {"2"}
  with Checkpoints(tmp_path, keep=keep) as checkpoints:
    checkpoints.save(3, large(3), {})
  assert sorted(p.name for p in tmp_path.iterdir()) == [str(s) for s in range(4 - keep, 4)]


def test_an_error_in_the_background_comes_with_the_next_call(tmp_path, monkeypatch):
  monkeypatch.setattr("posttrain_jax.core.checkpoint._on_host", lambda leaf: False)
  w = {"w": np.random.default_rng(0).standard_normal(1 << 16, np.float32)}
  checkpoints = Checkpoints(tmp_path)
  save(checkpoints, 1)
  with full_disk():
    checkpoints.save(2, w, {})
    with pytest.raises(OSError, match="could not finish a save to"):
      checkpoints.close()
  assert [p.name for p in tmp_path.iterdir() if p.name.isdecimal()] == ["1"]


def test_a_directory_that_cannot_be_written(tmp_path):
  directory, away = tmp_path / "checkpoints", tmp_path / "away"
  checkpoints = Checkpoints(directory)
  save(checkpoints, 1)
  directory.rename(away)
  directory.write_text("in the way")
  with pytest.raises(OSError, match=f"could not save step 2 to {directory}"):
    save(checkpoints, 2)
  with pytest.raises(OSError, match=f"could not open {directory}"):
    Checkpoints(directory)
  directory.unlink()
  away.rename(directory)
  assert checkpoints.latest() == 1
  save(checkpoints, 2)
  assert equal(checkpoints.restore(make(0))[0], make(2))
  checkpoints.close()


# Kills.  One child imports everything and forks for each trial, which saves 10, 20, 30, ... until it is killed.

TRIALS = """
import json, os, shutil, signal, sys, time
import numpy as np
from orbax.checkpoint._src.path import atomicity
from posttrain_jax.core.checkpoint import Checkpoints
from tests.marks import few

def die(*args, **kwargs):
  os.kill(os.getpid(), signal.SIGKILL)

def at_call(cls, name, n):
  whole, calls = getattr(cls, name), []
  def counted(*args, **kwargs):
    calls.append(1)
    return (die if len(calls) == n else whole)(*args, **kwargs)
  setattr(cls, name, counted)

def trial(directory, kind, n):
  rename = atomicity.AtomicRenameTemporaryPath
  if kind == "commit":
    at_call(rename, "finalize", n)
  if kind == "create":
    at_call(rename, "create", n)
  if kind == "delete":
    at_call(shutil, "rmtree", n)
  checkpoints = Checkpoints(directory)
  for step in range(10, 10000, 10):
    w = np.random.default_rng(step).standard_normal(1 << 15, np.float32)
    checkpoints.save(step, {"w": w, "n": np.full(3, step, np.int32)}, {"step": step})
    checkpoints.wait()

for directory, kind, n in json.loads(sys.argv[1]):
  child = os.fork()
  if not child:
    try:
      trial(directory, kind, n)
    finally:
      os._exit(1)
  if kind == "time":
    while not os.path.isdir(os.path.join(directory, "10")):
      time.sleep(0.001)
    time.sleep(n)
    os.kill(child, signal.SIGKILL)
  status = os.waitpid(child, 0)[1]
  print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "exit %d" % os.WEXITSTATUS(status))
"""


def test_a_kill_in_the_middle_of_a_save_leaves_whole_steps(tmp_path):
  # a save commits its two items and then the step: 4, 5 and 6 belong to step 20
  trials = [("commit", n) for n in (4, 5, 6)] + [("delete", 2)]
  trials += [("time", t) for t in np.random.default_rng().uniform(0, 0.3, 2).round(4).tolist()]
  arguments = [(str(tmp_path / f"{kind}-{n}"), kind, n) for kind, n in trials]
  child = subprocess.run(
    [sys.executable, "-c", TRIALS, json.dumps(arguments)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert child.stdout.split() == ["9"] * len(trials), child.stderr
  abstract = {"w": np.empty(1 << 15, np.float32), "n": np.empty(3, np.int32)}
  unfinished = 0
  for directory, kind, n in arguments:
    left = [p.name for p in pathlib.Path(directory).iterdir() if not p.name.isdecimal()]
    unfinished += bool(left)
    with Checkpoints(directory) as checkpoints:
      steps = checkpoints.steps()
      if kind == "commit":
        assert steps == [10], (kind, n)
      for step in steps:
        state, found, _ = checkpoints.restore(abstract, step=step)
        w = np.random.default_rng(step).standard_normal(1 << 15, np.float32)
        assert equal(state, {"w": w, "n": np.full(3, step, np.int32)}), (kind, n)
        assert found == {"step": step}
      checkpoints.save(100000, abstract, {})
    left = [p.name for p in pathlib.Path(directory).iterdir() if not p.name.isdecimal()]
    assert left == [], (kind, n)
  assert unfinished >= 4
