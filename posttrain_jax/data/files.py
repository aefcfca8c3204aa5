"""Raw rows out of files, built-in tasks and hub datasets, each with its place (`file.jsonl:12`).

A row that cannot be read is handed over as a `RowError` in its place, so that the reader decides
whether it stops the run or is counted; a source that cannot be read at all raises.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from posttrain_jax.data import arrow, json_rows, tables

SUFFIXES = tuple(
  kind + packed for kind in (".jsonl", ".json", ".csv", ".tsv") for packed in ("", ".gz")
) + (".parquet",)
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(#[\w.\[\]:%+-]+)?")


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
  if (
    isinstance(source, Path) or name.lower().endswith(SUFFIXES) or name.startswith((".", "/", "~"))
  ):
    raise FileNotFoundError(f"{source} does not exist{_nearby(path)}")
  if not HUB_NAME.fullmatch(name):
    raise ValueError(
      f"{name!r} is no file ({', '.join(SUFFIXES)}), no built-in task ({', '.join(BUILT_IN)})"
      " and no hub dataset (owner/name[:config][#split])"
    )
  return _hub_rows(name, split)


def _file_rows(path):
  name = path.name.removesuffix(".gz").lower()
  if name.endswith((".jsonl", ".json")):
    return json_rows.rows(path)
  if name.endswith(tables.SUFFIXES):
    return tables.rows(path)
  if name.endswith(".parquet"):
    return arrow.parquet_rows(path)
  raise ValueError(f"{path} is of no known kind; data files end in {', '.join(SUFFIXES)}")


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
  for number, row in arrow.plain(rows, name):
    yield f"{name}/{split}:{number}", row


def _nearby(path):
  folder = path.parent
  if path.is_symlink():
    return f": it is a link to {path.readlink()}, where there is no file"
  if not folder.is_dir():
    return f", nor does its folder {folder}"
  close = difflib.get_close_matches(
    path.name, [p.name for p in folder.iterdir() if p.exists()], n=3
  )
  if close:
    return f"; did you mean {' or '.join(str(folder / name) for name in close)}?"
  return f"; {folder} holds {_listed(folder)}"


def _listed(folder):
  names = sorted(
    p.name for p in folder.iterdir() if p.exists() and p.name.lower().endswith(SUFFIXES)
  )
  rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
  return (", ".join(names[:8]) or "no data file") + rest
