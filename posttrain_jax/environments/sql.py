"""The database of a question as tools: a model looks at its tables, asks it, and answers then."""

from __future__ import annotations

import sqlite3
from typing import Any

from posttrain_jax.rewards import sql

ROWS = 8  # of a result that are shown


class Database:
  """Of a row: the file that it names, its script, or the facts of the built-in task.  Everything is read only."""

  def __init__(self) -> None:
    self._connection: sqlite3.Connection | None = None

  def reset(self, **row: Any) -> None:
    if self._connection is not None:
      self._connection.close()
    self._connection, self._bounds = sql.connected(row)

  def tables(self) -> str:
    """
    Shows the tables of the database with their columns.

    Returns:
      str: The statements that made them.
    """
    assert self._connection is not None
    asked = "SELECT sql FROM sqlite_master WHERE type = 'table' ORDER BY name"
    return "\n".join(text for (text,) in self._connection.execute(asked) if text)

  def query(self, sql: str) -> str:
    """
    Runs a query on the database.

    Args:
      sql: A SELECT statement of SQLite.

    Returns:
      str: The rows, or what is wrong with the query.
    """
    return _shown(self._connection, sql, self._bounds)


def _shown(connection: Any, query: str, bounds: sql.Bounds) -> str:
  """
  >>> _shown(sqlite3.connect(":memory:"), "SELECT 1, 'a' UNION SELECT 2, 'b'", sql.BUILT_IN)
  '1 | a\\n2 | b'
  """
  rows, said = sql.asked(connection, query, bounds)
  if said != "ok":
    raise ValueError(said)
  if not rows:
    return "no rows"
  lines = [
    " | ".join("NULL" if value is None else str(value) for value in row) for row in rows[:ROWS]
  ]
  more = [f"and {len(rows) - ROWS} more rows"] if len(rows) > ROWS else []
  return "\n".join([*lines, *more])
