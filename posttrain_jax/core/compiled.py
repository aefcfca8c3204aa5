"""The cache of compiled programs as JAX writes it: a compressed file a program, of which a kill may leave a part."""

from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path

NEWEST = 8  # files that are looked at: a few milliseconds on a CPU
ZSTD = b"\x28\xb5\x2f\xfd"  # how its frames begin; JAX writes them on Python 3.14 and later, else zlib's streams


def drop_cut(folder: Path, newest: int = NEWEST) -> list[Path]:
  """Deletes of a cache's newest programs those that are not whole, and names them.

  A process that is killed while it writes one, or a disk that is full, leaves a part.  JAX reads it at every start,
  compiles the program again, and never writes over it.  Several processes may do so at once; a folder that is not
  there, or not ours to change, stays as it is.
  """
  dropped = []
  with contextlib.suppress(OSError):
    known = [entry for entry in os.scandir(folder) if entry.name.endswith("-cache")]
    for entry in sorted(known, key=lambda one: one.stat().st_mtime)[-newest:]:
      path = Path(entry.path)
      if not _is_whole(path.read_bytes()):
        path.unlink(missing_ok=True)
        dropped.append(path)
  return dropped


def _is_whole(data: bytes) -> bool:
  """Whether compressed data comes to its end; of a kind that cannot be read here nothing is said against it."""
  if data.startswith(ZSTD):
    try:
      from compression import zstd  # ty: ignore[import-not-found]  (Python 3.14)
    except ImportError:
      return True
    reader, error = zstd.ZstdDecompressor(), zstd.ZstdError
  else:
    reader, error = zlib.decompressobj(), zlib.error
  try:
    reader.decompress(data)
  except error:
    return False
  return reader.eof
