"""Columns of rows that verifiers read: those that every row has, and those that some have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def of(rows: Sequence[tuple[Mapping[str, Any], str]]) -> tuple[list[str], dict[str, str]]:
  """(the columns that every row has, {a column that some have and not all: where the first row without it stands}).

  >>> of([({"a": 1, "b": 1}, "row 1"), ({"a": 2}, "row 2")])
  (['a'], {'b': 'row 2'})

  Args:
    rows: (row, where it stands).
  """
  every = dict.fromkeys(column for row, _ in rows for column in row)
  without = {column: next((at for row, at in rows if column not in row), None) for column in every}
  return (
    [column for column, at in without.items() if at is None],
    {column: at for column, at in without.items() if at is not None},
  )
