"""Recipes, whole folders: `posttrain merge` and mergekit on the same YAML."""

import jax
import numpy as np
import pytest
import yaml

from posttrain_jax.core import shards
from posttrain_jax.models import decoder, hf
from posttrain_jax.train import merging
from tests.train import tiny

mergekit_config = pytest.importorskip("mergekit.config")
mergekit_merge = pytest.importorskip("mergekit.merge")
mergekit_options = pytest.importorskip("mergekit.options")

pytestmark = pytest.mark.oracle

LAYERS = 4
MODEL = tiny.config(num_hidden_layers=LAYERS, architectures=["LlamaForCausalLM"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  made = tmp_path_factory.mktemp("models")
  base = decoder.init(jax.random.key(0), MODEL, std=0.1)
  rng = np.random.default_rng(0)
  for name in ("base", "a", "b"):
    step = 0.0 if name == "base" else 0.03
    params = jax.tree.map(
      lambda x, step=step: np.asarray(x + step * rng.standard_normal(x.shape), np.float32), base
    )
    hf.save(made / name, params, MODEL)
    tiny.tokenizer().save_pretrained(made / name)
  return made


def each(name, **parameters):
  return {"model": f"@{name}", **({"parameters": parameters} if parameters else {})}


def part(name, first, end, **parameters):
  return {**each(name, **parameters), "layer_range": [first, end]}


def recipe(method, models=None, base=None, parameters=None, **more):
  found = {"merge_method": method, "dtype": "float32", **more}
  for key, value in (("models", models), ("base_model", base), ("parameters", parameters)):
    if value is not None:
      found[key] = value
  return found


GRADIENT = [0.1, 0.9, 0.4]
FILTERS = [
  {"filter": "self_attn", "value": [0.0, 0.5, 1.0]},
  {"filter": "mlp", "value": [1.0, 0.0]},
  {"value": 0.25},
]
RECIPES = {
  "linear": recipe("linear", [each("a", weight=0.3), each("b", weight=1.1)]),
  "linear, not normalised": recipe(
    "linear", [each("a", weight=0.3), each("b", weight=1.1)], parameters={"normalize": False}
  ),
  "linear, gradient": recipe("linear", [each("a", weight=GRADIENT), each("base", weight=0.5)]),
  "linear, filters": recipe("linear", [each("a", weight=FILTERS), each("b", weight=0.5)]),
  "slerp": recipe("slerp", [each("base"), each("a")], "@base", {"t": FILTERS}),
  "nuslerp": recipe("nuslerp", [each("a", weight=0.3), each("b", weight=0.9)]),
  "nuslerp, rows": recipe(
    "nuslerp",
    [each("a", weight=0.3), each("b", weight=0.9)],
    "@base",
    {"nuslerp_flatten": False, "nuslerp_row_wise": True},
  ),
  "nuslerp, columns": recipe(
    "nuslerp",
    [each("a", weight=0.3), each("b", weight=0.9)],
    parameters={"nuslerp_flatten": False},
  ),
  "multislerp": recipe("multislerp", [each("a", weight=0.3), each("b", weight=0.9)]),
  "karcher": recipe("karcher", [each("a"), each("b"), each("base")], parameters={"max_iter": 50}),
  "task_arithmetic": recipe(
    "task_arithmetic",
    [each("a", weight=0.7), each("b", weight=-0.4)],
    "@base",
    {"lambda": 0.8},
  ),
  "ties": recipe(
    "ties",
    [each("a", weight=GRADIENT, density=0.4), each("b", weight=0.6, density=[0.9, 0.2])],
    "@base",
    {"normalize": True, "lambda": 1.2},
  ),
  "ties, base listed": recipe(
    "ties", [each("base"), each("a", weight=0.7), each("b", weight=0.6, density=0.5)], "@base"
  ),
  "breadcrumbs_ties": recipe(
    "breadcrumbs_ties",
    [each("a", weight=0.7, density=0.6, gamma=0.1), each("b", weight=0.6, density=0.5)],
    "@base",
  ),
  "model_stock": recipe("model_stock", [each("a"), each("b")], "@base"),
  "sce": recipe("sce", [each("a"), each("b")], "@base", {"select_topk": 0.4}),
  "passthrough": recipe(
    "passthrough",
    slices=[
      {"sources": [part("a", 0, 3)]},
      {"sources": [part("b", 1, 4, scale=[{"filter": "o_proj", "value": 0.0}, {"value": 1.0}])]},
    ],
  ),
  "slices of linear": recipe(
    "linear",
    slices=[
      {"sources": [part("a", 0, 2, weight=1), part("b", 2, 4, weight=GRADIENT)]},
      {"sources": [part("b", 1, 3, weight=0.3), part("base", 0, 2, weight=1)]},
    ],
  ),
  "slices of slerp": recipe(
    "slerp",
    base="@base",
    parameters={"t": [0.0, 1.0]},
    slices=[
      {"sources": [part("base", 0, 2), part("a", 0, 2)], "parameters": {"t": 0.3}},
      {"sources": [part("base", 2, 4), part("a", 2, 4)]},
    ],
  ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_folder_holds_mergekits_numbers(name, models, tmp_path):
  text = yaml.safe_dump(RECIPES[name]).replace("'@", "'").replace("@", f"{models}/")
  for model in ("base", "a", "b"):
    text = text.replace(f"'{model}'", f"{models}/{model}")
  (tmp_path / "recipe.yml").write_text(text)
  ours = merging.merge(str(tmp_path / "recipe.yml"), tmp_path / "ours")
  mergekit_merge.run_merge(
    mergekit_config.MergeConfiguration.model_validate(yaml.safe_load(text)),
    str(tmp_path / "theirs"),
    mergekit_options.MergeOptions(copy_tokenizer=False, lazy_unpickle=True),
  )
  a, b = shards.Reader(ours), shards.Reader(tmp_path / "theirs")
  assert set(b.where) <= set(a.where)
  assert set(a.where) - set(b.where) <= {"lm_head.weight"}
  for tensor in b.where:
    x, y = a.get(tensor), b.get(tensor)
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1, np.abs(y).max()), err_msg=tensor)
  found, config = hf.load(ours)
  wanted = [s["sources"][0]["layer_range"] for s in RECIPES[name].get("slices", [])]
  assert config.num_layers == (sum(end - first for first, end in wanted) or LAYERS)
  assert np.isfinite(decoder.forward(found, np.arange(3, 9)[None], config)).all()
