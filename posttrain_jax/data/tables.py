"""Rows of tables in text: the first line names the columns, every cell is text."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain_jax.data import lines
from posttrain_jax.data.errors import RowError

SUFFIXES = (".csv", ".tsv")
LARGEST_CELL = 2**30  # characters; the csv module's own limit is 2**17
TRUTHS = {"true": True, "false": False, "1": True, "0": False}
NUMBERS = ("margin", "weight")
WRITTEN_AS_JSON = (
  *("messages", "conversations", "completions", "labels", "scores", "tools", "documents"),
  *("chat_template_kwargs", "history", "preferred_output", "non_preferred_output"),
)


def is_table(source: Any) -> bool:
  """Whether a source's rows come from such a table."""
  return str(source).removesuffix(".gz").lower().endswith(SUFFIXES)


def rows(path: Path) -> Iterator[tuple[str, object]]:
  """(origin, row) of each row; a row whose cells are not as many as the columns is a `RowError`."""
  csv.field_size_limit(LARGEST_CELL)
  reader = csv.reader(_text(path), delimiter=_delimiter(path), strict=True)
  header: list[str] = []
  while True:
    origin = f"{path}:{reader.line_num + 1}"
    try:
      cells = next(reader, None)
    except csv.Error as error:
      raise RowError("not CSV", origin, _why(error)) from None
    if cells is None:
      return
    if not any(cell.strip() for cell in cells):
      continue
    if header:
      yield origin, _row(header, cells, origin)
    else:
      header = _header(cells, origin)


def typed(fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
  """The fields of a row with what cells say as text: labels, numbers, JSON; what is empty and need not be there is not.

  Raises:
    RowError: a cell says something else.
  """
  typed_fields = dict(fields)
  for name, text in fields.items():
    if not isinstance(text, str):
      continue
    if name in (*NUMBERS, *WRITTEN_AS_JSON, "label", "system", "channel") and not text.strip():
      del typed_fields[name]
    elif name == "label":
      typed_fields[name] = TRUTHS.get(text.strip().lower(), text)
    elif name in NUMBERS:
      typed_fields[name] = _number(text)
    elif name in WRITTEN_AS_JSON:
      typed_fields[name] = _json(text, name, origin)
  return typed_fields


def _text(path: Path) -> Iterator[str]:
  for number, line in enumerate(lines.of(path), 1):
    try:
      yield line.decode("utf-8")
    except UnicodeDecodeError as error:
      raise lines.not_utf8(error, f"{path}:{number}") from None


def _delimiter(path: Path) -> str:
  """Tabs in .tsv; in .csv commas, or where the first line has none the semicolons or tabs that it has."""
  if path.name.removesuffix(".gz").lower().endswith(".tsv"):
    return "\t"
  first = next(iter(_text(path)), "")
  return next((mark for mark in ",;\t" if mark in first), ",")


def _header(cells: list[str], origin: str) -> list[str]:
  names = [cell.strip() for cell in cells]
  while names and not names[-1]:
    names.pop()
  twice = next((name for name in names if name and names.count(name) > 1), None)
  if twice is not None:
    raise RowError(
      "column twice", origin, f"two columns are called {twice!r}; the first line names the columns"
    )
  return [name or f"unnamed column {number}" for number, name in enumerate(names, 1)]


def _row(header: list[str], cells: list[str], origin: str) -> dict[str, str] | RowError:
  while len(cells) > len(header) and not cells[-1].strip():
    cells.pop()
  if len(cells) != len(header):
    return RowError(
      "unequal cells",
      origin,
      f"the row has {len(cells)} cells, and the first line names {len(header)} columns; a cell with a comma, a quote or"
      ' a line break in it stands in "quotes", and a quote in it is doubled ("")',
    )
  return dict(zip(header, cells))


def _why(error: csv.Error) -> str:
  if "unexpected end" in str(error):
    return 'a quote that opens in this row is not closed; a quote within a cell is doubled ("")'
  return f"cannot be read as a table ({error})"


def _number(text: str) -> float | str:
  try:
    return float(text)
  except ValueError:
    return text


def _json(text: str, name: str, origin: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    hint = ""
    if "'" in text and '"' not in text:
      hint = ", but as Python prints it; write the cell with json.dumps"
    raise RowError(
      "not JSON",
      origin,
      f"{name!r} is no JSON{hint}: {text if len(text) < 60 else text[:57] + '...'}",
    ) from None
