"""What every stored type must do: multiply, look up, differentiate, stack, shard, and stay small while it does so."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax import quant
from posttrain_jax.core import sharding, tree, weight
from posttrain_jax.quant import fp4, int8, nf4, report
from tests.marks import few
from tests.quant.types import TYPES

# nf4 with nested absmax and int8 in the fast suite; fp4 and one level are the same code with other tables
EACH = pytest.mark.parametrize("kind", few(TYPES, TYPES[0], TYPES[4]), ids=str)


def normal(*shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@EACH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_apply_and_rows_agree_with_dense(dtype, kind):
  q = kind.quantize(normal(192, 40, dtype=dtype))
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


@EACH
def test_gradient_goes_through_the_matrix_and_not_into_it(kind):
  q = kind.quantize(normal(128, 24))
  x, g = normal(5, 128, seed=1), normal(5, 24, seed=2)
  _, pullback = jax.vjp(lambda x: q.apply(x), x)
  np.testing.assert_allclose(pullback(g)[0], g @ q.dense().T, rtol=1e-4, atol=1e-4)
  dq = jax.grad(lambda q: jnp.sum(q.apply(x) * g), allow_int=True)(q)
  assert dq.codes.dtype == jax.dtypes.float0
  others = [leaf for leaf in jax.tree.leaves(dq) if leaf.dtype != jax.dtypes.float0]
  assert all((np.asarray(leaf) == 0).all() for leaf in others)


@EACH
def test_residuals_are_codes(kind):
  q = kind.quantize(normal(1024, 512))
  _, pullback = jax.vjp(lambda x, q: q.apply(x), normal(8, 1024, seed=1), q)
  kept = tree.nbytes(jax.tree.leaves(pullback))
  assert kept <= tree.nbytes(q)
  assert 8 * kept < 1024 * 512 * (kind.bits + 0.15)


@EACH
def test_scanned_layers_are_dequantised_one_at_a_time(kind):
  def temporaries(layers):
    q = kind.abstract((layers, 1024, 1024))
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)

    def loss(x, q):
      return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(w.apply(x)), None), x, q)[0])

    return jax.jit(jax.grad(loss)).lower(x, q).compile().memory_analysis().temp_size_in_bytes

  # Per layer: the carry of 8 x 1024 floats (32 KiB), and not the matrix (4 MiB) or its codes (0.5 or 1 MiB).
  assert temporaries(16) - temporaries(4) < 12 * 4 * 32 * 1024


@EACH
def test_nothing_of_the_size_of_scales_is_moved_out_of_the_layer_scan(kind):
  """Differentiation moves out of a scan what no layer decides: a codebook, expanded, would be 16 matrices."""
  q = kind.abstract((2, 1024, 512))
  x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)

  def loss(x, q):
    return jnp.sum(jax.lax.scan(lambda x, w: (x + jnp.sum(w.apply(x)), None), x, q)[0])

  scans = [
    eqn for eqn in jax.make_jaxpr(jax.grad(loss))(x, q).eqns if eqn.primitive is jax.lax.scan_p
  ]
  constants = [v.aval.size for eqn in scans for v in eqn.invars[: eqn.params["num_consts"]]]
  assert scans
  assert max(constants, default=0) < 1024 * 512 // 64


@EACH
def test_stack_is_its_layers(kind):
  w = normal(3, 128, 20)
  stacked = kind.quantize(w)
  on_host = kind.quantize(np.asarray(w))
  assert stacked.shape == (3, 128, 20)
  for i in range(3):
    one = kind.quantize(w[i])
    for leaves in zip(*map(jax.tree.leaves, (one, stacked, on_host))):
      np.testing.assert_array_equal(leaves[0], leaves[1][i])
      np.testing.assert_array_equal(leaves[0], leaves[2][i])
    np.testing.assert_array_equal(stacked.dense()[i], one.dense())


@EACH
@pytest.mark.parametrize("where", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_a_stack_is_refused_for_the_value_of_one_layer(where, kind):
  w = np.ones((2, 64, 2), np.float32)
  w[1, 3, 1] = np.inf
  with pytest.raises(ValueError, match="largest absolute value is inf"):
    kind.quantize(where(w))


@pytest.mark.parametrize("module", [nf4, fp4], ids=["nf4", "fp4"])
def test_scales_are_quantised_too_unless_told_otherwise(module):
  assert module.quantize(normal(64, 2)).nested_absmax is not None
  assert module.abstract((64, 2)).nested_absmax is not None


@EACH
def test_abstract_is_the_shape_of_quantize(kind):
  q = kind.quantize(normal(2, 256, 40, dtype=jnp.bfloat16))
  abstract = kind.abstract((2, 256, 40), dtype=jnp.bfloat16)
  assert abstract == jax.eval_shape(lambda: q)
  assert tree.nbytes(abstract) == tree.nbytes(q)


@EACH
def test_partition_specs_follow_the_matrix(kind):
  q = kind.quantize(normal(2, 128, 32))
  specs = q.partition_specs(P(None, "fsdp", "tensor"))
  assert specs.codes == P(None, "fsdp", "tensor")
  assert jax.tree.structure(specs) == jax.tree.structure(q)
  for leaf, spec in zip(jax.tree.leaves(q), jax.tree.leaves(specs)):
    assert len(spec) <= leaf.ndim
  if isinstance(q, int8.Int8):
    assert specs.absmax == P(None, "tensor")
  else:
    assert specs.scales == specs.codes
    assert specs.nested_absmax in (None, P(None))
    assert specs.offset == specs.nested_absmax


def test_no_type_is_taken_for_another():
  """JAX compares structures by fields, not by class; equal ones share the programs that `jit` keeps."""
  structures = [jax.tree.structure(kind.abstract((64, 8))) for kind in TYPES]
  for i, one in enumerate(structures):
    assert all(one != other for other in structures[:i])


@EACH
def test_error_and_bits_of_normal_values(kind):
  w = normal(4096, 256, seed=3)
  q = kind.quantize(w)
  assert 8 * tree.nbytes(q) / w.size == pytest.approx(kind.bits, abs=1e-3)
  assert tree.size(q) == w.size
  assert 0.95 * kind.norm < report.error(w, q).norm < kind.norm


@pytest.mark.parametrize("spec", [P("tensor", None), P(None, "tensor")], ids=["row", "column"])
@EACH
def test_tensor_parallel_apply_moves_no_weights(spec, kind):
  mesh = sharding.mesh(tensor=-1)
  assert mesh.size == 8
  q = kind.quantize(normal(1024, 64) / 32)
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


@EACH
@pytest.mark.parametrize("shape", [(64, 24), (3, 64, 24)])
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_one_nan_among_numbers_is_refused(kind, shape, as_array):
  """XLA:CPU's maximum gives the largest of the others, and with it a code for the NaN."""
  w = np.array(normal(*shape))
  w[..., 17, 5] = np.nan
  with pytest.raises(ValueError, match=r"its largest absolute value is nan.*look for NaN"):
    kind.quantize(as_array(w))
  if len(shape) == 3:
    w[[0, 2], 17, 5] = 1
    with pytest.raises(ValueError, match=r"its largest absolute value is nan.*look for NaN"):
      kind.quantize(as_array(w))


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8"])
def test_a_number_that_no_model_computes_with_is_not_to_be_left_dense(storage):
  """The advice was to exclude the matrix, whose dense products were not finite either."""
  w = np.array(normal(64, 64))
  w[3, 5] = 3e38
  with pytest.raises(ValueError, match=r"largest absolute value is 3.*fetch it again") as error:
    quant.quantize("layers/mlp/up_proj/weight", w, storage)
  assert "exclude=" not in str(error.value)
