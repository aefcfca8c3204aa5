"""Raw rows out of files, built-in tasks and hub datasets, each with its place (`file.jsonl:12`).

A row that cannot be read is handed over as a `RowError` in its place, so that the reader decides
whether it stops the run or is counted; a source that cannot be read at all raises.
"""

import difflib
import gzip
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
WITH_NULLS = ("arguments", "tools", "documents", "chat_template_kwargs")  # objects that JSON writes
SHORTEN = "shorten the row, or leave it out of the file"  # of one that is too long
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(#[\w.\[\]:%+-]+)?")


class RowError(ValueError):
  """A row that cannot be used: `origin` says where it stands, `reason` is what to count it under.

  `cure` is what to write instead, where that depends on who asked for the row.
  """

  def __init__(self, reason: str, origin: str, detail: str, cure: str = ""):
    super().__init__(f"{origin}: {detail}" + (f"; {cure}" if cure else ""))
    self.reason, self.origin, self.detail, self.cure = reason, origin, detail, cure

  def instead(self, cure: str) -> "RowError":
    """The same of a row that is too long, where settings of the data cannot be written."""
    if self.reason != "too long":
      return self
    return RowError(self.reason, self.origin, self.detail, cure)

  def within(self, name: str) -> "RowError":
    """The same of a row in the source of that name."""
    return RowError(self.reason, f"{name}: {self.origin}", self.detail, self.cure)


def raw_rows(source: str | Path, split: str) -> Iterator[tuple[str, object]]:
  """(origin, row) for each row of a source; the row is a `RowError` where it cannot be read."""
  name = str(source)
  if isinstance(source, str) and name in BUILT_IN:
    return BUILT_IN[name](split)
  path = Path(source).expanduser()
  if path.is_file():
    return _file_rows(path)
  if path.is_dir():
    raise IsADirectoryError(f"{source} is a folder; name one of its files: {_listed(path)}")
  if isinstance(source, Path) or name.endswith(SUFFIXES) or name.startswith((".", "/", "~")):
    raise FileNotFoundError(f"{source} does not exist{_nearby(path)}")
  if not HUB_NAME.fullmatch(name):
    raise ValueError(
      f"{name!r} is no file ({', '.join(SUFFIXES)}), no built-in task ({', '.join(BUILT_IN)})"
      " and no hub dataset (owner/name[:config][#split])"
    )
  return _hub_rows(name, split)


def _file_rows(path):
  if path.name.endswith((".jsonl", ".jsonl.gz")):
    return _jsonl(path)
  if path.name.endswith((".json", ".json.gz")):
    return _json(path)
  if path.name.endswith(".parquet"):
    return _parquet(path)
  raise ValueError(f"{path} is of no known kind; data files end in {', '.join(SUFFIXES)}")


def _jsonl(path):
  with _opened(path) as lines:
    for number, line in enumerate(_whole(lines, path), 1):
      if line.strip():
        origin = f"{path}:{number}"
        yield origin, _parsed(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, origin)


def _parsed(line, origin):
  try:
    return _loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    return _not_utf8(error, origin)
  except UnicodeEncodeError as error:
    return RowError("not text", origin, f"holds half of a surrogate pair ({error.reason})")
  except (ValueError, RecursionError) as error:
    text = line.decode("utf-8").strip()
    shown = text if len(text) <= 60 else text[:57] + "..."
    hint = ""
    if text.startswith("["):
      hint = "; if the whole file is one array, name it .json"
    return RowError("not JSON", origin, f"not JSON ({_why(error)}): {shown}{hint}")


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


def _json(path):
  """The items of one array, each with the line it starts on."""
  with _opened(path) as file:
    data = b"".join(_whole(file, path)).removeprefix(b"\xef\xbb\xbf")
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise _not_utf8(error, f"{path}:{data[: error.start].count(10) + 1}") from None
  at = _skip_blank(text, 0)
  if text[at : at + 1] != "[":
    raise RowError("not an array", f"{path}:1", f"expected one array of rows{_seen(text, at)}")
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


def _seen(text, at):
  if at == len(text):
    return ", found an empty file"
  if text[at] == "{" and "\n{" in text:
    return ", found one object to a line: name the file .jsonl"
  return f", found {text[at : at + 20]!r}"


def _not_utf8(error, origin):
  byte = error.object[error.start]
  column = error.start - error.object.rfind(b"\n", 0, error.start)
  return RowError(
    "not UTF-8",
    origin,
    f"byte 0x{byte:02x} at column {column} is not UTF-8; convert the file, as in"
    " `iconv -f latin1 -t utf-8`",
  )


def _opened(path):
  return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _whole(lines, path):
  try:
    yield from lines
  except (EOFError, gzip.BadGzipFile) as error:
    raise ValueError(f"{path} is a damaged gzip file ({error})") from error


def _parquet(path):
  import pyarrow

  dropped: Counter[str] = Counter()
  from pyarrow import parquet

  try:
    with parquet.ParquetFile(path) as file:
      number = 0
      for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist(maps_as_pydicts="lossy"):
          number += 1
          yield f"{path}:{number}", _without_nulls(row, dropped)
    _tell_nulls(path, dropped)
  except (pyarrow.ArrowInvalid, OSError) as error:
    raise ValueError(f"{path} is a damaged parquet file, or none ({error})") from error


def _sql(split):
  # Other modules of this package stand on this one, so the task is imported when it is asked for.
  from posttrain_jax.data.tasks import sql

  for number, row in enumerate(sql.examples(split), 1):
    yield f"sql/{split}:{number}", row


BUILT_IN = {"sql": _sql}


def _hub_rows(name, split):
  """Rows of a hub dataset `owner/name[:config][#split]`; a split that is named comes before the one that is usual."""
  import datasets

  name, _, named = name.partition("#")
  split = named or split
  path, _, config = name.partition(":")
  try:
    rows = datasets.load_dataset(path, config or None, split=split)
  except Exception as error:  # the library raises a kind of its own for each way to fail
    raise ValueError(
      f"no file, no built-in task ({', '.join(BUILT_IN)}), and as a hub dataset {name!r} with split"
      f" {split!r} cannot be loaded: {type(error).__name__}: {error}"
      f"{'' if named else f'; another split is named as {name}#test'}"
    ) from error
  dropped: Counter[str] = Counter()
  for number, row in enumerate(rows, 1):
    yield f"{name}/{split}:{number}", _without_nulls(row, dropped)
  _tell_nulls(name, dropped)


def _without_nulls(value, dropped, inside=""):
  """What an Arrow row says: there a struct has every field of the column's type, null where the row has none.

  Those in an object where null is a word are counted in `dropped`, by the object's name.
  """
  if isinstance(value, dict):
    if inside:
      dropped[inside] += sum(item is None for item in value.values())
    return {
      key: _without_nulls(item, dropped, inside or (key if key in WITH_NULLS else ""))
      for key, item in value.items()
      if item is not None
    }
  if isinstance(value, list):
    return [_without_nulls(item, dropped, inside) for item in value]
  return value


def _tell_nulls(source, dropped):
  """A line of the nulls that may have been meant, which Arrow does not tell from fields that are not there."""
  if dropped.total():
    counts = ", ".join(f"{count:,} in {name!r}" for name, count in dropped.items() if count)
    log.warning(
      "%s: fields that are null were left out (%s): Arrow does not tell a null from a field that a row lacks; where"
      " null is meant, write the object as JSON in a string",
      source,
      counts,
    )


def _nearby(path):
  folder = path.parent
  if not folder.is_dir():
    return f", nor does its folder {folder}"
  close = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=3)
  if close:
    return f"; did you mean {' or '.join(str(folder / name) for name in close)}?"
  return f"; {folder} holds {_listed(folder)}"


def _listed(folder):
  names = sorted(p.name for p in folder.iterdir() if p.name.endswith(SUFFIXES))
  rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
  return (", ".join(names[:8]) or "no data file") + rest
