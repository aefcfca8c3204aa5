"""A config file, its arguments and overrides: typed, known by name, refused with what to write instead."""

import re

import pytest

from posttrain_jax import settings
from posttrain_jax.settings import ConfigError

FILE = """
import ml_collections
import helper

def get_config(arg=None):
  if arg == "wrong":
    raise ValueError("unknown config argument 'wrong': known are model")
  c = ml_collections.ConfigDict()
  c.steps, c.flag, c.name = 10, True, "x"
  c.optimizer = ml_collections.ConfigDict({"lr": 1e-3, "betas": (0.9, 0.99)})
  c.layers, c.columns = (), ml_collections.ConfigDict()
  c.system = ml_collections.config_dict.placeholder(str)
  c.argument = arg or helper.NONE
  return c
"""
SWEEP = """
def sweep():
  for lr in (1, 2):
    yield "", {"optimizer.lr": lr}
"""


@pytest.fixture
def file(tmp_path):
  (tmp_path / "run.py").write_text(FILE)
  (tmp_path / "helper.py").write_text("NONE = 'none'\n")
  return str(tmp_path / "run.py")


def test_arguments_go_to_the_file(file):
  assert settings.load(file).argument == "none"
  assert settings.load(f"{file}:a=1,b=2").argument == "a=1,b=2"


@pytest.mark.parametrize(
  ("text", "field", "value"),
  [
    ("steps=20", "steps", 20),
    ("optimizer.lr=1", "optimizer.lr", 1.0),
    ("optimizer.lr=2e-4", "optimizer.lr", 2e-4),
    ("flag=false", "flag", False),
    ("flag=0", "flag", False),
    ("name=7", "name", "7"),
    ("name=('q','v')", "name", ["q", "v"]),
    ("layers=3", "layers", [3]),
    ("layers=(1,2)", "layers", [1, 2]),
    ("optimizer.betas=(0.8,0.9)", "optimizer.betas", [0.8, 0.9]),
    ("system=be brief", "system", "be brief"),
    ("columns.prompt=question", "columns.prompt", "question"),
    ("columns={'prompt': ['a', 'b']}", "columns.prompt", ["a", "b"]),
    ("columns={'layers.0.q_proj': 8}", "columns.layers.0.q_proj", 8),
  ],
)
def test_an_override_takes_the_type_of_its_field(file, text, field, value):
  loaded = settings.flat(settings.plain(settings.load(file, [f"--config.{text}"])))
  assert loaded[field] == value
  assert type(loaded[field]) is type(value)
  unchanged = settings.flat(settings.plain(settings.load(file)))
  assert {k for k in loaded if loaded[k] != unchanged.get(k)} == {field}


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("optimizer.lrr=1", "unknown config key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
    ("optimiser.lr=1", "did you mean 'optimizer.lr'"),
    ("name.x=1", "unknown config key 'name.x'"),
    ("steps=1e3", "--config.steps=1e3: expected an integer, like 10"),
    ("optimizer.lr=fast", "expected a number, like 0.001"),
    ("flag=maybe", "expected true or false"),
    ("steps", "write --config.steps=value"),
    ("columns=question", "expected a dict"),
    ("optimizer={'lr': 1}", "optimizer holds betas, lr; set them one by one"),
  ],
)
def test_a_wrong_override_says_what_to_write(file, text, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    settings.load(file, [f"--config.{text}"])


def test_a_loaded_config_is_locked(file):
  with pytest.raises((AttributeError, KeyError)):
    settings.load(file).stepss = 3


def test_what_the_file_refuses_is_the_users_mistake(file):
  with pytest.raises(ConfigError, match="unknown config argument 'wrong'"):
    settings.load(f"{file}:wrong")


def test_a_file_that_is_not_there_or_no_config(file, tmp_path):
  with pytest.raises(ConfigError, match=r"rum\.py does not exist; there is .*run\.py"):
    settings.load(str(tmp_path / "rum.py"))
  with pytest.raises(ConfigError, match="no get_config"):
    settings.load(str(tmp_path / "helper.py"))
  (tmp_path / "run.txt").write_text(FILE)
  with pytest.raises(ConfigError, match=r"run\.txt is not a Python file"):
    settings.load(str(tmp_path / "run.txt"))


def test_points_of_a_sweep(file, tmp_path):
  with pytest.raises(ConfigError, match="has no sweep"):
    settings.points(file)
  (tmp_path / "run.py").write_text(FILE + SWEEP)
  points = settings.points(f"{file}:argument")
  assert points == [("", {"optimizer.lr": 1}), ("", {"optimizer.lr": 2})]
  (_, second) = points[1]
  overrides = [settings.override(field, value) for field, value in second.items()]
  assert settings.load(file, overrides).optimizer.lr == 2.0


def test_differences_name_the_fields():
  old = {"a": 1, "b": {"c": [1], "d": {}}, "e": 0}
  assert settings.differences(old, {**old}) == []
  new = {"a": 2, "b": {"c": [1], "d": {"x": 1}}, "f": 0}
  assert settings.differences(old, new) == [
    "a: 1 -> 2",
    "b.d: {} -> '(absent)'",
    "b.d.x: '(absent)' -> 1",
    "e: 0 -> '(absent)'",
    "f: '(absent)' -> 0",
  ]
