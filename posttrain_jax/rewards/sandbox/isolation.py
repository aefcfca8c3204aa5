"""Which isolation this machine gives, told by a real run of a program that tries to get out."""

from __future__ import annotations

import compileall
import dataclasses
import functools
import os
import shutil
import sys
import threading

from posttrain_jax.rewards.sandbox import launch, start
from posttrain_jax.rewards.sandbox.outcome import Limits

INSTALL = "install bubblewrap (Debian and Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap)"
# What the program gets out to: the host's files, a socket, a namespace, another process's memory.
TRY = """
import ctypes, os, socket
def escapes():
  libc, out = ctypes.CDLL(None, use_errno=True), []
  try:
    socket.socket().close()
    out.append("sockets")
  except OSError: pass
  if libc.unshare(0x10000000) == 0: out.append("namespaces")
  if libc.ptrace(0, 0, 0, 0) == 0: out.append("tracing")
  for name in ("/etc/passwd", "/proc/%d/environ" % os.getppid()):
    try:
      open(name).close()
      out.append(name)
    except OSError: pass
  return out
"""
CASE = "assert escapes() == [], f'a program gets out: {escapes()}'"


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
  if sys.platform != "linux":
    return f"it needs Linux, and this is {sys.platform}"
  if not os.path.exists(f"/proc/self/task/{threading.get_native_id()}/children"):
    return (
      "this kernel does not list a process's children in /proc, so that nobody can look after them"
    )
  if isolation == "bubblewrap" and shutil.which("bwrap") is None:
    return "bwrap is not installed"
  try:
    tests = dict(cases=[CASE], setup="", names=[])
    outcome = start.once(isolation, dict(code=TRY, tests=tests), limits=Limits(), deadline=30.0)
  except OSError as error:
    return str(error)
  return "" if outcome.verdict == "passed" else outcome.reason[:300]
