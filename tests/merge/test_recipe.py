"""A recipe is read as mergekit reads it: which value counts where, which tensor comes from where, what is refused."""

import pytest

from posttrain_jax.merge import recipe
from posttrain_jax.merge.recipe import ModelRef, RecipeError, TokenRow

A, B, BASE = ModelRef("a"), ModelRef("b"), ModelRef("base")


def read(**changes):
  """A sum of a and b, with fields changed, or taken out where None."""
  found = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], **changes}
  return recipe.read({name: x for name, x in found.items() if x is not None})


def sliced(*parts):
  """A recipe of slices, each a list of (model, first, end)."""
  source = lambda model, first, end: {"model": model, "layer_range": [first, end]}
  slices = [{"sources": [source(*one) for one in part]} for part in parts]
  return read(models=None, slices=slices)


def test_the_base_is_a_source_and_leads():
  found = read(base_model="base")
  assert [one.model for one in found.slices[0].sources] == [A, B, BASE]
  assert found.leading == BASE
  assert found.models() == [BASE, A, B]
  named = read(base_model="b")
  assert [one.model for one in named.slices[0].sources] == [A, B]
  assert named.models() == [B, A]
  assert read().leading == A


@pytest.mark.parametrize(
  ("written", "read_as"),
  [
    ("a", ModelRef("a")),
    ("a+b", ModelRef("a", "b")),
    ("org/a+b+c", ModelRef("org/a+b", "c")),
    ({"model": "a"}, ModelRef("a")),
    ({"model": {"path": "a"}, "lora": {"path": "b"}}, ModelRef("a", "b")),
    ({"model": "a", "lora": "b"}, ModelRef("a", "b")),
  ],
)
def test_a_model_is_a_name_an_adapter_on_it_or_mergekits_mapping(written, read_as):
  (source,) = read(models=[{"model": written}]).slices[0].sources
  assert source.model == read_as


def test_a_parameter_is_looked_up_at_the_model_then_the_slice_the_module_the_recipe():
  levels = ("model", "slice", "module", "recipe")
  for nearest, expected in enumerate(levels):
    given = lambda level, n=nearest: {"weight": level} if levels.index(level) >= n else {}
    one = {"model": "a", "layer_range": [0, 2], "parameters": given("model")}
    body = {
      "slices": [{"sources": [one], "parameters": given("slice")}],
      "parameters": given("module"),
    }
    found = read(models=None, modules={"text": body}, parameters=given("recipe"))
    (part,) = found.slices
    assert found.setting("weight", "norm", 0.0, part, part.sources[0]) == expected
  assert found.setting("density", "norm", 0.0, part, part.sources[0]) is None


def test_the_next_level_is_asked_where_no_filter_fits():
  only_mlp = {"weight": [{"filter": "mlp", "value": 0.25}]}
  found = read(models=[{"model": "a", "parameters": only_mlp}], parameters={"weight": 2})
  (part,) = found.slices
  values = [found.setting("weight", x, 0.0, part, part.sources[0]) for x in ("mlp.up", "norm")]
  assert values == [0.25, 2]
  assert found.setting("weight", "mlp.up", 0.0, part) == 2  # not of a model


@pytest.mark.parametrize(
  ("given", "at", "expected"),
  [
    (3, 0.3, 3),
    (True, 0.3, True),
    ([5], 0.7, 5),
    ([0, 10, 40], 0.0, 0),
    ([0, 10, 40], 0.25, 5),
    ([0, 10, 40], 0.5, 10),
    ([0, 10, 40], 0.75, 25),
    ([0, 10, 40], 1.0, 40),
    ([{"filter": "attn", "value": 1}, {"filter": "mlp", "value": [2, 4]}, {"value": 9}], 0.5, 3),
    ([{"filter": "attn", "value": 1}, {"filter": "*", "value": 7}], 0.5, 7),
    ([{"filter": "attn", "value": 1}], 0.5, None),
  ],
)
def test_a_value_is_a_number_a_gradient_over_the_layers_or_the_first_filter_that_fits(
  given, at, expected
):
  assert recipe.value(given, "layers.3.mlp.up_proj", at) == expected


def test_a_gradient_may_stand_in_a_filter():
  given = [{"filter": "mlp", "value": [0, 1.5]}, {"value": True}]
  found = read(parameters={"weight": [1, 2], "t": given})
  assert found.parameters == {"weight": [1, 2], "t": given}


NAMES = (
  "embed.weight",
  "layers.0.mlp",
  "layers.0.norm",
  "layers.1.mlp",
  "layers.1.norm",
  "norm.weight",
)


def test_whole_models_give_every_tensor_from_all_of_them():
  wanted = [*recipe.tensors(read(), NAMES, layers=2)]
  assert [one.name for one in wanted] == [*NAMES]
  assert [one.at for one in wanted] == [0, 0, 0, 1, 1, 0]
  for one in wanted:
    assert [(source.model, name) for source, name in one.inputs] == [(A, one.name), (B, one.name)]


def test_slices_are_stacked_and_renumbered():
  found = sliced([("a", 0, 1)], [("b", 1, 4), ("a", 2, 5)])
  assert not found.whole
  wanted = [*recipe.tensors(found, NAMES, layers=6)]
  said = {one.name: [f"{source.model} {name}" for source, name in one.inputs] for one in wanted}
  expected = {
    "embed.weight": ["a embed.weight"],
    "layers.0.mlp": ["a layers.0.mlp"],
    "layers.0.norm": ["a layers.0.norm"],
    "layers.1.mlp": ["b layers.1.mlp", "a layers.2.mlp"],
    "layers.1.norm": ["b layers.1.norm", "a layers.2.norm"],
    "layers.2.mlp": ["b layers.2.mlp", "a layers.3.mlp"],
    "layers.2.norm": ["b layers.2.norm", "a layers.3.norm"],
    "layers.3.mlp": ["b layers.3.mlp", "a layers.4.mlp"],
    "layers.3.norm": ["b layers.3.norm", "a layers.4.norm"],
    "norm.weight": ["b norm.weight", "a norm.weight"],
  }
  assert [*said.items()] == [*expected.items()]
  assert [one.at for one in wanted if one.name.endswith("mlp")] == [1, 0, 0.5, 1]  # a slice's own


def test_one_module_is_the_recipe():
  body = {"models": [{"model": "a"}], "parameters": {"weight": 0.5}}
  found = read(models=None, modules={"text": body})
  assert found.whole
  assert found.module == {"weight": 0.5}
  assert found.models() == [A]


@pytest.mark.parametrize(
  ("tokens", "row"),
  [
    ({"source": "a"}, TokenRow(A)),
    ({"source": {"model": "a", "lora": "b"}}, TokenRow(ModelRef("a", "b"))),
    ({"source": {"kind": "zero"}, "force": True}, TokenRow(None, force=True)),
    ({"source": {"kind": "model_token", "model": "a", "token": "y"}}, TokenRow(A, "y")),
    ({"source": {"kind": "model_token", "model": "a", "token_id": 0}}, TokenRow(A, None, 0)),
  ],
)
def test_a_tokens_row_is_a_models_another_tokens_or_zeros(tokens, row):
  found = read(tokenizer={"source": "base", "tokens": {"x": tokens}, "pad_to_multiple_of": 8})
  assert found.vocabulary == recipe.Vocabulary(A, {"x": row}, 8)


def test_a_vocabulary_is_a_models_or_everybodys():
  assert read().vocabulary is None
  assert read(tokenizer_source="union").vocabulary == recipe.Vocabulary(None, {}, 1)
  assert read(tokenizer_source="base").vocabulary.source == A
  assert read(tokenizer_source="base", base_model="base").vocabulary.source == BASE
  assert read(tokenizer_source="b").vocabulary.source == B
  assert read(tokenizer={"source": "union"}).vocabulary == recipe.Vocabulary(None, {}, 1)
  assert read(tokenizer={"pad_to_multiple_of": 1}).vocabulary == recipe.Vocabulary(None, {}, 1)


def test_the_results_dtype_is_out_dtype_or_else_dtype():
  assert read().dtype is None
  assert read(dtype="float16").dtype == "float16"
  assert read(dtype="float16", out_dtype="bfloat16").dtype == "bfloat16"
  assert (read().seed, read(random_seed=3).seed) == (0, 3)


SOURCES = [{"model": "a", "layer_range": [0, 2]}]
BODY = {"slices": [{"sources": SOURCES}]}
ONE = {"model": "a"}


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(models=[]), "exactly one of models, slices and modules; here is none"),
    (dict(slices=BODY["slices"]), "here is models and slices"),
    (dict(models="ab"), "models: expected a list"),
    (dict(models={"model": "a"}), "models: expected a list"),
    (dict(models=["a"]), r"models\[0\]: expected a mapping with `model`, found 'a'"),
    (dict(models=[ONE, {"parameters": {}}]), r"models\[1\]: there is no `model`"),
    (dict(models=[{"model": "a", "layer_range": [0, 1]}]), "unknown key .*layer_range"),
    (dict(models=[{"model": 3}]), r"models\[0\].model: expected a model's name or folder, found 3"),
    (dict(models=[{"model": ""}]), "expected a model's name or folder"),
    (dict(models=[{"model": {"path": "a"}}]), r"unknown key models\[0\].model.path"),
    (dict(models=[{"model": "a", "parameters": 3}]), r"models\[0\].parameters: expected a mapping"),
    (dict(parameters={"t": []}), r"parameters.t=\[\]: write a number"),
    (dict(parameters={"t": [1, "two"]}), "parameters.t=.*: write a number"),
    (dict(parameters={"t": float("nan")}), "parameters.t=nan: write a number"),
    (dict(parameters={"t": [{"filter": "mlp"}]}), "parameters.t=.*: write a number"),
    (dict(parameters={"t": [{"value": 1}, 3]}), "parameters.t=.*: write a number"),
    (dict(parameters={"t": [{"value": 1, "fliter": "mlp"}]}), "unknown key parameters.t.fliter"),
    (dict(models=None, slices="ab"), "slices: expected a list"),
    (dict(models=None, slices=[SOURCES]), r"slices\[0\]: expected a mapping with `sources`"),
    (
      dict(models=None, slices=[{"sources": []}]),
      r"slices\[0\]: expected a mapping with `sources`",
    ),
    (dict(models=None, slices=[{"sources": SOURCES, "x": 1}]), r"unknown key slices\[0\].x"),
    (
      dict(models=None, slices=[{"sources": [*SOURCES, {"model": "b", "layer_range": [1, 2]}]}]),
      r"slices\[0\]: its sources have layer ranges of different lengths",
    ),
    *(
      (
        dict(models=None, slices=[{"sources": [{"model": "a", "layer_range": layers}]}]),
        r"slices\[0\].sources\[0\].layer_range=.*: write \[first, end\]",
      )
      for layers in (None, 2, [0], [0, 1, 2], [0, 1.5], [1, 1], [2, 1], [-1, 1])
    ),
    (dict(models=None, modules=[BODY]), "modules: one module is merged"),
    (dict(models=None, modules={"text": BODY, "vision": BODY}), "modules: one module is merged"),
    (dict(models=None, modules={"text": [ONE]}), "modules.text: expected a mapping"),
    (dict(models=None, modules={"text": {"parameters": {}}}), "write either models or slices"),
    (
      dict(models=None, modules={"text": {**BODY, "models": [ONE]}}),
      "write either models or slices",
    ),
    (dict(models=None, modules={"text": {**BODY, "x": 1}}), "unknown key modules.text.x"),
    (
      dict(models=None, modules={"text": {**BODY, "parameters": 3}}),
      "modules.text.parameters: expected a mapping",
    ),
    (dict(merge_method=3), "merge_method is missing"),
    (dict(out_dtype="int8"), "out_dtype='int8': known are float32, float16, bfloat16"),
    (dict(random_seed=True), "random_seed=True: write a whole number"),
    (dict(tokenizer_source="a", tokenizer={"source": "a"}), "not both"),
    (dict(tokenizer="union"), "tokenizer: expected a mapping with `source`"),
    (dict(tokenizer={"tokens": ["x"]}), "tokenizer.tokens: expected a mapping of tokens"),
    (dict(tokenizer={"pad_to_multiple_of": -8}), "pad_to_multiple_of=-8: write a whole number"),
    (
      dict(tokenizer={"tokens": {"x": "a"}}),
      "tokenizer.tokens.x: expected a mapping with `source`",
    ),
    (
      dict(tokenizer={"tokens": {"x": {"force": True}}}),
      "tokenizer.tokens.x: expected a mapping with `source`",
    ),
    (
      dict(tokenizer={"tokens": {"x": {"source": "a", "frce": True}}}),
      "unknown key tokenizer.tokens.x.frce.*did you mean 'force'",
    ),
    (
      dict(
        tokenizer={
          "tokens": {
            "x": {"source": {"kind": "model_token", "model": "a", "token": "y", "token_id": 1}}
          }
        }
      ),
      "tokenizer.tokens.x.source: write one of token and token_id",
    ),
  ],
)
def test_what_is_refused(changes, said):
  with pytest.raises(RecipeError, match=said):
    read(**changes)


def test_a_file_is_named_in_its_errors(tmp_path):
  path = tmp_path / "soup.yml"
  for text, said in (
    ("[a", "is not YAML"),
    ("- a", "a recipe is a mapping"),
    ("a: 1", "unknown key a"),
  ):
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"{path}.*{said}"):
      recipe.load(path)
  path.write_text("{merge_method: linear, models: [{model: a}, {model: b}]}")
  assert recipe.load(path) == read()
