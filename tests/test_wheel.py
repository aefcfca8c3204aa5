"""What `pip install` gives, without the clone: the command, the configs that come with it, and tables of tasks."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from posttrain_jax import settings
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
SETUPTOOLS = 77  # reads the license as pyproject.toml writes it
OWN = """
from posttrain_jax.configs import common, sft

def get_config(arg=None):
  c = sft.get_config(arg)
  c.steps = 7
  c.adapter = common.adapter("dora")
  return c
"""
BUILD = "import sys\nfrom setuptools import build_meta\nprint(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel of a copy of the sources."""
  version = importlib.metadata.version("setuptools")
  if int(version.partition(".")[0]) < SETUPTOOLS:
    pytest.skip(f"a wheel is built by setuptools >= {SETUPTOOLS}; this environment has {version}")
  source = tmp_path_factory.mktemp("source")
  for name in ("posttrain_jax", "configs"):
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source / name)
  built = tmp_path_factory.mktemp("wheel")
  command = [sys.executable, "-c", BUILD, str(built)]
  subprocess.run(command, check=True, cwd=source, capture_output=True, text=True)
  (file,) = built.glob("*.whl")
  return file


@pytest.fixture(scope="module")
def posttrain(wheel, tmp_path_factory):
  """The installed command in an environment that has the libraries of this one, run in an empty folder."""
  bare = tmp_path_factory.mktemp("bare")
  venv.create(bare, with_pip=False)
  (packages,) = bare.glob("lib/python*/site-packages")
  (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
  pip = [sys.executable, "-m", "pip", "--python", str(bare / "bin" / "python"), "install"]
  flags = ["--no-deps", "--no-index", "--force-reinstall", "--disable-pip-version-check"]
  subprocess.run([*pip, *flags, str(wheel)], check=True, capture_output=True)

  def run(folder, *argv):
    ours = ("PYTHONPATH", "XLA_FLAGS")  # the clone, and the eight devices of the tests
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [str(bare / "bin" / "posttrain"), *argv]
    return subprocess.run(
      command, check=False, cwd=folder, env=environment, capture_output=True, text=True
    )

  return run


def test_the_configs_are_in_it(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  configs = {f"posttrain_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
  assert configs <= names
  assert {name for name in names if name.endswith(".csv")}
  assert all(name.startswith(("posttrain_jax/", "posttrain_jax-")) for name in names)


def test_a_config_is_named_without_a_path_from_any_folder(posttrain, tmp_path):
  said = posttrain(tmp_path, "train", "--config=sft:adapter=vera", "--print_config")
  assert not said.returncode, said.stderr
  expected = settings.load(f"{ROOT / 'configs' / 'sft.py'}:adapter=vera")
  assert json.loads(said.stdout) == settings.plain(expected)
  assert not [*tmp_path.iterdir()]


BESIDE = {"__init__", "common", *settings.CHAINS}
SHIPPED = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - BESIDE)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_is_named_without_a_path(name, posttrain, tmp_path):
  said = posttrain(tmp_path, "train", f"--config={name}", "--print_config")
  assert not said.returncode, said.stderr
  assert json.loads(said.stdout) == settings.plain(settings.load(f"{ROOT / 'configs' / name}.py"))


def test_ones_own_config_imports_what_they_share(posttrain, tmp_path):
  (tmp_path / "mine.py").write_text(OWN)
  said = posttrain(tmp_path, "train", "--config=mine.py:base=nf4", "--print_config")
  assert not said.returncode, said.stderr
  config = json.loads(said.stdout)
  assert (config["steps"], config["model"]["base"]) == (7, "nf4")
  assert config["adapter"]["use_dora"]


@pytest.mark.slow
def test_the_quickstart_runs_from_an_empty_folder(posttrain, tmp_path):
  file = tiny.tiny_model_folder(tmp_path / "model") / "config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 1024}))
  said = posttrain(
    tmp_path,
    *("train", "--config=quickstart:model=model,smoke", "--workdir=run"),
    *("--config.data.length=1024", "--config.data.limit=16", "--config.eval.task="),
  )
  assert not said.returncode, said.stdout + said.stderr
  assert (tmp_path / "run" / "report.html").is_file()


def test_a_chain_is_named_without_a_path(posttrain, tmp_path):
  """And is found where the package lies; nothing runs, as the folder holds something else."""
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "notes.txt").touch()
  said = posttrain(tmp_path, "chain", "--config=chain", "--workdir=runs")
  assert said.returncode == 1
  assert "holds no chain" in said.stderr
