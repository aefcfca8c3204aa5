"""The scripts in examples/ run on a tiny model and do what they say."""

import ast
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import peft_format
from posttrain_jax.models import decoder, hf
from posttrain_jax.rollout import engine
from tests import tiny

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path):
  """Runs a script with arguments in an empty folder; what its module holds."""
  monkeypatch.chdir(tmp_path)

  def run(name, *arguments):
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name))

  return run


def printed(capsys, name):
  return [float(x) for x in re.findall(rf"{name} (-?[\d.]+)", capsys.readouterr().out)]


def is_code(line):
  return line.strip() and not line.strip().startswith("#")


def test_dpo_has_twenty_lines_and_six_imports():
  text = (EXAMPLES / "dpo.py").read_text()
  docstring, *statements = ast.parse(text).body
  code = text.splitlines()[docstring.end_lineno :]
  assert len([line for line in code if is_code(line)]) <= 20
  assert len([s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]) <= 6
  assert ";" not in text


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_is_read_at_a_glance(path):
  assert len(path.read_text().splitlines()) < 40


def test_dpo(example, shared, tmp_path, capsys):
  held = example("dpo.py", shared / "model")
  said = capsys.readouterr().out
  losses = [float(x) for x in re.findall(r"loss ([\d.]+)", said)]
  margins = [float(x) for x in re.findall(r"margin (-?[\d.]+)", said)]
  assert abs(losses[0] - np.log(2)) < 1e-4  # the policy is its reference
  assert losses[-1] < losses[0]
  assert margins[-1] > margins[0] + 1e-3
  assert held["step"].function._cache_size() == 1  # one program for the first state and all others
  folder = tmp_path / "runs/dpo-example"
  saved, _ = peft_format.load(folder, held["params"], held["config"])
  jax.tree.map(np.testing.assert_array_equal, saved, held["state"].adapter)


@pytest.mark.slow
def test_sft(example, shared, tmp_path, capsys):
  held = example("sft.py", shared / "model")
  losses = printed(capsys, "loss")
  assert losses[-1] < losses[0]
  merged, _ = hf.load(tmp_path / "runs/sft-example-merged")
  change = merged["layers"]["self_attn"]["q_proj"]["weight"] - held["params"]["layers"][
    "self_attn"
  ]["q_proj"]["weight"].dense("float32")
  assert float(abs(change).max()) > 1e-4


@pytest.mark.slow
def test_sft_reads_a_file(example, shared, capsys):
  example("sft.py", shared / "model", shared / "rows.jsonl")
  losses = printed(capsys, "loss")
  assert losses[-1] < losses[0]


@pytest.mark.slow
def test_own_loss(example, shared, capsys):
  example("own_loss.py", shared / "model")
  losses = printed(capsys, "loss")
  assert losses[-1] < losses[0]


@pytest.mark.slow
def test_merge(example, shared, tmp_path, capsys):
  config = tiny.config()
  base, _ = hf.load(shared / "model")
  change = {}
  for seed, name in ((1, "first"), (2, "second")):
    change[name] = decoder.init(jax.random.key(seed), config, std=0.01)
    params = jax.tree.map(np.add, base, change[name])
    hf.save(tmp_path / name, params, config)
  example("merge.py", shared / "model", tmp_path / "first", tmp_path / "second", "merged")
  merged, _ = hf.load(tmp_path / "merged")
  moved = np.asarray(merged["lm_head"]["weight"] - base["lm_head"]["weight"])
  share = np.mean(np.abs(moved) > 1e-7)
  assert 0.2 < share < 0.4  # a fifth of each, few of them the same entries
  assert printed(capsys, "both:")[0] > 0


@pytest.mark.slow
def test_own_adapter(example, shared, tmp_path, capsys):
  held = example("own_adapter.py", shared / "model")
  losses = printed(capsys, "loss")
  assert losses[-1] < losses[0]
  merged, config = hf.load(tmp_path / "runs/own-adapter-merged")
  tokens = np.arange(3, 23)[None]
  bound = adapters.bind(held["base"], held["state"].adapter)
  apart, whole = (decoder.forward(params, tokens, config) for params in (bound, merged))
  np.testing.assert_allclose(apart, whole, rtol=1e-4, atol=1e-4)
  assert abs(whole - decoder.forward(held["base"], tokens, config)).max() > 1e-2


@pytest.mark.slow
def test_many_adapters(example, shared, capsys):
  held = example("many_adapters.py", shared / "model")
  assert len(re.findall(r"^adapter (?:0|1|-1): ", capsys.readouterr().out, re.MULTILINE)) == 3
  ask = lambda params: engine.generate(
    params, held["config"], [held["prompt"]], max_new_tokens=8, stop_tokens=held["ends"]
  )
  alone = [*(adapters.bind(held["params"], adapter) for adapter in held["learned"]), held["params"]]
  assert held["written"].tokens == [ask(params).tokens[0] for params in alone]
  assert held["written"].tokens[0] != held["written"].tokens[1]
