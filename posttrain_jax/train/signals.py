"""Being asked to stop: SIGTERM, SIGHUP and Ctrl-C set a flag that the loop reads between steps."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from posttrain_jax.core import ending
from posttrain_jax.core.ending import ENDING, INTERRUPTED, PREEMPTED, mute, say


@contextlib.contextmanager
def exiting() -> Generator[None]:
  """SIGTERM and SIGHUP end the program with PREEMPTED: around a loop, where all there is can be had again.

  What waits in compiled code (for other processes, say) is not waited for longer than PATIENCE; nor is a handler whose
  exception Python drops (inside a garbage collection).  A process of several leaves without the others.
  """
  watch = ending.Watch(_receive, _late)
  try:
    with ending.handling(_receive, *ENDING, signal.SIGINT):
      yield
  finally:
    watch.close()


def _receive(number: int, frame: FrameType | None) -> None:
  if ending.is_importing(frame):
    _late(number)
  if number == signal.SIGINT:
    raise KeyboardInterrupt
  say(f"{signal.Signals(number).name}: ended before the first step; run the same command again")
  if jax.distributed.is_initialized():  # whose end waits minutes for the others
    os._exit(PREEMPTED)
  sys.exit(PREEMPTED)


def _late(number: int) -> None:
  ending.remove_unfinished()
  say(f"{signal.Signals(number).name}: ended while it started; run the same command again")
  os._exit(PREEMPTED if number in ENDING else INTERRUPTED)


class Stopped(Exception):
  """A batch was not made, as the run is to stop; what made it is as it was before."""


class Stop:
  """Turns SIGTERM, SIGHUP and the first SIGINT into `requested`; the second SIGINT is a KeyboardInterrupt.

  A signal that arrives while something compiles or runs is kept until it is read.

    with Stop() as stop:
      for step in ...:
        ...
        if stop.agreed():
          save(); sys.exit(PREEMPTED)
  """

  requested = False

  def __init__(self) -> None:
    self._pending: jax.Array | None = None
    self._previous: dict[int, Any] = {}
    self._interrupts = 0

  def __enter__(self) -> Stop:
    for number in ending.heard():
      self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def is_requested(self) -> bool:
    """Whether this process was asked to."""
    return self.requested

  def agreed(self) -> bool:
    """Whether to stop here: the same answer in every process.

    With one process that is `requested`.  With several, each call starts a tiny reduction of their flags and returns
    the one that the call before started, so that no step waits for the devices and a stop comes one call late.
    Every process must call it equally often.
    """
    if jax.process_count() == 1:
      return self.requested
    before, self._pending = self._pending, _any(self.requested)
    return before is not None and bool(before)

  def _receive(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
      self._interrupts += 1
      if self._interrupts > 1:
        raise KeyboardInterrupt
    if not self.requested:
      hint = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
      say(f"{signal.Signals(number).name}: stopping after this step{hint}")
    if number == signal.SIGHUP:
      mute()
    self.requested = True


@functools.cache
def _reduction() -> tuple[NamedSharding, Any]:
  """One flag for each device, and the jitted function that says whether any is set."""
  mesh = Mesh(np.asarray(jax.devices()), "all", axis_types=(AxisType.Auto,))
  everywhere = NamedSharding(mesh, PartitionSpec())
  return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.any, out_shardings=everywhere)


def _any(flag: bool) -> jax.Array:
  split, reduce = _reduction()
  local = np.full(jax.local_device_count(), flag)
  return reduce(jax.make_array_from_process_local_data(split, local))
