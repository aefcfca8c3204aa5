"""Several processes as one program: start-up, this process's share of the rows, one global batch."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posttrain_jax.core import sharding

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
