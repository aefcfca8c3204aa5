"""State, parameters and gradients on the host give what they give on the device, alone and on a mesh."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain_jax.core import memory, sharding, tree
from posttrain_jax.core.checkpoint import Checkpoints
from posttrain_jax.models import decoder
from posttrain_jax.objectives import Context, Sft
from posttrain_jax.optim import layout, offload
from posttrain_jax.train import state as state_lib
from posttrain_jax.train import step
from tests import tiny
from tests.marks import few, slow
from tests.optim import cases

NAMES = ("adamw", "lion", "sgd", *cases.NEW)
HOST, DEVICE = memory.KIND, "device"


def replicated(mesh=None):
  if mesh is None:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def placed(params, mode, mesh=None):
  """params where `offload=mode` has them."""
  params = params if mesh is None else cases.spread(params, mesh)
  if mode != "params":
    return params
  away = lambda x: jax.device_put(x, memory.host(x.sharding))
  return {**params, "layers": jax.tree.map(away, params["layers"])}


def start(optimizer, params, mesh=None):
  shapes = jax.eval_shape(optimizer.init, params)
  return jax.jit(optimizer.init, out_shardings=layout.shardings(shapes, params, replicated(mesh)))(
    params
  )


def updated(name, mode, mesh=None, count=3):
  """(parameters, state) after updates from gradients that lie as the parameters do."""
  optimizer = cases.made(name, offloaded=mode != "none")
  params = placed(cases.params(), mode, mesh)

  def update(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return offload.apply(params, updates, jnp.bool_(True)), state

  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    state, run = start(optimizer, params, mesh), jax.jit(update, donate_argnums=(0, 1))
    for seed in range(count):
      gradient = placed(cases.like(cases.params(), seed), mode, mesh)
      # one program at a time: on two cores, eight devices in two of them were seen to wait for each other
      params, state = jax.block_until_ready(run(params, state, gradient))
  return params, state


def kinds(arrays):
  return {x.sharding.memory_kind for x in jax.tree.leaves(arrays) if x.ndim}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "mode"), [("adamw", "state"), ("galore", "state"), *((name, "params") for name in NAMES)]
)
def test_offloaded_is_the_same(name, mode):
  wanted, _ = updated(name, "none")
  found, state = updated(name, mode)
  cases.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
  assert kinds(state) == {HOST}
  assert kinds(found["layers"]) == ({HOST} if mode == "params" else {DEVICE})
  assert kinds(found["embed_tokens"]) == {DEVICE}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "mode"),
  [
    *((name, "none") for name in ("adamw", "adafactor", "adamw8bit", "adam_mini", "galore")),
    *((name, "params") for name in ("adamw", "galore8bit")),
    ("adam_mini", "state"),
  ],
)
def test_a_mesh_changes_nothing(name, mode):
  mesh = sharding.mesh(fsdp=4, tensor=2)
  found, state = updated(name, mode, mesh)
  wanted, _ = updated(name, "none")
  cases.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
  assert kinds(state) <= ({DEVICE} if mode == "none" else {HOST})


def test_an_optimizer_that_asks_for_no_parameters_is_given_none():
  params = {"layers": {"w": jnp.ones((2, 3))}, "norm": jnp.ones(3)}
  gradient = jax.tree.map(lambda x: 0.5 * x, params)
  optimizer = offload.layerwise(optax.trace(decay=0.9))
  updates, state = optimizer.update(gradient, start(optimizer, params))
  again, _ = optimizer.update(gradient, state)
  cases.assert_close(updates, gradient, rtol=1e-6, atol=0)
  cases.assert_close(again, jax.tree.map(lambda g: 1.9 * g, gradient), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", few(["none", "state"], "state"))
def test_moments_lie_as_their_parameters(mode):
  """up_proj is [layers, 64, 160], fsdp x tensor = 4 x 2."""
  mesh = sharding.mesh(fsdp=4, tensor=2)
  shards = lambda x: x.sharding.shard_shape(x.shape)
  up = lambda tree: tree["layers"]["mlp"]["up_proj"]["weight"]
  inner = lambda state: state.layers if mode == "state" else state[1]
  made = lambda name, **o: inner(
    start(
      cases.made(name, offloaded=mode == "state", **o), cases.spread(cases.params(), mesh), mesh
    )
  )
  with jax.set_mesh(mesh):
    assert shards(up(made("adamw")[0].mu)) == (2, 16, 80)
    mini = made("adam_mini")[0]
    assert shards(up(mini.mu)) == (2, 16, 80)
    assert shards(up(mini.nu)) == (2, 1, 80)
    eight = up(made("adamw8bit").mu)
    assert shards(eight.codes) == (2, 16, 80)
    assert shards(eight.absmax) == (2, 40)  # blocks across rows: whole everywhere
    low = up(made("galore").leaves)
    assert shards(low.subspace.left) == (2, 16, 8)
    assert shards(low.mu) == (2, 8, 80)


def test_rows_of_whole_blocks_keep_their_shards():
  mesh = sharding.mesh(fsdp=4, tensor=2)
  spec = jax.sharding.PartitionSpec(None, "fsdp", "tensor")
  where = jax.sharding.NamedSharding(mesh, spec)
  params = {"layers": {"w": jax.device_put(jnp.ones((2, 64, 512)), where)}}
  mu = start(cases.made("adamw8bit"), params, mesh)[1].mu["layers"]["w"]
  assert mu.absmax.sharding.shard_shape(mu.absmax.shape) == (2, 16, 1)
  assert mu.codes.sharding.shard_shape(mu.codes.shape) == (2, 16, 256)


def test_a_factored_moment_follows_the_axes_that_it_keeps():
  spec = jax.sharding.PartitionSpec(None, "fsdp", "tensor")
  along = lambda shape: tuple(layout.along(spec, (2, 64, 160), shape))
  assert along((2, 64)) == (None, "fsdp")
  assert along((2, 160)) == (None, "tensor")
  assert along((1,)) == (None,)
  assert along((2, 1, 160)) == (None, None, "tensor")


def trained(mode, *, accumulate=1, count=2, bad=None):
  """(state, metrics) of the train step itself, with the tiny model's own gradients."""
  optimizer = cases.made("adamw", offloaded=mode != "none", eps=1e-3)
  params = placed(tiny_params(), mode)
  state = jax.jit(
    lambda params: state_lib.start(params, optimizer),
    out_shardings=state_lib.layout(
      jax.eval_shape(lambda p: state_lib.start(p, optimizer), params), params, replicated()
    ),
  )(params)
  objective = Sft(cases.MODEL, remat="names")
  run = jax.jit(step.make(objective, optimizer, accumulate=accumulate), donate_argnums=0)
  for _ in range(count):
    state, metrics = run(state, Context(), tiny.batch())
  if bad is not None:
    broken = lambda x: x.at[0].set(bad)
    head = {"weight": jax.jit(broken)(state.trainable["lm_head"]["weight"])}
    state = state.replace(trainable={**state.trainable, "lm_head": head})
    before = jax.tree.map(lambda x: np.array(x).tobytes(), state)
    state, metrics = run(state, Context(), tiny.batch())
    return state, before
  return state, metrics


def tiny_params():
  return decoder.init(jax.random.key(0), cases.MODEL, std=tiny.STD)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mode", "accumulate"), [("state", 1), ("params", 1), ("params", 2), ("params", 8)]
)
def test_a_step_trains_as_without(mode, accumulate):
  wanted, metrics = trained("none")
  found, same = trained(mode, accumulate=accumulate)
  cases.assert_close(found.trainable, wanted.trainable, rtol=1e-4, atol=1e-5)
  assert float(same["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
  assert kinds(found.optimizer) == {HOST}
  assert kinds(found.trainable["layers"]) == ({HOST} if mode == "params" else {DEVICE})


@pytest.mark.slow
@pytest.mark.parametrize("mode", [m if m == "state" else slow(m) for m in offload.MODES])
def test_a_gradient_that_is_not_finite_changes_no_bit(mode):
  state, before = trained(mode, bad=np.nan)
  after = jax.tree.map(lambda x: np.array(x).tobytes(), state)
  assert after.trainable == before.trainable
  assert jax.tree.leaves(after.optimizer) == jax.tree.leaves(before.optimizer)
  assert int(state.skipped) == 1


def test_the_state_is_donated_and_stays_on_the_host():
  optimizer = cases.made("adamw", offloaded=True)
  params = cases.params()
  state = start(optimizer, params)
  update = jax.jit(lambda g, s, p: optimizer.update(g, s, p), donate_argnums=(0, 1))
  _, new = update(cases.like(params, 1), state, params)
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert kinds(new) == {HOST}


@pytest.mark.slow
def test_it_comes_back_from_a_checkpoint_to_the_host(tmp_path):
  state, _ = trained("params")
  with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
    checkpoints.save(2, state, {})
    checkpoints.wait()
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    found, _, _ = checkpoints.restore(shapes)
  same = lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert jax.tree.all(jax.tree.map(same, found, state))
  assert all(memory.on_host(x) for x in jax.tree.leaves(found.optimizer) if x.ndim)
  assert all(memory.on_host(x) for x in jax.tree.leaves(found.trainable["layers"]))


def test_moments_of_one_layer_are_on_the_device_at_a_time():
  """The loop's body sees [1, ...] of every stack."""
  seen = []

  def spy(updates, state, params=None):
    seen.extend(x.shape for x in jax.tree.leaves((updates, state)))
    return updates, state

  inner = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), spy)
  params = {"layers": {"w": jnp.ones((7, 3, 4))}}
  optimizer = offload.layerwise(inner)
  jax.jit(optimizer.update)(params, start(optimizer, params), params)
  assert set(seen) == {(1, 3, 4)}


def test_a_state_that_mixes_layers_is_refused():
  inner = optax.GradientTransformation(lambda p: jnp.zeros((5,)), lambda u, s, p=None: (u, s))
  with pytest.raises(ValueError, match=r"\[5\] does not belong to single layers.*\[7\]"):
    offload.layerwise(inner).init({"layers": {"w": jnp.ones((7, 3, 4))}})


def test_arithmetic_across_memories_is_an_error_of_jax():
  """So that nothing on the host is used by mistake."""
  away = jax.device_put(jnp.ones(3), memory.host(replicated()))
  with pytest.raises(ValueError, match="memory_space"):
    jax.jit(jnp.add)(away, jnp.ones(3))
  assert kinds(memory.fetch(away)) == {DEVICE}
  assert tree.nbytes(away) == 12
