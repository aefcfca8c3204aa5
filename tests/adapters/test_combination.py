"""Several methods in one trained adapter: one tree, each at paths of its own; a folder of PEFT's for each."""

import functools

import jax
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import (
  AdapterConfig,
  Combination,
  from_section,
  parts_of,
  peft_format,
  together,
)
from posttrain_jax.core import files, tree
from posttrain_jax.models import decoder
from tests.adapters.kinds import moved
from tests.marks import slow
from tests.models import families

KEY = jax.random.key(0)
PARTS = {
  "prompt": AdapterConfig(method="prompt", num_virtual_tokens=3),
  "prefix": AdapterConfig(method="prefix", num_virtual_tokens=2),
  "lora": AdapterConfig(r=2, modules_to_save=("model.norm",)),
  "dora": AdapterConfig(method="dora", r=2),
  "vera": AdapterConfig(method="vera", r=3, target_modules=("up_proj", "down_proj")),
  "adalora": AdapterConfig(method="adalora", init_r=3, target_r=2, total_step=9),
  "ia3": AdapterConfig(method="ia3", target_modules=("k_proj",), feedforward_modules=()),
}
PARTS["pissa"] = AdapterConfig(method="pissa", r=2, target_modules=("q_proj", "v_proj"))
SETS = [
  ("prompt", "lora"),
  ("prefix", "dora"),
  ("prompt", "prefix"),
  ("prompt", "adalora"),
  ("vera", "ia3"),
  ("pissa", "vera"),
  ("prompt", "ia3", "vera"),
]
FAST = (("prompt", "lora"), ("vera", "ia3"), ("prefix", "dora"))
every = pytest.mark.parametrize(
  "methods", [slow(one) if one not in FAST else one for one in SETS], ids="+".join
)


def close(actual, expected, rtol=1e-5):
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


def made(methods):
  """(model config, the base, what training sees of it, config, adapter away from its start)."""
  model, params = families.make("llama")
  config = together([PARTS[name] for name in methods])
  left, adapter = adapters.init(KEY, params, config)
  return model, params, left, config, moved(adapter, size=0.2)


@functools.partial(jax.jit, static_argnames="config")
def logits(params, adapter, tokens, config):
  return decoder.forward(adapters.bind(params, adapter), tokens, config)


@every
def test_one_tree_is_those_of_its_parts(methods):
  model, params, left, config, adapter = made(methods)
  parts = [adapters.init(KEY, params, part)[1] for part in config.parts]
  flat = [tree.flatten(part) for part in parts]
  fresh = tree.flatten(adapters.init(KEY, params, list(config.parts))[1])
  assert fresh.keys() == {path for part in flat for path in part}
  alike = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  for part in flat:
    for path, node in part.items():
      alike(fresh[path], node)
  assert adapters.count(adapter) == sum(map(adapters.count, parts))
  assert f"{adapters.count(adapter):,}" in adapters.summary(left, adapter)
  tokens = families.tokens(2, 9)
  bound = left
  for part in flat:  # one after the other
    own = tree.unflatten({path: tree.get(adapter, path) for path in part})
    bound = adapters.bind(bound, own)
  close(logits(bound, {}, tokens, model), logits(left, adapter, tokens, model), 1e-6)


@every
def test_it_trains_merges_and_comes_back_from_files(methods, tmp_path):
  model, params, left, config, adapter = made(methods)
  tokens = families.tokens(2, 9)
  expected = logits(left, adapter, tokens, model)
  assert np.abs(expected - logits(params, {}, tokens, model)).max() > 0.05
  trained, fixed = tree.partition(adapter)
  same = tree.combine(trained, fixed)
  jax.tree.map(np.testing.assert_array_equal, same, adapter)
  close(logits(adapters.merge(left, adapter), {}, tokens, model), expected, 5e-5)
  peft_format.save(tmp_path / "a", adapter, config, model)
  again, found = peft_format.load(tmp_path / "a", params, model)
  # PEFT's file of PiSSA is a LoRA of the original
  names = ["lora" if name == "pissa" else name for name in methods]
  assert [part.method for part in found.parts] == names
  close(logits(params, again, tokens, model), expected, 5e-5)
  peft_format.save(tmp_path / "b", again, found, model)
  twice, _ = peft_format.load(tmp_path / "b", params, model)
  jax.tree.map(np.testing.assert_array_equal, twice, again)


def test_each_of_its_folders_is_an_adapter_by_itself(tmp_path):
  model, params, _, config, adapter = made(("prompt", "lora"))
  peft_format.save(tmp_path / "a", adapter, config, model)
  described = {
    name: files.read_json(tmp_path / "a" / name / peft_format.CONFIG) for name in ("", "lora")
  }
  assert [each["peft_type"] for each in described.values()] == ["PROMPT_TUNING", "LORA"]
  assert [each["modules_to_save"] for each in described.values()] == [None, ["model.norm"]]
  own, found = peft_format.load(tmp_path / "a" / "lora", params, model)
  assert isinstance(found, AdapterConfig)
  assert "prompt" not in own
  alone = tree.unflatten({p: n for p, n in tree.items(adapter) if not p.startswith("prompt")})
  jax.tree.map(np.testing.assert_array_equal, own, alone)


def test_a_rewards_head_is_in_each_folder_and_read_once(tmp_path):
  """PEFT wants a classifier's head in every adapter's file; here it is one node."""
  model, params = families.make("llama")
  params, model = decoder.scored(KEY, params, model)
  section = {"method": "prompt+vera", "prompt": {"num_virtual_tokens": 3}, "vera": {"r": 3}}
  config = from_section(section, whole=("score",))
  assert [part.modules_to_save for part in config.parts] == [("score",), ()]
  adapter = moved(adapters.init(KEY, params, config)[1])
  peft_format.save(tmp_path / "a", adapter, config, model)
  for folder in (tmp_path / "a", tmp_path / "a" / "vera"):
    described = files.read_json(folder / peft_format.CONFIG)
    assert (described["task_type"], described["modules_to_save"]) == ("SEQ_CLS", ["score"])
  again, found = peft_format.load(tmp_path / "a", params, model)
  assert [part.modules_to_save for part in found.parts] == [("score",), ()]
  jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_a_record_cannot_lead_out_of_its_folder(tmp_path):
  model, params, _, config, adapter = made(("prompt", "lora"))
  peft_format.save(tmp_path / "a", adapter, config, model)
  path = tmp_path / "a" / peft_format.RECORD
  path.write_text(path.read_text().replace('"lora"', '"../b"'))
  with pytest.raises(ValueError, match=r"with_methods names '../b', which is no method"):
    peft_format.load(tmp_path / "a", params, model)


@pytest.mark.parametrize(
  ("methods", "message"),
  [
    (("lora", "vera"), "lora and vera both adapt layers/mlp/up_proj/weight"),
    (("ia3", "adalora"), "ia3 and adalora both adapt layers/self_attn/k_proj/weight"),
  ],
)
def test_two_methods_at_one_path_are_refused(methods, message):
  config = together([PARTS[name] for name in methods])
  with pytest.raises(ValueError, match=f"{message}.*exclude_modules.*frozen"):
    adapters.init(KEY, families.make("llama")[1], config)


def test_one_head_for_two_methods_is_refused():
  parts = [PARTS[name].replace(modules_to_save=("norm",)) for name in ("prompt", "lora")]
  with pytest.raises(ValueError, match="prompt and lora both adapt layers/input_layernorm/weight"):
    adapters.init(KEY, families.make("llama")[1], parts)


@pytest.mark.parametrize(
  ("parts", "message"),
  [
    ((), "no method: a combination"),
    ((PARTS["lora"],), "lora: a combination is of two methods or more"),
    ((PARTS["lora"], PARTS["lora"]), "lora.lora: .* each once"),
    ((PARTS["pissa"], AdapterConfig(method="olora")), "pissa and olora each start with a part"),
  ],
)
def test_what_is_no_combination(parts, message):
  with pytest.raises(ValueError, match=message):
    Combination(parts)


def test_what_is_asked_of_a_config_is_asked_of_a_combination():
  plain, prompt = AdapterConfig(lora_dropout=0.1), PARTS["prompt"]
  text = prompt.replace(prompt_tuning_init="TEXT", prompt_tuning_init_text="Be brief.")
  long = AdapterConfig(method="longlora", attention_group=8, context_length=64)
  config = Combination((text, long))
  assert config.method == "prompt+longlora"
  assert (config.attention_group, config.context_length) == (8, 64)
  assert config.prompt_tuning_init_text == "Be brief."
  assert Combination((prompt, plain)).lora_dropout == 0.1
  assert [c.in_weights for c in (plain, prompt, config)] == [True, False, False]
  starts = [c.starts_as_its_base for c in (AdapterConfig(), plain, prompt, long, config)]
  assert starts == [True, False, False, False, False]
  assert Combination((AdapterConfig(), PARTS["vera"])).starts_as_its_base
  assert not Combination((AdapterConfig(), prompt)).starts_as_its_base
  began = Combination((PARTS["vera"], PARTS["pissa"]))
  assert began.changes_base
  assert began.starting is PARTS["pissa"]
  assert PARTS["pissa"].starting is PARTS["pissa"]
  assert plain.starting is None
  assert not config.changes_base
  assert config.starting is None
  deep = Combination((prompt, AdapterConfig(depth_ranks=(2, 4)))).for_layers(3)
  assert deep.parts[1].rank("layers.2.mlp.up_proj") == 4
  assert parts_of(plain) == (plain,)
  assert parts_of(config) == config.parts == (text, long)


@pytest.mark.slow
def test_a_batch_mixes_a_combination_with_others():
  model, params = families.make("llama")
  plain = PARTS["lora"].replace(modules_to_save=())
  both = moved(adapters.init(KEY, params, [PARTS["prompt"], plain])[1], size=0.2)
  alone = moved(adapters.init(KEY, params, plain)[1], seed=4, size=0.2)
  tokens = families.tokens(3, 9)
  bound = adapters.bind(params, adapters.stack([both, alone]), rows=np.asarray([1, 0, -1]))
  found = decoder.forward(bound, tokens, model)
  for row, adapter in enumerate((alone, both, {})):
    close(found[row], logits(params, adapter, tokens[row : row + 1], model)[0], 2e-5)


def test_adaloras_hooks_see_its_nodes_among_others():
  _, _, _, config, adapter = made(("prompt", "adalora"))
  alone = adapters.hooks(PARTS["adalora"], 9)
  hooks = adapters.hooks(config, 9)
  own = tree.unflatten({p: n for p, n in tree.items(adapter) if not p.startswith("prompt")})
  assert float(hooks.penalty(adapter)) == float(alone.penalty(own)) > 0
  assert adapters.hooks(together([PARTS["prompt"], PARTS["lora"]]), 9) is None


# --- from a run's section ---------------------------------------------------------------------------------------------


def test_sections_make_configs():
  assert from_section({"method": "none"}, whole=("score",)) is None
  found = from_section(
    {"method": "lora", "r": 4, "init_lora_weights": "uniform", "layers_to_transform": ()},
    whole=("score",),
  )
  assert found == AdapterConfig(r=4, modules_to_save=("score",))
  text = from_section({"method": "prompt", "prompt_tuning_init_text": ""})
  assert text == AdapterConfig(method="prompt")
  both = from_section(
    {"method": "prefix+adalora", "prefix": {"num_virtual_tokens": 4}, "adalora": {"init_r": 9}},
    steps=30,
  )
  assert both.parts == (
    AdapterConfig(method="prefix", num_virtual_tokens=4),
    AdapterConfig(method="adalora", init_r=9, total_step=30),
  )
  given = {"method": "adalora", "total_step": 7, "modules_to_save": ("norm",)}
  found = from_section(given, steps=30, whole=("score", "norm"))
  assert (found.total_step, found.modules_to_save) == (7, ("norm", "score"))


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({"method": "prompt+lora", "prompt": {}}, "one section for each of prompt, lora.*in lora"),
    ({"method": "prompt+lora", "prompt": {}, "lora": {}, "r": 3}, "which differs in r"),
    ({"method": "prompt+lara", "prompt": {}, "lara": {}}, "unknown adapter method 'lara'"),
    ({"method": "prompt+lora", "prompt": {"r": 3}, "lora": {}}, "'prompt' has no such option"),
  ],
)
def test_sections_that_say_nothing_are_refused(section, message):
  with pytest.raises(ValueError, match=message):
    from_section(section)


def test_ranks_by_depth_of_some_layers_are_written_too(tmp_path):
  """`for_layers` writes the ranks of all layers; those that are left alone match no adapted module."""
  model, params = families.make("llama")
  lora = AdapterConfig(depth_ranks=(2, 4), layers_to_transform=(1,), target_modules=("q_proj",))
  config = together([lora, PARTS["prompt"]])
  _, adapter = adapters.init(KEY, params, config)
  adapter = moved(adapter, size=0.2)
  described = config.for_layers(model.num_layers)
  peft_format.save(tmp_path / "both", adapter, described, model)
  again, _ = peft_format.load(tmp_path / "both", params, model)
  tokens = np.arange(3, 12)[None]
  close(logits(params, again, tokens, model), logits(params, adapter, tokens, model))
