"""VeRA, AdaLoRA and (IA)3: what holds for every node, on one weight and in whole trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import AdapterConfig, adalora, peft_format, vera
from posttrain_jax.core import tree, weight
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models import decoder
from tests.adapters.kinds import IN, KINDS, OUT, moved
from tests.marks import few, slow
from tests.models import families

KEY = jax.random.key(0)
# of the whole model, and of some layers of some matrices
OPTIONS = {
  "vera": dict(method="vera", r=5),
  "vera_some": dict(
    method="vera", r=40, target_modules=("down_proj", "k_proj"), layers_to_transform=1
  ),
  "vera_head": dict(method="vera", r=3, target_modules=("lm_head", "q_proj")),
  "adalora": dict(method="adalora", init_r=4, target_r=2),
  "adalora_some": dict(
    method="adalora", init_r=4, target_r=2, exclude_modules=("layers.1.mlp.up_proj", "o_proj")
  ),
  "ia3": dict(method="ia3", target_modules=("k_proj", "v_proj", "down_proj")),
  "ia3_some": dict(
    method="ia3",
    feedforward_modules=("o_proj", "down_proj"),
    exclude_modules=("layers.0.self_attn.k_proj", "layers.2.mlp.down_proj"),
  ),
  "ia3_head": dict(method="ia3", target_modules=("lm_head", "v_proj")),
}
CASES = [("llama", name) for name in OPTIONS] + [
  ("llama_biased", "ia3_some"),  # every matrix has a bias
  ("qwen2", "ia3_head"),  # the head is tied
  ("llama3", "vera_head"),
  ("gemma2", "ia3"),  # keys are normed after their scale
]
every_case = pytest.mark.parametrize(
  ("family", "name"),
  few(
    CASES,
    ("llama", "adalora"),
    ("llama3", "vera_head"),
    ("llama_biased", "ia3_some"),
    ("gemma2", "ia3"),
  ),
)


def close(actual, expected, rtol=1e-5):
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


# --- one weight -------------------------------------------------------------------------------------------------------


@pytest.fixture
def key():
  return jax.random.key(0)


# vera, AdaLoRA over it, and (IA)3 of outputs and of inputs; the rest differ by the base or a mask
@pytest.fixture(
  params=few(KINDS, KINDS[0], KINDS[5], KINDS[6], KINDS[7]), ids=lambda make: make.__name__
)
def bound(request, key):
  return Adapted(*request.param(key))


def test_apply_is_a_product_with_dense(bound, key):
  x = jax.random.normal(key, (3, 5, IN))
  close(bound.apply(x), x @ bound.dense())


def by_hand(node, base):
  """Each paper's equation in float64."""
  read = lambda x: np.asarray(x, np.float64)
  w = read(weight.dense(base))
  if isinstance(node, vera.VeRA):
    there = 1 if node.mask is None else float(node.mask)
    a, b = read(node.pair.value.a)[:IN], read(node.pair.value.b)[:, :OUT]
    return w + there * a @ np.diag(read(node.lambda_d)) @ b @ np.diag(read(node.lambda_b))
  if isinstance(node, adalora.AdaLoRA):
    return w + float(node.scale) * read(node.a) @ np.diag(read(node.e)) @ read(node.b)
  gain = np.diag(read(node.gain))
  return gain @ w if node.feedforward else w @ gain


def test_dense_is_the_papers_equation(bound):
  close(bound.dense(), by_hand(bound.node, bound.base))
  left_out = getattr(bound.node, "mask", None) is not None and not bound.node.mask.any()
  assert (np.abs(bound.dense() - weight.dense(bound.base)).max() > 0.1) != left_out


def test_rows_are_rows_of_dense(bound):
  ids = jnp.asarray([[0, 7, 7], [IN - 1, 3, 1]])
  close(bound.rows(ids), bound.dense()[ids])


def test_dtype_is_that_of_the_base_or_what_is_asked(bound):
  assert bound.dense().dtype == bound.dtype
  assert bound.dense(jnp.bfloat16).dtype == jnp.bfloat16
  assert bound.apply(jnp.ones((2, IN), jnp.bfloat16)).dtype == jnp.bfloat16


def test_only_what_trains_gets_a_gradient(bound, key):
  x = jax.random.normal(key, (6, IN))
  trained, fixed = tree.partition({"w": bound.node})
  arrays = lambda value: [x for x in jax.tree.leaves(value) if isinstance(x, jax.Array)]
  there = {name for name, value in vars(trained["w"]).items() if arrays(value)}
  assert there == set(bound.node.TRAINED)
  loss = lambda part: jnp.square(Adapted(bound.base, tree.combine(part, fixed)["w"]).apply(x)).sum()
  gradient = jax.grad(loss)(trained)
  mask = getattr(bound.node, "mask", None)
  left_out = mask is not None and not mask.any()
  assert all(bool(leaf.any()) != left_out for leaf in jax.tree.leaves(gradient))


def test_specs_have_the_structure_of_the_node(bound):
  specs = bound.node.partition_specs(P("fsdp", "tensor"))
  assert jax.tree.structure(specs) == jax.tree.structure(bound.node)
  fields = {name: getattr(specs, name, None) for name in ("a", "b", "lambda_b", "gain")}
  side = "fsdp" if getattr(bound.node, "feedforward", False) else "tensor"
  wanted = dict(
    a=P("fsdp", None), b=P(None, ("tensor", "fsdp")), lambda_b=P("tensor"), gain=P(side)
  )
  assert all(spec is None or spec == wanted[name] for name, spec in fields.items())


# --- whole trees ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def logits(params, adapter, tokens, config, key=None, remat="none"):
  bound = adapters.bind(params, adapter, key=key)
  hidden = decoder.hidden(bound, tokens, config, remat=remat)
  return weight.linear32(hidden, decoder.head(bound))


def made(family, name, **changes):
  """(model config, params, AdapterConfig, a fresh adapter)."""
  model, params = families.make(family)
  config = AdapterConfig(**OPTIONS[name], **changes)
  return model, params, config, adapters.init(KEY, params, config)[1]


@every_case
def test_a_fresh_adapter_leaves_the_logits_as_they_are(family, name):
  model, params, _, adapter = made(family, name)
  tokens = families.tokens(2, 9)
  expected = logits(params, {}, tokens, model)
  np.testing.assert_array_equal(logits(params, adapter, tokens, model), expected)


@every_case
def test_merged_computes_what_bound_does(family, name):
  model, params, _, adapter = made(family, name)
  adapter, tokens = moved(adapter), families.tokens(2, 9)
  bound = logits(params, adapter, tokens, model)
  for merged in (adapters.merge(params, adapter), adapters.merge(adapters.bind(params, adapter))):
    assert all(isinstance(leaf, jax.Array) for _, leaf in tree.items(merged))
    close(logits(merged, {}, tokens, model), bound, rtol=2e-5)
  assert tree.flatten(merged).keys() >= tree.flatten(params).keys()
  assert "shared" not in merged
  assert np.abs(bound - logits(params, {}, tokens, model)).max() > 0.05


@every_case
def test_files_give_the_same_logits(family, name, tmp_path):
  model, params, config, adapter = made(family, name)
  adapter, tokens = moved(adapter), families.tokens(2, 9)
  peft_format.save(tmp_path / "a", adapter, config, model)
  again, found = peft_format.load(tmp_path / "a", params, model)
  close(logits(params, again, tokens, model), logits(params, adapter, tokens, model), rtol=2e-6)
  assert found.method == config.method
  assert adapters.count(again) == adapters.count(adapter)


@pytest.mark.parametrize("name", few(["vera", "adalora_some", "ia3_some"], "vera"))
def test_a_quantised_base_and_binds_that_nest(name):
  model = families.config("llama_biased", hidden_size=64, intermediate_size=64, head_dim=16)
  params = quant.quantize_params(families.params(model))
  config = AdapterConfig(**OPTIONS[name])
  first, second = (moved(adapters.init(KEY, params, config)[1], seed) for seed in (0, 1))
  tokens = families.tokens(2, 9)
  close(
    logits(adapters.merge(params, first), {}, tokens, model),
    logits(params, first, tokens, model),
    rtol=2e-5,
  )
  nested = logits(adapters.bind(params, first), second, tokens, model)
  close(
    nested, logits(adapters.merge(adapters.merge(params, first), second), {}, tokens, model), 5e-5
  )


@pytest.mark.parametrize("name", [slow("vera_some"), "adalora_some", slow("ia3_some")])
def test_gradients_reach_the_adapted_layers_alone_and_remat_keeps_them(name):
  model, params, config, adapter = made("llama_biased", name)
  part, fixed = tree.partition(moved(adapter))
  tokens = families.tokens(2, 9)

  def gradient(remat):
    loss = lambda part: jnp.square(
      logits(params, tree.combine(part, fixed), tokens, model, remat=remat)
    ).mean()
    return jax.jit(jax.grad(loss))(part)

  plain, again = gradient("none"), gradient("names")
  jax.tree.map(lambda a, b: close(a, b), again, plain)
  for path, node in tree.items(plain):
    names = tree.expand(path, (model.num_layers,))
    for leaf in jax.tree.leaves(node):
      there = [bool(layer.any()) for layer in leaf]
      assert there == [config.targets(module) for module in names], path


@pytest.mark.parametrize("name", few(["vera", "adalora"], "vera"))
def test_dropout_is_of_the_update_in_training_alone(name):
  model, params, _, adapter = made("llama", name, lora_dropout=0.5)
  adapter, tokens = moved(adapter), families.tokens(2, 9)
  one, again, other = (
    logits(params, adapter, tokens, model, key=jax.random.key(seed)) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 0.05
  still = logits(params, adapter, tokens, model)
  close(still, logits(adapters.merge(params, adapter), {}, tokens, model), rtol=2e-5)
  fresh = made("llama", name, lora_dropout=0.5)[3]
  np.testing.assert_array_equal(
    logits(params, fresh, tokens, model, key=KEY), logits(params, {}, tokens, model)
  )


@pytest.mark.parametrize("name", few(["vera", "adalora", "ia3"], "vera"))
def test_the_decode_loops_separate_layers_compute_the_same(name):
  model, params, _, adapter = made("llama_biased", name)
  tokens = families.tokens(2, 9)
  bound = adapters.bind(params, moved(adapter))
  apart = jax.jit(lambda p: decoder.forward(p, tokens, model))(decoder.unstack(bound, model))
  close(apart, decoder.forward(bound, tokens, model))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(method="vera", target_modules=("embed_tokens",)), "vera adapts linear layers"),
    (dict(method="ia3", target_modules=("embed_tokens",)), "ia3 adapts linear layers"),
    (dict(method="adalora", target_modules=("embed_tokens",)), "adalora adapts linear layers"),
    (
      dict(method="ia3", feedforward_modules=("down_prj",)),
      "feedforward_modules: no adapted module matches 'down_prj'; names look like .*down_proj",
    ),
    (
      dict(method="ia3", target_modules=("k_proj",), feedforward_modules=("o_proj",)),
      "feedforward_modules: no adapted module matches 'o_proj'",
    ),
    (
      dict(method="ia3", feedforward_modules=("layers.0.mlp.down_proj",)),
      "picks layers.0.mlp.down_proj and not layers.1.mlp.down_proj",
    ),
    (dict(method="adalora", init_r=17), r"init_r=17 is above the size of .*k_proj, 32 x 16"),
    (dict(method="adalora", init_r=4, target_r=5), "target_r=5 and init_r=4"),
    (dict(method="adalora", target_r=0), "target_r=0"),
    (dict(method="adalora", lora_alpha=0), "lora_alpha=0"),
    (dict(method="adalora", beta2=1.0), "beta2=1.0"),
    (dict(method="adalora", orth_reg_weight=-1), "orth_reg_weight=-1"),
    (dict(method="adalora", deltaT=0), "deltaT=0"),
  ],
)
def test_what_cannot_be_made_is_an_error(options, message):
  with pytest.raises(ValueError, match=message):
    adapters.init(KEY, families.make("llama")[1], AdapterConfig(**options))


# --- what is particular -----------------------------------------------------------------------------------------------


def test_vera_has_one_pair_for_all_and_counts_its_vectors():
  model, params, _, adapter = made("llama", "vera")
  pair = adapter["shared"]["vera"]
  assert pair.a.shape == (48, 5)  # the largest input is down_proj's, the largest output up_proj's
  assert pair.b.shape == (5, 48)
  for factor, bound in ((pair.a, (6 / 48) ** 0.5), (pair.b, (6 / 5) ** 0.5)):
    assert [float(factor.min()), float(factor.max())] == pytest.approx([-bound, bound], rel=0.05)
  outs = 32 + 16 + 16 + 32 + 48 + 48 + 32
  assert adapters.count(adapter) == model.num_layers * (outs + 7 * 5)
  stored = sum(leaf.size for leaf in jax.tree.leaves(adapter))
  assert stored == adapters.count(adapter) + pair.a.size + pair.b.size
  tree_ = adapters.bind(params, adapter)
  pairs = [leaf.node.pair.value for _, leaf in tree.items(tree_) if isinstance(leaf, Adapted)]
  assert len(pairs) == 7
  assert all(own.a is pair.a and own.b is pair.b for own in pairs)


def test_veras_pair_depends_on_its_seed_alone():
  start = lambda seed, key: adapters.init(
    jax.random.key(key),
    families.make("llama")[1],
    AdapterConfig(method="vera", r=5, projection_prng_key=seed, d_initial=0.3),
  )[1]
  one, same, other = start(1, 0), start(1, 9), start(2, 0)
  np.testing.assert_array_equal(one["shared"]["vera"].a, same["shared"]["vera"].a)
  assert (one["shared"]["vera"].a != other["shared"]["vera"].a).mean() > 0.99
  node = one["layers"]["self_attn"]["q_proj"]["weight"]
  assert set(np.unique(node.lambda_d)) == {np.float32(0.3)}
  assert not node.lambda_b.any()


def test_vera_outside_its_tree_says_what_is_missing():
  node = made("llama", "vera_head")[3]["lm_head"]["weight"]
  with pytest.raises(ValueError, match="bind the tree"):
    Adapted(jnp.zeros((32, 96)), node).dense()


def test_ia3_scales_biases_with_the_outputs_and_not_those_behind_scaled_inputs():
  _, params, _, adapter = made("llama_biased", "ia3")
  adapter = moved(adapter)
  bound, merged = adapters.bind(params, adapter), adapters.merge(params, adapter)
  at = lambda tree_, name: tree_["layers"]["self_attn"][name]["bias"]
  gain = adapter["layers"]["self_attn"]["k_proj"]["weight"].gain
  for changed in (bound, merged):
    close(at(changed, "k_proj"), at(params, "k_proj") * gain, 1e-6)
    assert at(changed, "q_proj") is at(params, "q_proj")
    assert (
      changed["layers"]["mlp"]["down_proj"]["bias"] is params["layers"]["mlp"]["down_proj"]["bias"]
    )


def test_ia3_counts_outputs_and_inputs():
  assert adapters.count(made("llama", "ia3")[3]) == 3 * (16 + 16 + 48)
  outs = 32 + 16 + 16 + 48 + 48  # q k v gate up; then the inputs of o and down
  assert adapters.count(made("llama", "ia3_some")[3]) == 3 * (outs + 32 + 48) - 16 - 48


def test_the_shared_pair_is_written_once_and_must_fit(tmp_path):
  model, params, config, adapter = made("llama", "vera")
  peft_format.save(tmp_path / "a", adapter, config, model)
  other = AdapterConfig(method="vera", r=5, target_modules=("q_proj",))
  small = adapters.init(KEY, params, other)[1]
  swapped = {**adapter, "shared": small["shared"]}
  peft_format.save(tmp_path / "b", swapped, config, model)
  with pytest.raises(ValueError, match=r"vera_A has shape \(5, 32\), expected \(5, 48\)"):
    peft_format.load(tmp_path / "b", params, model)


def test_a_rank_that_grew_again_since_it_was_pruned_is_written(tmp_path):
  """Between two allocations it acts, so a file of that moment without it would be another model."""
  model, params, config, adapter = made("llama", "adalora")
  path = "layers/mlp/up_proj/weight"
  node = tree.get(adapter, path)
  adapter = moved(tree.put(adapter, path, node.replace(mask=node.mask.at[:, :2].set(0))))
  peft_format.save(tmp_path / "a", adapter, config, model)
  again, _ = peft_format.load(tmp_path / "a", params, model)
  tokens = families.tokens(2, 9)
  close(logits(params, again, tokens, model), logits(params, adapter, tokens, model), rtol=2e-6)
  still = tree.get(adapter, path)
  adapter = tree.put(adapter, path, still.replace(e=still.e * still.mask))
  peft_format.save(tmp_path / "b", adapter, config, model)
  again, _ = peft_format.load(tmp_path / "b", params, model)
  assert tree.get(again, path).ranks().tolist() == [2, 2, 2]
