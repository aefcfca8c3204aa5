"""A lock that dies with its process: two runs never share a folder, and a killed one leaves nothing to remove."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Generator
from pathlib import Path
from typing import IO

from posttrain_jax.settings import ConfigError


@contextlib.contextmanager
def held(path: Path) -> Generator[None]:
  """Inside, no other process holds the lock; the file says who does.

  The kernel releases it when the process ends, however it ends.  A file system without locks has none: the run goes on
  and says so.

  Raises:
    ConfigError: another process holds it.
  """
  with path.open("a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(_refusal(path, file)) from None
    except OSError as error:
      print(f"{path.parent} is not locked against a second run: {error.strerror}", file=sys.stderr)
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
    file.flush()
    yield


def check(path: Path) -> None:
  """Raises ConfigError where another process holds the lock; nothing is written."""
  if not path.exists():
    return
  with path.open("r", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(_refusal(path, file)) from None
    except OSError:
      return


def _refusal(path: Path, file: IO[str]) -> str:
  file.seek(0)
  try:
    owner = json.loads(file.read())
    by = f"process {owner['pid']} on {owner['host']}"
  except (ValueError, KeyError, TypeError):
    by = "another process"
  return (
    f"{path.parent} is in use: {by} trains in it. Wait until that ends, or end it (it saves, and its command goes on),"
    " or name another --workdir"
  )
