"""modules_to_save: a value in the place of the base's, and LongLoRA, which trains embeddings and norms with it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax import adapters, objectives, quant
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.adapters.replaced import Replaced
from posttrain_jax.core import tree
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models import decoder
from posttrain_jax.objectives import Context
from tests import tiny
from tests.adapters.kinds import moved
from tests.marks import few
from tests.models import families

KEY = jax.random.key(0)
forward = jax.jit(decoder.forward, static_argnums=2)
SAVED = ("embed_tokens", "norm", "layernorm")
NAMES = {  # family, what is named, what trains whole
  "embeddings and norms": ("llama", SAVED, 96 * 32 + 3 * 2 * 32 + 32),
  "a tied embedding": ("llama3", ("embed_tokens",), 96 * 32),
  "a tied head": ("llama3", ("lm_head",), 96 * 32),
  "some layers": ("llama", ("1.input_layernorm", "2.input_layernorm"), 2 * 32),
  "a matrix with its bias": ("llama_biased", ("0.mlp.up_proj",), 32 * 48 + 48),
  "norms of heads": ("gemma3", ("q_norm", "k_norm"), 7 * 2 * 16),
}


def close(actual, expected, rtol=1e-5):
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


def made(name):
  family, saved, _ = NAMES[name]
  model, params = families.make(family)
  config = AdapterConfig(r=2, target_modules=("q_proj",), modules_to_save=saved)
  return model, params, config, adapters.init(KEY, params, config)[1]


def whole(adapter):
  return {path: node for path, node in tree.items(adapter) if isinstance(node, Replaced)}


@pytest.mark.parametrize("name", few(NAMES, "a tied embedding", "some layers"))
def test_a_start_changes_nothing_and_trained_it_acts_bound_merged_and_apart(name):
  model, params, _, adapter = made(name)
  tokens = families.tokens(2, 9)
  base = forward(params, tokens, model)
  close(forward(adapters.bind(params, adapter), tokens, model), base, 1e-6)
  adapter = moved(adapter)
  bound = adapters.bind(params, adapter)
  found = forward(bound, tokens, model)
  close(forward(adapters.merge(params, adapter), tokens, model), found)
  close(forward(decoder.unstack(bound, model), tokens, model), found)
  for path, node in whole(adapter).items():  # by hand: the value where it is used, else the base
    old = tree.get(params, path) if path in tree.flatten(params) else decoder.head(params).dense()
    used = np.ones(1) if node.mask is None else np.asarray(node.mask)
    used = used.reshape(-1, *[1] * (old.ndim - 1))
    params = tree.put(params, path, jnp.where(used > 0, node.value, old))
  # a head tied to a trained embedding keeps to the base
  if "lm_head" not in params and "embed_tokens" in adapter:
    params = tree.put(params, "lm_head/weight", made(name)[1]["embed_tokens"]["weight"].T)
  lora = {"layers": {"self_attn": {"q_proj": adapter["layers"]["self_attn"]["q_proj"]}}}
  close(forward(adapters.bind(params, lora), tokens, model), found)
  assert np.abs(found - base).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_of_what_trains(name):
  _, _, _, adapter = made(name)
  assert sum(node.size() for node in whole(adapter).values()) == NAMES[name][2]
  total = adapters.count(adapter)
  assert total == NAMES[name][2] + sum(
    node.size() for path, node in tree.items(adapter) if path not in whole(adapter)
  )


@pytest.mark.parametrize("name", few(NAMES, "a tied head", "a matrix with its bias"))
def test_files_hold_the_same_numbers(name, tmp_path):
  model, params, config, adapter = made(name)
  adapter = moved(adapter)
  peft_format.save(tmp_path / "a", adapter, config, model)
  again, found = peft_format.load(tmp_path / "a", params, model)
  assert set(found.modules_to_save) == set(config.modules_to_save)
  assert tree.flatten(again).keys() == tree.flatten(adapter).keys()
  tokens = families.tokens(2, 9)
  bound = lambda adapter: forward(adapters.bind(params, adapter), tokens, model)
  np.testing.assert_array_equal(bound(again), bound(adapter))


def test_one_replaced_layer_alone_gets_a_gradient():
  model, params, _, adapter = made("some layers")
  trained, fixed = tree.partition(moved(adapter))
  tokens = families.tokens(2, 9)
  loss = lambda t: jnp.square(
    forward(adapters.bind(params, tree.combine(t, fixed)), tokens, model)
  ).mean()
  gradient = jax.jit(jax.grad(loss))(trained)["layers"]["input_layernorm"]["weight"].value
  np.testing.assert_array_equal(np.abs(gradient).max(1) > 0, [False, True, True])


def test_a_stored_base_is_replaced_by_its_dense_value():
  model = families.config("llama", hidden_size=64, intermediate_size=64, head_dim=16)
  params = quant.quantize_params(families.params(model))
  config = AdapterConfig(r=2, target_modules=("q_proj",), modules_to_save=("1.mlp.up_proj",))
  _, adapter = adapters.init(KEY, params, config)
  tokens = families.tokens(2, 9)
  close(
    forward(adapters.bind(params, adapter), tokens, model),
    forward(params, tokens, model),
  )


def test_the_computation_keeps_the_dtype_of_the_base():
  model, params, _, adapter = made("embeddings and norms")
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  bound = adapters.bind(low, adapter)
  assert decoder.hidden(bound, families.tokens(1, 5), model).dtype == jnp.bfloat16
  assert adapters.merge(bound)["norm"]["weight"].dtype == jnp.bfloat16
  assert bound["norm"]["weight"].dense(jnp.float32).dtype == jnp.float32


def test_specs_and_the_start_is_a_copy():
  _, params, _, adapter = made("embeddings and norms")
  node = adapter["norm"]["weight"]
  assert node.partition_specs(P("fsdp")).value == P("fsdp")
  assert node.value is not params["norm"]["weight"]  # a donated state must not hold the base
  bound = Adapted(params["norm"]["weight"], node)
  assert bound.shape == (32,)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(modules_to_save=("embed_token",)), "no module matches 'embed_token'"),
    (dict(modules_to_save=("q_proj",)), "'layers.0.self_attn.q_proj' is a target of the adapter"),
  ],
)
def test_names_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=f"modules_to_save: .*{message}"):
    adapters.init(KEY, families.make("llama")[1], AdapterConfig(r=2, **options))


def test_a_block_is_all_that_lies_in_it(tmp_path):
  """PEFT wraps the block and stores its projections; no module of ours is called so, and it was refused."""
  model, params = families.make("llama")
  config = AdapterConfig(r=2, target_modules=("q_proj", "up_proj"), exclude_modules=("up_proj",))
  config = config.replace(modules_to_save=("1.mlp",))
  adapter = moved(adapters.init(KEY, params, config)[1])
  flat = tree.flatten(adapter)
  for name in ("gate_proj", "up_proj", "down_proj"):
    assert list(flat[f"layers/mlp/{name}/weight"].ranks()) == [0, 1, 0]
  peft_format.save(tmp_path / "a", adapter, config, model)
  described = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
  assert described["modules_to_save"] == ["1.mlp"]
  again, read = peft_format.load(tmp_path / "a", params, model)
  assert read.modules_to_save == ("1.mlp",)
  for path, node in flat.items():
    np.testing.assert_array_equal(node.ranks(), tree.get(again, path).ranks())


def test_a_reward_models_head_says_what_to_do_with_it(tmp_path):
  model, params = families.make("llama")
  config = AdapterConfig(r=2, modules_to_save=("score",))
  scored, scored_model = decoder.scored(KEY, params, model)
  peft_format.save(tmp_path, adapters.init(KEY, scored, config)[1], config, scored_model)
  with pytest.raises(ValueError, match=r"'score' is the head of a reward model.*eval --reward=.*"):
    peft_format.load(tmp_path, params, model)


def test_files_that_do_not_fit_are_refused(tmp_path):
  model, params, config, adapter = made("embeddings and norms")
  peft_format.save(tmp_path / "a", adapter, config, model)
  path = tmp_path / "a" / "adapter_config.json"
  for old, new, message in (
    ('"norm"', '"nrm"', "modules_to_save: no module matches 'nrm'"),
    ('"norm"', '"up_proj"', "names 'layers.0.mlp.up_proj', which has no weight"),
  ):
    text = path.read_text()
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
      peft_format.load(tmp_path / "a", params, model)
    path.write_text(text)


# --- LongLoRA ---------------------------------------------------------------------------------------------------------

LONG = AdapterConfig(
  method="longlora", r=2, modules_to_save=SAVED, attention_group=8, context_length=512
)


@pytest.mark.slow
def test_training_sees_groups_and_evaluation_the_whole_row():
  model, batch = tiny.config(), tiny.batch()
  params = decoder.init(KEY, model, std=tiny.STD)
  trained, fixed = tree.partition(moved(adapters.init(KEY, params, LONG)[1], size=0.1))
  context = Context(params, fixed)
  full, sparse = objectives.Sft(model), objectives.Sft(model, attention_group=8)

  def loss(objective, key):
    totals = objective.totals(trained, context, batch, KEY, memory=None, training=True)
    return float(objective.loss(trained, context, batch, totals, key, training=key is not None)[0])

  assert loss(sparse, None) == loss(full, None)
  assert loss(full, KEY) == pytest.approx(loss(full, None), rel=1e-6)
  assert abs(loss(sparse, KEY) - loss(full, KEY)) > 1e-5
  hidden = decoder.hidden(
    objectives.policy(trained, context),
    batch["tokens"],
    model,
    positions=batch["positions"],
    segment_ids=batch["segment_ids"],
    attention_group=8,
  )
  labels, mask = objectives.targets(batch)
  logps = jax.nn.log_softmax(decoder.logits(params, hidden, model))
  nll = -jnp.take_along_axis(logps, labels[..., None], -1)[..., 0]
  assert loss(sparse, KEY) == pytest.approx(float((nll * mask).sum() / mask.sum()), rel=1e-5)


def test_its_files_remember_group_and_context(tmp_path):
  model, params = families.make("llama")
  _, adapter = adapters.init(KEY, params, LONG)
  peft_format.save(tmp_path / "a", adapter, LONG, model)
  again, found = peft_format.load(tmp_path / "a", params, model)
  assert (found.method, found.attention_group, found.context_length) == ("longlora", 8, 512)
  assert tree.flatten(again).keys() == tree.flatten(adapter).keys()
  with pytest.raises(ValueError, match="attention_group=1: write at least 2"):
    LONG.replace(attention_group=1)
  with pytest.raises(ValueError, match="context_length=-1"):
    LONG.replace(context_length=-1)
