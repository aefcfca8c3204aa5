"""A cache of compiled programs that a kill or a full disk left a part in."""

import os
import subprocess
import sys
import zlib

import pytest

from posttrain_jax.core import compiled

WHOLE = zlib.compress(os.urandom(2000))


def written(folder, name, data, age=0):
  path = folder / f"{name}-cache"
  path.write_bytes(data)
  os.utime(path, (1e9 - age, 1e9 - age))
  return path


def test_a_program_of_which_a_part_was_written_is_deleted_and_no_other(tmp_path):
  written(tmp_path, "whole", WHOLE)
  cut = [written(tmp_path, f"cut at {at}", WHOLE[:at], age=at) for at in (0, 1, 900, 2000)]
  written(tmp_path, "of another kind", b"nonsense")
  (tmp_path / "whole-atime").write_bytes(b"12345678")
  dropped = compiled.drop_cut(tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {"whole-cache", "whole-atime"}
  assert {*cut} < {*dropped}
  assert compiled.drop_cut(tmp_path) == compiled.drop_cut(tmp_path / "absent") == []


def test_only_the_newest_are_read(tmp_path):
  old = written(tmp_path, "old", WHOLE[:9], age=50)
  for at in range(3):
    written(tmp_path, f"new {at}", WHOLE)
  assert compiled.drop_cut(tmp_path, newest=3) == []
  assert compiled.drop_cut(tmp_path, newest=4) == [old]


def test_zstds_frames_are_read_where_python_has_it(tmp_path):
  zstd = pytest.importorskip("compression.zstd", reason="Python 3.14 has it")
  written(tmp_path, "whole", zstd.compress(WHOLE))
  cut = written(tmp_path, "cut", zstd.compress(WHOLE)[:-9])
  assert compiled.drop_cut(tmp_path) == [cut]


COMPILES = """
import sys, jax, jax.numpy as jnp
from posttrain_jax.commands import common
common.cache_compilations()
jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(8))
"""


@pytest.mark.slow
def test_a_command_compiles_what_was_cut_once_and_not_at_every_start(tmp_path):
  env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  env |= dict(JAX_PLATFORMS="cpu", POSTTRAIN_CACHE=str(tmp_path))

  def start():
    argv = [sys.executable, "-c", COMPILES]
    ended = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    (program,) = tmp_path.glob("compiled/jit__lambda*-cache")
    return program, "Error reading" in ended.stderr

  program, _ = start()
  whole = program.read_bytes()
  program.write_bytes(whole[:300])
  assert start() == (program, False)
  assert program.read_bytes()[:2] == whole[:2]
  assert len(program.read_bytes()) > 300
