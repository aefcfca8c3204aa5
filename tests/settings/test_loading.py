"""A config file, its arguments and overrides: typed, known by name, refused with what to write instead."""

import contextlib
import json
import re
import sys
import textwrap
import types

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


def test_one_of_steps_and_epochs_says_how_long_a_run_is(tmp_path):
  """The one asked for takes the place of the file's."""
  length = lambda *given, path="sft": [settings.load(path, given)[name] for name in settings.LENGTH]
  assert length() == [100, None]
  assert length("--config.epochs=3") == [None, 3]
  assert length("--config.epochs=0.5") == [None, 0.5]
  assert length("--config.epochs=None") == [100, None]
  assert length("--config.steps=None", "--config.epochs=3") == [None, 3]
  with pytest.raises(ConfigError, match=r"epochs=True: write a number above 0"):
    length("--config.epochs=True")
  with pytest.raises(ConfigError, match=r"steps=7 and epochs=3 both say how long .* leave one"):
    length("--config.epochs=3", "--config.steps=7")
  mine = tmp_path / "mine.py"
  mine.write_text(
    "from posttrain_jax.configs import sft\n"
    "def get_config(arg=None):\n  c = sft.get_config(arg)\n  c.epochs = 2.0\n  return c\n"
  )
  with pytest.raises(ConfigError, match=r"steps=100 and epochs=2 both .* c.steps = None"):
    length(path=str(mine))
  assert length("--config.steps=7", path=str(mine)) == [7, None]
  recorded = tmp_path / "config.json"  # of a run, whose epochs came to 120 steps
  recorded.write_text(json.dumps({"config": {"steps": 120, "epochs": 3.0}}))
  assert length(path=str(recorded)) == [None, 3.0]
  assert length("--config.steps=7", path=str(recorded)) == [7, None]


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


def test_what_a_shipped_config_without_a_sweep_says_to_write_is_one(tmp_path):
  with pytest.raises(ConfigError, match=r"those of rl$") as error:
    settings.points("rl:method=grpo")
  lines = str(error.value).split("\n\n", 1)[1].rpartition("\n\n")[0]
  path = tmp_path / "sweep.py"
  path.write_text(textwrap.dedent(lines))
  points = settings.points(f"{path}:method=cispo")
  assert [fields for _, fields in points] == [{"optimizer.lr": 1e-5}, {"optimizer.lr": 1e-4}]
  assert settings.load(f"{path}:method=cispo").objective.loss == "cispo"


def test_points_of_a_sweep(file, tmp_path):
  with pytest.raises(ConfigError, match="has no sweep") as error:
    settings.points(file)
  assert "posttrain_jax.configs" not in str(error.value)
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


def folder_of(parent, name, rate):
  folder = parent / name
  folder.mkdir()
  (folder / "run.py").write_text(
    "import ml_collections\nimport common\n\ndef get_config(arg=None):\n  from late import STEPS\n"
    "  return ml_collections.ConfigDict({'lr': common.LR, 'steps': STEPS})\n\n"
    "def sweep():\n  yield '', {'lr': common.LR}\n"
  )
  (folder / "common.py").write_text(f"LR = {rate}\n")
  (folder / "late.py").write_text(f"STEPS = {int(rate * 10)}\n")
  return str(folder / "run.py")


def test_each_folder_has_its_own_helpers(tmp_path):
  """Two configs in one process, each with a `common`; what the program itself has under such a name stays."""
  first, second = (folder_of(tmp_path, name, rate) for name, rate in (("a", 0.1), ("b", 0.2)))
  path, mine = [*sys.path], types.ModuleType("common")
  sys.modules["common"] = mine
  try:
    for file, rate in ((first, 0.1), (second, 0.2), (first, 0.1)):
      assert settings.plain(settings.load(file)) == {"lr": rate, "steps": int(rate * 10)}
      assert settings.points(file) == [("", {"lr": rate})]
    assert sys.modules["common"] is mine
  finally:
    del sys.modules["common"]
  assert "late" not in sys.modules
  assert sys.path == path


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(arg=None):\n  c = 1\n  return c.x\n", r"run\.py:3: AttributeError: 'int'"),
    ("import not_there\n", r"run\.py:1: ModuleNotFoundError: No module named 'not_there'"),
    ("def get_config(arg=None:\n", r"run\.py:1: "),
    ("raise SystemExit(3)\n", r"run\.py:1: SystemExit: 3"),
    (
      "import ml_collections\ndef get_config(arg=None):\n  c = ml_collections.ConfigDict({'n': 1})\n"
      "  c.n = 2.5\n  return c\n",
      r"run\.py:4: TypeError",
    ),
    ("def get_config(arg=None):\n  return {}\n", "returned a dict, expected an ml_collections"),
    ("def get_config(arg=None):\n  pass\n", "returned a NoneType"),
  ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(text, message, tmp_path):
  (tmp_path / "run.py").write_text(text)
  with pytest.raises(ConfigError, match=message):
    settings.load(str(tmp_path / "run.py"))


@pytest.mark.parametrize(
  "text",
  [
    *(
      "columns={[]:1}",
      "columns={1:2}",
      "steps=" + "9" * 5000,
      "steps=" + "(" * 3000,
      "layers=" + "[" * 3000,
    ),
    *("=1", ".=1", "optimizer.=1", "a..b=1", "steps=", "optimizer.lr=1_", "flag=", "columns={'a':"),
  ],
)
def test_no_override_ends_in_anything_but_a_sentence(text, file):
  with contextlib.suppress(ConfigError):
    settings.load(file, [f"--config.{text}"])


def test_a_file_of_the_users_may_define_a_dataclass(tmp_path):
  """With annotations as strings, which dataclasses reads in the module by its name."""
  (tmp_path / "verify.py").write_text(
    "from __future__ import annotations\nimport dataclasses\n\n@dataclasses.dataclass\nclass Right:\n  to: float\n\n"
    "def verifier(prompt, completion, example):\n  return Right(1.0).to\n"
  )
  assert settings.function(str(tmp_path / "verify.py"), "verifier")("", "", {}) == 1.0
