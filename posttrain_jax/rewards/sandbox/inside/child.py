"""The model's program, as the judge sees it."""

import os
import select
import signal

from posttrain_jax.rewards.sandbox.inside import values


class Ended(Exception):
  """The program has ended."""


class Wrong(Exception):
  """The program's fault."""


class Child:
  """The model's program: what is asked of it, what it says, and how it ended."""

  def __init__(self, pid, asks, replies, seconds):
    self.pid, self.asks, self.replies, self.seconds = pid, asks, replies, seconds
    self.has_ended, self.status, self.used, self._read = False, 0, 0.0, b""

  def ended(self, wait=os.WNOHANG):
    """Whether it has; `wait=0` returns when it has."""
    if not self.has_ended:
      pid, self.status, usage = os.wait4(self.pid, wait)
      self.has_ended, self.used = pid != 0, usage.ru_utime + usage.ru_stime
    return self.has_ended

  def send(self, line):
    try:
      while line:
        line = line[os.write(self.asks, line) :]
    except OSError:
      raise Ended from None

  def line(self):
    """Its next message.

    Raises:
      Ended: there will be none.
    """
    parts = [self._read]
    size = len(self._read)
    while b"\n" not in parts[-1]:
      if select.select([self.replies], [], [], 0.05)[0]:
        part = os.read(self.replies, 1 << 16)
        if not part:
          # it may have closed the pipe and go on: then it is the caller's limits that end it
          self.ended(0)
          raise Ended
        parts.append(part)
        size += len(part)
        if size > values.MAX_MESSAGE:
          raise Wrong(f"an answer of more than {values.MAX_MESSAGE >> 20} MiB")
      elif self.ended():
        raise Ended  # a child of its own may still hold the pipe
    line, _, self._read = b"".join(parts).partition(b"\n")
    return line

  def kill(self):
    """It is gone, and reaped here, when this returns."""
    if not self.ended():
      os.kill(self.pid, signal.SIGKILL)
      self.ended(0)

  def end(self):
    """(verdict, reason) of how it ended."""
    self.ended(0)
    code = os.waitstatus_to_exitcode(self.status)
    # the kernel's limit counts by ticks: among other work it may come well before so much has been used
    is_limit = code == -signal.SIGXCPU
    if is_limit or (code == -signal.SIGKILL and self.used > self.seconds - 0.5):
      return "cpu", f"used its {self.seconds} s of CPU time"
    if code < 0:
      return "failed", f"ended by {_signal(-code)}"
    return ("ended", "") if code == 0 else ("failed", f"ended with exit code {code}")


def _signal(number):
  try:
    return signal.Signals(number).name
  except ValueError:
    return f"signal {number}"
