"""Text to SQL over a small database of public facts, with a verifier that executes the answer.

`countries.csv`: population in millions (UN estimates for 2023, rounded), area in thousand km2 (total, rounded),
currency (2025), an official or working language, the year of joining the UN; continents as the UN counts them.
`mountains.csv`: heights in metres; a peak on a border is listed under one of its countries.

The verifier executes the answer and the gold query on the facts and again on a twin, a database of the same names
with other facts.  A query that says the answer instead of asking for it (`SELECT 'Paris'`), or that is right by
accident, agrees with the gold on the one but not on the other.
"""

import contextlib
import csv
import dataclasses
import functools
import importlib.resources
import itertools
import math
import pathlib
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Generator, Sequence

from posttrain_jax.data.tasks import sql_questions

COLUMNS = {
  "country": dict(
    name="TEXT",
    continent="TEXT",
    capital="TEXT",
    population="REAL",
    area="REAL",
    currency="TEXT",
    language="TEXT",
    joined="INTEGER",
  ),
  "mountain": dict(peak="TEXT", country="TEXT", height="INTEGER"),
}
FILES = {"country": "countries.csv", "mountain": "mountains.csv"}
# Besides the columns shifted against each other, so that sums, extremes and counts change too.
TWIN = (
  "UPDATE country SET population = population * 0.9, area = area * 0.9, joined = joined + 2",
  "UPDATE mountain SET height = height - 150",
)
SYSTEM = (
  "Answer in SQLite. country(name, continent, capital, population in millions, area in thousand km2, "
  "currency, language, joined) mountain(peak, country, height)"
)
SIZES = {"train": 800, "eval": 60, "test": 200}

MAX_ROWS = 1000
MAX_STEPS = 500_000  # of SQLite's virtual machine, so that a busy machine comes to the same verdict
MAX_SECONDS = 1.0  # of this thread's CPU time: the backstop for steps that are slow themselves
MAX_LENGTH = 1000  # bytes of a value; with rows and columns it bounds the memory a result can fill
MAX_COLUMNS = 30
MAX_QUERY = 2000  # characters
LIMITS = {
  sqlite3.SQLITE_LIMIT_LENGTH: MAX_LENGTH,
  sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_QUERY,
  sqlite3.SQLITE_LIMIT_COLUMN: MAX_COLUMNS,
  sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
  sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
  sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
  sqlite3.SQLITE_LIMIT_ATTACHED: 0,
  sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
# What a question about this database can need.  Absent on purpose: random, the clock, files, extensions, and
# everything that makes a large value out of a small one.
# fmt: off
FUNCTIONS = {
  "abs", "avg", "coalesce", "count", "dense_rank", "first_value", "group_concat", "ifnull", "iif", "instr",
  "last_value", "length", "like", "lower", "ltrim", "max", "min", "nullif", "rank", "round", "row_number",
  "rtrim", "substr", "substring", "sum", "total", "trim", "upper",
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Score:
  """Whether an answer is right, and the reason: "ok", "wrong result", "syntax error: ...", "too slow", ..."""

  correct: bool
  reason: str


@functools.cache
def _table(name: str) -> list[list[str]]:
  source = importlib.resources.files("posttrain_jax.data.tasks") / FILES[name]
  header, *rows = csv.reader(source.read_text(encoding="utf-8").splitlines())
  if header != list(COLUMNS[name]):
    raise ValueError(f"{FILES[name]} has the columns {header}, not {list(COLUMNS[name])}")
  return rows


def _shifted(rows: list[list[str]]) -> list[list[str]]:
  """Column c of each row comes from 7 c rows below."""
  return [[rows[(i + 7 * c) % len(rows)][c] for c in range(len(row))] for i, row in enumerate(rows)]


def database(path: str | pathlib.Path | None = None, *, twin: bool = False) -> sqlite3.Connection:
  """The tables `country` and `mountain`, in memory or as a new file at `path`; a `twin` has other facts.

  >>> database().execute("SELECT capital FROM country WHERE name = 'France'").fetchall()
  [('Paris',)]
  """
  if path is not None and pathlib.Path(path).exists():
    raise FileExistsError(
      f"{path} exists; name a new file for the database, or open that one with sqlite3.connect"
    )
  connection = sqlite3.connect(path or ":memory:")
  for table, columns in COLUMNS.items():
    rows = _table(table)
    connection.execute(
      f"CREATE TABLE {table} ({', '.join(f'{c} {kind}' for c, kind in columns.items())})"
    )
    marks = ", ".join("?" * len(columns))
    connection.executemany(
      f"INSERT INTO {table} VALUES ({marks})", _shifted(rows) if twin else rows
    )
  for change in TWIN if twin else ():
    connection.execute(change)
  connection.commit()
  return connection


# Questions


def _questions(split: str, n: int, seed: int) -> list[sql_questions.Question]:
  with contextlib.closing(database()) as facts, contextlib.closing(database(twin=True)) as twin:
    return sql_questions.draw(split, n, seed, facts, twin)


def examples(split: str, *, n: int | None = None, seed: int = 0) -> list[dict]:
  """n different questions of "train", "eval" or "test" with gold queries, as prompt and completion.

  The splits share no question, whatever the seeds: each has its own pairs of what is asked and of which rows.
  """
  if split not in SIZES:
    raise ValueError(f"no split {split!r}; there are {', '.join(SIZES)}")
  return [
    dict(
      prompt=[dict(role="system", content=SYSTEM), dict(role="user", content=q.text)],
      completion=[dict(role="assistant", content=q.gold)],
      channel=q.channel,
      gold=q.gold,
      question=q.text,
    )
    for q in _questions(split, SIZES[split] if n is None else n, seed)
  ]


# Scoring


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


@contextlib.contextmanager
def _guarded(connection: sqlite3.Connection) -> Generator[list[str]]:
  """Inside, the connection only reads, within LIMITS; what was refused is in the list."""
  refused: list[str] = []
  started, ticks = time.thread_time(), itertools.count(1)

  def authorize(action, first, second, *_):
    if action in READS or (action == sqlite3.SQLITE_FUNCTION and second.lower() in FUNCTIONS):
      return sqlite3.SQLITE_OK
    function = action == sqlite3.SQLITE_FUNCTION
    refused.append(f"function not allowed: {second}" if function else "not read-only")
    return sqlite3.SQLITE_DENY

  def tick():
    slow = next(ticks) * 1000 > MAX_STEPS or time.thread_time() - started > MAX_SECONDS
    if slow:
      refused.append("too slow")
    return slow

  query_only = connection.execute("PRAGMA query_only").fetchone()[0]
  connection.execute("PRAGMA query_only = 1")
  before = {limit: connection.setlimit(limit, value) for limit, value in LIMITS.items()}
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


def _rows(connection: sqlite3.Connection, query: str) -> tuple[list[tuple], str]:
  """The rows of a query and "ok", or no rows and what is wrong with it."""
  with _guarded(connection) as refused:
    try:
      with contextlib.closing(connection.execute(query)) as cursor:
        rows = cursor.fetchmany(MAX_ROWS + 1)
    except sqlite3.DataError as error:
      return [], refused[0] if refused else f"too large: {error}"
    except (sqlite3.Error, sqlite3.Warning) as error:
      broken = re.search("syntax error|incomplete input|unrecognized token", str(error))
      kind = "syntax error" if broken else "not valid"
      return [], refused[0] if refused else f"{kind}: {error}"
  return ([], "too many rows") if len(rows) > MAX_ROWS else (rows, "ok")


def _same_value(a, b) -> bool:
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


def score(answer: str, gold: str, *, connection: sqlite3.Connection | None = None) -> Score:
  """Whether the first statement in `answer` returns what `gold` returns, on the facts and on their twin.

  Rows are compared as a multiset, or in their order where the gold query has ORDER BY; column names do not
  count, column order does; 1 equals 1.0.  Both run read-only, within MAX_STEPS and MAX_ROWS, whatever the answer
  is.  With a `connection`, that database alone decides.

  >>> gold = "SELECT capital FROM country WHERE name = 'France'"
  >>> score("SELECT capital AS c FROM country WHERE name LIKE 'france'", gold)
  Score(correct=True, reason='ok')
  >>> score("SELECT 'Paris'", gold)
  Score(correct=False, reason='wrong result')
  """
  if connection is not None:
    return _score(answer, gold, [connection])
  with contextlib.closing(database()) as facts, contextlib.closing(database(twin=True)) as twin:
    return _score(answer, gold, [facts, twin])


def _score(answer: str, gold: str, connections: Sequence[sqlite3.Connection]) -> Score:
  query = extract(answer)
  for i, connection in enumerate(connections):
    gold_rows, reason = _rows(connection, gold)
    if reason != "ok":
      raise ValueError(f"the gold query fails ({reason}): {gold}")
    if not gold_rows and i == 0:
      raise ValueError(
        f"the gold query returns no row, so any that returns none would be right: {gold}"
      )
    if not query:
      return Score(False, "no query")
    rows, reason = _rows(connection, query)
    if reason != "ok":
      return Score(False, reason)
    if not _same_rows(rows, gold_rows, ordered=_is_ordered(gold)):
      return Score(False, "wrong result")
  return Score(True, "ok")


def evaluate(answers: Sequence[str], examples: Sequence[dict]) -> dict:
  """Execution accuracy: {"accuracy", "correct", "n", "channels": {name: {"correct", "total"}}, "reasons": {...}}."""
  if len(answers) != len(examples):
    raise ValueError(
      f"{len(answers)} answers for {len(examples)} examples; give one answer per example"
    )
  with contextlib.closing(database()) as facts, contextlib.closing(database(twin=True)) as twin:
    scores = [_score(a, example["gold"], [facts, twin]) for a, example in zip(answers, examples)]
  total = Counter(example["channel"] for example in examples)
  correct = Counter(example["channel"] for s, example in zip(scores, examples) if s.correct)
  return dict(
    accuracy=sum(correct.values()) / len(examples) if examples else math.nan,
    correct=sum(correct.values()),
    n=len(examples),
    channels={
      channel: dict(correct=correct[channel], total=total[channel]) for channel in sorted(total)
    },
    reasons=dict(Counter(s.reason.partition(":")[0] for s in scores).most_common()),
  )
