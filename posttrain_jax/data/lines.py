"""Lines of text files as UTF-8, which UTF-16 becomes: Excel and PowerShell write that."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain_jax.data.errors import RowError

BOM = b"\xef\xbb\xbf"


def of(path: Path) -> Iterator[bytes]:
  """The lines with their ends, without a byte order mark.

  Raises:
    ValueError: a damaged gzip file, or one that is UTF-16 in its beginning alone.
  """
  try:
    with _opened(path) as file:
      encoding = json.detect_encoding(file.peek(4)[:4])
      if encoding.startswith("utf-8"):
        for number, line in enumerate(file):
          yield line if number else line.removeprefix(BOM)
      else:
        for text in io.TextIOWrapper(file, encoding, newline="\n"):
          yield text.encode("utf-8")
  except (EOFError, gzip.BadGzipFile) as error:
    raise ValueError(f"{path} is a damaged gzip file ({error})") from error
  except UnicodeError as error:
    raise ValueError(
      f"{path} begins as {encoding.upper()} and is not that throughout ({error}); convert it to UTF-8"
    ) from None


def _opened(path: Path) -> Any:
  return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def not_utf8(error: UnicodeDecodeError, origin: str) -> RowError:
  """Where in a line, or a whole file, a byte is not UTF-8."""
  byte = error.object[error.start]
  column = error.start - error.object.rfind(b"\n", 0, error.start)
  return RowError(
    "not UTF-8",
    origin,
    f"byte 0x{byte:02x} at column {column} is not UTF-8; convert the file, as in"
    " `iconv -f latin1 -t utf-8`",
  )
