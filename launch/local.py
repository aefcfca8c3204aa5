r"""One training run as several processes on this machine: a rehearsal on CPU of what a pod does.

  python launch/local.py --processes=2 -- --config=configs/sft.py:model=smollm2 --workdir=runs/x

Each process is `posttrain train` with the arguments after `--`; it loads its own share of the data, and all of them
write one checkpoint.  Output lines start with the process's number.  SIGTERM, SIGHUP and Ctrl-C go to every process.
When one fails, the others are ended and its exit code is this one's; 75 means stopped when asked and safe to run again.
When this program itself is killed, its processes save and end.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

PREEMPTED = 75
GRACE = 10.0  # seconds between asking the processes that are left to stop and killing them
SETTLE = (
  30.0  # seconds in which the others end by themselves when one has stopped because it was asked to
)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--processes", type=int, required=True)
  parser.add_argument("--devices_per_process", type=int, help="virtual CPU devices of each")
  parser.add_argument("train", nargs="+", metavar="-- ARGUMENT", help="of `posttrain train`")
  args = parser.parse_args(argv)
  if args.processes < 1 or (args.devices_per_process or 1) < 1:
    parser.error("--processes and --devices_per_process must be at least 1")
  command = [sys.executable, "-m", "posttrain_jax", "train", *args.train]
  return run(command, processes=args.processes, devices=args.devices_per_process)


def run(
  command: Sequence[str],
  *,
  processes: int,
  devices: int | None = None,
  grace: float = GRACE,
  settle: float = SETTLE,
) -> int:
  """The exit code of the first process that fails, else 75 where one was preempted, else 0.

  Args:
    devices: virtual CPU devices of each process; None leaves XLA_FLAGS as they are.
    grace: seconds that the others get to end by themselves when one has failed.
    settle: seconds that they get when one has stopped with 75, as all do after the same step.
  """
  coordinator = f"127.0.0.1:{_free_port()}"
  children: list[subprocess.Popen[bytes]] = []
  send = lambda number, frame=None: _signal(children, number)
  asked = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  before = {number: signal.signal(number, send) for number in asked}
  # its other end closes when this process ends, however it ends: then they stop too
  alive, mine = os.pipe()
  try:
    for index in range(processes):
      children.append(
        subprocess.Popen(
          command,
          env=_environment(coordinator, processes, index, devices)
          | {"POSTTRAIN_LAUNCHER": str(alive)},
          pass_fds=(alive,),
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          start_new_session=True,  # the terminal's Ctrl-C would reach it a second time
        )
      )
    lock = threading.Lock()
    readers = [
      threading.Thread(target=_copy, args=(index, child, lock), daemon=True)
      for index, child in enumerate(children)
    ]
    for reader in readers:
      reader.start()
    failed = _first_failure(children, settle)
    if failed is not None:
      _end(children, grace)
    for reader in readers:
      reader.join(timeout=grace)
    if failed is not None:
      return failed
    return PREEMPTED if any(child.returncode == PREEMPTED for child in children) else 0
  finally:
    for child in children:
      if child.poll() is None:
        child.kill()
        child.wait()
    for descriptor in (alive, mine):
      os.close(descriptor)
    for number, handler in before.items():
      signal.signal(number, handler)


def _first_failure(children: Sequence[subprocess.Popen[bytes]], settle: float) -> int | None:
  """The exit code of the process that fails first, or stops alone; None once all have ended well."""
  stopped = math.inf
  while True:
    codes = [child.poll() for child in children]
    # whose end the others cannot survive: JAX aborts them
    well = (0, PREEMPTED, *([-signal.SIGABRT] if PREEMPTED in codes else []))
    for index, code in enumerate(codes):
      if code is not None and code not in well:
        print(f"process {index} of {len(codes)} {_ending(code)}; ending the others", flush=True)
        return code if code > 0 else 128 - code  # as a shell reports a signal
    if PREEMPTED in codes:
      stopped = min(stopped, time.monotonic())
    if -signal.SIGABRT in codes or (None in codes and time.monotonic() - stopped > settle):
      index = codes.index(PREEMPTED)
      print(
        f"process {index} of {len(codes)} stopped when asked, others did not; ending them",
        flush=True,
      )
      return PREEMPTED
    if None not in codes:
      return None
    time.sleep(0.05)


def _ending(code: int) -> str:
  return f"exited with {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"


def _end(children: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
  """Without the one that failed the others cannot finish a step, so most of them need the kill."""
  _signal(children, signal.SIGTERM)
  deadline = time.monotonic() + grace
  while time.monotonic() < deadline and any(child.poll() is None for child in children):
    time.sleep(0.05)
  _signal(children, signal.SIGKILL)
  for child in children:
    child.wait()


def _signal(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
  for child in children:
    child.send_signal(number)  # does nothing when it has ended


def _copy(index: int, child: subprocess.Popen[bytes], lock: threading.Lock) -> None:
  assert child.stdout is not None
  for line in child.stdout:
    with lock:
      sys.stdout.buffer.write(b"[%d] " % index + line.rstrip(b"\n") + b"\n")
      sys.stdout.buffer.flush()


def _environment(
  coordinator: str, processes: int, index: int, devices: int | None
) -> dict[str, str]:
  """What posttrain_jax.core.distributed reads, on CPU unless JAX_PLATFORMS says otherwise."""
  environment = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONUNBUFFERED": "1",
    **os.environ,
    "POSTTRAIN_COORDINATOR": coordinator,
    "POSTTRAIN_PROCESSES": str(processes),
    "POSTTRAIN_PROCESS_ID": str(index),
  }
  if devices is not None:
    flag = "--xla_force_host_platform_device_count"
    others = re.sub(rf"{flag}=\S*", "", environment.get("XLA_FLAGS", ""))
    environment["XLA_FLAGS"] = f"{others} {flag}={devices}".strip()
  return environment


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


if __name__ == "__main__":
  sys.exit(main())
