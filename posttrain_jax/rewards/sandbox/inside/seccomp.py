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
TYPES = [0x5412, 0x541C]  # TIOCSTI, TIOCLINUX: they type into a terminal
OWNERS = [0x8901, 0x8902]  # FIOSETOWN, SIOCSPGRP
OWNED = [8, 10, 15]  # F_SETOWN, F_SETSIG, F_SETOWN_EX: whom a descriptor sends its signals

Filter = list[tuple[int, int, int, int]]


def base(*, alone: int | None = None, machine: str | None = None) -> bytes:
  """The filter of all that runs in a sandbox.

  alone: without namespaces, the one process that it may signal; it then starts none, and changes no file.
  """
  name = machine or syscalls.machine()
  denied = syscalls.DENIED | ({} if alone is None else syscalls.WITHOUT_NAMESPACES)
  lines = _opening(name)
  lines += [(EQUAL, 0, 1, syscalls.number(syscalls.CLONE3, name)), (RETURN, 0, 0, ENOSYS)]
  for call in syscalls.numbers(denied, name):
    lines += [(EQUAL, 0, 1, call), (RETURN, 0, 0, EPERM)]
  lines += _refused(syscalls.number(syscalls.IOCTL, name), SECOND, TYPES + OWNERS)
  lines += _refused(syscalls.number(syscalls.FCNTL, name), SECOND, OWNED)
  clone = syscalls.number(syscalls.CLONE, name)
  lines += [(EQUAL, 0, 4, clone), (LOAD, 0, 0, FIRST)]
  if alone is None:
    lines += [(ANY_BIT, 0, 1, NAMESPACES), (RETURN, 0, 0, EPERM), (LOAD, 0, 0, CALL)]
  else:
    lines += [(ANY_BIT, 1, 0, THREAD), (RETURN, 0, 0, EPERM), (LOAD, 0, 0, CALL)]
    for call in syscalls.numbers(syscalls.SIGNALS, name):
      lines += _only(call, alone)
    lines += _only(syscalls.number(syscalls.PRLIMIT, name), 0)
  return _packed([*lines, (RETURN, 0, 0, ALLOW)])


def answering(judge: int, *, machine: str | None = None) -> bytes:
  """What the model's program has besides: it signals neither the judge nor everybody, and sets its own limits alone."""
  name = machine or syscalls.machine()
  lines = _opening(name)
  refused = [0, 1, -1, judge, -judge]  # 0 and -1 are all of a group, and all there are
  for call in syscalls.numbers(syscalls.SIGNALS, name):
    lines += _refused(call, FIRST, refused)
  lines += _only(syscalls.number(syscalls.PRLIMIT, name), 0)
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


def _refused(call: int, argument: int, values: list[int]) -> Filter:
  """EPERM for a call whose argument is one of the values."""
  tests = [line for v in values for line in [(EQUAL, 0, 1, v & 0xFFFFFFFF), (RETURN, 0, 0, EPERM)]]
  return [(EQUAL, 0, len(tests) + 2, call), (LOAD, 0, 0, argument), *tests, (LOAD, 0, 0, CALL)]


def _only(call: int, first: int) -> Filter:
  """EPERM for a call whose first argument is another."""
  return [
    (EQUAL, 0, 4, call),
    (LOAD, 0, 0, FIRST),
    (EQUAL, 1, 0, first),
    (RETURN, 0, 0, EPERM),
    (LOAD, 0, 0, CALL),
  ]


def _packed(lines: Filter) -> bytes:
  return b"".join(struct.pack("=HBBI", *line) for line in lines)
