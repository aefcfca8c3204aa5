"""Making, binding, merging and counting a tree of adapters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import AdapterConfig
from posttrain_jax.core import memory, tree
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models import decoder
from posttrain_jax.models.config import from_hf
from tests.adapters.cases import trained
from tests.marks import few
from tests.models import families

KEY = jax.random.key(0)
CONFIGS = {
  "all_linear": AdapterConfig(r=3),
  "uneven": AdapterConfig(
    r=2, lora_alpha=5, rank_pattern={r"layers\.1\..*": 4}, exclude_modules=["layers.0.mlp.up_proj"]
  ),
  "rslora_layers": AdapterConfig(r=4, use_rslora=True, layers_to_transform=(0, 2)),
  "embedding": AdapterConfig(r=3, target_modules=["embed_tokens", "v_proj"]),
  "head": AdapterConfig(r=3, target_modules=["lm_head"]),
  "embedding_and_head": AdapterConfig(r=3, target_modules=["lm_head", "embed_tokens"]),
  "dora": AdapterConfig(
    r=2, use_dora=True, rank_pattern={r"layers\.1\..*": 4}, exclude_modules=["layers.0.mlp.up_proj"]
  ),
  "dora_at_both_ends": AdapterConfig(
    r=3, use_dora=True, target_modules=["lm_head", "embed_tokens"]
  ),
}


@functools.partial(jax.jit, static_argnums=2)
def logits(params, tokens, config):
  return decoder.forward(params, tokens, config)


def close(actual, expected, rtol=1e-5):
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


def adapted(family, config, seed=0):
  """(model config, params, adapter away from its start)."""
  model, params = families.make(family)
  _, adapter = adapters.init(KEY, params, config)
  return model, params, trained(adapter, seed)


def test_a_fresh_adapter_leaves_the_logits_as_they_are():
  model, params = families.make("llama3")
  tokens = families.tokens(2, 9)
  options = dict(r=4, target_modules=["embed_tokens", "lm_head", "q_proj", "down_proj"])
  same, adapter = adapters.init(KEY, params, AdapterConfig(**options))
  assert all(leaf is tree.get(params, path) for path, leaf in tree.items(same))
  bound = adapters.bind(params, adapter)
  np.testing.assert_array_equal(logits(bound, tokens, model), logits(params, tokens, model))


TIED = ["embedding", "head", "embedding_and_head", "dora_at_both_ends"]  # where a tied head matters


@pytest.mark.parametrize(
  ("family", "name"),
  few(
    [("llama", name) for name in CONFIGS] + [("llama3", name) for name in TIED],
    ("llama", "all_linear"),
    ("llama", "uneven"),
    ("llama3", "dora_at_both_ends"),
  ),
)
def test_merged_computes_what_bound_does(family, name):
  model, params, adapter = adapted(family, CONFIGS[name])
  tokens = families.tokens(2, 9)
  bound = adapters.bind(params, adapter)
  expected = logits(bound, tokens, model)
  for merged in (adapters.merge(params, adapter), adapters.merge(bound)):
    assert all(isinstance(leaf, jax.Array) for _, leaf in tree.items(merged))
    close(logits(merged, tokens, model), expected)
  assert np.abs(expected - logits(params, tokens, model)).max() > 0.1
  assert "lm_head" in merged


def test_a_tied_head_stays_tied_where_neither_end_is_adapted():
  _, params, adapter = adapted("llama3", CONFIGS["all_linear"])
  assert "lm_head" not in adapters.merge(params, adapter)


def test_a_quantised_base_is_bound_merged_and_counted():
  model = families.config("llama", hidden_size=64, intermediate_size=64, head_dim=16)
  dense = families.params(model)
  params = quant.quantize_params(dense)
  _, adapter = adapters.init(KEY, params, AdapterConfig(r=3))
  adapter = trained(adapter)
  tokens = families.tokens(2, 9)
  bound = logits(adapters.bind(params, adapter), tokens, model)
  close(logits(adapters.merge(params, adapter), tokens, model), bound, rtol=2e-5)
  assert adapters.summary(params, adapter) == adapters.summary(dense, adapter)


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("joined", [adapters.merge, adapters.settled])
def test_what_lies_on_the_host_is_joined_on_the_device(storage, joined):
  """Base and adapter there: what writes during a run with model.offload=layers reads the joined tree."""
  model = families.config("llama", hidden_size=64, intermediate_size=64, head_dim=16)
  params = families.params(model)
  params = quant.quantize_params(params) if storage == "nf4" else params
  _, adapter = adapters.init(KEY, params, AdapterConfig(r=3))
  away = lambda x: jax.device_put(x, memory.host(x.sharding))
  there = {**params, "layers": jax.tree.map(away, params["layers"])}
  found = joined(there, jax.tree.map(away, adapter))
  assert not memory.any_on_host(found)
  jax.tree.map(np.testing.assert_array_equal, found, joined(params, adapter))


def test_binds_nest():
  model, params, inner = adapted("llama", CONFIGS["uneven"])
  outer = adapted("llama", CONFIGS["all_linear"], seed=1)[2]
  tokens = families.tokens(2, 9)
  nested = adapters.bind(adapters.bind(params, inner), outer)
  merged = adapters.merge(adapters.merge(params, inner), outer)
  close(logits(nested, tokens, model), logits(merged, tokens, model))


def test_merge_rounds_once():
  """W + s a b in bfloat16 is the nearest bfloat16 of the float32 sum."""
  _, params, adapter = adapted("llama", CONFIGS["all_linear"])
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
  path = "layers/mlp/up_proj/weight"
  ours = tree.get(adapters.merge(low, adapter), path)
  expected = tree.get(adapters.merge(high, adapter), path).astype(jnp.bfloat16)
  np.testing.assert_array_equal(ours, expected)


def test_gradients_reach_the_adapter_and_no_masked_rank():
  model, params, adapter = adapted("llama", CONFIGS["uneven"])
  trained_part, fixed = tree.partition(adapter)
  tokens = families.tokens(2, 9)

  @jax.jit
  @jax.grad
  def gradient(part):
    bound = adapters.bind(params, tree.combine(part, fixed))
    return jnp.square(decoder.forward(bound, tokens, model)).mean()

  for path, node in tree.items(gradient(trained_part)):
    mask = tree.get(adapter, path).mask
    mask = np.ones((3, node.a.shape[-1])) if mask is None else np.asarray(mask)
    np.testing.assert_array_equal(np.abs(node.a).max(1) > 0, mask > 0, err_msg=path)
    np.testing.assert_array_equal(np.abs(node.b).max(2) > 0, mask > 0, err_msg=path)


def test_one_modules_start_does_not_depend_on_the_others():
  params = families.make("llama")[1]
  start = lambda **options: adapters.init(KEY, params, AdapterConfig(r=4, **options))[1]
  alone = start(target_modules=["q_proj"], layers_to_transform=1)["layers"]["self_attn"]["q_proj"]
  among = start(rank_pattern={r"layers\.0\..*q_proj": 9})["layers"]["self_attn"]["q_proj"]
  np.testing.assert_array_equal(alone["weight"].split()[1][0], among["weight"].split()[1][0])
  assert alone["weight"].split()[1][0].any()


def test_dropout_draws_for_each_layer_and_path_and_not_in_evaluation():
  _, params = families.make("llama")
  config = AdapterConfig(r=2, target_modules=["q_proj", "k_proj", "lm_head"], lora_dropout=0.5)
  _, adapter = adapters.init(KEY, params, config)
  bound = adapters.bind(params, adapter, key=KEY)
  keys = [
    jax.random.key_data(leaf.key) for _, leaf in tree.items(bound) if isinstance(leaf, Adapted)
  ]
  assert [k.shape[:-1] for k in keys] == [(3,), (3,), ()]
  rows = np.concatenate([np.asarray(k).reshape(-1, k.shape[-1]) for k in keys])
  assert len(np.unique(rows, axis=0)) == 7
  still = adapters.bind(params, adapter)
  assert all(leaf.key is None for _, leaf in tree.items(still) if isinstance(leaf, Adapted))
  without = adapters.init(KEY, params, config.replace(lora_dropout=0.0))[1]
  bound = adapters.bind(params, without, key=KEY)
  assert all(leaf.key is None for _, leaf in tree.items(bound) if isinstance(leaf, Adapted))


def test_dropout_changes_training_alone_and_repeats_with_its_key():
  model, params, adapter = adapted("llama", AdapterConfig(r=4, lora_dropout=0.5))
  tokens = families.tokens(2, 9)
  one, again, other = (
    logits(adapters.bind(params, adapter, key=jax.random.key(seed)), tokens, model)
    for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 0.1
  expected = logits(adapters.merge(params, adapter), tokens, model)
  close(logits(adapters.bind(params, adapter), tokens, model), expected)


SMOLLM2 = dict(
  model_type="llama",
  vocab_size=49152,
  hidden_size=576,
  intermediate_size=1536,
  num_hidden_layers=30,
  num_attention_heads=9,
  num_key_value_heads=3,
  tie_word_embeddings=True,
)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_summary_is_pefts_line(base):
  """Rank 16 on the seven linear modules of SmolLM2-135M; 4-bit bases count what they stand for."""
  params = decoder.abstract(from_hf(SMOLLM2))
  if base == "nf4":
    params = jax.eval_shape(quant.quantize_params, params)
  adapter = jax.eval_shape(lambda: adapters.init(KEY, params, AdapterConfig(r=16))[1])
  assert adapters.count(adapter) == 4_884_480
  assert adapters.summary(params, adapter) == (
    "trainable params: 4,884,480 || all params: 139,399,488 || trainable%: 3.5039"
  )


def test_the_summary_counts_effective_ranks():
  _, params = families.make("llama")
  config = AdapterConfig(r=2, target_modules=["q_proj"], rank_pattern={r"layers\.1\..*": 4})
  _, adapter = adapters.init(KEY, params, config.replace(exclude_modules=r".*\.2\..*"))
  assert adapters.count(adapter) == (2 + 4) * (32 + 32)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(method="lara"), "unknown adapter method 'lara'; known: lora"),
    (dict(target_modules=["q_prj"]), r"target_modules: no module matches 'q_prj'.*q_proj"),
    (dict(target_modules=["q_proj", "k_prj"]), "target_modules: no module matches 'k_prj'"),
    (dict(target_modules=r"layer\.0\..*"), "target_modules: no module matches"),
    (dict(exclude_modules=["q_prj"]), "exclude_modules: no module matches 'q_prj'"),
    (dict(exclude_modules=r"q_proj"), "exclude_modules: no module matches 'q_proj'"),
    (dict(rank_pattern={"q_prj": 2}), "rank_pattern: no adapted module matches 'q_prj'"),
    (
      dict(target_modules=["q_proj"], alpha_pattern={"k_proj": 2}),
      "alpha_pattern: no adapted module matches 'k_proj'",
    ),
    (
      dict(layers_to_transform=[1, 3]),
      r"layers_to_transform=\(1, 3\): the model has layers 0 to 2",
    ),
    (dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), "leave nothing to adapt"),
    (dict(target_modules=["embed_tokens"], layers_to_transform=[0]), "leave nothing to adapt"),
  ],
)
def test_names_that_match_nothing_are_errors(options, message):
  params = families.make("llama")[1]
  with pytest.raises(ValueError, match=message):
    adapters.init(KEY, params, AdapterConfig(**options))
