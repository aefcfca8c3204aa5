"""Which isolation this machine gives, told by a real run of a program that tries to get out."""

from __future__ import annotations

import compileall
import dataclasses
import functools
import shutil

from posttrain_jax.rewards.sandbox import launch, start
from posttrain_jax.rewards.sandbox.outcome import Limits

INSTALL = "install bubblewrap (Debian and Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap)"
# Ends with 0 where each try to get out fails: a file of the host's, a socket, a namespace, another's memory.
TRY = """
import ctypes, os, socket
libc, out = ctypes.CDLL(None, use_errno=True), []
try:
  socket.socket().close(); out.append("sockets")
except OSError: pass
if libc.unshare(0x10000000) == 0: out.append("namespaces")
if libc.ptrace(0, 0, 0, 0) == 0: out.append("tracing")
for name in ("/etc/passwd", "/proc/%d/environ" % os.getppid()):
  try:
    open(name).close(); out.append(name)
  except OSError: pass
assert not out, out
"""


@dataclasses.dataclass(frozen=True)
class Probe:
  """isolation: "bubblewrap", "landlock", or "" where neither holds; sentence: what to tell a person at the start."""

  isolation: str
  sentence: str


@functools.cache
def probe() -> Probe:
  """The best isolation that works here."""
  # in a sandbox nothing is written, and compiling each time would take longer than the program
  compileall.compile_dir(launch.FOLDER / "inside", quiet=2)
  why = {}
  for isolation in ("bubblewrap", "landlock"):
    why[isolation] = trouble(isolation)
    if not why[isolation]:
      return Probe(isolation, _sentence(isolation, why))
  return Probe(
    "",
    f"Programs that a model writes cannot be run here: bubblewrap: {why['bubblewrap']}; Landlock: {why['landlock']}.",
  )


def _sentence(isolation: str, why: dict[str, str]) -> str:
  if isolation == "bubblewrap":
    return "Programs run in bubblewrap: namespaces of their own, no network, nothing of the host's to write."
  return (
    f"Programs run under Landlock and seccomp, without namespaces, since bubblewrap does not work here "
    f"({why['bubblewrap']}): they start no processes and write no files.  For full isolation {INSTALL}."
  )


def trouble(isolation: str) -> str:
  """Why an isolation is not to be had; "" where it holds."""
  if isolation == "bubblewrap" and shutil.which("bwrap") is None:
    return "bwrap is not installed"
  try:
    outcome = start.once(isolation, dict(code=TRY), limits=Limits(), deadline=30.0)
  except OSError as error:
    return str(error)
  if outcome.verdict == "ended":
    return ""
  last = outcome.stderr.decode(errors="replace").strip().rpartition("\n")[2]
  return last[:200] or outcome.reason
