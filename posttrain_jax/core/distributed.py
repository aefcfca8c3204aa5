"""Several processes as one program: start-up, this process's share of the rows, one global batch.

What a process does alone (writes answers, scores them) it does on the `block` of the mesh that it has, with arrays that
are `here`, and what it found it tells the others by `exchanged`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posttrain_jax.core import memory, sharding

T = TypeVar("T")

COORDINATOR = "POSTTRAIN_COORDINATOR"  # host:port of process 0
PROCESSES = "POSTTRAIN_PROCESSES"
PROCESS_ID = "POSTTRAIN_PROCESS_ID"
LAUNCHER = "POSTTRAIN_LAUNCHER"  # a pipe's descriptor: its other end closes with the launcher
DISTRIBUTED = "POSTTRAIN_DISTRIBUTED"  # "auto": SLURM, TPU pods, ...: JAX finds the rest itself
SILENCE = (
  40  # seconds: a process that says nothing for so long counts as dead, which ends the others
)
FAREWELL = (
  3600  # seconds that processes which are done wait for the main one, which writes the results
)
LAST_WORDS = 600.0  # seconds from the launcher's end in which a process saves


def initialize() -> None:
  """Joins the processes that the environment names; does nothing where it names none.

  Whichever process dies, the others end within SILENCE seconds; where the launcher does, they save and end.  Comes
  before anything that asks JAX for its devices.

  Raises:
    ValueError: when only some of the variables are set, or one is no number.
  """
  names = (COORDINATOR, PROCESSES, PROCESS_ID)
  values = {name: os.environ[name] for name in names if os.environ.get(name)}
  auto = os.environ.get(DISTRIBUTED, "")
  if auto not in ("", "auto"):
    raise ValueError(f"{DISTRIBUTED}={auto}: write 'auto', or leave it unset")
  if not values and not auto:
    return
  if values and auto:
    raise ValueError(f"{DISTRIBUTED}=auto and {', '.join(values)} are both set; unset one of them")
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # its SIGTERM handler would compete with train.signals
  jax.config.update("jax_enable_preemption_service", False)
  waits: dict[str, Any] = dict(heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=FAREWELL)
  if launcher := os.environ.get(LAUNCHER):
    threading.Thread(target=_outlive, args=(int(launcher),), daemon=True).start()
  if auto:
    jax.distributed.initialize(**waits)
    return
  if len(values) < len(names):
    missing = ", ".join(name for name in names if name not in values)
    raise ValueError(f"{', '.join(values)} set without {missing}; set all three or none")
  count, index = (_number(name, values[name]) for name in (PROCESSES, PROCESS_ID))
  if not 0 <= index < count:
    raise ValueError(f"{PROCESS_ID}={index} must be at least 0 and less than {PROCESSES}={count}")
  jax.distributed.initialize(values[COORDINATOR], num_processes=count, process_id=index, **waits)


def _outlive(pipe: int) -> None:
  """Waits for the launcher's end, and has this process stop as it does when asked."""
  os.read(pipe, 1)
  nowhere = os.open(os.devnull, os.O_WRONLY)  # the launcher read what was printed
  for descriptor in (1, 2):
    os.dup2(nowhere, descriptor)
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(LAST_WORDS)
  os._exit(1)


def _number(name: str, value: str) -> int:
  if not value.isdecimal():
    raise ValueError(f"{name}={value!r} is not a whole number")
  return int(value)


def is_main() -> bool:
  """True in the one process that prints, logs and exports."""
  return jax.process_index() == 0


def shard(mesh: Mesh | None = None) -> tuple[int, int]:
  """(index, count): which share of every global batch's rows this process loads.

  Without a mesh: one share for each process.  With it, processes that split only the tensor axis between them hold the
  same rows and get the same index.

  Raises:
    ValueError: when the mesh gives two processes shares that overlap without being equal.
  """
  if mesh is None:
    return jax.process_index(), jax.process_count()
  rows = sharding.row_shares(mesh)
  held: dict[int, set[int]] = {}
  for device, (index,) in _rows(mesh).devices_indices_map((rows,)).items():
    held.setdefault(device.process_index, set()).update(range(rows)[index])
  shares = sorted({tuple(sorted(share)) for share in held.values()})
  if sum(map(len, shares)) != rows or len(set(map(len, shares))) != 1:
    raise ValueError(
      f"mesh {dict(mesh.shape)} gives its processes rows {shares}, which overlap or differ in number; "
      "choose sizes so that tensor divides, or is a multiple of, the devices of one process"
    )
  return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def global_batch(mesh: Mesh, local: Any) -> Any:
  """One tree of global arrays from every process's own rows (`shard`), rows split over data, fsdp and expert."""
  place = lambda x: jax.make_array_from_process_local_data(_rows(mesh), np.asarray(x))
  return jax.tree.map(place, local)


def _rows(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(sharding.ACTIVATIONS["batch"]))


def broadcast(tree: Any) -> Any:
  """The main process's tree of numbers or arrays in every process (a seed, a start time)."""
  return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def own_rows(mesh: Mesh | None, batch: Mapping[str, Any]) -> Mapping[str, Any]:
  """This process's rows (`shard`) of a batch that every process has whole."""
  index, count = (0, 1) if mesh is None else shard(mesh)
  if count == 1:
    return batch

  def part(x: Any) -> Any:
    each = len(x) // count
    return x[index * each : (index + 1) * each]

  return jax.tree.map(part, batch)


def placed(mesh: Mesh | None, batch: Mapping[str, Any]) -> Any:
  """`global_batch` of a batch that every process has whole; without a mesh as it is."""
  return batch if mesh is None else global_batch(mesh, own_rows(mesh, batch))


def part(items: Sequence[T]) -> Sequence[T]:
  """This process's of the items, dealt in order: the first have one more each where they do not divide."""
  each, more = divmod(len(items), jax.process_count())
  starts = [i * each + min(i, more) for i in range(jax.process_count() + 1)]
  return items[starts[jax.process_index()] : starts[jax.process_index() + 1]]


def exchanged(value: T) -> list[T]:
  """What every process has, in their order; each calls it, with anything that pickle takes."""
  if jax.process_count() == 1:
    return [value]
  packed = np.frombuffer(zlib.compress(pickle.dumps(value), 1), np.uint8)
  lengths = multihost_utils.process_allgather(np.asarray([len(packed)], np.int32)).ravel()
  padded = np.zeros(max(lengths), np.uint8)
  padded[: len(packed)] = packed
  every = multihost_utils.process_allgather(padded)
  return [pickle.loads(zlib.decompress(bytes(one[:length]))) for one, length in zip(every, lengths)]


def from_main(value: T) -> T:
  """What the main process has, in every process; each calls it, with anything that pickle takes."""
  told: list[Any] = exchanged(value if is_main() else None)
  return told[0]


def whole(arrays: Any, mesh: Mesh | None) -> Any:
  """The program's arrays with every shard on this host; each process calls it.  As they are where there is one."""
  if jax.process_count() == 1 or mesh is None:
    return arrays
  everywhere = NamedSharding(mesh, PartitionSpec())
  return jax.device_get(jax.jit(memory.fetch, out_shardings=everywhere)(arrays))


@functools.cache
def block(mesh: Mesh) -> Mesh:
  """The part of the mesh that this process has, with the same axes; all of it where there is one process.

  Raises:
    ValueError: its devices are no block.
  """
  mine = np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)
  places = np.nonzero(mine)
  part = mesh.devices[np.ix_(*map(np.unique, places))]
  if part.size != len(places[0]):
    raise ValueError(
      f"mesh {dict(mesh.shape)} gives this process {len(places[0])} devices that are no block of it; choose sizes so"
      " that each axis divides, or is a multiple of, the devices of one process"
    )
  return Mesh(part, mesh.axis_names, axis_types=mesh.axis_types)


def alone(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
  """Inside, this process computes on its own block of the mesh, and waits for no other."""
  if mesh is None or jax.process_count() == 1:
    return contextlib.nullcontext()
  own = block(mesh)
  return jax.set_mesh(own if own.size > 1 else None)


def kept_here(mesh: Mesh, where: NamedSharding) -> NamedSharding:
  """where without the axes along which another process would have a part, and without those that rows lie along."""
  own = block(mesh)
  axes = [a for a in mesh.axis_names if own.shape[a] == mesh.shape[a] and a in ("expert", "tensor")]

  def kept(entry: Any) -> Any:
    names = entry if isinstance(entry, tuple) else (entry,)
    left = tuple(name for name in names if name in axes)
    return left if len(left) > 1 else next(iter(left), None)

  return NamedSharding(mesh, PartitionSpec(*map(kept, where.spec)))


def here(mesh: Mesh, arrays: Any) -> Any:
  """Arrays of this process alone, of the shards that it has: each array lies as `kept_here` says."""
  own = block(mesh)

  def one(x: Any) -> jax.Array:
    shards = [shard.data for shard in x.addressable_shards]
    if own.size == 1:
      return shards[0]
    return jax.make_array_from_single_device_arrays(
      x.shape, NamedSharding(own, x.sharding.spec), shards
    )

  return jax.tree.map(one, arrays)
