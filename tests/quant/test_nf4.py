"""NF4 against a numpy loop, its own dense matrix, and the memory it promises."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax import quant
from posttrain_jax.core import sharding, tree, weight
from posttrain_jax.quant import blockwise, nf4

DOUBLE = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])


def normal(*shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def by_hand(q):
  """The matrix from the stored bytes, one weight at a time, in bitsandbytes' flattened order."""
  rows, out = q.shape
  per_column = rows // q.block_size
  w = np.zeros((rows, out), np.float32)
  for o in range(out):
    for b in range(per_column):
      scale = np.asarray(q.scales)[b, o]
      if q.nested_absmax is not None:
        absmax = np.asarray(q.nested_absmax)[(o * per_column + b) // 256]
        scale = np.float32(blockwise.dynamic_map()[scale] * absmax) + np.asarray(q.offset)
      for i in range(b * q.block_size, (b + 1) * q.block_size):
        byte = int(q.codes[i // 2, o])
        w[i, o] = nf4.CODEBOOK[byte >> 4 if i % 2 == 0 else byte & 15] * scale
  return w


@DOUBLE
# One nested block, many columns to a block, blocks that end within a column, columns longer than a block.
@pytest.mark.parametrize("shape", [(64, 8), (192, 130), (9600, 2)])
def test_dense_is_what_the_bytes_say(shape, double_quant):
  q = nf4.quantize(normal(*shape), block_size=32, double_quant=double_quant)
  q = jax.tree.map(np.asarray, q)
  expected = by_hand(q)
  q = jax.tree.map(jnp.asarray, q)
  np.testing.assert_array_equal(q.dense(), expected)
  np.testing.assert_array_equal(jax.jit(lambda q: q.dense())(q), expected)


def test_codes_are_the_nearest_of_the_codebook():
  w = normal(128, 3)
  q = nf4.quantize(w, double_quant=False)
  scales = np.repeat(np.abs(w.reshape(2, 64, 3)).max(axis=1), 64, axis=0)
  nearest = np.abs(np.asarray(w)[..., None] / scales[..., None] - nf4.CODEBOOK).argmin(axis=-1)
  np.testing.assert_allclose(q.dense(), nf4.CODEBOOK[nearest] * scales, rtol=1e-6)


def test_error_on_normal_values_is_bitsandbytes():
  # bitsandbytes 0.50.2, tests/test_functional.py, error_stats for nf4 and blocks of 64.
  w = normal(1024, 1024, seed=3)
  error = nf4.error(w, nf4.quantize(w, double_quant=False))
  assert error["mean_abs"] == pytest.approx(0.072798, rel=2e-3)
  assert error["relative"] == pytest.approx(0.203339, rel=5e-3)
  doubled = nf4.error(w, nf4.quantize(w))
  assert error["mean_abs"] < doubled["mean_abs"] < 1.01 * error["mean_abs"]
  # The widest gap of the codebook, -1 to -0.696, is rounded from its middle.
  assert 0.1 * jnp.abs(w).max() < error["max_abs"] < 0.152 * jnp.abs(w).max()


@DOUBLE
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_apply_and_rows_agree_with_dense(dtype, double_quant):
  q = nf4.quantize(normal(192, 40, dtype=dtype), double_quant=double_quant)
  assert q.shape == (192, 40)
  assert q.dtype == dtype
  x = normal(2, 3, 192, seed=1, dtype=dtype)
  exact = np.asarray(x, np.float64) @ np.asarray(q.dense(), np.float64)
  tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}[dtype]
  y = weight.linear(x, q)
  assert y.dtype == dtype
  np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=tolerance, atol=20 * tolerance)
  ids = jnp.array([[0, 191], [77, 64]])
  np.testing.assert_array_equal(weight.embed(ids, q), q.dense()[ids])


@DOUBLE
def test_gradient_goes_through_the_matrix_and_not_into_it(double_quant):
  q = nf4.quantize(normal(128, 24), double_quant=double_quant)
  x, g = normal(5, 128, seed=1), normal(5, 24, seed=2)
  _, pullback = jax.vjp(lambda x: q.apply(x), x)
  np.testing.assert_allclose(pullback(g)[0], g @ q.dense().T, rtol=1e-4, atol=1e-4)
  dq = jax.grad(lambda q: jnp.sum(q.apply(x) * g), allow_int=True)(q)
  assert all(
    (np.asarray(leaf) == 0).all() for leaf in [dq.offset, dq.nested_absmax] if leaf is not None
  )
  assert dq.codes.dtype == jax.dtypes.float0


def test_residuals_are_codes():
  q = nf4.quantize(normal(1024, 512))
  _, pullback = jax.vjp(lambda x, q: q.apply(x), normal(8, 1024, seed=1), q)
  kept = tree.nbytes(jax.tree.leaves(pullback))
  assert kept <= tree.nbytes(q)
  assert kept < 1024 * 512 * 0.53


def test_scanned_layers_are_dequantised_one_at_a_time():
  def temporaries(layers):
    q = nf4.abstract((layers, 1024, 1024))
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)

    def loss(x, q):
      return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(w.apply(x)), None), x, q)[0])

    return jax.jit(jax.grad(loss)).lower(x, q).compile().memory_analysis().temp_size_in_bytes

  # Per layer: the carry of 8 x 1024 floats (32 KiB), and not the matrix (4 MiB) or its codes (0.5 MiB).
  assert temporaries(16) - temporaries(4) < 12 * 4 * 32 * 1024


@DOUBLE
def test_nothing_of_the_size_of_scales_is_moved_out_of_the_layer_scan(double_quant):
  """Differentiation moves out of a scan what no layer decides: the codebook, expanded, would be 16 matrices."""
  q = nf4.abstract((2, 1024, 512), double_quant=double_quant)
  x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)

  def loss(x, q):
    return jnp.sum(jax.lax.scan(lambda x, w: (x + jnp.sum(w.apply(x)), None), x, q)[0])

  scans = [
    eqn for eqn in jax.make_jaxpr(jax.grad(loss))(x, q).eqns if eqn.primitive is jax.lax.scan_p
  ]
  constants = [v.aval.size for eqn in scans for v in eqn.invars[: eqn.params["num_consts"]]]
  assert scans
  assert max(constants, default=0) < 1024 * 512 // q.block_size


@DOUBLE
def test_stack_is_its_layers(double_quant):
  w = normal(3, 128, 20)
  stacked = nf4.quantize(w, double_quant=double_quant)
  on_host = nf4.quantize(np.asarray(w), double_quant=double_quant)
  assert stacked.shape == (3, 128, 20)
  for i in range(3):
    one = nf4.quantize(w[i], double_quant=double_quant)
    for leaves in zip(*map(jax.tree.leaves, (one, stacked, on_host))):
      np.testing.assert_array_equal(leaves[0], leaves[1][i])
      np.testing.assert_array_equal(leaves[0], leaves[2][i])
    np.testing.assert_array_equal(stacked.dense()[i], one.dense())


@DOUBLE
def test_abstract_is_the_shape_of_quantize(double_quant):
  q = nf4.quantize(
    normal(2, 256, 40, dtype=jnp.bfloat16), block_size=128, double_quant=double_quant
  )
  abstract = nf4.abstract(
    (2, 256, 40), dtype=jnp.bfloat16, block_size=128, double_quant=double_quant
  )
  assert abstract == jax.eval_shape(lambda: q)
  assert tree.nbytes(abstract) == tree.nbytes(q)


def test_bits_a_weight():
  w = jnp.zeros((4096, 1024))
  bits = lambda q: 8 * tree.nbytes(q) / w.size
  assert bits(nf4.quantize(w, double_quant=False)) == 4.5
  assert bits(nf4.quantize(w)) == pytest.approx(4.127, abs=1e-3)
  assert tree.size(nf4.quantize(w)) == w.size


def test_zeros_and_constants_are_exact():
  w = jnp.zeros((128, 4)).at[:64, 1].set(-0.3).at[64:, 2].set(7.0)
  np.testing.assert_array_equal(nf4.quantize(w, double_quant=False).dense(), w)
  assert (nf4.quantize(jnp.zeros((64, 8))).dense() == 0).all()


@pytest.mark.parametrize(
  ("w", "kwargs", "message"),
  [
    (np.ones((100, 8), np.float32), {}, r"\(100, 8\).*no multiple of block_size=64.*dense"),
    (np.ones((96, 8), np.float32), {}, r"write block_size=32 or keep"),
    (np.ones((64, 8), np.int32), {}, r"int32.*cast to float32"),
    (np.ones((64, 8), np.float32), {"block_size": 48}, r"block_size=48; write one of 32, 64"),
    (np.ones(64, np.float32), {}, r"expected \[in, out\]"),
    (np.full((64, 8), np.nan, np.float32), {}, r"largest absolute value is nan"),
    (np.full((2, 64, 8), np.inf, np.float32), {}, r"largest absolute value is inf"),
  ],
)
def test_what_cannot_be_quantised_is_refused(w, kwargs, message):
  with pytest.raises(ValueError, match=message):
    nf4.quantize(w, **kwargs)


@DOUBLE
def test_partition_specs_follow_the_matrix(double_quant):
  q = nf4.quantize(normal(2, 128, 32), double_quant=double_quant)
  specs = q.partition_specs(P(None, "fsdp", "tensor"))
  assert specs.codes == specs.scales == P(None, "fsdp", "tensor")
  assert jax.tree.structure(specs) == jax.tree.structure(q)
  if double_quant:
    assert specs.nested_absmax == specs.offset == P(None)


@pytest.mark.parametrize("spec", [P("tensor", None), P(None, "tensor")], ids=["row", "column"])
@DOUBLE
def test_tensor_parallel_apply_moves_no_weights(spec, double_quant):
  mesh = sharding.mesh(tensor=-1)
  assert mesh.size == 8
  q = nf4.quantize(normal(1024, 64) / 32, double_quant=double_quant)
  x = jax.device_put(normal(4, 3, 1024, seed=1), jax.NamedSharding(mesh, P(None, None, spec[0])))
  placed = jax.tree.map(
    lambda leaf, spec: jax.device_put(leaf, sharding.named(mesh, spec, leaf.shape)),
    q,
    q.partition_specs(spec),
  )
  step = jax.value_and_grad(lambda x, q: jnp.sum(jnp.sin(q.apply(x))))
  expected = step(jax.device_get(x), q)
  with jax.set_mesh(mesh):
    program = jax.jit(step).lower(x, placed).compile()
    found = program(x, placed)
  for a, b in zip(found, expected):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  # One all-reduce of activations each; "row" also adds up the loss over what is whole on each device.
  moved = re.findall(r"(all-gather|all-to-all|collective-permute)(?:-start)?\(", program.as_text())
  assert not moved


def params():
  return {
    "embed_tokens": {"weight": normal(50, 64)},
    "layers": {
      "self_attn": {"q_proj": {"weight": normal(2, 64, 64), "bias": normal(2, 64)}},
      "mlp": {"down_proj": {"weight": normal(2, 128, 64)}},
      "input_layernorm": {"weight": normal(2, 64)},
    },
    "norm": {"weight": normal(64)},
    "lm_head": {"weight": normal(64, 50)},
  }


def quantised(tree_):
  return {path for path, leaf in tree.items(tree_) if isinstance(leaf, nf4.NF4)}


Q, DOWN = "layers/self_attn/q_proj/weight", "layers/mlp/down_proj/weight"


def test_linear_weights_of_the_layers_become_nf4():
  before = params()
  after = quant.quantize_params(before)
  assert quantised(after) == {Q, DOWN}
  assert list(tree.flatten(after)) == list(tree.flatten(before))
  assert tree.size(after) == tree.size(before)
  assert tree.get(after, "lm_head/weight") is tree.get(before, "lm_head/weight")


@pytest.mark.parametrize(
  "pattern", [DOWN, r"layers/mlp/.*", "down_proj", r"layers\.\d+\.mlp\.down_proj", r".*\.mlp\..*"]
)
def test_excluded_weights_stay_dense(pattern):
  assert quantised(quant.quantize_params(params(), exclude=[pattern])) == {Q}


def test_mistakes_in_quantize_params_are_named():
  with pytest.raises(ValueError, match=r"no parameter matches 'dwn_proj'; .*down_proj"):
    quant.quantize_params(params(), exclude=["dwn_proj"])
  with pytest.raises(ValueError, match=r"matches 1 of the 2 layers of .*write 'down_proj'"):
    quant.quantize_params(params(), exclude=[r"layers\.1\.mlp\.down_proj"])
  with pytest.raises(ValueError, match=r"down_proj/weight: it is a NF4 already"):
    quant.quantize_params(quant.quantize_params(params(), exclude=["q_proj"]))
  with pytest.raises(ValueError, match=r"q_proj/weight: cannot quantise .*exclude="):
    quant.quantize_params(tree.put(params(), Q, normal(2, 40, 64)))
  with pytest.raises(ValueError, match="nothing to quantise"):
    quant.quantize_params({"norm": {"weight": normal(64)}})
