"""Rows of JSON files: an object to a line, or one array, whatever the file is called."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from posttrain_jax.data import lines
from posttrain_jax.data.errors import RowError


def rows(path: Path) -> Iterator[tuple[str, object]]:
  """(origin, row) of each row of a file: a `[` at its beginning tells an array."""
  begun = next((line.lstrip() for line in lines.of(path) if line.strip()), b"")
  if begun.startswith(b"["):
    return _array(path)
  is_lined = path.name.removesuffix(".gz").endswith(".jsonl") or _is_whole(begun)
  return _lined(path) if is_lined else _refused(path, begun)


def _is_whole(line: bytes) -> bool:
  """Whether a line is an object by itself."""
  try:
    return isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False


def _refused(path: Path, begun: bytes) -> Iterator[tuple[str, object]]:
  shown = "an empty file" if not begun else repr(begun[:20].decode("utf-8", "replace"))
  raise RowError(
    "not an array",
    f"{path}:1",
    f"expected one array of rows, or an object to a line, found {shown}",
  )


def _lined(path: Path) -> Iterator[tuple[str, object]]:
  for number, line in enumerate(lines.of(path), 1):
    if line.strip():
      origin = f"{path}:{number}"
      yield origin, _parsed(line, origin)


def _parsed(line, origin):
  try:
    return _loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    return lines.not_utf8(error, origin)
  except UnicodeEncodeError as error:
    return RowError("not text", origin, f"holds half of a surrogate pair ({error.reason})")
  except (ValueError, RecursionError) as error:
    text = line.decode("utf-8").strip()
    shown = text if len(text) <= 60 else text[:57] + "..."
    return RowError("not JSON", origin, f"not JSON ({_why(error)}): {shown}")


def _why(error):
  """What json says, without the line it counts itself, which is always the first here."""
  if isinstance(error, json.JSONDecodeError):
    return f"{error.msg} at column {error.colno}"
  return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _refuse(constant):
  raise ValueError(f"{constant} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _loads(text):
  value = _DECODER.decode(text)
  if "\\u" in text:  # the only way to a lone surrogate, which no tokenizer can encode
    json.dumps(value, ensure_ascii=False).encode("utf-8")
  return value


def _array(path):
  """The items of one array, each with the line it starts on."""
  data = b"".join(lines.of(path))
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise lines.not_utf8(error, f"{path}:{data[: error.start].count(10) + 1}") from None
  at = _skip_blank(text, 0)
  line, counted = 1, 0
  at = _skip_blank(text, at + 1)
  while text[at : at + 1] != "]":
    line, counted = line + text.count("\n", counted, at), at
    origin = f"{path}:{line}"
    try:
      row, end = _DECODER.raw_decode(text, at)
      if "\\u" in text[at:end]:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
      row = RowError("not text", origin, f"holds half of a surrogate pair ({error.reason})")
    except (ValueError, RecursionError) as error:
      if isinstance(error, json.JSONDecodeError):
        origin = f"{path}:{error.lineno}"
      raise RowError("not JSON", origin, f"not JSON ({_why(error)})") from None
    yield origin, row
    at = _skip_blank(text, end)
    if text[at : at + 1] == ",":
      at = _skip_blank(text, at + 1)
    elif text[at : at + 1] != "]":
      origin = f"{path}:{text.count(chr(10), 0, at) + 1}"
      raise RowError("not JSON", origin, "not JSON (expected ',' or ']' after an item)")
  if text[at + 1 :].strip():
    origin = f"{path}:{text.count(chr(10), 0, at) + 1}"
    raise RowError("not JSON", origin, "not JSON (something follows the array's ']')")


_NOT_BLANK = re.compile(r"[^ \t\r\n]")


def _skip_blank(text, at):
  match = _NOT_BLANK.search(text, at)
  return match.start() if match else len(text)
