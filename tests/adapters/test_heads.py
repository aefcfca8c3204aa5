"""A reward model's head, or a norm, that trains whole beside every method: made, counted, bound, merged, in files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.adapters.config import OPTIONS
from posttrain_jax.adapters.replaced import Replaced
from posttrain_jax.core import tree, weight
from posttrain_jax.models import decoder
from tests.adapters.kinds import moved
from tests.marks import few
from tests.models import families

KEY = jax.random.key(0)
SCORE = "score/weight"
SMALL = {
  **{name: dict(r=2) for name in ("lora", "dora", "pissa", "olora", "longlora")},
  "vera": dict(r=3),
  "adalora": dict(init_r=4, target_r=2),
  "ia3": {},
  "prompt": dict(num_virtual_tokens=3),
  "prefix": dict(num_virtual_tokens=3),
}
every = pytest.mark.parametrize("method", few(SMALL, "dora", "pissa", "prompt"))


def close(actual, expected, rtol=1e-5):
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


@functools.cache
def scored():
  model, params = families.make("llama")
  params, model = decoder.scored(jax.random.key(7), params, model)
  return model, params


def made(method, saved=("score",)):
  """(model config, params, config, adapter): with LoRA's relatives that start in the base, the base without it."""
  model, params = scored()
  config = AdapterConfig(method=method, modules_to_save=saved, **SMALL[method])
  params, adapter = adapters.init(KEY, params, config)
  return model, params, config, adapter


@functools.partial(jax.jit, static_argnames="model")
def scores(params, adapter, tokens, model):
  bound = adapters.bind(params, adapter)
  hidden = decoder.hidden(bound, tokens, model)
  return weight.linear32(hidden, bound["score"]["weight"])


def test_every_method_is_here_but_loftq_which_needs_a_store():
  assert set(SMALL) == set(OPTIONS) - {"loftq"}


@every
def test_the_head_trains_whole_beside_it(method):
  model, params, config, adapter = made(method)
  node = adapter["score"]["weight"]
  assert isinstance(node, Replaced)
  np.testing.assert_array_equal(node.value, params["score"]["weight"])
  without = adapters.init(KEY, scored()[1], config.replace(modules_to_save=()))[1]
  assert adapters.count(adapter) == adapters.count(without) + model.hidden_size
  assert f"{adapters.count(adapter):,}" in adapters.summary(params, adapter)
  trained, fixed = tree.partition(moved(adapter))
  tokens = families.tokens(2, 9)
  loss = lambda t: jnp.square(scores(params, tree.combine(t, fixed), tokens, model)).mean()
  gradient = jax.grad(loss)(trained)
  assert np.abs(gradient["score"]["weight"].value).all()


@every
def test_merged_it_scores_as_bound(method):
  model, params, _, adapter = made(method)
  adapter, tokens = moved(adapter, size=0.1), families.tokens(2, 9)
  bound = scores(params, adapter, tokens, model)
  merged = adapters.merge(params, adapter)
  np.testing.assert_array_equal(merged["score"]["weight"], adapter["score"]["weight"].value)
  close(scores(merged, {}, tokens, model), bound, 5e-5)


@every
def test_files_hold_the_head_and_give_the_same_scores(method, tmp_path):
  model, params, config, adapter = made(method, saved=("score", "model.norm"))
  adapter, tokens = moved(adapter, size=0.1), families.tokens(2, 9)
  expected = scores(params, adapter, tokens, model)
  peft_format.save(tmp_path / "a", adapter, config, model)
  again, found = peft_format.load(tmp_path / "a", scored()[1], model)
  assert found.modules_to_save == config.modules_to_save
  close(scores(scored()[1], again, tokens, model), expected, 5e-5)
  # PEFT wraps the model of a soft prompt or prefix once and any other twice, and so are its names
  twice = "base_model." if method in ("prompt", "prefix") else "base_model.model."
  names = set(safetensors.numpy.load_file(tmp_path / "a" / peft_format.TENSORS))
  assert {f"{twice}score.weight", f"{twice}model.norm.weight"} <= names
  described = json.loads((tmp_path / "a" / peft_format.CONFIG).read_text())
  assert described["task_type"] == "SEQ_CLS"
  assert described["modules_to_save"] == ["score", "model.norm"]


@pytest.mark.parametrize("method", ["lora", "vera", "prompt"])
def test_the_two_heads_that_peft_names_are_the_one_that_there_is(method, tmp_path):
  """PEFT adds both names of heads to modules_to_save for a classifier, at each load once more."""
  model, params, config, adapter = made(method)
  peft_format.save(tmp_path / "a", adapter, config, model)
  path = tmp_path / "a" / peft_format.CONFIG
  described = json.loads(path.read_text())
  path.write_text(json.dumps({**described, "modules_to_save": ["classifier", "score"] * 2}))
  again, found = peft_format.load(tmp_path / "a", params, model)
  assert found.modules_to_save == ("score",)
  np.testing.assert_array_equal(again["score"]["weight"].value, params["score"]["weight"])
  path.write_text(json.dumps({**described, "task_type": None, "modules_to_save": ["classifier"]}))
  with pytest.raises(ValueError, match="modules_to_save: no module matches 'classifier'"):
    peft_format.load(tmp_path / "a", params, model)
