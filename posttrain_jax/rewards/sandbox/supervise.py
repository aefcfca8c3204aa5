"""A sandbox from outside: what goes in and comes out, its memory and time, and its end."""

from __future__ import annotations

import hmac
import json
import os
import selectors
import signal
import subprocess
import time

from posttrain_jax.rewards.sandbox import tree
from posttrain_jax.rewards.sandbox.outcome import RIGHT, WRONG, Limits, Outcome

LOOK = 0.02  # seconds between looks at memory and time
LONGEST = 0.1  # seconds that one look may count: a watchdog that was kept waiting has seen nothing of the time between
MAX_VERDICT = 1 << 16
PART = 1 << 16


class Supervisor:
  """Feeds a started sandbox and looks after it until there is a verdict; `outcome` is then what came of it."""

  def __init__(
    self,
    process: subprocess.Popen,
    limits: Limits,
    deadline: float,
    nonce: str,
  ) -> None:
    self.process, self.limits, self.deadline, self.nonce = process, limits, deadline, nonce
    self.has_verdict = False
    self.started = time.monotonic()
    self.kills_before = tree.out_of_memory_kills()
    self.read: dict[int, bytearray] = {}
    self.writing: dict[int, memoryview] = {}
    self.selector = selectors.DefaultSelector()
    self.idle = 0.0
    self.looked = self.started

  def writes(self, descriptor: int, data: bytes) -> None:
    os.set_blocking(descriptor, False)
    self.writing[descriptor] = memoryview(data)
    self.selector.register(descriptor, selectors.EVENT_WRITE)

  def reads(self, descriptor: int) -> None:
    os.set_blocking(descriptor, False)
    self.read[descriptor] = bytearray()
    self.selector.register(descriptor, selectors.EVENT_READ)

  def outcome(self, stdout: int, stderr: int, verdict: int) -> Outcome:
    """Until the verdict, a limit or the deadline; everything is then killed."""
    try:
      said = self._watched(stdout, stderr, verdict)
    finally:
      self._end()
    for descriptor in (stdout, stderr):  # what was still in the pipe
      self._receive(descriptor)
    output = [bytes(self.read[d][: self.limits.output]) for d in (stdout, stderr)]
    if any(len(self.read[d]) > self.limits.output for d in (stdout, stderr)):
      said = "output", f"wrote more than {self.limits.output:,} bytes"
    return Outcome(*output, *said, seconds=time.monotonic() - self.started)

  def _watched(self, stdout: int, stderr: int, verdict: int) -> tuple[str, str]:
    while True:
      ended = self.process.poll() is not None  # before the last look into the pipes
      moved = self._moved()
      line, complete, _ = bytes(self.read[verdict]).partition(b"\n")
      if complete:
        self.has_verdict = True
        return self._verdict(line)
      if any(len(self.read[d]) > self.limits.output for d in (stdout, stderr)):
        return "output", f"wrote more than {self.limits.output:,} bytes"
      if ended or verdict not in self.selector.get_map() or len(line) > MAX_VERDICT:
        return self._lost(bytes(self.read[stderr]))
      if said := self._looked(moved):
        return self._said_meanwhile(verdict, said) if said[0] == "timed out" else said

  def _said_meanwhile(self, verdict: int, timed_out: tuple[str, str]) -> tuple[str, str]:
    """What the sandbox said where it is this process that was kept waiting, and so too late to read it in time."""
    self._receive(verdict)
    line, complete, _ = bytes(self.read[verdict]).partition(b"\n")
    if not complete:
      return timed_out
    self.has_verdict = True
    return self._verdict(line)

  def _moved(self) -> bool:
    """Bytes went one way or the other."""
    ready = self.selector.select(LOOK)
    for key, _ in ready:
      if key.fd in self.writing:
        self._send(key.fd)
      else:
        self._receive(key.fd)
    return bool(ready)

  def _send(self, descriptor: int) -> None:
    try:
      sent = os.write(descriptor, self.writing[descriptor][:PART])
      self.writing[descriptor] = self.writing[descriptor][sent:]
    except BrokenPipeError:  # a program need not read all that it is given
      self.writing[descriptor] = self.writing[descriptor][:0]
    if not self.writing[descriptor]:
      self._close(descriptor)

  def _receive(self, descriptor: int) -> None:
    """What there is, until it is more than the limit."""
    while descriptor in self.selector.get_map():
      if len(self.read[descriptor]) > max(self.limits.output, MAX_VERDICT):
        return
      try:
        part = os.read(descriptor, PART)
      except BlockingIOError:
        return
      self.read[descriptor] += part
      if not part:
        self._close(descriptor)

  def _close(self, descriptor: int) -> None:
    self.selector.unregister(descriptor)
    os.close(descriptor)

  def _looked(self, moved: bool) -> tuple[str, str] | None:
    """A verdict, where something is used up."""
    now = time.monotonic()
    passed = now - self.looked
    if passed < LOOK and not now - self.started > self.deadline:
      return None
    self.looked = now
    used = tree.usage(self.process.pid)
    limits = self.limits
    if used.memory > limits.memory:
      return "memory", f"used more than {limits.memory >> 20} MiB of memory"
    if used.cpu > limits.seconds + 1:
      return "cpu", f"used its {limits.seconds} s of CPU time"
    if used.is_idle and not moved:
      self.idle += min(passed, LONGEST)
    if self.idle > limits.seconds:
      return "waited", f"waited for {limits.seconds} s, for nothing that comes"
    if now - self.started > self.deadline:
      return "timed out", (
        f"timed out after {self.deadline:g} s, of which it computed {used.cpu:.1f} s and waited {self.idle:.1f} s; its"
        f" processes were then {', '.join(dict.fromkeys(used.states)) or 'gone'}"
      )
    return None

  def _verdict(self, line: bytes) -> tuple[str, str]:
    try:
      said = json.loads(line)
      nonce, verdict, reason = str(said["nonce"]), str(said["verdict"]), str(said["reason"])
    except (ValueError, TypeError, KeyError):
      return "failed", "a forged verdict"
    if not hmac.compare_digest(nonce.encode(), self.nonce.encode()):
      return "failed", "a forged verdict"
    if verdict not in (*RIGHT, *WRONG, "broken"):
      return "failed", "a forged verdict"
    if verdict == "failed" and "SIGKILL" in reason and self._killed_for_memory():
      return "lost", "the machine ran out of memory"
    return verdict, reason

  def _killed_for_memory(self) -> bool:
    return tree.out_of_memory_kills() > self.kills_before

  def _lost(self, stderr: bytes) -> tuple[str, str]:
    last = stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
    return "lost", f"the sandbox ended without a verdict{': ' + last if last else ''}"

  def _end(self, patience: float = 1.0) -> None:
    """Until all is gone: the judge ends by itself when its program has, and bubblewrap with the judge."""
    if not self.has_verdict:
      tree.kill(self.process.pid)
    try:
      self.process.wait(patience)
    except subprocess.TimeoutExpired:
      tree.kill(self.process.pid)
      self._kill_group()
      self.process.wait()

  def _kill_group(self) -> None:
    if self.process.poll() is None:
      os.killpg(self.process.pid, signal.SIGKILL)

  def close(self) -> None:
    for key in list(self.selector.get_map().values()):
      self._close(key.fd)
    self.selector.close()
