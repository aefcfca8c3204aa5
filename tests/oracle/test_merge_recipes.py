"""Recipes, whole folders: `posttrain merge` and mergekit on the same YAML."""

import jax
import numpy as np
import pytest
import yaml

from posttrain_jax.build import merge as merging
from posttrain_jax.core import shards
from posttrain_jax.data import chat
from posttrain_jax.merge import vocabulary
from posttrain_jax.models import decoder, hf
from tests import tiny

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


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
  """Models of several vocabularies: tokens that one adds, that two have under other numbers, and rows of no token."""
  made = tmp_path_factory.mktemp("vocabularies")
  added = {"base": [], "a": ["<a>", "<both>"], "b": ["<both>", "<b>", " SELECT"], "padded": ["<b>"]}
  for i, (name, tokens) in enumerate(added.items()):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([t for t in tokens if t == " SELECT"])
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in tokens if t[0] == "<"]})
    rows = len(tokenizer) + 3 * (name == "padded")
    config = tiny.config(num_hidden_layers=1, vocab_size=rows, architectures=["LlamaForCausalLM"])
    params = decoder.init(jax.random.key(i), config, std=0.1)
    hf.save(made / name, jax.tree.map(lambda x: np.asarray(x, np.float32), params), config)
    tokenizer.save_pretrained(made / name)
  return made


SOURCES = {
  "union": dict(tokenizer_source="union"),
  "base": dict(tokenizer_source="base"),
  "a model": dict(tokenizer_source="@b"),
  "padded": dict(tokenizer=dict(source="union", pad_to_multiple_of=16)),
  "tokens": dict(
    # of the union, since new tokens in the base's tokenizer stop mergekit with a KeyError
    tokenizer=dict(
      source="union",
      tokens={
        "<b>": dict(source="@b", force=True),
        "<both>": dict(source=dict(kind="model_token", model="@a", token="<a>")),
        "<new>": dict(source=dict(kind="zero")),
        "<newer>": dict(source=dict(kind="model_token", model="@b", token_id=65), force=True),
      },
    )
  ),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_models_of_several_vocabularies(source, method, vocabularies, tmp_path):
  models = [each(name, weight=w) for name, w in (("a", 0.3), ("b", 0.5), ("padded", 0.7))]
  check_tokens(recipe(method, models, "@base", **SOURCES[source]), vocabularies, tmp_path)


def test_a_row_that_no_base_has_is_the_mean_of_those_there_are(vocabularies, tmp_path):
  # mergekit has no first model: its models are a set, and so the base of "base" and "union" is any of them
  models = [each(name, weight=w) for name, w in (("a", 0.3), ("padded", 0.5), ("base", 0.7))]
  found = recipe("linear", models, tokenizer_source="@b")
  check_tokens(found, vocabularies, tmp_path)


def check_tokens(found, models, tmp_path):
  """Row by token: new tokens have numbers in the order of mergekit's set of models."""
  a, b = both(yaml.safe_dump(found), models, tmp_path)
  ours, theirs = (chat.load_tokenizer(tmp_path / name).get_vocab() for name in ("ours", "theirs"))
  assert ours.keys() == theirs.keys()
  tokens = sorted(ours)
  for tensor in b.where:
    x, y = a.get(tensor), b.get(tensor)
    if vocabulary.has_rows(tensor):
      assert x.shape == y.shape
      np.testing.assert_allclose(x[len(ours) :], y[len(ours) :], rtol=0, atol=1e-6)
      x, y = x[[ours[t] for t in tokens]], y[[theirs[t] for t in tokens]]
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6, err_msg=tensor)
  found, config = hf.load(tmp_path / "ours")
  assert config.vocab_size == a.shape("model.embed_tokens.weight")[0] >= len(ours)
  assert np.isfinite(decoder.forward(found, np.arange(3, 9)[None], config)).all()


def both(text, models, tmp_path, **options):
  """The two folders that posttrain merge and mergekit make of a recipe."""
  text = text.replace("@", f"{models}/")
  (tmp_path / "recipe.yml").write_text(text)
  ours = merging.merge(str(tmp_path / "recipe.yml"), tmp_path / "ours")
  mergekit_merge.run_merge(
    mergekit_config.MergeConfiguration.model_validate(yaml.safe_load(text)),
    str(tmp_path / "theirs"),
    mergekit_options.MergeOptions(lazy_unpickle=True, **options),
  )
  return shards.Reader(ours), shards.Reader(tmp_path / "theirs")


def close(a, b, tensor):
  x, y = a.get(tensor), b.get(tensor)
  np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1, np.abs(y).max()), err_msg=tensor)


@pytest.mark.parametrize("name", RECIPES)
def test_the_folder_holds_mergekits_numbers(name, models, tmp_path):
  a, b = both(yaml.safe_dump(RECIPES[name]), models, tmp_path, copy_tokenizer=False)
  assert set(b.where) <= set(a.where)
  assert set(a.where) - set(b.where) <= {"lm_head.weight"}
  for tensor in b.where:
    close(a, b, tensor)
  found, config = hf.load(tmp_path / "ours")
  wanted = [s["sources"][0]["layer_range"] for s in RECIPES[name].get("slices", [])]
  assert config.num_layers == (sum(end - first for first, end in wanted) or LAYERS)
  assert np.isfinite(decoder.forward(found, np.arange(3, 9)[None], config)).all()
