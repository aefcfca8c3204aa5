"""Landlock: from now on this process reads below some folders, and writes, opens and signals nothing else."""

import ctypes
import os
import struct

from posttrain_jax.rewards.sandbox.inside import kernel, syscalls

READ_FILE, READ_FOLDER, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
VERSION = 1  # the flag that asks for the kernel's version of Landlock
BENEATH = 1  # the kind of rule


def version() -> int:
  """Of the kernel's Landlock; 0 where there is none."""
  try:
    return kernel.call(syscalls.LANDLOCK[0], None, ctypes.c_size_t(0), ctypes.c_uint(VERSION))
  except OSError:
    return 0


def _governed(abi: int) -> tuple[int, int, int]:
  """What can be forbidden at all: (ways to use files, ways to use the network, what leaves the domain)."""
  files = 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)
  return (1 << files) - 1, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0


def restrict(folders: list[str | int], files: list[str]) -> None:
  """Reads below folders (paths or descriptors), reads and writes the files, and uses nothing else.

  Raises:
    OSError: the kernel has no Landlock.
  """
  abi = version()
  if not abi:
    raise OSError("this kernel has no Landlock")
  governed = struct.pack("=QQQ", *_governed(abi))[: 8 if abi < 4 else 16 if abi < 6 else 24]
  ruleset = kernel.call(
    syscalls.LANDLOCK[0], governed, ctypes.c_size_t(len(governed)), ctypes.c_uint(0)
  )
  for folder in folders:
    _allow(ruleset, folder, READ_FILE | READ_FOLDER)
  for file in files:
    _allow(ruleset, file, READ_FILE | WRITE_FILE)
  kernel.no_new_privileges()
  kernel.call(syscalls.LANDLOCK[2], ctypes.c_int(ruleset), ctypes.c_uint(0))
  os.close(ruleset)


def _allow(ruleset: int, place: str | int, access: int) -> None:
  opened = os.open(place, os.O_PATH | os.O_CLOEXEC) if isinstance(place, str) else os.dup(place)
  if not os.path.isdir(place):
    access &= READ_FILE | WRITE_FILE
  rule = struct.pack("=Qi", access, opened)
  kernel.call(
    syscalls.LANDLOCK[1],
    ctypes.c_int(ruleset),
    ctypes.c_int(BENEATH),
    rule,
    ctypes.c_uint(0),
  )
  os.close(opened)
