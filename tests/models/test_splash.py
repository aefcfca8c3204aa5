"""The splash kernel, interpreted, is plain attention; for TPUs it is compiled where libtpu is at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core
from jax.sharding import NamedSharding, PartitionSpec

from posttrain_jax.core import sharding, zigzag
from posttrain_jax.models import attention, splash
from posttrain_jax.models.attention import Places
from posttrain_jax.plan import topology
from tests.marks import few, needs_libtpu
from tests.models.test_attention import drawn, packed_rows, pairs_that_share

WINDOW = 70
HIGHEST = jax.lax.Precision.HIGHEST


def run(attend, places, softcap, **options):
  """(q, k, v, window) -> (out, gradients); the window is traced, as over layers of two kinds."""

  def loss(q, k, v, window):
    out = attend(q, k, v, places, places, window, scale=0.2, softcap=softcap, **options)
    return jnp.sum(jnp.sin(out)), out

  both = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
  return jax.jit(lambda *inputs: (lambda value, grads: (value[1], grads))(*both(*inputs)))


def assert_close(found, wanted):
  for one, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    error = np.linalg.norm(np.asarray(one) - np.asarray(expected))
    assert error < 3e-6 * np.linalg.norm(expected)


def equations(jaxpr):
  """Of a program and of all that are within it, kernels too."""
  for one in jaxpr.eqns:
    yield one
    for inner in jax_core.jaxprs_in_params(one.params):
      yield from equations(inner)


def interpreted(monkeypatch):
  monkeypatch.setattr(splash, "BLOCK", 128)
  monkeypatch.setattr(splash, "INTERPRET", True)


CASES = ((WINDOW, 1.5), (250, None), (None, None))


@pytest.mark.parametrize(("window", "softcap"), few(CASES, CASES[0]))
def test_it_is_plain_attention(window, softcap, monkeypatch):
  """Two documents, padding within a block and behind it, and a row that is one document."""
  interpreted(monkeypatch)
  q, k, v = drawn(250, heads=4, kv_heads=2, dim=16)
  places = jax.tree.map(jnp.asarray, packed_rows(250))
  reach = None if window is None else jnp.int32(window)
  wanted = run(attention.attend, places, softcap)(q, k, v, reach)
  found = run(splash.attend, places, softcap, windows=(WINDOW,))(q, k, v, reach)
  assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(context=2, tensor=4), dict(data=2, context=4)], ids=str)
def test_it_is_plain_attention_on_a_mesh(sizes, monkeypatch):
  """Rows that are cut in zigzag order, and heads of keys that two devices share."""
  interpreted(monkeypatch)
  q, k, v = drawn(512, heads=8, kv_heads=2, dim=16)
  places = jax.tree.map(jnp.asarray, packed_rows(512))
  wanted = run(attention.attend, places, 1.5)(q, k, v, jnp.int32(WINDOW))

  def found(q, k, v):
    where, *inputs = jax.tree.map(zigzag.cut, (places, q, k, v))
    both = run(splash.attend, where, 1.5, windows=(WINDOW,))(*inputs, jnp.int32(WINDOW))
    return jax.tree.map(lambda x: zigzag.whole(x, 512), both)

  with jax.set_mesh(sharding.mesh(**sizes)):
    found = jax.jit(found)(q, k, v)
  assert_close(found, wanted)


def test_blocks_that_nobody_sees_into_are_left_out():
  """Four documents of two blocks each: three blocks of every four by four, none of another document."""
  seen = jnp.asarray(np.kron(np.eye(4), [[1, 0], [1, 1]]).astype(bool))
  tables = splash._tables(seen, None)
  assert int(tables.block_mask.sum()) == 4 * 3
  for i, (blocks, runs) in enumerate(zip(tables.data_next[0].tolist(), tables.block_mask[0])):
    first = 2 * (i // 2)
    assert blocks[: int(runs.sum())] == [first, first + 1][: int(runs.sum())]
    assert set(blocks[int(runs.sum()) :]) <= {blocks[int(runs.sum()) - 1]}  # nothing more is loaded


@pytest.mark.parametrize(("dtype", "asked"), [(jnp.float32, HIGHEST), (jnp.bfloat16, None)])
def test_products_of_float32_are_asked_for_as_such(dtype, asked):
  """By the kernels themselves, forward and backward: a TPU rounds float32 to bfloat16 where nothing is asked for."""
  places = jax.tree.map(jnp.asarray, packed_rows(250))
  inputs = [x.astype(dtype) for x in drawn(250, heads=4, kv_heads=2, dim=16)]
  program = jax.make_jaxpr(run(splash.attend, places, None))(*inputs, None)
  products = [one for one in equations(program.jaxpr) if "dot" in one.primitive.name]
  asks = [one.params["precision"] for one in products]
  # of the three kernels: forward, and the gradients of queries and of keys and values
  assert len(asks) > 2 + 3 + 4
  assert set(asks) == {asked and (asked, asked)}


def test_tokens_that_several_documents_see_are_refused():
  q, k, v = drawn(22)
  places = pairs_that_share(22)
  with pytest.raises(ValueError, match="several documents see have no place in it; write xla"):
    splash.attend(q, k, v, places, places, scale=1.0)


# --- for chips that are not here --------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
  ("chips", "sizes", "dim", "softcap", "dtype"),
  [
    ("v5e:2x2", dict(fsdp=2, context=2), 128, 30.0, jnp.bfloat16),
    ("v5p:2x2x1", dict(context=4), 128, None, jnp.bfloat16),
    ("v6e:2x2", dict(fsdp=2, tensor=2), 64, None, jnp.bfloat16),
    ("v6e:2x2", dict(data=4), 256, 50.0, jnp.bfloat16),
    ("v6e:2x2", dict(data=4), 256, 50.0, jnp.float32),
    ("v4:2x2x1", dict(fsdp=8), 128, None, jnp.bfloat16),
    ("tpu7x:2x2x1", dict(fsdp=-1), 128, None, jnp.bfloat16),
  ],
)
def test_it_compiles_for_a_tpu(chips, sizes, dim, softcap, dtype):
  """Forward and backward of two rows of 8,192 tokens a device, in less than a tenth of the memory of their scores.

  Of float32 twice that.
  """
  time, heads, kv_heads = 8192, 8, 2
  mesh = sharding.mesh(**sizes, devices=topology.target(chips).devices)
  rows = 2 * mesh.shape["data"] * mesh.shape["fsdp"]
  with jax.set_mesh(mesh):

    def shape(axes, *sizes, dtype=dtype):
      spec = sharding.fitted(sharding.logical(axes), sizes, mesh)
      return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    arrays = [shape("batch time heads -", rows, time, n, dim) for n in (heads, kv_heads, kv_heads)]
    places = shape("batch -", rows, time, dtype=jnp.int32)
    window = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(q, k, v, positions, segments, window):
      where = Places(positions, segments)
      how = dict(windows=(4096,), scale=0.1, softcap=softcap)
      return jnp.sum(splash.attend(q, k, v, where, where, window, **how).astype(jnp.float32))

    program = jax.jit(jax.grad(loss, (0, 1, 2)))
    compiled = program.lower(*arrays, places, places, window).compile()
  scores = 2 * heads / mesh.shape["tensor"] * time**2 / mesh.shape["context"]
  own = scores * 2 * dtype.dtype.itemsize
  assert compiled.memory_analysis().temp_size_in_bytes < own / 10
