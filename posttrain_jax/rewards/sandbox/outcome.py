"""What a program may use, and what became of it."""

from __future__ import annotations

import dataclasses

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one program may use, with all the processes that it starts.

  seconds: of its own time, in which it computes or waits.  Time in which it wanted a core and had none is nobody's.
  memory: bytes, of any one process's addresses and of all processes' memory together.
  processes: at once, threads counted.
  files: bytes that it may leave in /tmp, in one file or many.
  output: bytes on each of stdout and stderr.
  """

  seconds: int = 5
  memory: int = 1024 * MIB
  processes: int = 32
  files: int = 64 * MIB
  output: int = 1 * MIB
  open_files: int = 64

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise ValueError(f"{field.name} must be at least 1, found {getattr(self, field.name)}")
    if self.memory < 64 * MIB:
      raise ValueError(f"memory must be at least 64 MiB to start Python, found {self.memory} bytes")


# What a verdict is worth: passed all tests, or ended by itself; at fault; or nobody knows, and it is tried again.
RIGHT = ("passed", "ended")
WRONG = ("failed", "cpu", "waited", "memory", "output")
MISSING = ("timed out", "broken", "lost")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a program wrote, and the verdict on it.

  verdict: `passed`, every test; `ended`, without tests and with exit code 0; `failed`, a test or the program; `cpu`,
    `waited`, `memory` and `output`, it used more than its limit.  Those are answers.  `timed out`, the deadline came
    while it had not had its time; `broken`, the tests themselves; `lost`, the sandbox ended without a verdict.  Those
    say nothing of the program.
  reason: a sentence's worth, for a reader.
  seconds: from the start, without the queue.
  """

  stdout: bytes
  stderr: bytes
  verdict: str
  reason: str
  seconds: float

  @property
  def is_missing(self) -> bool:
    return self.verdict in MISSING


class NoSandbox(RuntimeError):
  """Nothing here keeps a stranger's program from the host, so it is not run."""
