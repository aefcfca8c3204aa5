"""DoRA against the paper's formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax.adapters import AdapterConfig, dora, inits, lora
from posttrain_jax.core import tree
from posttrain_jax.core.weight import Adapted, dense, linear
from posttrain_jax.models import decoder
from posttrain_jax.quant import nf4
from tests.adapters.cases import DORAS, IN, OUT

STACKED = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj"]


@pytest.fixture
def key():
  return jax.random.key(0)


def close(actual, expected, rtol=1e-5):
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


def wide(x):
  return np.asarray(x, np.float64)


def direction(node, base):
  """V = W + scale a b, float64."""
  mask = np.ones(node.a.shape[-1]) if node.mask is None else wide(node.mask)
  return wide(dense(base)) + wide(node.scale) * wide(node.a) @ np.diag(mask) @ wide(node.b)


@pytest.mark.parametrize("make", DORAS, ids=lambda make: make.__name__)
def test_the_formula_of_the_paper(make, key):
  base, node = make(key)
  v = direction(node, base)
  expected = wide(node.magnitude) * v / np.linalg.norm(v, axis=0)
  close(node.dense(base), expected)
  close(node.factor(base, jnp.float32), wide(node.magnitude) / np.linalg.norm(v, axis=0))
  assert np.abs(expected - v).max() > 0.1


@pytest.mark.parametrize("make", DORAS, ids=lambda make: make.__name__)
def test_the_gradient_takes_the_norm_for_a_constant(make, key):
  base, node = make(key)
  x, g = jax.random.normal(key, (2, 7, IN))
  g = g[:, :OUT]
  loss = lambda part: jnp.sum(g * part.apply(x, base))
  gradient = jax.grad(lambda part: loss(node.replace(**part)))(
    {name: getattr(node, name) for name in node.TRAINED}
  )
  v = direction(node, base)
  norm = np.linalg.norm(v, axis=0)
  mask = np.ones(node.a.shape[-1]) if node.mask is None else wide(node.mask)
  inner = wide(g) * wide(node.magnitude) / norm  # what reaches x @ V
  scale = float(node.scale)
  close(gradient["a"], scale * wide(x).T @ inner @ wide(node.b).T * mask)
  close(gradient["b"], scale * mask[:, None] * (wide(node.a).T @ wide(x).T @ inner))
  close(gradient["magnitude"], np.sum(wide(g) * (wide(x) @ v), axis=0) / norm)


@pytest.mark.parametrize("size", [0, 1e-6, 1e-3, 1, 1e3, 1e6])
def test_norms_of_small_and_large_changes(size, key):
  keys = jax.random.split(key, 3)
  w = jax.random.normal(keys[0], (512, OUT))
  a = size * jax.random.normal(keys[1], (512, 8))
  node = dora.over(lora.LoRA(a, jax.random.normal(keys[2], (8, OUT)), jnp.float32(0.5)), w)
  norm = np.linalg.norm(direction(node, w), axis=0)
  np.testing.assert_allclose(node.magnitude, norm, rtol=1e-6)
  np.testing.assert_allclose(node.factor(w, jnp.float32), np.ones(OUT), rtol=2e-6)


def test_the_change_of_a_small_step_is_in_the_norm(key):
  """Not lost beside ||W||^2: half a step in b moves the norm by half as much."""
  w = jax.random.normal(key, (512, OUT))
  base_norm = np.linalg.norm(wide(w), axis=0)
  node = dora.over(lora.LoRA(w[:, :8], jnp.zeros((8, OUT)), jnp.float32(1)), w)
  for step in (1e-2, 1e-3):
    moved = node.replace(b=jnp.full((8, OUT), step))
    change = 1 / np.asarray(moved.factor(w, jnp.float32)) - 1
    exact = np.linalg.norm(direction(moved, w), axis=0) / base_norm - 1
    np.testing.assert_allclose(change, exact, atol=3e-7)
    assert np.abs(exact).max() > 10 * 3e-7


@pytest.mark.parametrize("left", [0.1, 1e-2, 0.0])
def test_a_change_that_cancels_the_base(left, key):
  """Down to a hundredth of ||W|| the norm is right; below what float32 resolves it is bounded, not NaN or infinite."""
  keys = jax.random.split(key, 3)
  a, b = jax.random.normal(keys[0], (512, 8)), jax.random.normal(keys[1], (8, OUT))
  w = a @ b + left * jax.random.normal(keys[2], (512, OUT)) * 8**0.5
  node = dora.over(lora.LoRA(a, -b, jnp.float32(1)), w)
  node = node.replace(magnitude=node.norm)
  norm = np.linalg.norm(direction(node, w), axis=0)
  factor = node.factor(w, jnp.float32)
  if left:
    np.testing.assert_allclose(
      factor, wide(node.magnitude) / norm, rtol=1e-4 if left > 0.01 else 1e-2
    )
  assert np.isfinite(factor).all()
  assert (np.abs(factor) <= 1.01 / dora.FLOOR**0.5).all()


def test_a_column_of_zeros_stays_one(key):
  w = jax.random.normal(key, (IN, OUT)).at[:, 3].set(0)
  node = dora.over(lora.LoRA(w[:, :2], jnp.zeros((2, OUT)), jnp.float32(1)), w)
  x = jax.random.normal(key, (5, IN))
  close(node.apply(x, w), x @ w)
  gradient = jax.grad(lambda b: node.replace(b=b).apply(x, w).sum())(node.b)
  assert np.isfinite(gradient).all()


def test_bfloat16_sums_the_norm_in_float32(key):
  base, node = DORAS[0](key)
  low = base.astype(jnp.bfloat16)
  node = dora.over(node, low).replace(magnitude=node.magnitude)
  exact = wide(node.magnitude) / np.linalg.norm(direction(node, low), axis=0)
  np.testing.assert_allclose(node.factor(low, jnp.bfloat16), exact, rtol=4e-3)
  x = jax.random.normal(key, (5, IN), jnp.bfloat16)
  close(node.apply(x, low), wide(x) @ wide(node.dense(low, jnp.float32)), rtol=3e-2)


def test_no_matrix_as_large_as_the_base_is_formed(key):
  """What the compiled norm holds is far less than W: no a @ b, no square of W."""
  w, rank = jnp.zeros((512, 2048)), 4
  node = dora.over(lora.LoRA(jnp.ones((512, rank)), jnp.ones((rank, 2048)), jnp.float32(1)), w)
  compiled = jax.jit(lambda node, w: node.factor(w, w.dtype)).lower(node, w).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < w.nbytes / 8


# --- init -------------------------------------------------------------------------------------------------------------


def make(base, **options):
  return inits.init(jax.random.key(0), base, STACKED, AdapterConfig(use_dora=True, **options))


def test_a_fresh_one_is_the_base(key):
  base = jax.random.normal(key, (3, IN, OUT))
  same, node = make(base, r=4)
  assert same is base
  np.testing.assert_allclose(node.magnitude, np.linalg.norm(wide(base), axis=1), rtol=1e-6)
  for layer in range(3):
    one = jax.tree.map(lambda x, layer=layer: x[layer], node)
    np.testing.assert_array_equal(one.factor(base[layer], jnp.float32), np.ones(OUT))
    x = jax.random.normal(key, (5, IN))
    np.testing.assert_array_equal(one.apply(x, base[layer]), linear(x, base[layer]))


@pytest.mark.parametrize("quantise", [lambda w: w, nf4.quantize], ids=["dense", "nf4"])
def test_a_fresh_factor_is_one_to_the_bit_in_a_compiled_scan(quantise, key):
  """m / sqrt(n) may be compiled to a product with an approximate 1 / sqrt(n): logits of 30 layers moved by 6e-5."""
  base = quantise(jax.random.normal(key, (3, IN, OUT)))
  _, node = make(base, r=4)
  factors = jax.jit(
    lambda *xs: jax.lax.scan(lambda c, x: (c, x[0].factor(x[1], jnp.float32)), 0, xs)
  )
  np.testing.assert_array_equal(factors(node, base)[1], np.ones((3, OUT)))


def test_the_norm_of_a_quantised_base_is_that_of_what_it_decodes_to(key):
  base = nf4.quantize(jax.random.normal(key, (3, IN, OUT)))
  _, node = make(base, r=4)
  np.testing.assert_allclose(node.norm, np.linalg.norm(wide(base.dense()), axis=1), rtol=1e-6)


def test_ranks_and_scales_are_those_of_lora(key):
  base = jax.random.normal(key, (3, IN, OUT))
  options = dict(r=4, lora_alpha=8, use_rslora=True, rank_pattern={r"layers\.1\..*": 6})
  _, node = make(base, **options, exclude_modules=["layers.2.self_attn.q_proj"])
  np.testing.assert_allclose(node.scale, [8 / 4**0.5, 8 / 6**0.5, 0], rtol=1e-6)
  assert node.ranks().tolist() == [4, 6, 0]
  assert node.size() == (4 + 6) * (IN + OUT) + 2 * OUT
  moved = node.replace(
    b=jax.random.normal(key, node.b.shape), magnitude=node.magnitude * jnp.float32(1.5)
  )
  for layer in range(3):
    one = jax.tree.map(lambda x, layer=layer: x[layer], moved)
    v = direction(one, base[layer])
    expected = 1.5 * np.linalg.norm(wide(base[layer]), axis=0) * v / np.linalg.norm(v, axis=0)
    close(one.dense(base[layer]), expected if layer < 2 else base[layer])
    close(moved.dense(base)[layer], one.dense(base[layer]), rtol=1e-6)


def test_a_layer_that_is_not_adapted_is_its_base_and_has_no_gradient(key):
  base = jax.random.normal(key, (3, IN, OUT))
  _, node = make(base, r=4, exclude_modules=["layers.2.self_attn.q_proj"])
  one = jax.tree.map(lambda x: x[2], node)
  one = one.replace(magnitude=3 * one.magnitude)
  x = jax.random.normal(key, (5, IN))
  np.testing.assert_array_equal(one.apply(x, base[2]), linear(x, base[2]))
  np.testing.assert_array_equal(one.dense(base[2]), base[2])
  gradient = jax.grad(lambda m: one.replace(magnitude=m).apply(x, base[2]).sum())(one.magnitude)
  assert not gradient.any()


def test_magnitudes_and_norms_are_sharded_as_columns(key):
  _, node = make(jax.random.normal(key, (3, IN, OUT)), r=2)
  specs = node.partition_specs(P(None, "fsdp", "tensor"))
  assert specs.magnitude == specs.norm == P(None, "tensor")
  assert specs.a == P(None, "fsdp", None)
  assert jax.tree.structure(specs) == jax.tree.structure(node)


def test_only_the_norm_is_fixed(key):
  trained, fixed = tree.partition({"w": DORAS[0](key)[1]})
  assert trained["w"].magnitude is not None
  assert trained["w"].norm is None
  assert fixed["w"].norm is not None
  assert fixed["w"].magnitude is None


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_is_on_the_change_alone(key):
  """x W + dropped ((m / ||V||) V - W), as PEFT's; the base sees the whole input."""
  base, node = DORAS[0](key)
  node = node.replace(dropout=0.5)
  x = jax.random.normal(key, (2, 5, IN))
  kept = jax.random.bernoulli(key, 0.5, x.shape)
  dropped = np.where(kept, wide(x) / 0.5, 0)
  change = wide(node.dense(base)) - wide(base)
  close(Adapted(base, node, key).apply(x), wide(x) @ wide(base) + dropped @ change)
  close(Adapted(base, node).apply(x), wide(x) @ wide(node.dense(base)))


def test_the_norm_does_not_see_the_dropout_of_a_base_that_has_its_own(key):
  base, node = DORAS[3](key)
  noisy = base.replace(node=base.node.replace(dropout=0.5), key=key)
  np.testing.assert_array_equal(node.factor(noisy, jnp.float32), node.factor(base, jnp.float32))


def test_the_backward_pass_does_not_compute_the_norm_again(key):
  """Under remat "names" W is multiplied three times: forward, for the norm, and in the backward pass."""
  base, node = DORAS[0](key)

  def products(remat):
    apply = decoder.REMAT[remat](lambda x, node, base: node.apply(x, base))
    loss = lambda x, node, base: jnp.square(apply(x, node, base)).sum()
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    lowered = gradient.lower(jnp.ones((5, IN)), node, base).as_text().splitlines()
    return sum("dot_general" in line and f"tensor<{IN}x{OUT}xf32>" in line for line in lowered)

  assert (products("names"), products("none"), products("full")) == (3, 3, 5)
