"""A query is right when it returns what the gold query returns: both are executed, whatever the answer says.

On the built-in task both run on the facts and again on their twin (`data.tasks.sql`); on one's own rows on the database
that the row names, or on one made of its script.  Read-only, with no files, extensions, clock or chance, within bounds
of steps, time, rows and bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax.data.tasks import sql as task
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Known, Prompt, Tried

# What a question about a database can need.  Absent on purpose: random, the clock, files, extensions, and
# everything that makes a large value out of a small one.
# fmt: off
FUNCTIONS = frozenset({
  "abs", "avg", "coalesce", "count", "dense_rank", "first_value", "group_concat", "ifnull", "iif", "instr",
  "last_value", "length", "like", "lower", "ltrim", "max", "min", "nullif", "rank", "round", "row_number",
  "rtrim", "substr", "substring", "sum", "total", "trim", "upper",
})
# The questions of others need these, too; `now` among a date's arguments is the clock all the same.
MORE_FUNCTIONS = frozenset({
  "cast", "ceil", "ceiling", "char", "concat", "concat_ws", "cume_dist", "date", "datetime", "exp", "floor", "format",
  "glob", "hex", "json_array_length", "json_extract", "json_type", "julianday", "lag", "lead", "ln", "log", "log10",
  "mod", "nth_value", "ntile", "percent_rank", "pow", "power", "printf", "replace", "sign", "sqrt", "strftime", "time",
  "trunc", "typeof", "unicode", "unixepoch",
})
# fmt: on
READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
MAX_QUERY = 2000  # characters


@dataclasses.dataclass(frozen=True)
class Bounds:
  """What a query may use.

  steps: of SQLite's virtual machine, so that a busy machine comes to the same verdict.
  seconds: of this thread's CPU time: the backstop for steps that are slow themselves.
  length: bytes of a value; with rows and columns it bounds the memory a result can fill.
  """

  rows: int = 1000
  columns: int = 30
  steps: int = 500_000
  seconds: float = 1.0
  length: int = 1000
  functions: frozenset[str] = FUNCTIONS


BUILT_IN = Bounds()
OWN = Bounds(
  10_000, 100, 2_000_000, 5.0, 10_000, FUNCTIONS | MORE_FUNCTIONS
)  # for a row's database


@dataclasses.dataclass(frozen=True)
class Query(Tried):
  """`sql` as a part of a reward; the gold query is in the row's `column`."""

  column: str = "gold"

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    return sql(prompt, completion, {**example, "gold": example.get(self.column)})

  def known(self) -> list[Known]:
    gold = "SELECT capital FROM country WHERE name = 'France'"
    row = {self.column: gold}
    return [
      Known(f"```sql\n{gold};\n```", row, True),
      Known("SELECT name FROM country WHERE name = 'France'", row, False),
      Known("Paris", row, False),
    ]


def sql(prompt: Any, completion: str, example: Mapping[str, Any]) -> Score:
  """1 where the completion's query returns what the row's `gold` returns, else 0.

  The row may name its `database`, a file that is opened read-only, or have a `schema`, a script of CREATE and INSERT;
  without either the built-in task's facts are asked.

  >>> sql("", "SELECT 2 + 2 WHERE 0", {"gold": "SELECT 4", "schema": "CREATE TABLE t (x)"}).value
  0.0
  """
  gold = example.get("gold")
  if not isinstance(gold, str):
    return Score(None, "the row has no `gold` query")
  try:
    if example.get("database") or example.get("schema"):
      with contextlib.closing(_own(example)) as connection:
        return _score(completion, gold, [connection], OWN, may_be_empty=True)
    return score(completion, gold)
  except (ValueError, sqlite3.Error) as error:  # of the row, not of the answer
    return Score(None, str(error))


def score(answer: str, gold: str, *, connection: sqlite3.Connection | None = None) -> Score:
  """Whether the first statement in `answer` returns what `gold` returns, on the facts and on their twin.

  Rows are compared as a multiset, or in their order where the gold query has ORDER BY; column names do not
  count, column order does; 1 equals 1.0.  Both run read-only, within BUILT_IN, whatever the answer is.  With a
  `connection`, that database alone decides.

  >>> gold = "SELECT capital FROM country WHERE name = 'France'"
  >>> score("SELECT capital AS c FROM country WHERE name LIKE 'france'", gold).value
  1.0
  >>> score("SELECT 'Paris'", gold).reason
  'wrong result'
  """
  if connection is not None:
    return _score(answer, gold, [connection], BUILT_IN)
  with _facts() as connections:
    return _score(answer, gold, connections, BUILT_IN)


def evaluate(answers: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Execution accuracy: {"accuracy", "correct", "n", "channels": {name: {"correct", "total"}}, "reasons": {...}}."""
  if len(answers) != len(examples):
    raise ValueError(
      f"{len(answers)} answers for {len(examples)} examples; give one answer per example"
    )
  with _facts() as connections:
    scores = [_score(a, e["gold"], connections, BUILT_IN) for a, e in zip(answers, examples)]
  total = Counter(example["channel"] for example in examples)
  correct = Counter(example["channel"] for s, example in zip(scores, examples) if s.value)
  return dict(
    accuracy=sum(correct.values()) / len(examples) if examples else math.nan,
    correct=sum(correct.values()),
    n=len(examples),
    channels={
      channel: dict(correct=correct[channel], total=total[channel]) for channel in sorted(total)
    },
    reasons=dict(Counter(s.reason.partition(":")[0] for s in scores).most_common()),
  )


def extract(text: str) -> str:
  """The first SQL statement of a model's answer, without code fence, semicolon or characters SQLite cannot read.

  >>> extract("Sure:\\n```sql\\nSELECT 1;\\nSELECT 2;\\n```")
  'SELECT 1'
  """
  text = text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
  fenced = re.search(
    r"```[^\S\n]*(?:sqlite|sql)?\s(.*?)(?:```|\Z)", text, re.DOTALL | re.IGNORECASE
  )
  text = (fenced[1] if fenced else text)[: 2 * MAX_QUERY].strip()
  end = text.find(";")
  while end >= 0 and not sqlite3.complete_statement(text[: end + 1]):  # a semicolon in a string
    end = text.find(";", end + 1)
  return (text[:end] if end >= 0 else text).strip()


def connected(example: Mapping[str, Any]) -> tuple[sqlite3.Connection, Bounds]:
  """(the database that a row asks, what a query may use of it): its own, or the built-in task's facts.

  Raises:
    ValueError: the row's own cannot be had.
  """
  if example.get("database") or example.get("schema"):
    return _own(example), OWN
  return task.database(), BUILT_IN


def asked(connection: sqlite3.Connection, query: str, bounds: Bounds) -> tuple[list[tuple], str]:
  """The rows of a query and "ok", or no rows and what is wrong with it; it only reads, within bounds.

  >>> asked(sqlite3.connect(":memory:"), "DROP TABLE t", BUILT_IN)[1][:9]
  'not valid'
  """
  return _rows(connection, extract(query), bounds)


@contextlib.contextmanager
def _facts() -> Generator[list[sqlite3.Connection]]:
  with (
    contextlib.closing(task.database()) as facts,
    contextlib.closing(task.database(twin=True)) as twin,
  ):
    yield [facts, twin]


def _own(example: Mapping[str, Any]) -> sqlite3.Connection:
  """The row's database: a file that is only read, or its script in memory."""
  if example.get("database"):
    path = Path(str(example["database"])).expanduser().absolute()
    if not path.is_file():
      raise ValueError(f"the row's database is not there: {path}")
    return sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
  connection = sqlite3.connect(":memory:")
  started = time.thread_time()
  # a row comes from a stranger, too: its script makes tables, and opens no file
  refused = {
    sqlite3.SQLITE_ATTACH: sqlite3.SQLITE_DENY,
    sqlite3.SQLITE_PRAGMA: sqlite3.SQLITE_IGNORE,  # scripts have them, and need none here
  }
  connection.set_authorizer(lambda action, *_: refused.get(action, sqlite3.SQLITE_OK))
  connection.set_progress_handler(lambda: time.thread_time() - started > OWN.seconds, 1000)
  try:
    connection.executescript(str(example["schema"]))
  except sqlite3.Error as error:
    connection.close()
    raise ValueError(f"the row's schema fails: {error}") from None
  connection.set_authorizer(None)
  connection.set_progress_handler(None, 0)
  return connection


@contextlib.contextmanager
def _guarded(connection: sqlite3.Connection, bounds: Bounds) -> Generator[list[str]]:
  """Inside, the connection only reads, within bounds; what was refused is in the list."""
  refused: list[str] = []
  started, ticks = time.thread_time(), itertools.count(1)

  def authorize(action, first, second, *_):
    if action in READS or (
      action == sqlite3.SQLITE_FUNCTION and second.lower() in bounds.functions
    ):
      return sqlite3.SQLITE_OK
    function = action == sqlite3.SQLITE_FUNCTION
    refused.append(f"function not allowed: {second}" if function else "not read-only")
    return sqlite3.SQLITE_DENY

  def tick():
    slow = next(ticks) * 1000 > bounds.steps or time.thread_time() - started > bounds.seconds
    if slow:
      refused.append("too slow")
    return slow

  query_only = connection.execute("PRAGMA query_only").fetchone()[0]
  connection.execute("PRAGMA query_only = 1")
  before = {limit: connection.setlimit(limit, value) for limit, value in _limits(bounds).items()}
  connection.set_authorizer(authorize)
  connection.set_progress_handler(tick, 1000)
  try:
    yield refused
  finally:
    connection.set_progress_handler(None, 0)
    connection.set_authorizer(None)
    for limit, value in before.items():
      connection.setlimit(limit, value)
    connection.execute(f"PRAGMA query_only = {query_only}")


def _limits(bounds: Bounds) -> dict[int, int]:
  return {
    sqlite3.SQLITE_LIMIT_LENGTH: bounds.length,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_QUERY,
    sqlite3.SQLITE_LIMIT_COLUMN: bounds.columns,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
  }


def _rows(connection: sqlite3.Connection, query: str, bounds: Bounds) -> tuple[list[tuple], str]:
  """The rows of a query and "ok", or no rows and what is wrong with it."""
  with _guarded(connection, bounds) as refused:
    try:
      with contextlib.closing(connection.execute(query)) as cursor:
        rows = cursor.fetchmany(bounds.rows + 1)
    except sqlite3.DataError as error:
      return [], refused[0] if refused else f"too large: {error}"
    except (sqlite3.Error, sqlite3.Warning) as error:
      broken = re.search("syntax error|incomplete input|unrecognized token", str(error))
      kind = "syntax error" if broken else "not valid"
      return [], refused[0] if refused else f"{kind}: {error}"
  return ([], "too many rows") if len(rows) > bounds.rows else (rows, "ok")


def _same_value(a: Any, b: Any) -> bool:
  if isinstance(a, int | float) and isinstance(b, int | float):
    return math.isclose(a, b, rel_tol=1e-9)
  return type(a) is type(b) and a == b


def _same_row(a: tuple, b: tuple) -> bool:
  return len(a) == len(b) and all(map(_same_value, a, b))


def _sortable(row: tuple) -> list[tuple]:
  return [(0, v, "") if isinstance(v, int | float) else (1, 0, repr(v)) for v in row]


def _same_rows(a: list[tuple], b: list[tuple], *, ordered: bool) -> bool:
  if len(a) != len(b):
    return False
  if ordered:
    return all(map(_same_row, a, b))
  # Both sorted, so that the match is nearly always the first of the rest.
  rest = sorted(b, key=_sortable)
  for row in sorted(a, key=_sortable):
    place = next((i for i, other in enumerate(rest) if _same_row(row, other)), None)
    if place is None:
      return False
    del rest[place]
  return True


def _is_ordered(query: str) -> bool:
  """Whether the outermost SELECT sorts: ORDER BY outside of strings and parentheses."""
  query, nested = re.sub(r"'[^']*'", "", query), 1
  while nested:
    query, nested = re.subn(r"\([^()]*\)", "", query)
  return re.search(r"\bORDER\s+BY\b", query, re.IGNORECASE) is not None


def _score(
  answer: str,
  gold: str,
  connections: Sequence[sqlite3.Connection],
  bounds: Bounds,
  *,
  may_be_empty: bool = False,
) -> Score:
  query = extract(answer)
  for i, connection in enumerate(connections):
    gold_rows, reason = _rows(connection, gold, bounds)
    if reason != "ok":
      raise ValueError(f"the gold query fails ({reason}): {gold}")
    if not gold_rows and i == 0 and not may_be_empty:
      raise ValueError(
        f"the gold query returns no row, so any that returns none would be right: {gold}"
      )
    if not query:
      return Score(0.0, "no query")
    rows, reason = _rows(connection, query, bounds)
    if reason != "ok":
      return Score(0.0, reason)
    if not _same_rows(rows, gold_rows, ordered=_is_ordered(gold)):
      return Score(0.0, "wrong result")
  return Score(1.0, "ok")
