"""Lines of JSON that outlive the process that writes them: what is paid for once is not paid for again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
CURE = "remove the file, and what it holds is done again"


class Journal:
  """A file whose first line says what its lines are of; a line is whole, or was never written.

  header, lines: what the file holds as it is opened; a header of None is that of a new file.
  """

  def __init__(self, path: Path):
    self.path = path
    self._read()

  def _read(self) -> None:
    path = self.path
    written = path.read_bytes() if path.exists() else b""
    # killed in the middle of a line: what stands behind the last line break was never said
    self._whole = written.rfind(b"\n") + 1
    values = [self._value(line, i) for i, line in enumerate(written[: self._whole].splitlines(), 1)]
    self.header: Any = values[0] if values else None
    self.lines = values[1:]

  def _value(self, line: bytes, number: int) -> Any:
    try:
      value = json.loads(line)
    except ValueError as error:
      raise ValueError(f"{self.path}:{number} is not JSON ({error}): {CURE}") from error
    if not isinstance(value, dict):
      raise ValueError(f"{self.path}:{number} is no object of JSON: {CURE}")
    return value

  def each(self, read: Callable[[Any], T]) -> Iterator[T]:
    """What `read` makes of each line.

    Raises:
      ValueError: a line lacks what it reads, or holds something else.
    """
    for number, line in enumerate(self.lines, 2):
      try:
        value = read(line)
      except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        raise ValueError(f"{self.path}:{number} {what}: {CURE}") from error
      yield value

  def begin(self, header: Mapping[str, Any]) -> Journal:
    """Ready to be written to, by this process alone, a new file with this header.

    Raises:
      ValueError: another process writes it.
    """
    self._file = self.path.open("ab")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process
    except BlockingIOError:
      self._file.close()
      raise ValueError(
        f"another process writes {self.path}: wait for its end, or write another file"
      ) from None
    except OSError:  # a file system without locks
      pass
    self._read()  # what the other has written meanwhile
    self._file.truncate(self._whole)
    if self.header is None:
      self.header = dict(header)
      self.write(self.header)
    return self

  def write(self, value: Mapping[str, Any]) -> None:
    """A line more, which is with the kernel when this returns."""
    line = json.dumps(value, ensure_ascii=False) + "\n"
    self._file.write(line.encode(errors="surrogatepass"))  # halves of characters, as JSON has them
    self._file.flush()

  def __enter__(self) -> Journal:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
