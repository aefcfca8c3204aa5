"""The command that a sandbox is: bubblewrap around Python, or Python that locks itself in."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from posttrain_jax.rewards.sandbox.inside import seccomp
from posttrain_jax.rewards.sandbox.outcome import MIB, Limits

FOLDER = Path(__file__).parent  # holds inside/
HARNESS = "/harness"
ISOLATIONS = ("bubblewrap", "landlock", "none")
# The packages above are made up, since they are not there, or take seconds to import.
START = """import sys
for name in ("posttrain_jax", "posttrain_jax.rewards", "posttrain_jax.rewards.sandbox"):
  sys.modules[name] = type(sys)(name)
  sys.modules[name].__path__ = []
sys.modules[name].__path__ = [sys.argv.pop(1)]
sys.pycache_prefix = None
from posttrain_jax.rewards.sandbox.inside import judge
judge.main()
"""
ENVIRONMENT = {
  "PATH": "/usr/bin:/bin",
  "HOME": "/tmp",
  "LANG": "C.UTF-8",
  "OMP_NUM_THREADS": "1",
  "OPENBLAS_NUM_THREADS": "1",
  "PYTHONHASHSEED": "0",
}


def command(
  isolation: str, limits: Limits, uid: int | None, order: int, verdict: int, filter_fd: int
) -> list[str]:
  """The arguments; `order`, `verdict` and `filter_fd` are descriptors that it inherits."""
  bubblewrap = isolation == "bubblewrap"
  setup = dict(
    isolation=isolation,
    uid=None if isolation == "none" else uid,
    seconds=limits.seconds,
    limits=_rlimits(limits, counted=bubblewrap or uid is not None),
    libraries=[str(p) for p in _libraries()],
    folders=[str(p) for p in [*_folders(), FOLDER] if p.exists()],
    home="/tmp" if bubblewrap else "/",
    order=order,
    verdict=verdict,
  )
  # as it is called where the folder of an environment is a link to another
  executable = Path(sys.executable)
  executable = executable.parent.resolve() / executable.name
  python = [str(executable), "-I", "-S", "-c", START, HARNESS if bubblewrap else str(FOLDER)]
  outer = _bubblewrap(limits, uid, filter_fd) if bubblewrap else []
  return [*outer, *python, json.dumps(setup)]


def _rlimits(limits: Limits, *, counted: bool) -> dict[str, int]:
  """counted: whether RLIMIT_NPROC would count this sandbox's processes alone, and not all of the user's."""
  held = dict(
    RLIMIT_AS=limits.memory,
    RLIMIT_FSIZE=limits.files,
    RLIMIT_NOFILE=limits.open_files,
    RLIMIT_CORE=0,
    RLIMIT_MEMLOCK=0,
    RLIMIT_MSGQUEUE=0,
  )
  return held | ({"RLIMIT_NPROC": limits.processes + 3} if counted else {})


def _bubblewrap(limits: Limits, uid: int | None, filter_fd: int) -> list[str]:
  # Root's sandbox has a uid of the host's own, which the limit of processes counts; others' has a user namespace.
  users = (
    ["--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"]
    if uid is None
    else ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
  )
  arguments = [_program(), *users]
  arguments += [
    "--unshare-ipc",
    "--unshare-pid",
    "--unshare-net",
    "--unshare-uts",
    "--unshare-cgroup-try",
  ]
  arguments += ["--hostname", "sandbox", "--new-session", "--die-with-parent", "--clearenv"]
  # The judge is process 1: nothing in its namespace can signal it, and everything ends with it.  bubblewrap's own
  # would be one that the program can read.
  arguments += ["--as-pid-1"]
  for name, value in ENVIRONMENT.items():
    arguments += ["--setenv", name, value]
  arguments += _system()
  arguments += ["--proc", "/proc", "--dev", "/dev"]
  arguments += _writable("/dev/shm", 16 * MIB) + _writable("/tmp", limits.files)
  arguments += _interpreter()  # which may itself be in a folder of /tmp
  arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
  return [*arguments, "--seccomp", str(filter_fd), "--"]


def _writable(path: str, size: int) -> list[str]:
  return ["--size", str(size), "--perms", "1777", "--tmpfs", path]


@functools.cache
def _system() -> list[str]:
  """Read-only: the system's programs and libraries."""
  arguments = ["--ro-bind", "/usr", "/usr"]
  for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
    if os.path.islink(name):
      arguments += ["--symlink", os.readlink(name), name]
    elif os.path.isdir(name):
      arguments += ["--ro-bind", name, name]
  arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
  return [*arguments, "--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]


@functools.cache
def _interpreter() -> list[str]:
  """Read-only: Python with its packages, and this folder."""
  arguments = []
  for prefix in _prefixes():
    for parent in reversed(prefix.parents[:-1]):  # bubblewrap gives them the modes that they have
      arguments += ["--perms", "0755", "--dir", str(parent)]
    arguments += ["--ro-bind", str(prefix), str(prefix)]
  return [*arguments, "--ro-bind", str(FOLDER), HARNESS]


@functools.cache
def _prefixes() -> list[Path]:
  """Where the interpreter and its packages are, outside of /usr."""
  homes = dict.fromkeys(
    Path(p).resolve()
    for p in (sys.base_prefix, sys.prefix, sys.base_exec_prefix, Path(sys.executable).parent.parent)
  )
  outside = [p for p in homes if not p.is_relative_to("/usr")]
  return [p for p in outside if not any(p != q and p.is_relative_to(q) for q in outside)]


@functools.cache
def _libraries() -> list[Path]:
  """Installed packages: numpy is there for a program where it is here."""
  return [Path(p) for p in dict.fromkeys(sysconfig.get_paths()[k] for k in ("purelib", "platlib"))]


def _folders() -> list[Path]:
  """What Landlock lets a program read."""
  return [*_prefixes(), Path("/usr"), Path("/lib"), Path("/lib64"), Path("/etc/ld.so.cache")]


def _program() -> str:
  return shutil.which("bwrap") or "bwrap"


@functools.cache
def filter_of_namespaces() -> bytes:
  return seccomp.base()
