"""Text to SQL over a small database of public facts; `rewards.sql` verifies by executing the answer.

`countries.csv`: population in millions (UN estimates for 2023, rounded), area in thousand km2 (total, rounded),
currency (2025), an official or working language, the year of joining the UN; continents as the UN counts them.
`mountains.csv`: heights in metres; a peak on a border is listed under one of its countries.

An answer and the gold query are executed on the facts and again on a twin, a database of the same names with other
facts.  A query that says the answer instead of asking for it (`SELECT 'Paris'`), or that is right by
accident, agrees with the gold on the one but not on the other.
"""

import contextlib
import csv
import functools
import importlib.resources
import pathlib
import sqlite3

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
