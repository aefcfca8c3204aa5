"""Several processes as one program, with two real ones under gloo."""

import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from launch import local
from posttrain_jax.core import distributed, sharding

NAMES = (distributed.COORDINATOR, distributed.PROCESSES, distributed.PROCESS_ID)

WAITS = {"heartbeat_timeout_seconds": 40, "shutdown_timeout_seconds": 3600}


@pytest.fixture
def environment(monkeypatch):
  for name in (*NAMES, distributed.DISTRIBUTED):
    monkeypatch.delenv(name, raising=False)
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
  monkeypatch.setattr(jax.config, "update", lambda *a: None)
  return monkeypatch, calls


def test_nothing_is_started_when_nothing_is_named(environment):
  distributed.initialize()
  assert environment[1] == []


def test_the_environment_names_the_processes(environment):
  monkeypatch, calls = environment
  for name, value in zip(NAMES, ("h:1", "3", "2")):
    monkeypatch.setenv(name, value)
  distributed.initialize()
  assert calls == [(("h:1",), {"num_processes": 3, "process_id": 2, **WAITS})]


def test_auto_leaves_it_to_jax(environment):
  monkeypatch, calls = environment
  monkeypatch.setenv(distributed.DISTRIBUTED, "auto")
  distributed.initialize()
  assert calls == [((), WAITS)]


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({distributed.PROCESSES: "2"}, "set without POSTTRAIN_COORDINATOR, POSTTRAIN_PROCESS_ID"),
    (dict(zip(NAMES, ("h:1", "two", "0"))), "POSTTRAIN_PROCESSES='two' is not a whole number"),
    (dict(zip(NAMES, ("h:1", "2", "2"))), "must be at least 0 and less than"),
    ({distributed.DISTRIBUTED: "yes"}, "write 'auto'"),
    ({distributed.DISTRIBUTED: "auto", distributed.PROCESSES: "2"}, "unset one of them"),
  ],
)
def test_half_a_setting_is_an_error(environment, values, message):
  monkeypatch, calls = environment
  for name, value in values.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=message):
    distributed.initialize()
  assert calls == []


def test_one_process_holds_every_row():
  mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
  assert distributed.is_main()
  assert distributed.shard() == (0, 1)
  assert distributed.shard(mesh) == (0, 1)
  local_rows = {"x": np.arange(24).reshape(8, 3), "y": np.arange(8)}
  batch = distributed.global_batch(mesh, local_rows)
  assert batch["x"].sharding.spec == PartitionSpec(("data", "fsdp", "expert"))
  assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}
  assert jax.tree.all(jax.tree.map(np.array_equal, batch, local_rows))
  assert distributed.broadcast(3) == 3
  assert distributed.exchanged(mesh) == [mesh]  # as it is
  assert distributed.part("abc") == "abc"
  assert distributed.block(mesh) == mesh
  assert distributed.own_rows(mesh, local_rows) is local_rows
  assert distributed.whole(batch, mesh) is batch


TWO = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from posttrain_jax.core import sharding
from posttrain_jax.core.checkpoint import Checkpoints
from posttrain_jax.core import distributed
from posttrain_jax.train.signals import PREEMPTED, Stop

distributed.initialize()
me, count = distributed.shard()
assert count == 2 and jax.device_count() == 4 and distributed.is_main() == (me == 0)

# one batch from two halves; a sum over it sees both
mesh = sharding.mesh(fsdp=-1)
assert distributed.shard(mesh) == (me, 2)
assert distributed.shard(sharding.mesh(fsdp=2, tensor=2)) == (me, 2)
assert distributed.shard(sharding.mesh(tensor=4)) == (0, 1)
rows = np.arange(16, dtype=np.int32).reshape(8, 2)
batch = distributed.global_batch(mesh, {"x": rows[4 * me : 4 * me + 4]})["x"]
assert batch.shape == (8, 2)
assert [int(s) for s in jax.jit(lambda x: x.sum(0))(batch)] == rows.sum(0).tolist()
for shard in batch.addressable_shards:
  assert np.array_equal(shard.data, rows[shard.index])
assert int(distributed.broadcast(np.int32(10 + me))) == 10

# what one has is told to all; what all have is dealt
assert distributed.exchanged({"me": me, "long": "x" * 1000 * me})[1] == {"me": 1, "long": "x" * 1000}
assert distributed.from_main(f"of {me}") == "of 0"
assert distributed.part("abc") == ["ab", "c"][me]
assert distributed.part("") == ""
assert np.array_equal(distributed.own_rows(mesh, {"x": rows})["x"], rows[4 * me : 4 * me + 4])
assert np.array_equal(distributed.whole(distributed.placed(mesh, {"x": rows}), mesh)["x"], rows)

# arrays and programs of one alone
for sizes, kept in (
  (dict(fsdp=2, tensor=2), P("expert", "tensor")),
  (dict(tensor=4), P("expert", None)),
  (dict(expert=2, tensor=2), P(None, "tensor")),
  (dict(data=2, expert=2), P("expert", "tensor")),
):
  some = sharding.mesh(**sizes)
  cut = NamedSharding(some, P(("expert", "fsdp"), "tensor"))
  assert distributed.kept_here(some, cut).spec == kept, sizes
  make = lambda: jnp.arange(32.0).reshape(4, 8)
  own = distributed.here(some, jax.jit(make, out_shardings=distributed.kept_here(some, cut))())
  assert own.is_fully_addressable and len(own.sharding.device_set) == 2
  assert np.array_equal(own, np.arange(32.0).reshape(4, 8))
  if me == 1:
    with distributed.alone(some):
      assert sharding.active() and jax.sharding.get_abstract_mesh().size == 2
      assert float(jax.jit(lambda x: sharding.constrain(x, "- embed").sum())(own)) == 496
assert not sharding.active()

# one checkpoint that both write
place = lambda spec: NamedSharding(mesh, spec)
init = jax.jit(
  lambda: {"w": jnp.arange(64.0).reshape(16, 4), "n": jnp.int32(7)},
  out_shardings={"w": place(P("fsdp")), "n": place(P())},
)
state = init()
step = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones_like(x), s), donate_argnums=0)
checkpoints = Checkpoints(sys.argv[1], keep=1)
checkpoints.save(1, state, {"position": 1})
state = step(state)
checkpoints.save(2, state, {"position": 2})
state = step(state)
try:
  checkpoints.save(3, {"n": jnp.int32(0)}, {})
except ValueError as error:
  assert "n belongs to one of 2 processes" in str(error)
else:
  raise AssertionError("a local array was saved")
restored, data, at = checkpoints.restore(state)
assert (data, at, checkpoints.steps()) == ({"position": 2}, 2, [2])
assert restored["w"].sharding == state["w"].sharding
for shard in restored["w"].addressable_shards:
  assert np.array_equal(shard.data, np.arange(1, 65.0, dtype=np.float32).reshape(16, 4)[shard.index])
assert int(restored["n"]) == 8
checkpoints.close()

# asked to stop in one process, both stop after the same step
with Stop() as stop:
  for n in range(100):
    state = step(state)
    if n == 3 and me == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    if stop.agreed():
      print("stopped after", n, flush=True)
      sys.exit(PREEMPTED)
"""


def test_two_processes_are_one_program(tmp_path, capfdbinary):
  code = local.run(
    [sys.executable, "-c", TWO, str(tmp_path / "checkpoints")], processes=2, devices=2
  )
  out = capfdbinary.readouterr().out.decode()
  assert code == 75, out
  assert {"[0] stopped after 4", "[1] stopped after 4"} <= set(out.splitlines()), out
