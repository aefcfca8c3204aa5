"""Rows of Arrow, in parquet files and hub datasets: a struct has all fields of its type, null where a row has none."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

WITH_NULLS = ("arguments", "tools", "documents", "chat_template_kwargs")  # objects that JSON writes


def parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
  """(origin, row) of each row of a parquet file."""
  import pyarrow
  from pyarrow import parquet

  dropped: Counter[str] = Counter()

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


def plain(rows: Iterable[object], source: str) -> Iterator[tuple[int, object]]:
  """(number from 1, row without the nulls of what it lacks) of a dataset's rows."""
  dropped: Counter[str] = Counter()
  for number, row in enumerate(rows, 1):
    yield number, _without_nulls(row, dropped)
  _tell_nulls(source, dropped)


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
