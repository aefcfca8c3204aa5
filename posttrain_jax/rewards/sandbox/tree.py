"""A process and all below it, as /proc shows them."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")
STATES = {"R": "running", "S": "asleep", "D": "held by the kernel", "Z": "ended", "T": "stopped"}


@dataclasses.dataclass(frozen=True)
class Usage:
  """Of a process and all below: bytes of memory that no file backs, CPU seconds, and whether any wants the CPU.

  states: of the processes, parents first; what the kernel keeps from running for a disk or a namespace is no sleeper.
  """

  memory: int
  cpu: float
  is_idle: bool
  states: tuple[str, ...] = ()


def below(pid: int) -> list[int]:
  """pid and its descendants, parents first."""
  found = [pid]
  for parent in found:
    for task in _names(f"/proc/{parent}/task"):
      found += map(int, _read(f"/proc/{parent}/task/{task}/children").split())
  return found


def usage(pid: int) -> Usage:
  memory, cpu, idle, states = 0, 0.0, True, []
  for process in below(pid):
    status, stat = _read(f"/proc/{process}/status"), _read(f"/proc/{process}/stat")
    memory += sum(
      int(line.split()[1]) << 10
      for line in status.splitlines()
      if line.startswith(("RssAnon:", "RssShmem:"))
    )
    if stat:
      # after the name, which may hold anything: utime, stime and those of children that were waited for
      fields = stat.rpartition(")")[2].split()
      cpu += TICK * sum(map(int, fields[11:15]))
      states.append(STATES.get(fields[0], fields[0]))
    idle = idle and _is_idle(process)
  return Usage(memory, cpu, idle, tuple(states))


def _is_idle(pid: int) -> bool:
  """Every thread is seen to sleep, or to be stopped; what cannot be seen is not idle."""
  states = [
    _read(f"/proc/{pid}/task/{task}/stat").rpartition(")")[2][1:2]
    for task in _names(f"/proc/{pid}/task")
  ]
  return bool(states) and all(state and state in "STtZX" for state in states)


def kill(pid: int) -> int:
  """SIGKILL to all below a process; how many there were."""
  others = below(pid)[1:]
  for process in reversed(others):
    try:
      os.kill(process, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
      continue
  return len(others)


def out_of_memory_kills() -> int:
  """How often the kernel has killed for want of memory, anywhere on this machine."""
  for line in _read("/proc/vmstat").splitlines():
    if line.startswith("oom_kill "):
      return int(line.split()[1])
  return 0


def _read(path: str) -> str:
  try:
    return Path(path).read_text(errors="replace")
  except OSError:  # it has ended
    return ""


def _names(path: str) -> list[str]:
  try:
    return os.listdir(path)
  except OSError:
    return []
