"""The few calls to Linux that Python has no name for."""

import ctypes
import os

SET_PARENT_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 4, 22, 38
_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *arguments: int) -> None:
  _checked(_libc.prctl(option, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4])), "prctl")


def no_new_privileges() -> None:
  prctl(SET_NO_NEW_PRIVILEGES, 1)


def hide() -> None:
  """Nobody of the same uid reads this process's memory, descriptors or environment."""
  prctl(SET_DUMPABLE, 0)


def call(number: int, *arguments: object) -> int:
  """A system call by its number."""
  return _checked(_libc.syscall(ctypes.c_long(number), *arguments), f"system call {number}")


def _checked(result: int, what: str) -> int:
  if result < 0:
    error = ctypes.get_errno()
    raise OSError(error, f"{what}: {os.strerror(error)}")
  return result
