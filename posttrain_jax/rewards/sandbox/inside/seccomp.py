"""Filters of system calls, assembled by hand: a list of (code, jt, jf, k) that the kernel runs before each call.

What is denied fails with EPERM, `clone3` with ENOSYS (its flags lie where a filter cannot look, and libc then takes
`clone`); a call by the numbers of another architecture ends the process.
"""

import ctypes
import struct

from posttrain_jax.rewards.sandbox.inside import kernel, syscalls

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38
CALL, ARCHITECTURE, FIRST, SECOND = 0, 4, 16, 24  # offsets of struct seccomp_data, low words
X32 = 0x40000000  # the other numbering of x86_64
NAMESPACES = 0x7E020000  # CLONE_NEW*
THREAD = 0x00010000  # CLONE_THREAD
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # they type into a terminal

Filter = list[tuple[int, int, int, int]]


def base(*, namespaces: bool = True, machine: str | None = None) -> bytes:
  """The filter of all that runs in a sandbox; without `namespaces` no process is started, and no file changed."""
  name = machine or syscalls.machine()
  denied = syscalls.DENIED | ({} if namespaces else syscalls.WITHOUT_NAMESPACES)
  lines = _opening(name)
  lines += [(EQUAL, 0, 1, syscalls.number(syscalls.CLONE3, name)), (RETURN, 0, 0, ENOSYS)]
  for call in syscalls.numbers(denied, name):
    lines += [(EQUAL, 0, 1, call), (RETURN, 0, 0, EPERM)]
  lines += _where(syscalls.number(syscalls.IOCTL, name), SECOND, [TIOCSTI, TIOCLINUX])
  clone = syscalls.number(syscalls.CLONE, name)
  lines += [(EQUAL, 0, 4, clone), (LOAD, 0, 0, FIRST)]
  if namespaces:
    lines += [(ANY_BIT, 0, 1, NAMESPACES), (RETURN, 0, 0, EPERM)]
  else:
    lines += [(ANY_BIT, 1, 0, THREAD), (RETURN, 0, 0, EPERM)]
  lines += [(LOAD, 0, 0, CALL)]
  return _packed([*lines, (RETURN, 0, 0, ALLOW)])


def answering(judge: int, *, machine: str | None = None) -> bytes:
  """What the model's program has besides: it sends the judge no signal, nor all at once, and sets only its own limits."""
  name = machine or syscalls.machine()
  lines = _opening(name)
  refused = [0, 1, -1, judge, -judge]  # 0 and -1 are all of a group, and all there are
  for call in syscalls.numbers(syscalls.SIGNALS, name):
    lines += _where(call, FIRST, refused)
  limit = syscalls.number(syscalls.PRLIMIT, name)
  lines += [(EQUAL, 0, 4, limit), (LOAD, 0, 0, FIRST)]
  lines += [(EQUAL, 1, 0, 0), (RETURN, 0, 0, EPERM), (LOAD, 0, 0, CALL)]
  return _packed([*lines, (RETURN, 0, 0, ALLOW)])


def install(program: bytes) -> None:
  """The filter holds for this process and its children, for ever."""

  class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

  kernel.no_new_privileges()
  held = Program(len(program) // 8, program)
  kernel.prctl(kernel.SET_SECCOMP, 2, ctypes.addressof(held))


def _opening(name: str) -> Filter:
  lines = [
    (LOAD, 0, 0, ARCHITECTURE),
    (EQUAL, 1, 0, syscalls.ARCHITECTURES[name]),
    (RETURN, 0, 0, KILL),
    (LOAD, 0, 0, CALL),
  ]
  return lines + ([(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, EPERM)] if name == "x86_64" else [])


def _where(call: int, argument: int, values: list[int]) -> Filter:
  """EPERM for a call whose argument is one of the values."""
  tests = [
    line for v in values for line in [(EQUAL, 0, 1, v & 0xFFFFFFFF), (RETURN, 0, 0, EPERM)]
  ]
  return [(EQUAL, 0, len(tests) + 2, call), (LOAD, 0, 0, argument), *tests, (LOAD, 0, 0, CALL)]


def _packed(lines: Filter) -> bytes:
  return b"".join(struct.pack("=HBBI", *line) for line in lines)
