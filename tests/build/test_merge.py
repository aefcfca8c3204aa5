"""`posttrain merge`: the numbers of the operators on trees, whatever the files; whole or not at all."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from posttrain_jax import adapters, merge, quant
from posttrain_jax.__main__ import main
from posttrain_jax.adapters import peft_format
from posttrain_jax.build import merge as merging
from posttrain_jax.build import merge_meaning
from posttrain_jax.core import direct, shards, tree
from posttrain_jax.data import chat
from posttrain_jax.merge import blocks, methods, stream
from posttrain_jax.models import decoder, hf
from tests import tiny
from tests.adapters.cases import trained
from tests.marks import few
from tests.models import families

MODEL = tiny.config()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Folders "base", "a" and "b" of one kind, beside each other."""
  made = tmp_path_factory.mktemp("models")
  base = decoder.init(jax.random.key(0), MODEL, std=0.1)
  save(made / "base", base)
  for i, name in enumerate("ab", 1):
    tuned = jax.tree.map(
      lambda x, key: x + 0.02 * jax.random.normal(key, x.shape),
      base,
      keys(jax.random.key(i), base),
    )
    save(made / name, tuned)
  return made


def keys(key, like):
  leaves, structure = jax.tree.flatten(like)
  return jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))


def save(folder, params, config=MODEL):
  hf.save(folder, params, config)
  tiny.tokenizer().save_pretrained(folder)


def run(tmp_path, models, text, *options, out="out", name="recipe.yml"):
  path = write_recipe(tmp_path, models, text, name)
  return main(["merge", f"--recipe={path}", f"--out={tmp_path / out}", *options])


def write_recipe(tmp_path, models, text, name="recipe.yml"):
  (tmp_path / name).write_text(text.replace("@", f"{models}/"))
  return str(tmp_path / name)


def trees(models, *names):
  return [hf.load(models / name)[0] for name in names]


def assert_close(found, expected, tolerance=1e-6):
  found, expected = tree.flatten(found), tree.flatten(expected)
  assert found.keys() == expected.keys()
  for path, leaf in expected.items():
    np.testing.assert_allclose(found[path], leaf, rtol=0, atol=tolerance, err_msg=path)


TIES = """\
merge_method: ties
base_model: @base
models:
  - model: @a
    parameters: {density: 0.5, weight: 0.7}
  - model: @b
    parameters: {density: 0.3, weight: 0.4}
parameters: {normalize: true, int8_mask: true}
dtype: float32
"""


def test_a_recipe_is_the_operator_on_trees(tmp_path, models):
  assert run(tmp_path, models, TIES) == 0
  base, a, b = trees(models, "base", "a", "b")
  expected = merge.ties([a, b], base=base, density=[0.5, 0.3], weights=[0.7, 0.4])
  assert_close(trees(tmp_path, "out")[0], expected)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["dtype"] == "float32"
  assert (tmp_path / "out" / "tokenizer.json").exists()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yml"]


CASES = {
  "linear": (
    "merge_method: linear\nmodels:\n  - {model: @a, parameters: {weight: 1}}\n"
    "  - {model: @b, parameters: {weight: 3}}\n",
    lambda base, a, b: merge.linear([a, b], weights=[1, 3]),
  ),
  "slerp": (
    "merge_method: slerp\nbase_model: @base\nmodels: [{model: @base}, {model: @a}]\nparameters: {t: 0.3}\n",
    lambda base, a, b: merge.slerp(base, a, t=0.3),
  ),
  "dare_ties": (
    "merge_method: dare_ties\nbase_model: @base\nrandom_seed: 7\nmodels:\n"
    "  - {model: @a, parameters: {weight: 0.5, density: 0.6}}\n"
    "  - {model: @b, parameters: {weight: 0.5, density: 0.6}}\n",
    lambda base, a, b: merge.dare(
      [a, b],
      base=base,
      key=jax.random.key(7),
      density=0.6,
      weights=[0.5, 0.5],
      election="sum",
    ),
  ),
  "ties, peft's way": (
    "merge_method: ties\nbase_model: @base\nmodels:\n  - {model: @a, parameters: {weight: 0.5, density: 0.4}}\n"
    "  - {model: @b, parameters: {weight: 0.8, density: 0.4}}\nparameters: {semantics: peft}\n",
    lambda base, a, b: merge.ties(
      [a, b], base=base, density=0.4, weights=[0.5, 0.8], semantics="peft"
    ),
  ),
  "model_stock": (
    "merge_method: model_stock\nbase_model: @base\nmodels: [{model: @a}, {model: @b}]\n",
    lambda base, a, b: merge.model_stock([a, b], base=base),
  ),
  "sce": (
    "merge_method: sce\nbase_model: @base\nmodels: [{model: @a}, {model: @b}]\nparameters: {select_topk: 0.4}\n",
    lambda base, a, b: merge.sce([a, b], base=base, density=0.4),
  ),
  "karcher": (
    "merge_method: karcher\nmodels: [{model: @a}, {model: @b}, {model: @base}]\n",
    lambda base, a, b: merge.karcher([a, b, base]),
  ),
}


@pytest.mark.parametrize(
  "name", few(CASES, "linear", "slerp", "dare_ties", "ties, peft's way", "model_stock")
)
def test_methods_are_called_with_what_the_recipe_says(name, tmp_path, models):
  text, function = CASES[name]
  assert run(tmp_path, models, text) == 0
  assert_close(trees(tmp_path, "out")[0], function(*trees(models, "base", "a", "b")))


def test_a_gradient_runs_over_the_layers_and_a_filter_picks_tensors(tmp_path, models):
  text = """\
merge_method: linear
models:
  - model: @a
    parameters:
      weight:
        - {filter: mlp, value: [0.0, 1.0]}
        - {value: 0.25}
  - model: @b
    parameters: {weight: 0.5}
parameters: {normalize: false}
"""
  assert run(tmp_path, models, text) == 0
  a, b = (tree.flatten(each) for each in trees(models, "a", "b"))
  for path, leaf in tree.flatten(trees(tmp_path, "out")[0]).items():
    if "mlp" in path:
      weights = np.linspace(0, 1, MODEL.num_layers)
      weights = weights.reshape(-1, *[1] * (leaf.ndim - 1))
    else:
      weights = 0.25
    np.testing.assert_allclose(leaf, weights * a[path] + 0.5 * b[path], atol=1e-6, err_msg=path)


def test_a_tensor_that_no_model_has_a_weight_for_is_the_bases(tmp_path, models):
  weight = "[{filter: mlp, value: 1.0}, {value: 0.0}]"
  text = TIES.replace("weight: 0.7", f"weight: {weight}").replace(
    "weight: 0.4", f"weight: {weight}"
  )
  assert run(tmp_path, models, text) == 0
  base, found = (tree.flatten(hf.load(f)[0]) for f in (models / "base", tmp_path / "out"))
  changed = {path for path in base if not np.array_equal(base[path], found[path])}
  assert changed == {path for path in base if "mlp" in path}


def test_slices_stack_layers(tmp_path, models):
  text = """\
merge_method: passthrough
slices:
  - sources: [{model: @a, layer_range: [0, 2]}]
  - sources: [{model: @b, layer_range: [1, 2], parameters: {scale: 0.5}}]
"""
  assert run(tmp_path, models, text) == 0
  found, config = hf.load(tmp_path / "out")
  assert config.num_layers == 3
  a, b = (tree.flatten(each) for each in trees(models, "a", "b"))
  for path, leaf in tree.flatten(found).items():
    if path.startswith("layers/"):
      expected = np.concatenate([a[path][:2], 0.5 * np.asarray(b[path][1:2])])
    else:
      expected = a[path] if "embed" in path else 0.5 * np.asarray(b[path])
    np.testing.assert_allclose(leaf, expected, atol=1e-6, err_msg=path)
  tokens = np.arange(3, 9)[None]
  assert np.isfinite(decoder.forward(found, tokens, config)).all()


def test_an_adapter_is_merged_into_its_base_when_that_is_read(tmp_path, models):
  params, config = hf.load(models / "base")
  folders = []
  for method in ("lora", "dora"):
    chosen = adapters.AdapterConfig(method=method, r=3, target_modules=("q_proj", "lm_head"))
    _, adapter = adapters.init(jax.random.key(1), params, chosen)
    adapter = trained(adapter)
    folders.append((tmp_path / method, adapter))
    peft_format.save(tmp_path / method, adapter, chosen, config)
  listed = "".join(
    f"  - {{model: {models}/base+{folder}, parameters: {{weight: 0.5}}}}\n" for folder, _ in folders
  )
  assert run(tmp_path, models, f"merge_method: linear\nmodels:\n{listed}") == 0
  merged = [adapters.merge(params, adapter) for _, adapter in folders]
  assert_close(trees(tmp_path, "out")[0], merge.linear(merged), 1e-5)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantised_base_is_made_dense_and_takes_its_adapter(tmp_path, storage):
  """As `adapters.merge` makes it: what was trained, in a folder of plain matrices."""
  config = tiny.config(hidden_size=64, intermediate_size=128)
  stored = quant.quantize_params(decoder.init(jax.random.key(0), config, std=0.1), storage=storage)
  save(tmp_path / "base", stored, config)
  chosen = adapters.AdapterConfig(r=3, target_modules=("q_proj", "down_proj"))
  adapter = trained(adapters.init(jax.random.key(1), stored, chosen)[1])
  peft_format.save(tmp_path / "own", adapter, chosen, config)
  text = "merge_method: linear\nmodels:\n  - {model: @base+@own, parameters: {weight: 1.0}}\n"
  assert run(tmp_path, tmp_path, text) == 0
  assert_close(trees(tmp_path, "out")[0], adapters.merge(stored, adapter), 1e-6)
  assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_an_adapter_of_a_bfloat16_base_is_rounded_once(tmp_path):
  params = jax.tree.map(
    lambda x: x.astype("bfloat16"), decoder.init(jax.random.key(0), MODEL, std=0.1)
  )
  save(tmp_path / "base", params)
  chosen = adapters.AdapterConfig(r=3, target_modules=("q_proj",))
  adapter = trained(adapters.init(jax.random.key(1), params, chosen)[1])
  peft_format.save(tmp_path / "own", adapter, chosen, MODEL)
  text = "merge_method: linear\ndtype: float32\nmodels:\n  - {model: @base+@own, parameters: {weight: 1.0}}\n"
  assert run(tmp_path, tmp_path, text) == 0
  wide = jax.tree.map(lambda x: x.astype(np.float32), params)
  assert_close(trees(tmp_path, "out")[0], adapters.merge(wide, adapter), 1e-6)


def test_bfloat16_in_and_out(tmp_path, models):
  text = TIES.replace("dtype: float32", "dtype: bfloat16")
  assert run(tmp_path, models, text) == 0
  assert run(tmp_path, models, TIES, out="wide", name="wide.yml") == 0
  narrow, wide = shards.Reader(tmp_path / "out"), shards.Reader(tmp_path / "wide")
  for name in wide.where:
    assert narrow.stored(name) == "BF16"
    np.testing.assert_array_equal(narrow.get(name), wide.get(name).astype(narrow.get(name).dtype))


# --- tokenizers ------------------------------------------------------------------------------------------------------

AVERAGE = "merge_method: linear\nmodels:\n" + "".join(
  f"  - {{model: @{name}, parameters: {{weight: 1}}}}\n" for name in ("base", "a", "b")
)


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory, models):
  """ "a" and "b" of two vocabularies: a token each, of one number, and a row for it."""
  made = tmp_path_factory.mktemp("tokenised")
  (made / "base").symlink_to(models / "base")
  for name in "ab":
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{name}>"], special_tokens=True)
    config = tiny.config(vocab_size=len(tokenizer))
    params = decoder.init(jax.random.key(ord(name)), config, std=0.1)
    hf.save(made / name, params, config)
    tokenizer.save_pretrained(made / name)
  return made


def test_a_union_has_everybodys_tokens(tmp_path, tokenised):
  assert run(tmp_path, tokenised, AVERAGE + "tokenizer_source: union\n") == 0
  config = hf.read_config(tmp_path / "out")
  folders = {name: tokenised / name for name in ("base", "a", "b")} | {"out": tmp_path / "out"}
  vocabularies = {name: chat.load_tokenizer(folder).get_vocab() for name, folder in folders.items()}
  out = vocabularies["out"]
  assert out.keys() == vocabularies["a"].keys() | vocabularies["b"].keys()
  assert config.vocab_size == len(out)
  held = {name: hf.load(folder)[0]["embed_tokens"]["weight"] for name, folder in folders.items()}
  row = lambda name, token: held[name][vocabularies[name][token]]
  for name in "ab":  # lent to all, so that the mean is its own
    np.testing.assert_allclose(row("out", f"<{name}>"), row(name, f"<{name}>"), rtol=1e-6)
  mean = (row("base", "i") + row("a", "i") + row("b", "i")) / 3
  np.testing.assert_allclose(row("out", "i"), mean, rtol=1e-5)
  tokenizer = chat.load_tokenizer(tmp_path / "out")
  assert tokenizer.convert_ids_to_tokens(tokenizer("<a><b>")["input_ids"]) == ["<a>", "<b>"]
  assert tokenizer.chat_template == tiny.tokenizer().chat_template


def test_rows_of_one_number_and_two_tokens_are_said(tmp_path, tokenised, caplog):
  text = AVERAGE.replace("  - {model: @base, parameters: {weight: 1}}\n", "")
  assert run(tmp_path, tokenised, text) == 0
  assert "is '<a>' in one and '<b>' in the other; rows are merged by number" in caplog.text
  caplog.clear()
  assert run(tmp_path, tokenised, text + "tokenizer_source: base\n", out="base") == 0
  assert "merged by number" not in caplog.text


def test_models_of_one_vocabulary_keep_their_rows(tmp_path, models):
  assert run(tmp_path, models, AVERAGE) == 0
  assert run(tmp_path, models, AVERAGE + "tokenizer_source: union\n", out="union") == 0
  assert contents(tmp_path / "out") == contents(tmp_path / "union")


def test_models_of_two_sizes_want_to_be_told(tmp_path, tokenised, capsys):
  assert run(tmp_path, tokenised, AVERAGE) == 1
  assert "tokenizer_source: union" in capsys.readouterr().err


# --- killed, resumed -------------------------------------------------------------------------------------------------


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
def test_a_killed_merge_leaves_nothing_that_looks_whole_and_goes_on(
  method, tmp_path, models, monkeypatch
):
  monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
  text = TIES.replace("merge_method: ties", f"merge_method: {method}")
  assert run(tmp_path, models, text, out="whole") == 0
  apply, called = methods.apply, []

  def killed(recipe, wanted, arrays, **options):
    called.append(wanted.name)
    if len(called) == 9:
      raise KeyboardInterrupt
    return apply(recipe, wanted, arrays, **options)

  monkeypatch.setattr(methods, "apply", killed)
  assert run(tmp_path, models, text) == 130
  assert not (tmp_path / "out").exists()
  standing = list((tmp_path / ".out.merging").glob("*.safetensors"))
  assert standing
  called.extend([""] * 9)
  assert run(tmp_path, models, text) == 0
  again = len(called) - 18
  found = shards.Reader(tmp_path / "out")
  assert again < len(found.where)  # what was whole is not computed again
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")
  assert not (tmp_path / ".out.merging").exists()


def test_what_another_recipe_began_is_not_gone_on_with(tmp_path, models, monkeypatch):
  monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
  finish = merging._finish
  monkeypatch.setattr(merging, "_finish", lambda *a: (_ for _ in ()).throw(OSError("full")))
  assert run(tmp_path, models, TIES) == 1
  assert (tmp_path / ".out.merging").exists()
  monkeypatch.setattr(merging, "_finish", finish)
  other = TIES.replace("weight: 0.7", "weight: 0.1")
  assert run(tmp_path, models, other) == 0
  base, a, b = trees(models, "base", "a", "b")
  expected = merge.ties([a, b], base=base, density=[0.5, 0.3], weights=[0.1, 0.4])
  assert_close(trees(tmp_path, "out")[0], expected)


def test_the_bytes_do_not_depend_on_how_the_result_is_cut(tmp_path, models, monkeypatch):
  text = CASES["dare_ties"][0]
  assert run(tmp_path, models, text, out="one") == 0
  monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
  assert run(tmp_path, models, text, out="many") == 0
  one, many = shards.Reader(tmp_path / "one"), shards.Reader(tmp_path / "many")
  assert len(set(many.where.values())) > 3
  assert one.where.keys() == many.where.keys()
  for name in one.where:
    np.testing.assert_array_equal(one.get(name), many.get(name))


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
def test_the_bytes_do_not_depend_on_the_workers(method, tmp_path, models):
  text = TIES.replace("merge_method: ties", f"merge_method: {method}")
  for workers in ("1", "3"):
    assert run(tmp_path, models, text, f"--workers={workers}", out=workers) == 0
  assert contents(tmp_path / "1") == contents(tmp_path / "3")
  assert run(tmp_path, models, text, "--workers=0", out="none") == 1


# --- block by block --------------------------------------------------------------------------------------------------

ELEMENTWISE = {
  "linear": "merge_method: linear\nmodels:\n  - {model: @a, parameters: {weight: 0.6}}\n"
  "  - {model: @b, parameters: {weight: 0.3}}\n",
  "task_arithmetic": "merge_method: task_arithmetic\nbase_model: @base\nmodels:\n"
  "  - {model: @a, parameters: {weight: 0.6}}\n  - {model: @b, parameters: {weight: 0.3}}\n",
  "passthrough": "merge_method: passthrough\nmodels:\n  - {model: @a, parameters: {scale: 0.7}}\n",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ELEMENTWISE)
def test_block_by_block_has_the_bytes_of_tensor_by_tensor(
  method, dtype, tmp_path, models, monkeypatch
):
  text = f"{ELEMENTWISE[method]}dtype: {dtype}\n"
  monkeypatch.setattr(blocks, "places", lambda *a: None)
  assert run(tmp_path, models, text, out="tensors") == 0
  monkeypatch.undo()
  monkeypatch.setattr(direct, "BLOCK", 3 * direct.ALIGNED + 1)  # which cuts tensors, and numbers
  monkeypatch.setattr(blocks, "NUMBERS", 1000)
  assert run(tmp_path, models, text, out="blocks") == 0
  assert contents(tmp_path / "blocks") == contents(tmp_path / "tensors")


def test_every_elementwise_method_is_compared(models):
  assert set(ELEMENTWISE) == {name for name, m in methods.METHODS.items() if m.elementwise}


def test_a_nan_in_a_block_is_said_of_its_tensor(tmp_path, models, capsys):
  shutil.copytree(models / "a", tmp_path / "a")
  rewrite(tmp_path / "a", lambda t: t["model.norm.weight"].__setitem__(3, np.nan))
  text = ELEMENTWISE["task_arithmetic"].replace("@a", str(tmp_path / "a")).replace("0.6", "0.0")
  assert run(tmp_path, models, text) == 1
  assert "tensor 'model.norm.weight' holds 1 NaN of 64 numbers" in capsys.readouterr().err
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "recipe.yml"]


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_a_killed_blockwise_merge_goes_on(method, tmp_path, models, monkeypatch):
  monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
  text = ELEMENTWISE[method]
  assert run(tmp_path, models, text, out="whole") == 0
  write, files_written = blocks.write, []

  def killed(path, *args, **options):
    files_written.append(path.name)
    if len(files_written) == 3:
      raise KeyboardInterrupt
    write(path, *args, **options)

  monkeypatch.setattr(blocks, "write", killed)
  assert run(tmp_path, models, text) == 130
  assert not (tmp_path / "out").exists()
  assert run(tmp_path, models, text) == 0
  assert len(set(files_written)) == len(files_written) - 1  # the third alone was begun twice
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- refused ---------------------------------------------------------------------------------------------------------


def changed(**changes):
  """TIES with top-level fields changed, or taken out where None."""
  found = yaml.safe_load(TIES.replace("@", "HERE/"))
  for name, value in changes.items():
    found[name] = value
    if value is None:
      del found[name]
  return yaml.safe_dump(found).replace("HERE/", "@")


def model(**parameters):
  return [{"model": "HERE/a", "parameters": parameters}]


def token(**source):
  return dict(source="base", tokens={"<x>": dict(source=source)})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(merge_methd="ties"), "unknown key merge_methd.*did you mean 'merge_method'"),
    (dict(merge_method=None), "merge_method is missing"),
    (dict(merge_method="tie"), "known are linear.*did you mean 'ties'"),
    (dict(base_model=None), "ties starts from a base: write base_model"),
    (dict(models=None), "exactly one of models, slices and modules; here is none"),
    (dict(slices=[]), None),
    (dict(models=[{"model": "HERE/a", "params": {}}]), r"unknown key models\[0\].params"),
    (dict(models=model(weight=1, densty=0.5)), "parameter 'densty': ties reads weight, density"),
    (dict(models=model(density=0.5)), "ties needs the parameter 'weight' of .*a for"),
    (dict(models=model(weight=1, density=1.5)), r"embed_tokens.*density=1.5.*\[0, 1\]"),
    (dict(models=model(weight=0, density=1)), "all weights are zero: the merge would be the base"),
    (dict(models=model(weight={"a": 1})), "write a number, a list of them"),
    (dict(dtype="int8"), "dtype='int8': known are float32"),
    (dict(models=[{"model": "HERE/base"}]), "no model beside the base"),
    (dict(models=[{"model": "HERE/nowhere", "parameters": {"weight": 1}}]), "nowhere"),
    (dict(tokenizer_source="HERE/nowhere"), "nowhere"),
    (dict(tokenizer=dict(source="base", pad_to_multiple_of=0.5)), "write a whole number"),
    (dict(tokenizer=dict(source="base", pad=8)), "unknown key tokenizer.pad"),
    (
      dict(tokenizer=dict(tokens={"<x>": {"force": True}})),
      "<x>: expected a mapping with `source`",
    ),
    (
      dict(tokenizer=dict(tokens={"<x>": {"source": {"kind": "none"}}})),
      "write zero or model_token",
    ),
    (
      dict(tokenizer=token(kind="zero", token="a")),
      "unknown key tokenizer.tokens.<x>.source.token",
    ),
    (dict(tokenizer=token(kind="model_token", model="HERE/a")), "write one of token and token_id"),
    (
      dict(tokenizer=token(kind="model_token", model="HERE/a", token_id=261)),
      "'<x>' takes the row 261 of .*a, whose 261 rows lack it",
    ),
    (
      dict(tokenizer=token(kind="model_token", model="HERE/a", token="<y>")),
      "'<x>' takes the token '<y>' of .*a",
    ),
    (dict(tokenizer=dict(tokens={"<x>": {"source": "HERE/c"}})), "/c, which is not merged"),
    (dict(tokenizer=dict(tokens={"<x>": {"source": "HERE/a"}})), "the token '<x>' of .*a"),
    (dict(random_seed="x"), "write a whole number"),
  ],
)
def test_mistakes_are_named_before_anything_is_written(changes, message, tmp_path, models, capsys):
  if message is None:
    assert run(tmp_path, models, changed(**changes)) == 0
    return
  assert run(tmp_path, models, changed(**changes)) == 1
  found = capsys.readouterr().err
  assert re.search(message, found), found
  assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


@pytest.mark.parametrize(
  ("size", "message"),
  [
    (dict(vocab_size=300), "their vocabularies differ"),
    (dict(num_hidden_layers=3), "has 3 layers, .* has 2"),
    (dict(intermediate_size=64), "has shape"),
  ],
)
def test_models_of_another_kind_are_refused(size, message, tmp_path, models, capsys):
  config = tiny.config(**size)
  hf.save(tmp_path / "other", decoder.init(jax.random.key(0), config), config)
  text = TIES.replace("@b\n", f"{tmp_path / 'other'}\n")
  assert run(tmp_path, models, text) == 1
  found = capsys.readouterr().err
  assert re.search(message, found), found
  assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "recipe.yml"]


@pytest.mark.parametrize(
  ("described", "said"),
  [
    (
      dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32),
      "num_attention_heads .4 and 2",
    ),
    (dict(hidden_act="gelu_pytorch_tanh"), "hidden_act .'silu' and 'gelu_tanh'"),
    (dict(model_type="gemma2", hidden_activation="gelu_pytorch_tanh"), "norm_plus_one .False and"),
    (dict(model_type="phi3"), "model_type .'llama' and 'phi3'"),
  ],
)
def test_equal_shapes_that_are_another_function_are_refused(
  tmp_path, models, capsys, described, said
):
  shutil.copytree(models / "b", tmp_path / "b")
  rewrite(tmp_path / "b", lambda t: None, **described)
  assert run(tmp_path, models, TIES.replace("@b\n", f"{tmp_path / 'b'}\n")) == 1
  assert re.search(f"base and .*/b differ in .*{said}", capsys.readouterr().err)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("described", "said"),
  [
    (dict(rope_parameters=dict(rope_theta=5e5)), r"rope_theta \(10000.0 and 500000.0\)"),
    (
      dict(rope_parameters=dict(rope_type="linear", factor=4.0)),
      r"rope_type \('default' and 'linear'\), rope_factor \(1.0 and 4.0\)",
    ),
    (dict(rms_norm_eps=1e-3), r"rms_norm_eps \(1e-05 and 0.001\)"),
    (
      dict(model_type="mistral", sliding_window=8),
      r"model_type \('llama' and 'mistral'\).*sliding_window \(None and 8\)",
    ),
    (dict(eos_token_id=257, bos_token_id=256), r"bos_token_id \(None and 256\), eos_token_id"),
    (dict(max_position_embeddings=64), r"max_position_embeddings \(128 and 64\)"),
  ],
)
def test_what_a_fine_tune_may_have_changed_is_said_with_both_values(
  tmp_path, models, caplog, described, said
):
  shutil.copytree(models / "b", tmp_path / "b")
  rewrite(tmp_path / "b", lambda t: None, **described)
  recipe = merging.read(write_recipe(tmp_path, models, TIES.replace("@b\n", f"{tmp_path / 'b'}\n")))
  merge_meaning.check(recipe, {model: pathlib.Path(model.name) for model in recipe.models()})
  (record,) = caplog.records
  assert re.search(said, record.getMessage()), record.getMessage()


def test_a_missing_shard_a_full_disk_and_a_folder_that_is_there(
  tmp_path, models, capsys, monkeypatch
):
  monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
  save(tmp_path / "cut", trees(models, "a")[0])
  lost = sorted((tmp_path / "cut").glob("model-*.safetensors"))[1]
  lost.unlink()
  assert run(tmp_path, models, TIES.replace("@a\n", f"{tmp_path / 'cut'}\n")) == 1
  assert lost.name in capsys.readouterr().err
  usage = stream.shutil.disk_usage(tmp_path)
  monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: usage._replace(free=1000))
  assert run(tmp_path, models, TIES) == 1
  assert "nothing was written" in capsys.readouterr().err
  assert not list(tmp_path.glob("*out*"))
  (tmp_path / "out").mkdir()
  assert run(tmp_path, models, TIES) == 1
  assert "exists; name a new folder" in capsys.readouterr().err


def test_a_config_file_is_a_recipe_too(tmp_path, models):
  path = tmp_path / "soup.py"
  path.write_text(
    "import ml_collections\n"
    "def get_config(arg=None):\n"
    "  each = lambda name: dict(model=f'{arg}/{name}', parameters=dict(weight=1.0))\n"
    "  return ml_collections.ConfigDict(dict(merge_method='linear', models=(each('a'), each('b'))))\n"
  )
  assert main(["merge", f"--recipe={path}:{models}", f"--out={tmp_path / 'out'}"]) == 0
  assert_close(trees(tmp_path, "out")[0], merge.soup(trees(models, "a", "b")))


def test_the_models_and_the_merge_are_scored(tmp_path, models, capsys):
  rows = [{"prompt": f"say {'ab'[i % 2]}", "completion": "ab" * (i + 1)} for i in range(6)]
  tiny.write_jsonl(tmp_path / "held.jsonl", rows)
  (tmp_path / "recipe.yml").write_text(TIES.replace("@", f"{models}/"))
  command = ["merge", f"--recipe={tmp_path / 'recipe.yml'}", f"--out={tmp_path / 'out'}"]
  assert main([*command, f"--evaluate={tmp_path / 'nothing.jsonl'}"]) == 1
  assert "no such file" in capsys.readouterr().err
  assert main([*command, f"--evaluate={tmp_path / 'held.jsonl'}"]) == 0
  told = json.loads((tmp_path / "out" / "merge_report.json").read_text())
  assert list(told["scores"]) == [*(f"{models}/{name}" for name in ("base", "a", "b")), "merge"]
  assert list(told["layers"]) == ["embedding", "0", "1", "end"]
  capsys.readouterr()
  assert main(["eval", f"--model={tmp_path / 'out'}", f"--data={tmp_path / 'held.jsonl'}"]) == 0
  loss = json.loads(capsys.readouterr().out)["loss"]
  assert told["scores"]["merge"]["held, loss"] == pytest.approx(loss, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Files of one model that say it in several ways
# ---------------------------------------------------------------------------------------------------------------------

LINEAR = """\
merge_method: linear
models:
  - model: {}
    parameters: {{weight: 0.5}}
  - model: {}
    parameters: {{weight: 0.5}}
"""
HALVES = dict(weights=[0.5, 0.5])


def rewrite(folder, edit, **described):
  """Edits a folder's tensors, and keys of its config.json."""
  tensors = load_file(folder / "model.safetensors")
  edit(tensors)
  save_file(tensors, folder / "model.safetensors")
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | described))
  return folder


def held(folder):
  return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("own", [False, True], ids=["copy", "own"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_tied_model_and_one_with_a_head_in_its_file_are_merged(tmp_path, models, own, order):
  """A copy of the embedding is no head; where one has a head of its own the other's is its embedding."""
  tied = dict(tie_word_embeddings=True)
  for name in "ab":
    shutil.copytree(models / name, tmp_path / name)
  rewrite(tmp_path / "a", lambda t: t.pop("lm_head.weight"), **tied)
  if not own:
    copy = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    rewrite(tmp_path / "b", copy, **tied)
  folders = [tmp_path / "ab"[i] for i in order]
  assert run(tmp_path, models, LINEAR.format(*folders)) == 0
  merged, config = hf.load(tmp_path / "out")
  assert config.tied == (not own)
  a, b = (held(tmp_path / name) for name in "ab")
  mean = lambda one, other: 0.5 * a[one] + 0.5 * b[other]
  if own:
    head = mean("model.embed_tokens.weight", "lm_head.weight")
    np.testing.assert_allclose(merged["lm_head"]["weight"], head.T, atol=1e-6)
  embedding = mean(*2 * ["model.embed_tokens.weight"])
  np.testing.assert_allclose(merged["embed_tokens"]["weight"], embedding, atol=1e-6)


@pytest.mark.parametrize("both", [False, True])
def test_buffers_that_the_config_gives_are_left_out(tmp_path, models, both):
  for name in "ab":
    shutil.copytree(models / name, tmp_path / name)
    if both or name == "a":
      names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
      buffers = dict.fromkeys(names, np.ones(8, np.float32))
      rewrite(tmp_path / name, lambda t, buffers=buffers: t.update(buffers))
  text = LINEAR.format(tmp_path / "a", tmp_path / "b") + "parameters: {normalize: false}\n"
  assert run(tmp_path, models, text) == 0
  assert not [name for name in held(tmp_path / "out") if "inv_freq" in name]
  merged = merge.linear(trees(models, "a", "b"), **HALVES)
  assert_close(trees(tmp_path, "out")[0], merged)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
  """Folders "one" and "other" of a multimodal model, whose vision tower has more layers than its text model."""
  folder = tmp_path_factory.mktemp("seeing")
  config = families.config("gemma3", vocab_size=261)
  for seed, name in enumerate(("one", "other")):
    save(folder / name, families.params(config, seed), config)
    rng = np.random.default_rng(seed)
    tower = {
      f"vision_tower.encoder.layers.{i}.mlp.fc1.weight": rng.standard_normal((4, 4)).astype("f4")
      for i in range(5)
    }
    described = json.loads((folder / name / "config.json").read_text())
    edit = lambda t, tower=tower: t.update(
      {f"language_model.{key}": t.pop(key) for key in list(t)} | tower
    )
    rewrite(folder / name, edit)
    described = dict(model_type="gemma3", text_config=described, vision_config={})
    (folder / name / "config.json").write_text(json.dumps(described))
  return folder


def test_models_that_see_are_merged_with_what_they_see_with(tmp_path, seeing):
  text = LINEAR.format(seeing / "one", seeing / "other")
  assert run(tmp_path, seeing, text) == 0
  one, other = held(seeing / "one"), held(seeing / "other")
  found = held(tmp_path / "out")
  assert found.keys() == one.keys()
  for name, array in found.items():
    np.testing.assert_allclose(array, (one[name] + other[name]) / 2, atol=1e-6, err_msg=name)
  assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "gemma3"
  merged = merge.linear(trees(seeing, "one", "other"), **HALVES)
  assert_close(trees(tmp_path, "out")[0], merged)


def test_slices_of_a_model_that_sees_are_of_its_text_model(tmp_path, seeing):
  text = f"""\
merge_method: passthrough
slices:
  - sources: [{{model: {seeing / "one"}, layer_range: [0, 2]}}]
  - sources: [{{model: {seeing / "other"}, layer_range: [1, 2]}}]
"""
  assert run(tmp_path, seeing, text) == 0
  params, config = hf.load(tmp_path / "out")
  assert config.num_layers == 3
  one, other = trees(seeing, "one", "other")
  q = lambda params, i: params["layers"]["self_attn"]["q_proj"]["weight"][i]
  np.testing.assert_array_equal(q(params, 1), q(one, 1))
  np.testing.assert_array_equal(q(params, 2), q(other, 1))


def test_an_adapter_of_a_model_that_sees_is_merged_when_that_is_read(tmp_path, seeing):
  params, config = hf.load(seeing / "one")
  chosen = adapters.AdapterConfig(r=2, target_modules=["q_proj", "up_proj"])
  adapter = trained(adapters.init(jax.random.key(0), params, chosen)[1])
  peft_format.save(tmp_path / "lora", adapter, chosen, config)
  text = f"merge_method: passthrough\nmodels:\n  - model: {seeing / 'one'}+{tmp_path / 'lora'}\n"
  assert run(tmp_path, seeing, text) == 0
  assert_close(trees(tmp_path, "out")[0], adapters.merge(params, adapter))


def test_a_tied_head_keeps_to_the_embedding_that_an_adapter_changes(tmp_path, models):
  """As PEFT computes it; merged in place the head went along with the embedding."""
  config = tiny.config(tie_word_embeddings=True)
  params = decoder.init(jax.random.key(0), config, std=0.1)
  save(tmp_path / "tied", params, config)
  chosen = adapters.AdapterConfig(r=2, target_modules=["embed_tokens", "lm_head"])
  adapter = trained(adapters.init(jax.random.key(0), params, chosen)[1])
  peft_format.save(tmp_path / "lora", adapter, chosen, config)
  text = f"merge_method: passthrough\nmodels:\n  - model: {tmp_path}/tied+{tmp_path}/lora\n"
  assert run(tmp_path, models, text) == 0
  assert_close(trees(tmp_path, "out")[0], adapters.merge(params, adapter))


@pytest.mark.parametrize(
  "text",
  [
    TIES.replace("0.5, weight: 0.7", "5e-1, weight: '7e-1'"),
    TIES.replace("0.5, weight", "[5E-1, '0.5'], weight"),
    TIES.replace("density: 0.5", "density: [{filter: mlp, value: +5.0e-1}, {value: .5e0}]"),
  ],
)
def test_numbers_that_yaml_takes_for_words_are_numbers(tmp_path, models, text):
  assert run(tmp_path, models, TIES, out="plain") == 0
  assert run(tmp_path, models, text) == 0
  assert_close(trees(tmp_path, "out")[0], trees(tmp_path, "plain")[0], tolerance=0)


def test_numbers_that_float16_has_no_place_for_are_not_written(tmp_path, models, capsys):
  shutil.copytree(models / "a", tmp_path / "a")
  large = lambda t: t["model.norm.weight"].__setitem__(3, 1e6)
  rewrite(tmp_path / "a", large)
  text = f"merge_method: passthrough\nmodels:\n  - model: {tmp_path / 'a'}\ndtype: float16\n"
  assert run(tmp_path, models, text) == 1
  said = capsys.readouterr().err
  assert "model.norm.weight is not finite when merged: float16 ends at 6.55e+04" in said
  assert "go up to 1e+06; write dtype: bfloat16 or float32" in said
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "recipe.yml"]
  assert run(tmp_path, models, text.replace(": float16", ": bfloat16")) == 0


def test_a_nan_is_not_merged_away(tmp_path, models, capsys):
  shutil.copytree(models / "a", tmp_path / "a")
  rewrite(tmp_path / "a", lambda t: t["model.norm.weight"].__setitem__(3, np.nan))
  assert run(tmp_path, models, TIES.replace("@a\n", f"{tmp_path / 'a'}\n")) == 1
  assert "tensor 'model.norm.weight' holds 1 NaN of 64 numbers" in capsys.readouterr().err
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "recipe.yml"]


def test_a_model_that_stands_in_a_recipe_twice_is_said(tmp_path, models, caplog):
  (tmp_path / "again").symlink_to(models / "a")
  assert run(tmp_path, models, LINEAR.format(models / "a", tmp_path / "again")) == 0
  assert f"{models / 'a'} stands in the recipe twice" in caplog.text
  caplog.clear()
  assert run(tmp_path, models, TIES, out="other") == 0
  assert "twice" not in caplog.text


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (("0.7}", "0.7, weight: 0.2}"), "line 5 says 'weight' a second time: write one of them"),
    (("normalize: true", "normalize: maybe"), "normalize='maybe': write true or false"),
    (("weight: 0.7", "weight: heavy"), "weight='heavy': write a number"),
    (("weight: 0.7", "weight: true"), "weight=True: write a number"),
    (("weight: 0.7", "weight: [0.1, [0.2]]"), r"weight=\[0.1, \[0.2\]\]: write a number"),
    (("weight: 0.7", "weight: &a [{value: *a}]"), "nested without end|weight=.*: write a number"),
    (("weight: 0.7", "weight: 1e999"), "weight=.*: write a number"),
    (("- model: @a", "- model: {model: {paths: 3}}"), "expected `model` and `lora` with a `path`"),
    (("dtype: float32", "chat_template: [3]"), r"chat_template=\[3\]: write a template's name"),
  ],
)
def test_what_no_recipe_means_is_a_sentence(tmp_path, models, capsys, change, said):
  assert run(tmp_path, models, TIES.replace(*change)) == 1
  error = capsys.readouterr().err
  assert re.search(said, error), error
  assert "Traceback" not in error
  assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yml"]


def test_aliases_that_would_fill_the_memory_are_a_sentence(tmp_path, models, capsys):
  lines = [
    "a0: &a0 [x, x]",
    *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)),
  ]
  inner = "[" * 3000
  assert run(tmp_path, models, TIES.replace("weight: 0.7", f"weight: {inner}")) == 1
  assert run(tmp_path, models, "\n".join(lines) + "\n" + TIES.replace("0.7", "*a39")) == 1
  assert "Traceback" not in capsys.readouterr().err
