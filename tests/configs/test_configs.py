"""Every config file: it loads, its arguments are checked, each of its points differs from the others."""

import dataclasses
import json
import pathlib
import re

import pytest

from posttrain_jax import adapters, settings
from posttrain_jax.adapters.config import OPTIONS
from posttrain_jax.build import adapter, optimizer
from posttrain_jax.models.shapes import SHAPES
from posttrain_jax.settings import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
HELPERS = ("__init__.py", "common.py", *(f"{name}.py" for name in settings.CHAINS))
CONFIGS = sorted(p.name for p in (ROOT / "configs").glob("*.py") if p.name not in HELPERS)


def load(name, arguments="", overrides=()):
  return settings.load(f"{ROOT / 'configs' / name}:{arguments}", overrides)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_plain_data(name):
  config = settings.plain(load(name))
  assert json.loads(json.dumps(config)) == config
  assert config["steps"] >= 1


@pytest.mark.parametrize("name", CONFIGS)
def test_its_docstring_holds_its_command(name):
  """Its own, or that of a target of the Makefile which runs it."""
  text = settings.module(str(ROOT / "configs" / name)).__doc__
  makefile = (ROOT / "Makefile").read_text()
  for target in re.findall(r"make (\w+)", text):
    text += re.search(rf"^{target}:.*\n((\t|ifeq|else|endif).*\n)+", makefile, re.MULTILINE)[0]
  shipped = name.removesuffix(".py")
  assert re.search(rf"--config=(configs/{re.escape(name)}|{shipped}\b)", text)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_smoke_run_is_small(name):
  full, smoke = load(name), load(name, "smoke")
  assert smoke.steps <= 4 < full.steps
  assert smoke.batch.rows <= full.batch.rows


@pytest.mark.parametrize("name", CONFIGS)
def test_its_fields_make_an_adapter_and_an_optimizer(name):
  config = load(name, "", ["adapter.r=5", "optimizer.lr=0.25", "optimizer.schedule=constant"])
  _, rate = optimizer.make(config, SHAPES["llama3-8b"])
  assert rate(config.steps // 2) == 0.25
  assert adapter.described(config).r == 5
  assert adapter.described(load(name, "adapter=none")) is None


SAVED = ("embed_tokens", "norm", "layernorm")


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_reads_its_section_and_trains_a_head_beside(method):
  section = load("sft.py", f"adapter={method}").adapter.to_dict()
  assert section["modules_to_save"] == (SAVED if method == "longlora" else ())
  config = adapters.from_section(section, whole=("score",), steps=100)
  assert config.method == method
  assert config.modules_to_save[-1] == "score"


def test_methods_that_train_together_have_a_section_each():
  section = load("sft.py", "adapter=prompt+lora").adapter
  assert sorted(section) == ["lora", "method", "prompt"]
  config = adapters.from_section(section.to_dict())
  apart = [load("sft.py", f"adapter={name}").adapter.to_dict() for name in ("prompt", "lora")]
  assert config.parts == tuple(adapters.from_section(one) for one in apart)
  for wrong in ("lora+lora", "none+lora"):
    with pytest.raises(ConfigError, match="write two methods, each once"):
      load("sft.py", f"adapter={wrong}")


@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "longlora", "prompt", "prefix"])
def test_every_number_of_an_adapter_reaches_it(method):
  """One at a time, one higher than it was, and nothing else moves."""
  before = load("sft.py", f"adapter={method}")
  plain = dataclasses.asdict(adapter.described(before))
  numbers = {k: v for k, v in before.adapter.items() if type(v) in (int, float)}
  assert numbers
  for field, value in numbers.items():
    overrides = [settings.override(f"adapter.{field}", type(value)(value + 1))]
    if field == "lora_dropout":
      overrides = ["adapter.lora_dropout=0.5"]
    after = dataclasses.asdict(adapter.described(load("sft.py", f"adapter={method}", overrides)))
    moved = {name for name in after if after[name] != plain[name]}
    assert moved == {field}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ("adaptr=lora", "unknown config argument 'adaptr'.*did you mean 'adapter'"),
    ("adapter=lorra", "adapter='lorra': known are none, lora"),
    ("adapter=prompt+lorra", "adapter='lorra': known are none, lora"),
    ("base=int3", "base='int3': known are dense, nf4, fp4, int8"),
    ("smoke=perhaps", "write true or false"),
  ],
)
def test_a_wrong_argument_is_explained(name, arguments, message):
  with pytest.raises(ConfigError, match=message):
    load(name, arguments)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_points_of_its_sweep_differ(name):
  file = str(ROOT / "configs" / name)
  if "sweep" not in vars(settings.module(file)):
    assert "def sweep" not in pathlib.Path(file).read_text()
    return
  resolved = [
    json.dumps(
      settings.plain(load(name, arguments, [settings.override(*f) for f in fields.items()]))
    )
    for arguments, fields in settings.points(file)
  ]
  assert len({*resolved}) == len(resolved) > 1


@pytest.mark.parametrize(
  ("overrides", "gold"),
  [((), 4), (("batch.rows=16",), 8), (("online.gold_rows=3", "batch.rows=16"), 3)],
)
def test_a_share_of_the_students_own_rows_follows_the_batch(overrides, gold):
  told = [f"--config.{field}" for field in overrides]
  config = settings.load("distil:teacher=small,on_policy=0.5", told)
  assert config.online.gold_rows == gold


def test_a_plus_in_a_path_is_none_between_names(tmp_path):
  path = tmp_path / "c++" / "mine.py"
  path.parent.mkdir()
  path.write_text("def f(prompt, completion, example): ...\n")
  mine, folder = f"{path}:f", str(path.parent)
  loaded = settings.load(f"rl:reward=number+{mine}+{folder}+{mine},tools=python+{mine}", [])
  assert loaded.reward.parts == ("number", mine, folder, mine)
  assert loaded.online.tools == ("python", mine)
  assert settings.load("rl:reward=number+gone/c+/x.py:f", []).reward.parts[1:] == (
    "gone/c",
    "/x.py:f",
  )


def test_a_config_is_named_without_its_path(tmp_path, monkeypatch):
  """Whatever folder it is asked from; one that is not there gets the names."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "sft").mkdir()
  for name in CONFIGS:
    assert settings.load(f"{name.removesuffix('.py')}:smoke") == load(name, "smoke")
  assert settings.points("sft") == settings.points(str(ROOT / "configs" / "sft.py"))
  with pytest.raises(ConfigError, match=r"comes with posttrain is --config=sft$"):
    settings.load("configs/sft.py")
  with pytest.raises(ConfigError, match="without a path there are beta_rank, distil, grouped, kto"):
    settings.load("common")
