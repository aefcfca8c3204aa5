"""LoRA's closed forms, and what holds for every adapter node."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax.adapters import AdapterConfig, inits, lora
from posttrain_jax.core import tree, weight
from posttrain_jax.core.weight import Adapted
from tests.adapters.cases import ADAPTERS, IN, LORAS, OUT
from tests.marks import few

STACKED = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj"]


@pytest.fixture
def key():
  return jax.random.key(0)


def close(actual, expected, rtol=1e-5):
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


@pytest.fixture(
  params=few(ADAPTERS, ADAPTERS[0], *ADAPTERS[2:4], ADAPTERS[6]), ids=lambda make: make.__name__
)
def bound(request, key):
  """One weight with its adapter."""
  return Adapted(*request.param(key))


def test_apply_is_a_product_with_dense(bound, key):
  x = jax.random.normal(key, (3, 5, IN))
  close(bound.apply(x), x @ bound.dense())


def test_rows_are_rows_of_dense(bound):
  ids = jnp.asarray([[0, 7, 7], [IN - 1, 3, 1]])
  close(bound.rows(ids), bound.dense()[ids])


@pytest.mark.parametrize("make", LORAS, ids=lambda make: make.__name__)
def test_dense_is_the_base_and_the_scaled_product(make, key):
  bound = Adapted(*make(key))
  node = bound.node
  mask = np.ones(node.a.shape[-1]) if node.mask is None else np.asarray(node.mask)
  update = np.asarray(node.a) @ np.diag(mask) @ np.asarray(node.b) * float(node.scale)
  close(bound.dense(), np.asarray(weight.dense(bound.base)) + update)
  assert np.abs(update).max() > 0.1


def test_dtype_is_that_of_the_base_or_what_is_asked(bound):
  assert bound.dense().dtype == bound.dtype
  assert bound.dense(jnp.bfloat16).dtype == jnp.bfloat16
  assert bound.apply(jnp.ones((2, IN), jnp.bfloat16)).dtype == jnp.bfloat16


def test_only_what_trains_gets_a_gradient(bound, key):
  node = bound.node
  x = jax.random.normal(key, (6, IN))
  trained, fixed = tree.partition({"w": node})
  static = {"dropout", "_class"}
  kept = {name for name, field in vars(trained["w"]).items() if jax.tree.leaves(field)} - static
  assert kept == set(node.TRAINED)
  loss = lambda part: jnp.square(Adapted(bound.base, tree.combine(part, fixed)["w"]).apply(x)).sum()
  gradient = jax.grad(loss)(trained)["w"]
  used = np.ones(node.a.shape[-1]) if node.mask is None else np.asarray(node.mask)
  assert ((np.abs(gradient.a).max(0) > 0) == (used > 0)).all()  # masked ranks stay where they are
  assert ((np.abs(gradient.b).max(1) > 0) == (used > 0)).all()


def test_specs_fit_the_fields(bound):
  specs = bound.node.partition_specs(P("fsdp", "tensor"))
  assert specs.a == P("fsdp", None)
  assert specs.b == P(None, ("tensor", "fsdp"))
  assert jax.tree.structure(specs) == jax.tree.structure(bound.node)


def test_specs_of_stacked_factors_keep_the_layers_unsharded():
  _, node = lora.init(jax.random.key(0), jnp.zeros((3, IN, OUT)), STACKED, AdapterConfig(r=2))
  specs = node.partition_specs(P(None, "fsdp", "tensor"))
  assert specs.a == P(None, "fsdp", None)
  assert specs.b == P(None, None, ("tensor", "fsdp"))
  assert node.partition_specs(P("fsdp", "tensor")) == specs


# --- init -------------------------------------------------------------------------------------------------------------


def make(config, modules=STACKED, rows=IN, columns=OUT, key=None):
  shape = (len(modules), rows, columns) if modules[0].startswith("layers") else (rows, columns)
  key = jax.random.key(0) if key is None else key
  return lora.init(key, jnp.zeros(shape), modules, config)[1]


def test_a_fresh_one_changes_nothing(key):
  for module in ("layers.0.mlp.up_proj", "embed_tokens", "lm_head"):
    config = AdapterConfig(r=4, target_modules=[module])
    node = make(config, [module])
    node = jax.tree.map(lambda x: x[0], node) if module.startswith("layers") else node
    base = jax.random.normal(key, (IN, OUT))
    np.testing.assert_array_equal(Adapted(base, node).dense(), base)
    x = jax.random.normal(key, (5, IN))
    np.testing.assert_array_equal(Adapted(base, node).apply(x), weight.linear(x, base))
    assert np.abs(node.a).max() + np.abs(node.b).max() > 0  # and yet it can learn


def test_factors_are_drawn_as_in_peft():
  many, wide = 400, dict(rows=500, columns=400)
  uniform = make(AdapterConfig(r=many), **wide)
  bound = 500**-0.5
  assert np.abs(uniform.a).max() == pytest.approx(bound, rel=1e-3)
  assert np.std(uniform.a) == pytest.approx(bound / 3**0.5, rel=0.02)
  gaussian = make(AdapterConfig(r=many, init_lora_weights="gaussian"), **wide)
  assert np.std(gaussian.a) == pytest.approx(1 / many, rel=0.02)
  embedding = make(AdapterConfig(r=many, target_modules=["embed_tokens"]), ["embed_tokens"], **wide)
  assert not embedding.a.any()
  assert np.std(embedding.b) == pytest.approx(1, rel=0.02)
  other = make(AdapterConfig(r=many, init_lora_weights="zero_a"), **wide)
  assert not other.a.any()
  assert np.abs(other.b).max() == pytest.approx(many**-0.5, rel=1e-3)


@pytest.mark.parametrize("options", [dict(), dict(use_dora=True), dict(init_lora_weights="pissa")])
def test_a_rank_above_the_matrix_is_refused_by_name(options):
  config = AdapterConfig(r=4, rank_pattern={r"layers\.1\..*": OUT + 1}, **options)
  message = rf"rank 25 of 'layers.1.self_attn.q_proj' is above the matrix, which is {IN} x {OUT}"
  with pytest.raises(ValueError, match=message):
    inits.init(jax.random.key(0), jnp.zeros((3, IN, OUT)), STACKED, config)


def test_layers_start_differently():
  a = make(AdapterConfig(r=4)).a
  assert (a[0] != a[1]).all()


def test_ranks_that_differ_are_masked_and_counted_as_they_are():
  config = AdapterConfig(
    r=4,
    lora_alpha=8,
    rank_pattern={r"layers\.1\..*": 6},
    exclude_modules=["layers.2.self_attn.q_proj"],
  )
  node = make(config)
  assert node.ranks().tolist() == [4, 6, 0]
  assert node.size() == (4 + 6) * (IN + OUT)
  np.testing.assert_allclose(node.scale, [2, 8 / 6, 0], rtol=1e-7)
  assert not node.a[0, :, 4:].any()
  assert not node.a[2].any()
  even = make(AdapterConfig(r=4))
  assert even.mask is None
  assert even.ranks().tolist() == [4, 4, 4]
  assert even.size() == 3 * 4 * (IN + OUT)


def test_split_and_join_are_inverse():
  config = AdapterConfig(r=4, rank_pattern={r"layers\.1\..*": 6}, exclude_modules=r".*\.2\..*")
  node = make(config)
  pairs = node.split()
  assert [a.shape for a, _ in pairs] == [(IN, 4), (IN, 6), (IN, 0)]
  again = lora.join(pairs, node.scale, node.a.shape[:1])
  jax.tree.map(np.testing.assert_array_equal, again, node)


def test_split_takes_the_ranks_in_use_wherever_they_are(key):
  node = lora.LoRA(
    jnp.arange(6.0).reshape(2, 3),
    jnp.arange(3.0)[:, None],
    jnp.float32(1),
    jnp.asarray([1.0, 0, 1]),
  )
  [(a, b)] = node.split()
  assert a.tolist() == [[0, 2], [3, 5]]
  assert b.tolist() == [[0], [2]]


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_acts_on_the_update_alone_and_keeps_its_mean(key):
  base = jax.random.normal(key, (IN, OUT))
  node = lora.LoRA(jnp.eye(IN), jnp.ones((IN, OUT)), jnp.float32(1.0), dropout=0.25)
  x = jnp.ones((20_000, IN))
  update = np.asarray(Adapted(base, node, key).apply(x) - weight.linear(x, base))[:, 0]
  # Each of IN inputs is 4/3 with probability 3/4: mean IN, variance IN / 3.
  assert update.mean() == pytest.approx(IN, rel=2e-3)
  assert update.var() == pytest.approx(IN / 3, rel=0.05)
  still = Adapted(base, node).apply(x[:2])  # no key: evaluation
  close(still, x[:2] @ (base + 1))


def test_an_embedding_has_no_dropout(key):
  node = lora.LoRA(jnp.ones((IN, 2)), jnp.ones((2, OUT)), jnp.float32(1.0), dropout=0.5)
  base = jnp.zeros((IN, OUT))
  np.testing.assert_array_equal(
    Adapted(base, node, key).rows(jnp.arange(4)), np.full((4, OUT), 2.0)
  )
